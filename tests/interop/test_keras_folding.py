"""What `from_keras` folds into a layer, against Keras computing the layers one after the other."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_sepconv import SeparableConv1D, reference
from tvm_sepconv.interop.keras import KerasLayers, from_keras

keras = pytest.importorskip("keras")
layers = keras.layers

CHANNELS, FILTERS, STEPS = 5, 6, 12
SHAPE = (STEPS, CHANNELS)


def conv(name: str = "conv", **arguments: Any) -> Any:
    given = {"filters": FILTERS, "kernel_size": 3, "padding": "same", "name": name}
    return layers.SeparableConv1D(**{**given, **arguments})


def norm(name: str = "bn", **arguments: Any) -> Any:
    return layers.BatchNormalization(name=name, **arguments)


def sequential(*parts: Any, shape: tuple[int, ...] = SHAPE) -> Any:
    return keras.Sequential([keras.Input(shape), *parts])


def functional(call: Callable[[Any], Any]) -> Any:
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, call(inputs))


def read(model: Any, tmp_path: Path, suffix: str = ".keras", **arguments: Any) -> KerasLayers:
    rng = np.random.default_rng(1)
    for weight in model.weights:
        value = rng.normal(size=weight.shape)
        weight.assign(abs(value) + 0.3 if "variance" in weight.path else value)
    model.save(tmp_path / f"model{suffix}")
    return from_keras(tmp_path / f"model{suffix}", **{"fold_batch_norm": True, **arguments})


def computed(layer: SeparableConv1D, x: np.ndarray) -> np.ndarray:
    return reference.separable_conv1d(x, *layer.get_weights(), layer.config)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape or (2, *SHAPE)).astype(np.float32)


def twice(model: Any) -> Callable[[Any], Any]:
    return lambda x: model(model(x))


FOLDED = {
    "plain": lambda: sequential(conv(), norm()),
    "no bias": lambda: sequential(conv(use_bias=False), norm()),
    "no scale": lambda: sequential(conv(), norm(scale=False, epsilon=0.1)),
    "no center": lambda: sequential(conv(), norm(center=False)),
    "neither": lambda: sequential(conv(use_bias=False), norm(scale=False, center=False)),
    "frozen": lambda: sequential(conv(), norm(trainable=False)),
    "renorm": lambda: sequential(conv(), norm(renorm=True)),
    "strides, multiplier": lambda: sequential(conv(strides=2, depth_multiplier=3), norm()),
    "axis 2": lambda: sequential(conv(), norm(axis=2)),
    "functional": lambda: functional(lambda x: norm()(conv()(x))),
    "nested": lambda: functional(sequential(conv(), norm())),
    "nested, called twice": lambda: functional(twice(sequential(conv(filters=CHANNELS), norm()))),
    "zeros": lambda: sequential(conv(pointwise_initializer="zeros"), norm()),
}


def alone(model: Any) -> Any:
    """The convolution and the normalization, on the convolution's own input."""
    nested = next((m for m in model.layers if isinstance(m, keras.Model)), model)
    first = nested.get_layer("conv")
    return keras.Model(first.input, nested.get_layer("bn").output)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_batch_norm(make: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    model = make()
    ours = read(model, tmp_path, suffix)
    assert list(ours) == ["conv"] and ours["conv"].config.use_bias
    fold = ours.folds["conv"]
    assert (fold.layers, fold.reason) == (("bn",), None)
    x = data()
    expected = np.asarray(alone(model)(x))
    y = computed(ours["conv"], x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    assert 0 < fold.difference < 1e-6 * fold.magnitude
    assert "'bn' folded in, outputs differ by at most" in str(fold)


def test_channels_first(tmp_path: Path) -> None:
    model = sequential(conv(data_format="channels_first"), norm(axis=1), shape=(CHANNELS, STEPS))
    ours = read(model, tmp_path)
    x = data(2, CHANNELS, STEPS)
    np.testing.assert_allclose(computed(ours["conv"], x), model(x), rtol=1e-4, atol=1e-4)
    assert ours.folds["conv"].layers == ("bn",)


def test_compiled_layer(tmp_path: Path) -> None:
    model = sequential(conv(), norm(), layers.ReLU(name="relu"))
    ours = read(model, tmp_path, fold_activation=True)
    x = data()
    np.testing.assert_allclose(ours["conv"](x), model(x), rtol=1e-4, atol=1e-4)
    assert ours.folds["conv"].layers == ("bn", "relu")


def test_nothing_is_folded_unasked(tmp_path: Path) -> None:
    model = sequential(conv(), norm(), layers.ReLU())
    ours = read(model, tmp_path, fold_batch_norm=False)
    assert not ours.folds
    for got, weights in zip(ours["conv"].get_weights(), model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(got, weights)


def test_nothing_to_fold(tmp_path: Path) -> None:
    ours = read(sequential(conv(), layers.Dropout(0.1), norm(), conv("b")), tmp_path)
    assert [str(fold) for fold in ours.folds.values()] == ["nothing to fold"] * 2


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: layers.Activation("tanh"), "tanh"),
        (lambda: layers.ReLU(), "relu"),
        (lambda: layers.ReLU(max_value=6.0), "relu6"),
        (lambda: layers.LeakyReLU(negative_slope=0.2), "leaky_relu"),
        (lambda: layers.ELU(), "elu"),
    ],
    ids=["Activation", "ReLU", "ReLU6", "LeakyReLU", "ELU"],
)
@pytest.mark.parametrize("between", [True, False], ids=["behind it", "alone"])
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_activation(
    layer: Callable[[], Any], name: str, between: bool, suffix: str, tmp_path: Path
) -> None:
    model = sequential(conv(), *([norm()] if between else []), layer())
    ours = read(model, tmp_path, suffix, fold_activation=True)
    assert ours["conv"].get_config()["activation"] == name
    assert len(ours.folds["conv"].layers) == 1 + between
    x = data()
    np.testing.assert_allclose(computed(ours["conv"], x), model(x), rtol=1e-4, atol=1e-4)


