"""The compiled layer against Keras 3.15 on JAX: outputs, shapes, losses, configs and messages."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import json

import numpy as np
import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("tvm")

from tvm_sepconv import (  # noqa: E402 - Keras reads its backend when it is imported
    SeparableConv1D,
    reference,
)

if tuple(int(n) for n in keras.__version__.split(".")[:2]) < (3, 15):
    pytest.skip("the semantics are those of Keras 3.15", allow_module_level=True)

FORMATS = ("channels_last", "channels_first")
CHANNELS, FILTERS = 5, 18
EPS = np.finfo(np.float32).eps

# Arguments and numbers of steps. Cases of equal kernels, whatever their padding, share a library.
CASES = {
    "defaults": ({"kernel_size": 3}, (3, 4, 40)),
    "example": ({"kernel_size": 2, "strides": 2, "activation": "relu"}, (2, 3, 10)),
    "same": ({"kernel_size": 3, "padding": "same"}, (1, 2, 3, 40)),
    "same, even kernel": ({"kernel_size": 4, "padding": "SAME"}, (1, 2, 3, 4, 33)),
    "same, even, strides": (
        {"kernel_size": 4, "padding": "same", "strides": 3}, (1, 2, 3, 4, 5, 6)),
    "valid, even, strides": ({"kernel_size": 4, "strides": 3}, (4, 5, 6, 7, 50)),
    "strides above kernel": (
        {"kernel_size": 2, "padding": "same", "strides": 5}, (1, 2, 4, 5, 6, 11)),
    "pointwise alone": ({"kernel_size": 1}, (1, 17)),
    "one tap, strides": ({"kernel_size": 1, "strides": 4, "padding": "same"}, (1, 4, 5, 18)),
    "dilation": ({"kernel_size": 3, "dilation_rate": 4}, (9, 10, 40)),
    "dilation, same": ({"kernel_size": 3, "dilation_rate": 4, "padding": "same"}, (1, 8, 40)),
    "strides and dilation": (
        {"kernel_size": 3, "strides": 2, "dilation_rate": 3, "padding": "same"}, (1, 2, 7, 8, 41)),
    "strides and dilation, valid": (
        {"kernel_size": 3, "strides": 2, "dilation_rate": 3}, (7, 8, 9, 41)),
    "multiplier": ({"kernel_size": 3, "depth_multiplier": 3}, (3, 20)),
    "multiplier, all at once": (
        {"kernel_size": 5, "depth_multiplier": 2, "strides": 3, "dilation_rate": 2,
         "padding": "same", "activation": "relu", "use_bias": False}, (1, 2, 9, 70)),
    "long kernel": ({"kernel_size": 33, "padding": "same"}, (1, 16, 33, 70)),
    "elu": ({"kernel_size": 2, "activation": "elu"}, (2, 20)),
    "gelu": ({"kernel_size": 2, "activation": "gelu"}, (2, 20)),
    "silu": ({"kernel_size": 2, "activation": "swish"}, (2, 20)),
    "softmax": ({"kernel_size": 3, "activation": "softmax"}, (4, 20)),
    "log_softmax": ({"kernel_size": 3, "activation": "log_softmax"}, (4, 20)),
    "glu": ({"kernel_size": 3, "activation": "glu"}, (4, 20)),
}  # fmt: skip


def of_format(data_format: str, batch, steps, channels):
    last = data_format == "channels_last"
    return (batch, steps, channels) if last else (batch, channels, steps)


def both(data_format="channels_last", build=True, **arguments):
    """Our layer and Keras's, of one configuration and with equal weights."""
    given = {"filters": FILTERS, "name": "conv", **arguments, "data_format": data_format}
    ours, theirs = SeparableConv1D(**given), keras.layers.SeparableConv1D(**given)
    if build:
        shape = of_format(data_format, None, None, CHANNELS)
        ours.build(shape)
        theirs.build(shape)
        rng = np.random.default_rng(0)
        ours.set_weights([rng.standard_normal(w.shape) for w in ours.get_weights()])
        theirs.set_weights(ours.get_weights())
    return ours, theirs


