"""The Keras layer that runs the compiled kernel, against Keras's own, on whichever backend is set.

Keras reads its backend once: KERAS_BACKEND=tensorflow or torch runs these tests on the others.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("tvm")

import tvm_sepconv  # noqa: E402 - Keras reads its backend when it is imported
from tvm_sepconv.interop import keras as interop  # noqa: E402
from tvm_sepconv.interop.keras import SeparableConv1D, from_keras  # noqa: E402

BACKEND = keras.backend.backend()
CHANNELS, FILTERS, STEPS = 5, 6, 12
BASE: dict[str, Any] = {"filters": FILTERS, "kernel_size": 3, "padding": "same"}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu, no bias": {"activation": "relu", "use_bias": False},
    "strides, multiplier": {"strides": 2, "depth_multiplier": 2, "padding": "valid"},
    "dilation": {"dilation_rate": 3, "activation": "swish"},
    "softmax": {"activation": "softmax"},
    "own activation": {"activation": lambda y: keras.ops.sin(y) * 2.0},
    "half": {"dtype": "mixed_float16"},
}


def both(**arguments: Any) -> tuple[Any, Any]:
    """Our layer and Keras's, built, with equal weights."""
    given = {**BASE, **arguments}
    pair = SeparableConv1D(**given), keras.layers.SeparableConv1D(**given)
    rng = np.random.default_rng(0)
    shape = (None, CHANNELS, None) if given.get("data_format") == "channels_first" else None
    for layer in pair:
        layer.build(shape or (None, None, CHANNELS))
    values = [rng.standard_normal(w.shape) for w in pair[0].get_weights()]
    for layer in pair:
        layer.set_weights(values)
    return pair


def model_of(layer: Any) -> Any:
    return keras.Sequential([keras.Input((None, CHANNELS)), layer])


