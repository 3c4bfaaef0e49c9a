"""Activations against their definitions, evaluated one number at a time by the C library's math."""

from __future__ import annotations

import functools
import json
import math

import ml_dtypes
import numpy as np
import pytest

from tvm_sepconv import activations

VALUES = [-70.0, -20.5, -3.0, -2.25, -1.0, -0.5, -0.25, -1e-3, 0.0, 1e-3, 0.25, 0.5, 1.0, 3.0, 20.5]


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _tanh_gelu(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x, alpha=1.0):
    return x if x > 0 else alpha * math.expm1(x)


DEFINITIONS = {
    "celu": _elu,
    "elu": _elu,
    "exponential": math.exp,
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "hard_shrink": lambda x: x if abs(x) > 0.5 else 0.0,
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "hard_silu": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "hard_tanh": lambda x: min(max(x, -1), 1),
    "leaky_relu": lambda x: x if x >= 0 else 0.2 * x,
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -math.log1p(math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "soft_shrink": lambda x: math.copysign(max(abs(x) - 0.5, 0), x),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "softsign": lambda x: x / (abs(x) + 1),
    "sparse_plus": lambda x: 0.0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4,
    "sparse_sigmoid": lambda x: min(max((x + 1) / 2, 0), 1),
    "squareplus": lambda x: (x + math.sqrt(x * x + 4)) / 2,
    "tanh": math.tanh,
    "tanh_shrink": lambda x: x - math.tanh(x),
}

INF, NAN = math.inf, math.nan
# What Keras 3.15 on JAX gives for (-inf, inf, nan).
SPECIAL = {
    "celu": (-1, INF, NAN),
    "elu": (-1, INF, NAN),
    "exponential": (0, INF, NAN),
    "gelu": (NAN, INF, NAN),
    "hard_shrink": (-INF, INF, 0),
    "hard_sigmoid": (0, 1, NAN),
    "hard_silu": (NAN, INF, NAN),
    "hard_tanh": (-1, 1, NAN),
    "leaky_relu": (-INF, INF, NAN),
    "linear": (-INF, INF, NAN),
    "log_sigmoid": (-INF, 0, NAN),
    "mish": (NAN, INF, NAN),
    "relu": (0, INF, NAN),
    "relu6": (0, 6, NAN),
    "selu": (-1.7580993408473768, INF, NAN),
    "sigmoid": (0, 1, NAN),
    "silu": (NAN, INF, NAN),
    "soft_shrink": (-INF, INF, 0),
    "softplus": (0, INF, NAN),
    "softsign": (NAN, NAN, NAN),
    "sparse_plus": (0, INF, NAN),
    "sparse_sigmoid": (0, 1, NAN),
    "squareplus": (NAN, INF, NAN),
    "tanh": (-1, 1, NAN),
    "tanh_shrink": (-INF, INF, NAN),
}
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def test_the_tables_here_name_every_elementwise_activation():
    assert set(DEFINITIONS) == set(SPECIAL) == activations.ELEMENTWISE


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_values_follow_the_definition(name, dtype):
    x = np.array(VALUES).astype(dtype)
    y = activations.get(name)(x)
    assert y.dtype == x.dtype and y.shape == x.shape
    # float32's largest value is about exp(88.7), float16's exp(11.1): wide results become infinite.
    want = np.array([DEFINITIONS[name](float(v)) for v in x.astype(np.float64)])
    with np.errstate(over="ignore"):
        rounded = want.astype(dtype).astype(np.float64)
    eps = float(ml_dtypes.finfo(dtype).eps)
    # The cancellation in x + sqrt(x² + 4), x - tanh(x) and their like is Keras's too.
    atol = float(
        ml_dtypes.finfo(np.promote_types(dtype, np.float32) if eps < 1e-5 else np.float32).eps
    )
    np.testing.assert_allclose(y.astype(np.float64), rounded, rtol=6 * eps, atol=70 * atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_infinities_and_nan(name, dtype):
    y = activations.get(name)(np.array([-INF, INF, NAN]).astype(dtype)).astype(np.float64)
    np.testing.assert_allclose(y, SPECIAL[name], rtol=float(ml_dtypes.finfo(dtype).eps))


SHAPES = [(0,), (2, 0, 4), (2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, ()) for name in sorted(activations.ELEMENTWISE)]
    + [
        (name, shape)
        for name in sorted(activations.NAMES - {"threshold", "glu"})
        for shape in SHAPES
    ],
    ids=str,
)
def test_shapes_stay(name, shape):
    y = activations.get(name)(np.full(shape, 0.5, np.float32))
    assert y.shape == shape and y.dtype == np.float32


def test_integers_become_float32():
    y = activations.sigmoid([0, 1])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [0.5, 0.7310586], rtol=1e-6)


