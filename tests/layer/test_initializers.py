"""Initializers: moments and bounds of the random ones, values of the others."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from tvm_sepconv import initializers

SHAPE = (33, 96, 2)  # a depthwise kernel: fans 33·96 and 33·2
FAN_IN, FAN_OUT = 33 * 96, 33 * 2
FAN_AVG = (FAN_IN + FAN_OUT) / 2

# name: (standard deviation, largest magnitude)
DISTRIBUTIONS = {
    "random_normal": (0.05, math.inf),
    "random_uniform": (0.05 / math.sqrt(3), 0.05),
    "truncated_normal": (0.05 * 0.87962566103423978, 0.1),
    "variance_scaling": (math.sqrt(1 / FAN_IN), 2 / 0.8796 / math.sqrt(FAN_IN)),
    "glorot_uniform": (math.sqrt(1 / FAN_AVG), math.sqrt(3 / FAN_AVG)),
    "glorot_normal": (math.sqrt(1 / FAN_AVG), 2 / 0.8796 / math.sqrt(FAN_AVG)),
    "he_normal": (math.sqrt(2 / FAN_IN), 2 / 0.8796 * math.sqrt(2 / FAN_IN)),
    "he_uniform": (math.sqrt(2 / FAN_IN), math.sqrt(6 / FAN_IN)),
    "lecun_normal": (math.sqrt(1 / FAN_IN), 2 / 0.8796 / math.sqrt(FAN_IN)),
    "lecun_uniform": (math.sqrt(1 / FAN_IN), math.sqrt(3 / FAN_IN)),
}
RANDOM = [*DISTRIBUTIONS, "orthogonal"]
CLASSES = [
    "Zeros", "Ones", "Constant", "Identity", "RandomNormal", "RandomUniform", "TruncatedNormal",
    "VarianceScaling", "GlorotUniform", "GlorotNormal", "HeNormal", "HeUniform", "LecunNormal",
    "LecunUniform", "Orthogonal", "STFT",
]  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_moments_and_bounds(name):
    values = initializers.with_seed(initializers.get(name), 7)(SHAPE)
    stddev, largest = DISTRIBUTIONS[name]
    assert values.shape == SHAPE and values.dtype == np.float32
    # 6336 draws: four standard errors of the mean and of the standard deviation.
    assert abs(values.mean()) < 4 * stddev / math.sqrt(values.size)
    assert values.std() == pytest.approx(stddev, rel=4 / math.sqrt(2 * values.size))
    assert np.abs(values).max() <= largest * (1 + 1e-6)
    if largest < math.inf:
        assert np.abs(values).max() > 0.95 * largest


@pytest.mark.parametrize(
    ("mode", "distribution", "variance"),
    [
        ("fan_in", "uniform", 3 / FAN_IN),
        ("fan_out", "normal", 3 / FAN_OUT),
        ("fan_avg", "UNTRUNCATED_NORMAL", 3 / FAN_AVG),
    ],
)
def test_variance_scaling(mode, distribution, variance):
    values = initializers.VarianceScaling(3.0, mode, distribution, seed=1)(SHAPE)
    assert values.std() == pytest.approx(math.sqrt(variance), rel=0.04)


@pytest.mark.parametrize(
    ("shape", "fans"),
    [
        ((), (1, 1)),
        ((5,), (5, 5)),
        ((5, 7), (5, 7)),
        ((3, 5, 7), (15, 21)),
        ((2, 3, 5, 7), (30, 42)),
    ],
    ids=str,
)
def test_fans(shape, fans):
    assert initializers.compute_fans(shape) == fans


def test_named_axes_make_the_fans():
    assert initializers.compute_fans((3, 5, 7), (0, 1), (2,)) == (15, 7)
    glorot = initializers.GlorotUniform(seed=1, input_axes=[0, 1], output_axes=[2])
    limit = math.sqrt(6 / (33 * 96 + 2))
    assert 0.95 * limit < np.abs(glorot(SHAPE)).max() <= limit * (1 + 1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_repeats_and_no_seed_differs(name):
    free, other = initializers.get(name), initializers.get(name)
    first = initializers.with_seed(free, 3)((4, 5, 6))
    np.testing.assert_array_equal(first, initializers.with_seed(other, 3)((4, 5, 6)))
    assert not np.array_equal(first, initializers.with_seed(free, 4)((4, 5, 6)))
    assert not np.array_equal(first, initializers.with_seed(free, -3)((4, 5, 6)))
    assert not np.array_equal(free((4, 5, 6)), other((4, 5, 6)))
    np.testing.assert_array_equal(free((4, 5, 6)), free((4, 5, 6)))


def test_with_seed_leaves_alone_what_has_a_seed_or_draws_nothing():
    for initializer in (initializers.HeNormal(seed=1), initializers.Zeros(), np.zeros):
        assert initializers.with_seed(initializer, 3) is initializer


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 4), (1, 4, 9)], ids=str)
def test_orthogonal(shape):
    matrix = initializers.Orthogonal(gain=2.0, seed=0)(shape, "float64").reshape(-1, shape[-1])
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


@pytest.mark.parametrize(
    ("identifier", "shape", "want"),
    [
        ("zeros", (2, 3), np.zeros((2, 3))),
        ("one", (2,), np.ones(2)),
        (initializers.Constant(2.5), (2, 2), np.full((2, 2), 2.5)),
        (initializers.Constant(np.float32(2.5)), (2,), [2.5, 2.5]),
        (initializers.Constant(np.arange(3.0)), (2, 3), [[0, 1, 2]] * 2),
        (initializers.Identity(3.0), (2, 3), [[3, 0, 0], [0, 3, 0]]),
        (np.arange(6.0).reshape(2, 3), (2, 3), np.arange(6).reshape(2, 3)),
        (np.float32(4), (), 4),
    ],
    ids=["zeros", "one", "constant", "scalar", "row", "identity", "array", "0-d"],
)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float64"])
def test_exact_values(identifier, shape, want, dtype):
    values = initializers.get(identifier)(shape, dtype)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert values.dtype == (bfloat16 if dtype == "bfloat16" else np.dtype(dtype or "float32"))
    np.testing.assert_array_equal(values.astype(np.float64), want)


@pytest.mark.parametrize("side", ["real", "imag"])
@pytest.mark.parametrize("scaling", [None, "density", "spectrum"])
def test_stft_is_a_windowed_fourier_transform(side, scaling):
    frame = np.random.default_rng(0).normal(size=16)
    kernel = initializers.STFT(side, "hann", scaling, periodic=True)((16, 1, 9), np.float64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)
    spectrum = np.fft.rfft(frame * window)
    scale = {None: 1, "density": np.sqrt((window**2).sum()), "spectrum": window.sum()}[scaling]
    want = (spectrum.real if side == "real" else spectrum.imag) / scale
    np.testing.assert_allclose(frame @ kernel[:, 0], want, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "window"),
    [("hann", np.hanning), ("ham", np.hamming), ("black", np.blackman), ("bartlett", np.bartlett)],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_stft_windows_are_those_of_numpy(name, window):
    named = initializers.STFT("real", name, None)((9, 1, 5), "float64")
    given = initializers.STFT("real", window(9), None)((9, 1, 5), "float64")
    np.testing.assert_allclose(named, given, atol=1e-15)


def test_stft_takes_a_window_as_values_or_none():
    ones = initializers.STFT(window=np.ones(8), scaling=None)((8, 1, 5), "float64")
    none = initializers.STFT(window=None)((8, 1, 5), "float64")
    np.testing.assert_array_equal(ones, none)
    assert initializers.STFT(window="bartlett")((1, 1, 5)).shape == (1, 1, 5)


@pytest.mark.parametrize("name", CLASSES)
def test_configs_round_trip_through_json(name):
    initializer = initializers.get(name)
    config = json.loads(json.dumps(initializers.serialize(initializer)))
    assert config["module"] == "keras.initializers" and config["class_name"] == name
    assert not {"input_axes", "output_axes"} & config["config"].keys()
    assert initializers.deserialize(config) == initializer
    assert initializers.get(initializer) is initializer
    assert initializers.get(type(initializer)) == initializer


@pytest.mark.parametrize(
    "initializer",
    [
        initializers.GlorotNormal(seed=3, input_axes=(0,), output_axes=(1, 2)),
        initializers.VarianceScaling(2.0, "fan_out", "uniform", 5),
        initializers.Constant((1.0, 2.0)),
        initializers.STFT("imag", (1.0, 2.0), None, True),
        initializers.TruncatedNormal(1.0, 2.0, seed=1),
    ],
    ids=lambda i: type(i).__name__,
)
def test_arguments_round_trip_through_json(initializer):
    config = json.loads(json.dumps(initializers.serialize(initializer)))
    assert initializers.deserialize(config) == initializer
    assert hash(initializers.deserialize(config)) == hash(initializer)


def test_configs_of_keras_are_understood():
    generator = {"class_name": "SeedGenerator", "config": {"seed": 5, "name": "seed_generator"}}
    config = {"class_name": "HeNormal", "config": {"seed": generator, "input_axes": None}}
    assert initializers.get(config) == initializers.HeNormal(seed=5)
    array = {"class_name": "__numpy__", "config": {"value": [1.0, 2.0], "dtype": "float32"}}
    constant = initializers.get({"class_name": "Constant", "config": {"value": array}})
    np.testing.assert_array_equal(constant((2,)), [1, 2])
    assert initializers.get({"class_name": "Zeros", "config": None}) == initializers.Zeros()


def test_none_stays_none():
    assert initializers.get(None) is None and initializers.serialize(None) is None


def test_a_callable_passes_through_and_has_no_config():
    assert initializers.get(np.zeros) is np.zeros
    for custom in (np.zeros, initializers.get(np.ones(3))):
        with pytest.raises(ValueError, match=r"Unknown initializer .* cannot be serialized"):
            initializers.serialize(custom)


@pytest.mark.parametrize(
    "identifier",
    [
        "nope",
        3,
        {"class_name": "Nope", "config": {}},
        {"class_name": "Zeros", "config": {}, "registered_name": "mine>Zeros"},
        {"class_name": "Zeros", "config": [1]},
    ],
    ids=str,
)
def test_unknown_identifiers(identifier):
    with pytest.raises(ValueError, match="Could not interpret initializer identifier: ") as error:
        initializers.get(identifier)
    assert str(identifier) in str(error.value) and "glorot_uniform" in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initializers.RandomNormal(seed=np.int64(3)), "`seed` argument should be an"),
        (lambda: initializers.RandomNormal(seed="3"), r"seed=3 \(of type <class 'str'>\)"),
        (lambda: initializers.VarianceScaling(0.0), "Argument `scale` must be positive float"),
        (lambda: initializers.VarianceScaling(mode="x"), "Invalid `mode` argument: x. Please use"),
        (
            lambda: initializers.VarianceScaling(distribution="x"),
            "Invalid `distribution` argument: x",
        ),
        (lambda: initializers.Identity()((2, 2, 2)), r"only be used for 2D .* of rank 3"),
        (lambda: initializers.Orthogonal()((2,)), r"at least two-dimensional. .* of rank 1"),
        (lambda: initializers.STFT(side="x"), "side should be 'real' or 'imag', not x"),
        (lambda: initializers.STFT(scaling="x"), "Scaling is invalid, .* Received scaling=x"),
        (lambda: initializers.STFT(window="x"), "Unknown `window` name: x. Pass the window's"),
        (
            lambda: initializers.STFT(window=[1.0])((2, 1, 2)),
            r"window shape=\(1,\), frame_length=2",
        ),
        (lambda: initializers.get(np.ones(3))((4,)), r"`shape` to be \(3,\) .* shape=\(4,\)"),
        (
            lambda: initializers.get({"class_name": "Zeros", "config": {"a": 1}}),
            r"passed to Zeros: \{'a': 1\}. Expected some of \[\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
