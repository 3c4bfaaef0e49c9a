"""What a device sees: the wheel in an environment that has only its base dependencies.

Not a pytest file, since pytest is not there. Two halves, for two environments::

    .venv/bin/python tests/wheel_check.py make BUNDLE        # has the compiler: writes a bundle
    empty/bin/python -I tests/wheel_check.py use BUNDLE      # has the wheel alone: everything else
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tvm_sepconv

KERNEL_SIZE, STRIDES, FILTERS, CHANNELS = 2, 2, 3, 12
SIZES = [
    (4, 10),
    (1, 2),
    (3, 37),
    (0, 10),
]  # (batch, steps): the usual, the shortest, a ragged one, an empty one
HEAVY = {"tvm", "torch", "h5py", "keras", "jax", "onnxruntime", "xgboost", "scipy", "pytest"}
MAX_IMPORT_SECS = 0.25  # of the processor, beyond numpy's own, best of five; measured: 0.03
MAX_INSTALLED_BYTES = 20_000_000  # besides numpy


def make(bundle: Path) -> None:
    """Write a bundle of one small layer with weights that are not all alike."""
    layer = tvm_sepconv.SeparableConv1D(FILTERS, KERNEL_SIZE, strides=STRIDES, activation="relu")
    layer.build((None, None, CHANNELS))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape).astype("float32") for w in layer.get_weights()])
    layer.save(bundle)
    print(f"wrote {bundle.name}: {sum(f.stat().st_size for f in bundle.rglob('*'))} bytes")


def separable_conv(
    x: np.ndarray, depthwise: np.ndarray, pointwise: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """Compute the layer once more, apart from everything the wheel brought."""
    out_steps = (x.shape[1] - KERNEL_SIZE) // STRIDES + 1
    taps = [x[:, k : k + STRIDES * out_steps : STRIDES][:, :out_steps] for k in range(KERNEL_SIZE)]
    mixed = sum(tap * depthwise[k, :, 0] for k, tap in enumerate(taps))
    return np.maximum(mixed @ pointwise[0] + bias, 0)


def check_environment() -> None:
    """The check itself would prove nothing in the checkout or beside a compiler."""
    assert Path(tvm_sepconv.__file__).is_relative_to(sys.prefix), tvm_sepconv.__file__
    present = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert not present & (HEAVY | {"apache-tvm"}), present
    sizes = {
        name: sum(Path(f.locate()).stat().st_size for f in importlib.metadata.files(name) or ())
        for name in present - {"numpy", "pip", "setuptools"}
    }
    assert sum(sizes.values()) < MAX_INSTALLED_BYTES, sizes
    print(f"installed besides numpy: {sum(sizes.values()) / 1e6:.1f} MB in {sorted(sizes)}")


def check_import() -> None:
    """Importing costs next to nothing and draws in no library to load kernels with."""
    code = """if True:
        import json, sys, time
        import numpy
        start = time.process_time()  # other programs' time is not ours
        import tvm_sepconv
        print(json.dumps([time.process_time() - start, sorted(sys.modules)]))
    """
    runs = [json.loads(_run(sys.executable, "-I", "-c", code)) for _ in range(5)]
    seconds, modules = min(run[0] for run in runs), set(runs[0][1])
    assert not modules & (HEAVY | {"tvm_ffi"}), modules & (HEAVY | {"tvm_ffi"})
    assert seconds < MAX_IMPORT_SECS, f"import took {seconds:.2f} s besides numpy's"
    print(f"import tvm_sepconv: {seconds * 1e3:.0f} ms besides numpy's")


def check_config() -> None:
    """Shapes can be asked for without any library."""
    config = tvm_sepconv.SepConvConfig.parse(FILTERS, KERNEL_SIZE, STRIDES, activation="relu")
    assert config.compute_output_shape((4, 10, CHANNELS)) == (4, 5, FILTERS)
    assert tvm_sepconv.SepConvConfig.from_dict(config.to_dict()) == config
    print("SepConvConfig: shapes, and there and back through its dict")


def check_missing_extras(folder: Path) -> None:
    """What the base install cannot do says what to type."""
    # Filters unlike the bundle's, in a cache of its own: nothing compiled before can serve it.
    layer = tvm_sepconv.SeparableConv1D(FILTERS + 2, KERNEL_SIZE)
    message = _error(lambda: layer(np.zeros((1, 10, CHANNELS), "float32")))
    assert "tvm-sepconv[compiler]" in message and "load" in message, message
    print(f"no compiler: {message}")

    data = importlib.resources.files("tvm_sepconv.demo") / "data"
    model = next(entry for entry in data.iterdir() if entry.name.endswith(".keras"))
    copy = folder / model.name
    copy.write_bytes(model.read_bytes())
    message = _error(lambda: tvm_sepconv.from_keras(copy))
    assert "tvm-sepconv[h5]" in message, message
    print(f"no h5py: {message}")


def check_bundle(bundle: Path) -> None:
    """The bundle made elsewhere loads and computes the same here."""
    layer = tvm_sepconv.load(bundle)
    weights = layer.get_weights()
    rng = np.random.default_rng(1)
    for batch, steps in SIZES:
        x = rng.normal(size=(batch, steps, CHANNELS)).astype("float32")
        y, expected = layer(x), separable_conv(x, *weights)
        assert y.shape == expected.shape and y.dtype == x.dtype, (y.shape, y.dtype)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert batch == 0 or y.any(), "every output is 0: the comparison shows nothing"
    assert "tvm" not in sys.modules
    print(f"bundle: loaded, and right at (batch, steps) = {SIZES}")


def check_commands(bundle: Path) -> None:
    """The console script starts, and reads a bundle without a compiler."""
    script = Path(sys.prefix) / "bin" / "tvm-sepconv"
    assert "inspect" in _run(script, "--help")
    assert "float32" in _run(script, "inspect", bundle)
    assert "right" in _run(script, "verify", bundle)
    print("tvm-sepconv: --help, inspect, verify")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    raise AssertionError("no error where one was due")


def use(bundle: Path) -> None:
    """Run every check on the device's side."""
    with tempfile.TemporaryDirectory() as folder:
        check_environment()
        check_import()
        check_config()
        check_missing_extras(Path(folder))
        check_bundle(bundle)
        check_commands(bundle)


if __name__ == "__main__":
    {"make": make, "use": use}[sys.argv[1]](Path(sys.argv[2]))