def test_tiny_sigmoids_are_not_lost():
    np.testing.assert_allclose(activations.sigmoid(np.array([-100.0])), math.exp(-100), rtol=1e-14)
    assert activations.sigmoid(np.float32(-95)) > 0


@pytest.mark.parametrize(
    ("arguments", "x", "want"),
    [
        ({"max_value": 2.0}, [-1, 1, 3], [0, 1, 2]),
        ({"max_value": 6}, [-1, 1, 9], [0, 1, 6]),
        ({"negative_slope": 0.5}, [-2, 0, 3], [-1, 0, 3]),
        ({"threshold": 1.0}, [-2, 1, 3], [0, 0, 3]),
        ({"threshold": 1.0, "negative_slope": 0.5}, [-2, 1, 3], [-1.5, 0, 3]),
        ({"max_value": 2.0, "negative_slope": 0.5}, [-2, 1, 3], [-1, 1, 2]),
    ],
    ids=str,
)
def test_relu_parameters(arguments, x, want):
    np.testing.assert_allclose(activations.relu(np.float32(x), **arguments), want)


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (lambda x: activations.elu(x, alpha=0.5), [0.5 * math.expm1(-2), 3]),
        (lambda x: activations.celu(x, alpha=0.5), [0.5 * math.expm1(-4), 3]),
        (lambda x: activations.leaky_relu(x, 0.1), [-0.2, 3]),
        (lambda x: activations.soft_shrink(x, 1.0), [-1, 2]),
        (lambda x: activations.hard_shrink(x, 2.5), [0, 3]),
        (lambda x: activations.squareplus(x, b=0), [0, 3]),
        (lambda x: activations.threshold(x, 1.0, -7.0), [-7, 3]),
        (lambda x: activations.gelu(x, approximate=True), [_tanh_gelu(-2), _tanh_gelu(3)]),
    ],
    ids=[
        "elu",
        "celu",
        "leaky_relu",
        "soft_shrink",
        "hard_shrink",
        "squareplus",
        "threshold",
        "gelu",
    ],
)
def test_other_parameters(call, want):
    np.testing.assert_allclose(call(np.array([-2.0, 3.0])), want, rtol=1e-7)


def test_softmax_and_log_softmax_over_the_last_axis():
    x = np.array([[1.0, 2.0, 4.0], [1e4, 0.0, -1e4]])
    e = [math.exp(v - 4) for v in (1, 2, 4)]
    np.testing.assert_allclose(activations.softmax(x), [[v / sum(e) for v in e], [1, 0, 0]])
    want = [[math.log(v / sum(e)) for v in e], [0, -1e4, -2e4]]
    np.testing.assert_allclose(activations.log_softmax(x), want)
    np.testing.assert_allclose(activations.softmax(x, axis=[0, 1]).sum(), 1)
    np.testing.assert_allclose(activations.softmax(x, axis=0).sum(axis=0), [1, 1, 1])


def _keras_sparsemax(row):
    total, totals = 0.0, []
    for rank, value in enumerate(sorted(row, reverse=True), start=1):
        total += value
        if 1 + rank * value > total:
            totals.append(total)
    tau = (sum(totals) - 1) / len(totals)
    return [max(value - tau, 0.0) for value in row]


def test_sparsemax_is_that_of_keras():
    x = np.random.default_rng(0).normal(size=(20, 5))
    y = activations.sparsemax(x)
    np.testing.assert_allclose(y, [_keras_sparsemax(row) for row in x.tolist()], atol=1e-14)
    np.testing.assert_allclose(activations.sparsemax(x.T, axis=0), y.T)


def test_sparsemax_with_one_winner_is_one_hot():
    np.testing.assert_array_equal(activations.sparsemax(np.eye(3) * 9.0), np.eye(3))


def test_glu_halves_the_last_axis():
    x = np.array([[1.0, -2.0, 0.0, 3.0]])
    np.testing.assert_allclose(activations.glu(x), [[0.5, -2 * _sigmoid(3)]])
    np.testing.assert_allclose(activations.glu(x.T, axis=0), [[0.5], [-2 * _sigmoid(3)]])
    with pytest.raises(ValueError, match=r"even length. Received: x.shape=\(1, 3\), axis=-1"):
        activations.glu(x[:, :3])


