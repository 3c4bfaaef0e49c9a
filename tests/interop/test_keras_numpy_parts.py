"""The NumPy parts against Keras 3.15 on JAX."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import json

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from tvm_sepconv import (  # noqa: E402 - Keras reads its backend when it is imported
    activations,
    constraints,
    initializers,
    reference,
    regularizers,
)
from tvm_sepconv.config import SepConvConfig  # noqa: E402

if tuple(int(n) for n in keras.__version__.split(".")[:2]) < (3, 15):
    pytest.skip("the semantics are those of Keras 3.15", allow_module_level=True)

MODULES = {
    "initializers": (initializers, keras.initializers),
    "regularizers": (regularizers, keras.regularizers),
    "constraints": (constraints, keras.constraints),
}
NAMES = [
    *(("initializers", n) for n in (
        "Zeros", "Ones", "Constant", "Identity", "RandomNormal", "RandomUniform", "TruncatedNormal",
        "VarianceScaling", "GlorotUniform", "GlorotNormal", "HeNormal", "HeUniform", "LecunNormal",
        "LecunUniform", "Orthogonal", "STFT")),
    *(("regularizers", n) for n in ("L1", "L2", "L1L2", "OrthogonalRegularizer")),
    *(("constraints", n) for n in ("MaxNorm", "NonNeg", "UnitNorm", "MinMaxNorm")),
]  # fmt: skip

EDGES = [-np.inf, np.inf, np.nan, -0.0, 0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 90.0, -90.0]


def keras_numpy(value):
    return np.asarray(keras.ops.convert_to_numpy(value))


def test_both_know_the_same_activations():
    ours = {*activations.NAMES, "swish", "hard_swish"}
    public = {n for n in dir(keras.activations) if callable(getattr(keras.activations, n))}
    assert ours == public - {"get", "serialize", "deserialize"}


def close(ours, theirs, dtype):
    """Equal with NaN and infinities in the same places, up to the rounding of `dtype`."""
    eps = {"float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.9e-3}[dtype]
    assert str(ours.dtype) == str(theirs.dtype) == dtype and ours.shape == theirs.shape
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=16 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(activations.ELEMENTWISE))
def test_elementwise_activations(name, dtype):
    values = np.concatenate([EDGES, np.random.default_rng(0).normal(0, 4, 500)])
    if dtype != "float32":  # Keras rounds x + sqrt(x² + 4) to x's 11 bits before it cancels
        values = values[abs(values) != 90]
    x = keras_numpy(keras.ops.cast(values, dtype))
    close(activations.get(name)(x), keras_numpy(keras.activations.get(name)(x)), dtype)


@pytest.mark.parametrize("special", [None, np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sparsemax", "glu"])
def test_axis_activations(name, special):
    x = np.random.default_rng(0).normal(0, 2, (3, 4, 6)).astype(np.float32)
    if special is not None:
        x[1, 2, 3] = x[2, 0, 0] = special
    close(activations.get(name)(x), keras_numpy(keras.activations.get(name)(x)), "float32")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("relu", {"max_value": 2.0, "negative_slope": 0.5, "threshold": 0.25}),
        ("relu", {"negative_slope": 0.5}),
        ("relu", {"negative_slope": 0.5, "max_value": 6}),
        ("relu", {"threshold": 1.0}),
        ("relu", {"max_value": 6}),
        ("leaky_relu", {"negative_slope": 0.05}),
        ("elu", {"alpha": 0.5}),
        ("celu", {"alpha": 2.0}),
        ("gelu", {"approximate": True}),
        ("squareplus", {"b": 1}),
        ("soft_shrink", {"threshold": 1.5}),
        ("hard_shrink", {"threshold": 1.5}),
        ("threshold", {"threshold": 0.5, "default_value": -2.0}),
    ],
    ids=str,
)
def test_activation_parameters(name, arguments):
    values = np.concatenate([EDGES, np.random.default_rng(0).normal(0, 4, 500)]).astype(np.float32)
    theirs = getattr(keras.activations, name)(values, **arguments)
    close(getattr(activations, name)(values, **arguments), keras_numpy(theirs), "float32")


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.ReLU(), keras.layers.ReLU(6.0), keras.layers.ReLU(2.0, 0.1, 0.5),
        keras.layers.LeakyReLU(), keras.layers.LeakyReLU(0.2), keras.layers.ELU(0.5),
        keras.layers.Softmax(), keras.layers.Softmax(1), keras.layers.Softmax([1, 2]),
        keras.layers.Activation("gelu"),
    ],
    ids=lambda layer: layer.name,
)  # fmt: skip
def test_activation_layers_in_configs(layer):
    fn = activations.get(json.loads(json.dumps(keras.activations.serialize(layer))))
    x = np.random.default_rng(0).normal(0, 2, (3, 4, 6)).astype(np.float32)
    close(fn(x), keras_numpy(layer(x)), "float32")
    back = keras.activations.get(json.loads(json.dumps(activations.serialize(fn))))
    close(fn(x), keras_numpy(back(x)), "float32")


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=str)
def test_configs_are_understood_both_ways(kind, name):
    ours, theirs = MODULES[kind]
    config = json.loads(json.dumps(theirs.serialize(getattr(theirs, name)())))
    obj = ours.deserialize(config)
    written = json.loads(json.dumps(ours.serialize(obj)))
    again = theirs.serialize(theirs.deserialize(written))
    assert again == config
    # Keras accepts an Identity's gain and does not write it.
    assert again["config"].items() >= written["config"].items() or name == "Identity"
    assert obj == ours.get(name) or name in ("L1", "OrthogonalRegularizer")  # float32 factors


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("Zeros", {}, (3, 4)),
        ("Ones", {}, (3, 4)),
        ("Constant", {"value": -1.5}, (3, 4)),
        ("Identity", {"gain": 2.0}, (3, 4)),
        *(
            (
                "STFT",
                {"side": side, "window": window, "scaling": scaling, "periodic": periodic},
                (16, 1, 9),
            )
            for side in ("real", "imag")
            for window, scaling, periodic in [
                ("hann", "density", False), ("hann", "density", True),
                ("hamming", "spectrum", True),
                ("blackman", None, False), ("bartlett", "density", False), ("bartlett", None, True),
                ("nuttall", None, True), ("blackmanharris", None, False), ("flattop", None, True),
                ("boxcar", "spectrum", False), (None, "density", False),
            ]
        ),
    ],
    ids=str,
)  # fmt: skip
def test_deterministic_initializers(name, arguments, shape):
    ours = getattr(initializers, name)(**arguments)(shape)
    theirs = keras_numpy(getattr(keras.initializers, name)(**arguments)(shape))
    atol = 1e-5 if name == "STFT" else 0  # Keras computes the angles in float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    ["RandomNormal", "RandomUniform", "TruncatedNormal", "VarianceScaling", "GlorotUniform",
     "GlorotNormal", "HeNormal", "HeUniform", "LecunNormal", "LecunUniform", "Orthogonal"],
)  # fmt: skip
def test_random_initializers_have_one_distribution(name):
    shape = (33, 96, 4)
    ours = np.sort(getattr(initializers, name)(seed=1)(shape).ravel())
    theirs = np.sort(keras_numpy(getattr(keras.initializers, name)(seed=1)(shape)).ravel())
    # Kolmogorov and Smirnov's distance of two samples of n passes 1.95 * sqrt(2 / n) once in 1000.
    places = np.concatenate([ours, theirs])
    ranks = [
        np.searchsorted(sample, places, side="right") / len(sample) for sample in (ours, theirs)
    ]
    assert np.abs(ranks[0] - ranks[1]).max() < 1.95 * np.sqrt(2 / len(ours))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("L1", {"l1": 0.3}), ("L2", {"l2": 0.3}), ("L1L2", {"l1": 0.2, "l2": 0.3}),
     ("OrthogonalRegularizer", {}), ("OrthogonalRegularizer", {"factor": 0.5, "mode": "columns"})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("special", [None, np.nan, np.inf, 0.0], ids=str)
def test_regularizers(name, arguments, special):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    if special is not None:
        x[2] = special
    theirs = getattr(keras.regularizers, name)(**arguments)(keras.ops.convert_to_tensor(x))
    close(getattr(regularizers, name)(**arguments)(x), keras_numpy(theirs), "float32")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("MaxNorm", {}), ("MaxNorm", {"max_value": 0.5, "axis": [0, 1]}), ("NonNeg", {}),
     ("UnitNorm", {}), ("UnitNorm", {"axis": -1}), ("MinMaxNorm", {}),
     ("MinMaxNorm", {"min_value": 2.0, "max_value": 2.5, "rate": 0.25, "axis": 1})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("special", [None, np.nan, np.inf, 0.0], ids=str)
def test_constraints(name, arguments, special):
    w = np.random.default_rng(0).normal(size=(5, 4, 2)).astype(np.float32)
    if special is not None:
        w[2] = special
    ours = constraints.get({"class_name": name, "config": arguments})
    theirs = getattr(keras.constraints, name)(**arguments)
    close(ours(w), keras_numpy(theirs(w)), "float32")


LAYERS = [
    {"filters": 3, "kernel_size": 4},
    {"filters": 3, "kernel_size": 2, "strides": 2, "padding": "SAME", "activation": "relu"},
    {"filters": 4, "kernel_size": (3,), "strides": 2, "dilation_rate": 2, "padding": "same"},
    {
        "filters": 2, "kernel_size": 3, "depth_multiplier": 3, "use_bias": False,
        "activation": "swish",
    },
    {"filters": 4, "kernel_size": 3, "activation": "softmax", "trainable": False},
    {"filters": 4, "kernel_size": 3, "activation": keras.layers.LeakyReLU(0.1)},
    {"filters": 4, "kernel_size": 3, "activation": "glu", "padding": "same"},
    {"filters": 3, "kernel_size": 2, "name": "named", "dtype": "mixed_bfloat16"},
    {
        "filters": 3, "kernel_size": 2, "depthwise_initializer": "he_normal",
        "bias_initializer": keras.initializers.Constant(0.5), "depthwise_regularizer": "l2",
        "pointwise_regularizer": "l1l2", "activity_regularizer": "l2",
        "depthwise_constraint": "max_norm", "bias_constraint": "non_neg",
        "pointwise_initializer": keras.initializers.GlorotUniform(3, [0, 1], [2]),
    },
]  # fmt: skip


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", LAYERS, ids=lambda a: "-".join(map(str, a.values()))[:60])
def test_layer_configs_go_both_ways_and_outputs_agree(arguments, data_format):
    theirs = keras.layers.SeparableConv1D(**arguments, data_format=data_format)
    config = SepConvConfig.from_dict(json.loads(json.dumps(theirs.get_config())))
    written = json.loads(json.dumps(config.keras_config()))
    back = keras.layers.SeparableConv1D.from_config(written)
    stated = json.loads(json.dumps(theirs.get_config()))
    again = json.loads(json.dumps(back.get_config()))
    if "activity_regularizer" not in arguments:  # Keras then puts this key elsewhere
        assert list(again) == list(written)
    for d in (stated, again):  # names of activation layers, counted anew
        if isinstance(d["activation"], dict):
            d["activation"]["config"] = d["activation"]["config"]["negative_slope"]
    assert again == stated

    shape = (2, 10, 6) if data_format == "channels_last" else (2, 6, 10)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = keras_numpy(back(x)).astype(np.float64)
    # Keras's own compute_output_shape knows nothing of glu, which halves the last axis.
    plain = SepConvConfig.from_dict({**written, "activation": None})
    open_shape = (None, *shape[1:])
    assert plain.compute_output_shape(open_shape) == theirs.compute_output_shape(open_shape)
    assert y.shape == config.compute_output_shape(shape)
    weights = [keras_numpy(w) for w in back.weights]
    shapes = [config.depthwise_shape(6), config.pointwise_shape(6), config.bias_shape]
    assert [w.shape for w in weights] == shapes[: len(weights)]
    weights = weights if config.use_bias else [*weights, None]
    want = reference.separable_conv1d(x, *weights, config)
    eps = 8e-3 if config.compute_dtype == "bfloat16" else 1.2e-7
    bound = 4 * eps * np.sqrt(3 + 6 * 3) * reference.magnitude(x, *weights, config).max()
    np.testing.assert_allclose(y, want, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": None}, {"kernel_size": 2.0}, {"kernel_size": np.int64(2)},
        {"strides": (1, 2)},
        {"strides": 0}, {"dilation_rate": (-1,)}, {"dilation_rate": (None,)}, {"kernel_size": "a"},
        {"data_format": "x"}, {"data_format": 3}, {"depth_multiplier": 0}, {"filters": -1},
        {"name": "a/b"}, {"name": 3}, {"trainable": 1}, {"stride": 2}, {"dtype": 3},
        {"kernel_size": 0, "filters": 0}, {"filters": 0, "depth_multiplier": 0},
    ],
    ids=str,
)  # fmt: skip
def test_messages_of_the_constructor_are_those_of_keras(arguments):
    arguments = {"filters": 3, "kernel_size": 4, **arguments}
    messages = []
    for make in (keras.layers.SeparableConv1D, SepConvConfig.parse):
        with pytest.raises(ValueError) as error:
            make(**arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "causal"}, {"activation": "x"}, {"depthwise_initializer": "x"},
        {"bias_regularizer": 0.1}, {"pointwise_constraint": "x"}, {"activity_regularizer": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_these_messages_begin_like_those_of_keras(arguments):
    arguments = {"filters": 3, "kernel_size": 4, **arguments}
    with pytest.raises(ValueError) as theirs:
        keras.layers.SeparableConv1D(**arguments)
    with pytest.raises(ValueError) as ours:
        SepConvConfig.parse(**arguments)
    # Keras prints a set, in any order.
    text = str(theirs.value).replace("{'same', 'valid'}", "{'valid', 'same'}")
    assert str(ours.value).startswith(text) and len(str(ours.value)) > len(text)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(4, 10), (4,), (4, 2, 10, 3), (1, 3, 3)], ids=str)
def test_messages_of_the_first_call_are_those_of_keras(shape, data_format):
    arguments = {
        "filters": 3,
        "kernel_size": 4,
        "strides": 2,
        "name": "x",
        "data_format": data_format,
    }
    with pytest.raises(ValueError) as theirs:
        keras.layers.SeparableConv1D(**arguments)(np.zeros(shape, np.float32))
    with pytest.raises(ValueError) as ours:
        SepConvConfig.parse(**arguments).compute_output_shape(shape)
    assert str(ours.value) == str(theirs.value)


def test_message_of_other_channels_is_that_of_keras():
    layer = keras.layers.SeparableConv1D(3, 4, name="x")
    layer.build((1, 9, 5))
    with pytest.raises(ValueError) as theirs:
        layer(np.zeros((1, 9, 4), np.float32))
    with pytest.raises(ValueError) as ours:
        SepConvConfig.parse(3, 4, name="x").check_input_shape((1, 9, 4), channels=5)
    assert str(ours.value) == str(theirs.value)
