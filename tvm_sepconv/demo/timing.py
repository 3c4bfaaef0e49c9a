"""The demo's table: time of a whole call of each layer, NumPy in, NumPy out, here and elsewhere.

It is made in a process of its own, ``python -m tvm_sepconv.demo.timing BUNDLE FRAMES...``: the
table compares single threads, and NumPy's BLAS reads how many it may use once, when it is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

import tvm_sepconv
from tvm_sepconv.bench.case import check
from tvm_sepconv.bench.machine import where
from tvm_sepconv.bench.report import OURS
from tvm_sepconv.bench.timing import interleave
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.demo import data, peers
from tvm_sepconv.demo.network import Apply, load_network
from tvm_sepconv.interop.keras import SavedLayer

NUMPY = "NumPy"
THREADS = 1
ROW_SECS = 0.2
OUTPUT_TOLERANCE = 1e-4

_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

Call = Callable[[], np.ndarray]


def run_alone(bundle: Path, frames: Sequence[int]) -> int:
    """Make the table of a bundle's layers in a new process; returns its exit status."""
    command = [sys.executable, "-m", "tvm_sepconv.demo.timing", str(bundle), *map(str, frames)]
    sys.stdout.flush()
    environment = {**os.environ, **dict.fromkeys(_BLAS_THREADS, str(THREADS))}
    return subprocess.run(command, env=environment).returncode


def main(argv: Sequence[str]) -> int:
    """Make the table: a bundle's path, then the numbers of frames."""
    saved = {layer.names[-1]: layer for layer in load_network(data.MODEL)}
    compiled = tvm_sepconv.load(argv[0])
    layers = {name: (saved[name], compiled[name]) for name in compiled}
    report(layers, [int(frames) for frames in argv[1:]])
    return 0


def report(layers: Mapping[str, tuple[SavedLayer, Apply]], frames: Sequence[int]) -> None:
    """Print a line for each layer and number of frames.

    Parameters
    ----------
    layers
        By name, each layer as saved and as compiled.
    frames
        Lengths to time, batch 1.

    Raises
    ------
    AssertionError
        A peer's output differs from the compiled layer's: nothing is timed then.
    """
    tvm_sepconv.set_num_threads(THREADS)
    missing = peers.missing_for_onnxruntime()
    names = [OURS, NUMPY] if missing else [OURS, NUMPY, peers.ONNXRUNTIME]
    print(f"\nMedian µs of a whole call, batch 1, {where(THREADS)}")
    if missing:
        print(f"{peers.ONNXRUNTIME} is left out: {' and '.join(missing)} not installed")
    else:
        print(f"{peers.ONNXRUNTIME} gets its own layout, channels first")
    print(f"{'layer':28}{'frames':>7}" + "".join(f"{name:>14}" for name in names))
    for saved, compiled in layers.values():
        for steps in frames:
            calls = _calls(saved, compiled, steps, with_onnx=not missing)
            times = interleave(calls, ROW_SECS)
            cells = "".join(f"{times[name].median_us:14.1f}" for name in names)
            print(f"{_describe(saved):28}{steps:7}{cells}", flush=True)


def _calls(saved: SavedLayer, compiled: Apply, steps: int, with_onnx: bool) -> dict[str, Call]:
    """Return the layer in every form applied to one random input, their outputs compared."""
    channels = saved.weights[0].shape[1]
    x = np.random.default_rng(steps).standard_normal((1, steps, channels), np.float32)
    expected = compiled(x)
    in_numpy = peers.numpy_layer(saved)
    calls: dict[str, Call] = {OURS: lambda: compiled(x), NUMPY: lambda: in_numpy(x)}
    _check(NUMPY, in_numpy(x), expected)
    if with_onnx:
        in_onnx = peers.onnxruntime_layer(saved, THREADS)
        x_first = np.ascontiguousarray(x.swapaxes(1, 2))
        calls[peers.ONNXRUNTIME] = lambda: in_onnx(x_first)
        _check(peers.ONNXRUNTIME, in_onnx(x_first).swapaxes(1, 2), expected)
    return calls


def _check(name: str, output: np.ndarray, expected: np.ndarray) -> None:
    check(name, output, expected, OUTPUT_TOLERANCE * (1 + np.abs(expected)))


def _describe(saved: SavedLayer) -> str:
    config = SepConvConfig.from_dict(saved.config)
    return f"{saved.names[-1]} {config.kernel_config(saved.weights[0].shape[1]).sizes}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
