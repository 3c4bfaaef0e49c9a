"""The Keras layer on Keras's other backends, and Keras's own tests with our layer in its place.

Keras reads its backend when it is imported, so each backend gets a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("keras") is None:  # to import it, its backend must be there too
    pytest.skip("Keras is not installed", allow_module_level=True)
pytest.importorskip("tvm")

TESTS = Path(__file__).parent
BACKENDS = ["jax", "tensorflow", "torch"]

# What the frameworks and Keras warn of in their own code, where ours stands on the stack.
QUIET = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]

# Run by pytest in the other process: Keras's tests find our layer, and tell how often it ran.
PLUGIN = """
import keras
from keras.src import layers
from tvm_sepconv.interop import keras_layer

layers.SeparableConv1D = keras_layer.SeparableConv1D

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls: {calls}, backend: {keras.backend.backend()}")

calls = 0
run = keras_layer._Kernel.run

def counted(self, *arguments):
    global calls
    calls += 1
    return run(self, *arguments)

keras_layer._Kernel.run = counted
"""


def run_pytest(backend: str, *arguments: str, plugins: Path | None = None) -> str:
    """Run pytest with Keras on `backend` and return what it prints."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    paths = [str(plugins)] if plugins else []
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *QUIET, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_our_tests(backend: str) -> None:
    files = [str(TESTS / name) for name in ("test_keras_compiled.py", "test_keras_convert.py")]
    printed = run_pytest(backend, "-q", *files)
    assert re.search(r"\d\d passed", printed), printed


TENSORS = """
import numpy as np, tensorflow as tf, tvm_sepconv as tsc
layer = tsc.SeparableConv1D(4, 3)
x = tf.random.normal((1, 9, 5))
y = layer(x)
assert isinstance(y, tf.Tensor) and y.dtype == x.dtype
np.testing.assert_array_equal(y.numpy(), layer(x.numpy()))
half = tsc.SeparableConv1D(4, 3, dtype="bfloat16")
y = half(tf.cast(x, tf.bfloat16))
assert isinstance(y, tf.Tensor) and y.dtype == tf.bfloat16
np.testing.assert_array_equal(y.numpy(), half(tf.cast(x, tf.bfloat16).numpy()))
"""


def test_tensorflows_tensors_without_keras() -> None:
    if importlib.util.find_spec("tensorflow") is None:  # to import it here takes 10 s
        pytest.skip("tensorflow is not installed")
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", TENSORS], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


EXPORT = """
import sys
import keras, numpy as np, tensorflow as tf
from tvm_sepconv.interop.keras import convert
layers = [keras.layers.SeparableConv1D(8, 3, padding="same"), keras.layers.ReLU()]
model = keras.Sequential([keras.Input((20, 5)), *layers])
convert(model).export(sys.argv[1], format="tf_saved_model")
exported = tf.saved_model.load(sys.argv[1])
x = np.random.default_rng(0).standard_normal((2, 20, 5)).astype("float32")
np.testing.assert_allclose(exported.serve(x), np.asarray(model(x)), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.full
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_exported_models_need_nothing_of_ours(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_tests(backend: str, tmp_path: Path) -> None:
    """All 1-D tests and those of the arguments: none skipped, and the kernel ran in them."""
    spec = importlib.util.find_spec("keras")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "src/layers/convolutional/separable_conv_test.py"
    if not path.exists():
        pytest.skip("this Keras is packed without its tests")
    (tmp_path / "in_its_place.py").write_text(PLUGIN)
    printed = run_pytest(
        backend, "-p", "in_its_place", "-c", os.devnull, f"--rootdir={tmp_path}",
        "-k", "1d or bad_init or invalid_output", str(path), plugins=tmp_path,
    )  # fmt: skip
    assert re.search(r"= 8 passed, 6 deselected", printed), printed
    ran = re.search(r"calls: (\d+), backend: (\w+)", printed)
    assert ran is not None and int(ran[1]) > 0 and ran[2] == backend, printed