def tolerance(layer: SeparableConv1D, x: np.ndarray) -> np.ndarray:
    """Twice the bound on a kernel's error, one for each side, and again for the activation."""
    weights = [*layer.get_weights(), None]
    length = layer.config.kernel_size + CHANNELS * layer.config.depth_multiplier
    return 16 * EPS * np.sqrt(length) * reference.magnitude(x, *weights[:3], layer.config)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_outputs(case, data_format):
    arguments, lengths = CASES[case]
    ours, theirs = both(data_format, **arguments)
    for batch, steps in enumerate(lengths, start=1):
        shape = of_format(data_format, batch, steps, CHANNELS)
        if arguments.get("activation") == "glu" and data_format == "channels_first":
            shape = (*shape[:-1], steps + 2 - ours.config.out_steps(steps) % 2)
        x = np.random.default_rng(steps).standard_normal(shape).astype(np.float32)
        y, right = ours(x), np.asarray(theirs(x))
        assert y.shape == right.shape == ours.compute_output_shape(shape)
        if arguments.get("activation") != "glu":  # Keras forgets that glu halves an axis
            assert y.shape == tuple(theirs.compute_output_shape(shape))
        assert y.dtype == right.dtype
        bound = tolerance(ours, x)
        if bound.shape != y.shape or arguments.get("activation") == "log_softmax":
            bound = bound.max()  # outputs of the last axis are mixed
        assert (np.abs(y - right) <= bound).all(), f"batch {batch}, steps {steps}"


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["linear", "relu", "elu", "softmax"])
def test_nan(activation, data_format):
    ours, theirs = both(data_format, kernel_size=3, padding="same", activation=activation)
    x = np.random.default_rng(0).standard_normal(of_format(data_format, 2, 30, CHANNELS))
    x[0, 2, 3] = np.nan
    y, right = ours(x), np.asarray(theirs(x))
    assert 0 < np.isnan(right).sum() < right.size
    np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_configs_go_round(case, data_format):
    arguments, _ = CASES[case]
    ours, theirs = both(data_format, build=False, **arguments)
    again = SeparableConv1D.from_config(json.loads(json.dumps(theirs.get_config())))
    assert again.get_config() == ours.get_config()
    made = keras.layers.SeparableConv1D.from_config(json.loads(json.dumps(ours.get_config())))
    assert made.get_config() == theirs.get_config()


def test_losses():
    arguments = {"kernel_size": 3, "depthwise_regularizer": "l2", "pointwise_regularizer": "l1",
                 "bias_regularizer": "l1", "activity_regularizer": "l2"}  # fmt: skip
    ours, theirs = both(**arguments)
    x = np.random.default_rng(0).standard_normal((4, 20, CHANNELS)).astype(np.float32)
    for trainable in (True, False):
        ours.trainable = theirs.trainable = trainable
        for batch in (x, x[:3]):
            ours(batch), theirs(batch)
            right = [float(loss) for loss in theirs.losses]
            np.testing.assert_allclose(ours.losses, right, rtol=1e-5)
    assert len(right) == 1


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 9, 4), (4, 9), (4,), (2, 4, 9), (0, 0, 0)], ids=str)
def test_a_built_layer_refuses_shapes_in_keras_words(shape, data_format):
    messages = []
    for layer in both(data_format, kernel_size=3):
        with pytest.raises(ValueError, match="is incompatible with the layer") as caught:
            layer(np.zeros(shape, np.float32))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("build", (2, 2, 5)),
        ("build", (2, 2, 9, 5)),
        ("compute_output_shape", (2, 2, 5)),
        ("compute_output_shape", (2, 2, 9, 5)),
    ],
    ids=str,
)
def test_shapes_are_refused_in_keras_words(method, argument):
    messages = []
    for layer in both(build=False, kernel_size=3):
        with pytest.raises(ValueError, match=r"output size|Kernel shape") as caught:
            getattr(layer, method)(argument)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_weights_are_refused_in_keras_words():
    beginnings = []
    for layer in both(kernel_size=3):
        weights = layer.get_weights()
        with pytest.raises(ValueError, match="but the layer was expecting 3 weights") as number:
            layer.set_weights(weights[:2])
        with pytest.raises(ValueError, match="not compatible with provided weight shape") as shape:
            layer.set_weights([weights[1], weights[0], weights[2]])
        with pytest.raises(ValueError, match=r"variable\.shape=\(18,\), Received") as value:
            layer.bias.assign(np.zeros(4))
        beginnings.append(
            (str(number.value), str(shape.value)[:17], str(value.value).partition("Target")[0])
        )
    assert beginnings[0] == beginnings[1]


def test_inputs_and_outputs_of_the_backend():
    ours, theirs = both(kernel_size=3)
    x = keras.random.normal((2, 9, CHANNELS), seed=1)
    y = ours(x)
    assert type(y) is type(theirs(x))
    assert (np.abs(np.asarray(y) - np.asarray(theirs(x))) <= tolerance(ours, np.asarray(x))).all()


def test_empty_inputs():
    ours, theirs = both(kernel_size=3, padding="same")
    for shape in ((0, 9, CHANNELS), (2, 0, CHANNELS)):
        x = np.zeros(shape, np.float32)
        assert ours(x).shape == theirs(x).shape