def two_uses(x: Any) -> Any:
    y = conv()(x)
    return layers.Add()([y, norm()(y)])


def own_output(x: Any) -> Any:
    y = conv()(x)
    return [y, norm()(y)]


def called_twice(x: Any) -> Any:
    first = conv(filters=CHANNELS)
    return norm()(first(first(x)))


def an_operation_too(x: Any) -> Any:
    y = conv()(x)
    return norm()(y) + keras.ops.exp(y)


def in_training(x: Any) -> Any:
    return norm()(conv()(x), training=True)


def shared_by_two_models(x: Any) -> Any:
    shared = conv(filters=CHANNELS)
    y = norm()(shared(x))
    return sequential(shared)(y)


def normalization_kept_elsewhere(x: Any) -> Any:
    shared = norm()
    inner = keras.Sequential([keras.Input((STEPS, FILTERS)), shared], name="first")
    return shared(conv()(inner(layers.Conv1D(FILTERS, 1)(x))))


def half(x: Any) -> Any:
    return norm(dtype="float32")(conv(dtype="mixed_float16")(x))


NOT_FOLDED = {
    "two uses": (two_uses, "2 layers or outputs of the model take what 'conv' gives"),
    "an output of the model": (own_output, "2 layers or outputs"),
    "an operation too": (an_operation_too, "2 layers or outputs"),
    "called twice": (called_twice, "'conv' is called more than once"),
    "own activation": (lambda x: norm()(conv(activation="relu")(x)), "own activation comes before"),
    "other axis": (lambda x: norm(axis=1)(conv()(x)), "axis 1, not along the channels"),
    "in training": (in_training, "'bn' is called with training=True"),
    "shared": (shared_by_two_models, "'conv' is shared by 2 models"),
    "other dtype": (half, "'bn' computes in float32, not float16"),
}


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize(("call", "reason"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded(call: Callable[[Any], Any], reason: str, suffix: str, tmp_path: Path) -> None:
    model = functional(call)
    with pytest.warns(UserWarning, match=f"'conv' is not all that was asked for: .*{reason}"):
        ours = read(model, tmp_path, suffix)
    assert ours.folds["conv"].layers == () and reason in ours.folds["conv"].reason
    saved = model.get_layer("conv").get_weights()
    for got, weights in zip(ours["conv"].get_weights(), saved, strict=True):
        np.testing.assert_array_equal(got, weights)


@pytest.mark.parametrize(
    ("first", "layer", "reason"),
    [
        ({}, lambda: layers.LeakyReLU(), "not one of the element-wise functions"),
        ({}, lambda: layers.Activation("softmax"), "not one of the element-wise functions"),
        ({}, lambda: layers.Activation(wave), "a function that is not Keras's"),
        ({"activation": "tanh"}, lambda: layers.ReLU(), "own activation comes before"),
    ],
    ids=["slope", "softmax", "custom", "two activations"],
)
def test_activation_not_folded(
    first: dict[str, Any], layer: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=reason):
        ours = read(sequential(conv(**first), layer()), tmp_path, fold_activation=True)
    assert ours.folds["conv"].layers == ()


@keras.saving.register_keras_serializable("tests")
def wave(x: Any) -> Any:
    return keras.ops.sin(x)


def test_batch_norm_is_folded_where_the_activation_cannot_be(tmp_path: Path) -> None:
    model = sequential(conv(), norm(), layers.LeakyReLU(name="leaky"))
    with pytest.warns(UserWarning, match="'bn' folded in, .*; not folded: 'leaky' is not one"):
        ours = read(model, tmp_path, fold_activation=True)
    assert ours.folds["conv"].layers == ("bn",)
    assert ours["conv"].get_config()["activation"] == "linear"


def test_normalization_whose_variables_are_elsewhere_is_not_folded(tmp_path: Path) -> None:
    model = functional(normalization_kept_elsewhere)
    with pytest.warns(UserWarning, match="'bn' has other variables than its configuration says"):
        ours = read(model, tmp_path)
    assert ours.folds["conv"].layers == ()


def test_weights_too_large_for_half_are_not_folded(tmp_path: Path) -> None:
    model = sequential(conv(dtype="mixed_float16"), norm(dtype="mixed_float16"))
    model.layers[1].gamma.assign(np.full(FILTERS, 1e6))
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="the folded weights are not finite in float16"):
        from_keras(tmp_path / "model.keras", fold_batch_norm=True)


def test_half_precision(tmp_path: Path) -> None:
    model = sequential(conv(dtype="mixed_float16"), norm(dtype="mixed_float16"))
    ours = read(model, tmp_path)
    fold = ours.folds["conv"]
    assert ours["conv"].config.dtype == "mixed_float16"
    assert ours["conv"].get_weights()[0].dtype == np.float32
    # Rounding to float16 is what the kernel does with the weights, so that is what is stated.
    assert 1e-5 < fold.difference / fold.magnitude < 2e-3