@pytest.mark.parametrize("name", sorted(activations.NAMES))
def test_names_round_trip(name):
    fn = activations.get(name)
    assert activations.get(fn) is fn
    assert activations.name_of(fn) == activations.serialize(fn) == name
    assert activations.deserialize(activations.serialize(fn)) is fn
    builtin = {"module": "builtins", "class_name": "function", "config": name}
    assert activations.get({**builtin, "registered_name": "function"}) is fn


@pytest.mark.parametrize(("alias", "name"), [("swish", "silu"), ("hard_swish", "hard_silu")])
def test_aliases(alias, name):
    assert activations.serialize(activations.get(alias)) == name


def test_none_is_linear():
    x = np.zeros(3)
    assert activations.get(None) is activations.linear
    assert activations.linear(x) is x


def layer_config(class_name, **config):
    extra = {"name": "act", "trainable": True, "dtype": {"class_name": "DTypePolicy"}}
    return {"module": "keras.layers", "class_name": class_name, "config": {**extra, **config}}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (layer_config("ReLU"), "relu"),
        (layer_config("ReLU", max_value=6.0, negative_slope=0.0, threshold=0.0), "relu6"),
        (layer_config("LeakyReLU", negative_slope=0.2), "leaky_relu"),
        (layer_config("ELU", alpha=1.0), "elu"),
        (layer_config("Softmax", axis=-1), "softmax"),
        (layer_config("Activation", activation="mish"), "mish"),
        ({"module": "keras.activations", "class_name": "gelu", "config": {}}, "gelu"),
    ],
    ids=lambda c: c if isinstance(c, str) else c["class_name"],
)
def test_layers_that_are_plain_functions_become_them(config, name):
    assert activations.name_of(activations.get(config)) == name


@pytest.mark.parametrize(
    ("config", "x", "want"),
    [
        (layer_config("LeakyReLU"), [-1, 2], [-0.3, 2]),
        (layer_config("LeakyReLU", alpha=0.1), [-1, 2], [-0.1, 2]),
        (layer_config("ELU", alpha=2.0), [-1, 2], [2 * math.expm1(-1), 2]),
        (layer_config("ReLU", max_value=1.5), [-1, 2], [0, 1.5]),
        (layer_config("Softmax", axis=[0, 1]), [[0, 0], [0, 0]], [[0.25, 0.25]] * 2),
    ],
    ids=["leaky", "leaky-alpha", "elu", "relu", "softmax"],
)
def test_layers_with_parameters_round_trip_through_json(config, x, want):
    fn = activations.get(config)
    assert activations.name_of(fn) is None
    np.testing.assert_allclose(fn(np.float32(x)), want, rtol=1e-6)
    written = json.loads(json.dumps(activations.serialize(fn)))
    assert written["module"] == "keras.layers"
    assert activations.deserialize(written) == fn


def test_a_callable_passes_through_and_has_no_config():
    fn = functools.partial(activations.threshold, threshold=0.0, default_value=1.0)
    assert activations.get(fn) is fn
    assert activations.name_of(fn) is None
    with pytest.raises(ValueError, match="a custom callable has no Keras name"):
        activations.serialize(fn)


def test_a_namesake_is_not_ours():
    def relu(x):
        return x

    assert activations.name_of(relu) is None


@pytest.mark.parametrize(
    "identifier",
    [
        "nope",
        "ReLU",
        3,
        {},
        {"class_name": "function", "config": "mine>relu"},
        layer_config("PReLU"),
    ],
    ids=str,
)
def test_unknown_identifiers(identifier):
    with pytest.raises(
        ValueError, match="Could not interpret activation function identifier: "
    ) as e:
        activations.get(identifier)
    assert str(identifier) in str(e.value) and "hard_swish" in str(e.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            layer_config("LeakyReLU", slope=1),
            r"passed to LeakyReLU: \{'slope': 1\}. Expected some of",
        ),
        (
            layer_config("LeakyReLU", negative_slope=None),
            "`negative_slope` argument of a LeakyReLU",
        ),
        (layer_config("ReLU", threshold=-1), "`threshold` argument of a ReLU layer cannot be None"),
        (layer_config("ReLU", max_value="6"), "`max_value` argument of a ReLU layer cannot be"),
    ],
    ids=["unknown", "none", "negative", "string"],
)
def test_wrong_layer_parameters(config, message):
    with pytest.raises(ValueError, match=message):
        activations.get(config)