def data(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.standard_normal(shape or (2, STEPS, CHANNELS)).astype(np.float32)


def array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(array(ours), array(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_call_and_predict(arguments: dict[str, Any]) -> None:
    ours, theirs = both(**arguments)
    tolerance = 2e-2 if "dtype" in arguments else 1e-5
    assert_equal(ours(data()), theirs(data()), tolerance)
    assert ours.compiled_calls == 1
    model = model_of(ours)
    assert model.output_shape == model_of(theirs).output_shape
    assert ours.compiled_calls == 1  # symbolic calls run nothing
    assert_equal(model.predict(data(), verbose=0), theirs(data()), tolerance)
    assert ours.compiled_calls == 2


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow on a CPU has no channels_first")
def test_channels_first() -> None:
    ours, theirs = both(data_format="channels_first")
    x = data(2, CHANNELS, STEPS)
    assert_equal(ours(x), theirs(x))
    assert ours.compiled_calls == 1


def test_weights_may_change() -> None:
    ours, theirs = both()
    for scale in (1.0, 2.0, -1.0):
        for layer in (ours, theirs):
            layer.pointwise_kernel.assign(layer.pointwise_kernel * scale)
            layer.bias.assign(layer.bias + scale)
        assert_equal(ours(data()), theirs(data()))
        assert_equal(model_of(ours).predict(data(), verbose=0), theirs(data()))
    assert ours.compiled_calls == 6


def gradients(layer: Any, x: np.ndarray) -> list[np.ndarray]:
    """Of the sum of squares of an inference call, for its input and weights."""
    values = [keras.ops.convert_to_tensor(x), *(v.value for v in layer.weights)]
    if BACKEND == "jax":
        import jax

        def loss(x: Any, *weights: Any) -> Any:
            y, _ = layer.stateless_call(weights, [], x)
            return (y**2).sum()

        return [array(g) for g in jax.grad(loss, range(len(values)))(*values)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values[0])
            loss = tf.reduce_sum(layer(values[0]) ** 2)
        return [array(g) for g in tape.gradient(loss, values)]
    x = values[0].requires_grad_()
    for value in values[1:]:
        value.grad = None
    (layer(x) ** 2).sum().backward()
    return [array(value.grad) for value in values]


def test_gradients_are_the_native_layers() -> None:
    ours, theirs = both(activation="gelu")
    for got, wanted in zip(gradients(ours, data()), gradients(theirs, data()), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_training_is_native() -> None:
    losses = []
    ours, theirs = both()
    for layer in (ours, theirs):
        model = model_of(layer)
        model.compile("sgd", "mse")
        targets = np.ones((2, STEPS, FILTERS), np.float32)
        losses.append(model.fit(data(), targets, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert ours.compiled_calls == 0
    for got, wanted in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_native_where_the_kernel_does_not_fit() -> None:
    ours, theirs = both()
    assert_equal(ours(data(), training=True), theirs(data()))
    exporter = {"__name__": "keras.src.export.saved_model", "call": lambda: ours(data())}
    assert_equal(eval("call()", exporter), theirs(data()))
    assert ours.compiled_calls == 0


@pytest.mark.skipif(BACKEND != "jax", reason="transformations of JAX")
def test_transformations_of_jax() -> None:
    import jax

    ours, theirs = both()
    x = data(3, 2, STEPS, CHANNELS)
    wanted = np.stack([array(theirs(part)) for part in x])
    assert_equal(jax.jit(jax.vmap(ours))(x), wanted)
    assert ours.compiled_calls == 1
    second = jax.jvp(lambda x: jax.jvp(ours, (x,), (x,))[1], (x[0],), (x[0],))
    expected = jax.jvp(lambda x: jax.jvp(theirs, (x,), (x,))[1], (x[0],), (x[0],))
    assert_equal(second[0], expected[0])


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import keras, numpy as np
from tvm_sepconv.interop.keras import SeparableConv1D
layer = SeparableConv1D(6, 3, padding="same")
model = keras.Sequential([keras.Input((None, 5)), keras.layers.Dense(5), layer])
x = np.ones((8, 100_000, 5), "float32")
print(model.predict(x, batch_size=4, verbose=0).shape, layer.compiled_calls)
"""


@pytest.mark.skipif(BACKEND != "jax", reason="waiting for threads of JAX")
def test_one_core_is_enough_to_call_back() -> None:
    done = subprocess.run([sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True)
    assert done.stdout.strip() == "(8, 100000, 6) 2", done.stderr


def test_model_files(tmp_path: Path) -> None:
    ours, theirs = both(name="conv", activation="relu", depthwise_regularizer="l2")
    assert ours.get_config() == theirs.get_config()
    path = tmp_path / "model.keras"
    model_of(ours).save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded.layers[0]) is SeparableConv1D
    assert_equal(loaded(data()), theirs(data()))
    device = from_keras(path)["conv"]
    assert_equal(device(data()), theirs(data()))


def test_it_is_keras_layer() -> None:
    ours, _ = both()
    assert isinstance(ours, keras.layers.SeparableConv1D)
    assert not isinstance(ours, tvm_sepconv.SeparableConv1D)
    with pytest.raises(ValueError, match="`padding` argument must be"):
        SeparableConv1D(3, 2, padding="causal")


def test_layer_function_composes_with_models_and_symbolic_tensors() -> None:
    inputs = keras.Input((None, CHANNELS))
    y = tvm_sepconv.layer_separable_conv_1d(inputs, FILTERS, 3, padding="same", activation="relu")
    model = keras.Model(inputs, y)
    sequential = keras.Sequential([inputs])
    assert tvm_sepconv.layer_separable_conv_1d(sequential, FILTERS, 3, name="conv") is sequential
    for layer in (model.layers[-1], sequential.get_layer("conv")):
        assert type(layer) is SeparableConv1D
    assert model.predict(data(), verbose=0).shape == (2, STEPS, FILTERS)


@pytest.mark.parametrize("missing", ["keras", "jax"])
def test_without_keras_or_its_backend(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("keras_layer", "keras_convert"):
        monkeypatch.delitem(sys.modules, f"tvm_sepconv.interop.{name}", raising=False)

    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(interop.importlib, "import_module", gone)
    with pytest.raises(ImportError, match=rf"'{missing}' is not installed.*tvm-sepconv\[keras,jax"):
        interop.convert  # noqa: B018


WITHOUT_BACKENDS = """
import sys
sys.modules["jax"] = sys.modules["tensorflow"] = None
import tvm_sepconv as tsc
print(list(tsc.from_keras(sys.argv[1])))
try:
    from tvm_sepconv.interop.keras import convert
except ImportError as error:
    print(error)
"""


def test_without_tensorflow_and_jax() -> None:
    """Files are read all the same; what works inside Keras says what is missing."""
    path = Path(__file__).parent / "data/tf_keras.keras"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BACKENDS, path],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
    )
    layers, message = done.stdout.splitlines()
    assert layers == "['conv', 'inner/conv', 'frozen', 'half']", done.stderr
    assert "'tensorflow' is not installed" in message and "tvm-sepconv[keras,jax]" in message


def test_a_broken_installation_is_not_called_a_missing_keras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(interop.importlib, "import_module", gone)
    with pytest.raises(ModuleNotFoundError, match="No module named 'tvm_sepconv"):
        interop.convert  # noqa: B018


def test_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'SeparableConv2D'"):
        interop.SeparableConv2D  # noqa: B018
