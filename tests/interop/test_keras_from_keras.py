"""`from_keras` against models of many shapes that Keras itself wrote."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_sepconv.interop.keras import from_keras, read_model

keras = pytest.importorskip("keras")
layers = keras.layers

# Keras 3.15.1 on JAX: its variables' __array__ lacks the copy argument that NumPy 2 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHANNELS = 4


def random_separable(rng: np.random.Generator, filters: int = CHANNELS, **kwargs: Any) -> Any:
    dilation = int(rng.integers(1, 3))
    return layers.SeparableConv1D(
        filters,
        int(rng.integers(1, 5)),
        padding="same",
        dilation_rate=dilation,
        depth_multiplier=int(rng.integers(1, 4)),
        use_bias=bool(rng.integers(2)),
        activation=str(rng.choice(["linear", "relu", "silu", "tanh"])),
        depthwise_regularizer="l2",
        bias_constraint="non_neg",
        **kwargs,
    )


def random_layer(rng: np.random.Generator, depth: int) -> Any:
    kind = rng.integers(8 if depth else 6)
    if kind >= 6:
        return random_model(rng, depth - 1)
    if kind >= 3:
        # Some with a name that other models use for a layer of theirs too.
        named = {"name": "conv"} if rng.integers(4) == 0 else {}
        return random_separable(rng, **named)
    others = (
        lambda: layers.Conv1D(CHANNELS, 2, padding="same"),
        lambda: layers.TimeDistributed(layers.Dense(CHANNELS)),
        lambda: layers.BatchNormalization(),
    )
    return others[kind]()


def random_model(rng: np.random.Generator, depth: int) -> Any:
    x = inputs = keras.Input((None, CHANNELS))
    chain: list[Any] = []
    names: set[str] = set()
    for _ in range(int(rng.integers(1, 5))):
        layer = random_layer(rng, depth)
        if layer.name not in names:
            names.add(layer.name)
            chain.append(layer)
    if rng.integers(2):
        return keras.Sequential([inputs, *chain])
    for layer in chain:
        x = layer(x)
        if rng.integers(3) == 0:
            x = keras.ops.add(x, 1.0)  # an operation of the graph that is not a layer
        if rng.integers(4) == 0:
            x = layer(x)  # the same weights twice
    return keras.Model(inputs, x)


def separable_layers(model: Any, outer: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Path and layer, by Keras's own objects."""
    for layer in model.layers:
        names = (*outer, layer.name)
        if isinstance(layer, keras.Model):
            yield from separable_layers(layer, names)
        elif isinstance(layer, layers.TimeDistributed):
            if isinstance(layer.layer, layers.SeparableConv1D):
                yield "/".join((*names, layer.layer.name)), layer.layer
        elif isinstance(layer, layers.SeparableConv1D):
            yield "/".join(names), layer


def randomize(model: Any, rng: np.random.Generator) -> None:
    model.set_weights([rng.standard_normal(w.shape).astype(w.dtype) for w in model.get_weights()])


def check(model: Any, path: Path) -> None:
    """Save, read back, compare names, order, configs and weights."""
    model.save(path)
    check_layers(model, from_keras(path))


def check_layers(model: Any, ours: Any) -> None:
    expected = dict(separable_layers(model))
    short = [name.rpartition("/")[2] for name in expected]
    keys = [s if short.count(s) == 1 else n for n, s in zip(expected, short, strict=True)]
    assert list(ours) == keys
    for layer, theirs in zip(ours.values(), expected.values(), strict=True):
        config, wanted = layer.get_config(), theirs.get_config()
        for name in ("name", "filters", "kernel_size", "dilation_rate", "depth_multiplier"):
            np.testing.assert_array_equal(config[name], wanted[name], name)
        assert len(layer.get_weights()) == len(theirs.get_weights())
        for got, weights in zip(layer.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(got, weights)


@pytest.mark.parametrize("seed", range(12))
def test_random_nested_model(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    inputs = keras.Input((None, CHANNELS))
    own = random_separable(rng)
    model = keras.Model(inputs, own(random_model(rng, depth=2)(inputs)))
    randomize(model, rng)
    check(model, tmp_path / "model.keras")
    check(model, tmp_path / "model.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    check_layers(model, from_keras(tmp_path / "model.weights.h5", config=model.to_json()))


def test_more_than_one_of_a_class_at_two_depths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def block() -> Any:
        return keras.Sequential([random_separable(rng, name="a"), random_separable(rng, name="b")])

    model = keras.Sequential([keras.Input((9, CHANNELS)), *(block() for _ in range(3))])
    randomize(model, rng)
    check(model, tmp_path / "model.keras")
    saved = read_model(tmp_path / "model.keras", only={"SeparableConv1D"})
    assert [layer.group for layer in saved][2:4] == [
        "layers/sequential_1/layers/separable_conv1d",
        "layers/sequential_1/layers/separable_conv1d_1",
    ]


def test_wrapped_layer_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wrapped = layers.TimeDistributed(random_separable(rng, name="inside"))
    model = keras.Sequential([keras.Input((3, 9, CHANNELS)), wrapped])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="'inside' is left out: it is inside the TimeDistributed"):
        from_keras(tmp_path / "model.keras")


def test_layer_shared_by_two_models_is_read_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = random_separable(rng, name="shared")
    x = keras.Input((None, CHANNELS))
    inner = keras.Sequential([keras.Input((None, CHANNELS)), shared, random_separable(rng)])
    model = keras.Model(x, inner(shared(x)))
    randomize(model, rng)
    model.save(tmp_path / "model.keras")
    ours = from_keras(tmp_path / "model.keras")
    assert list(ours) == ["shared", inner.layers[1].name]
    for got, weights in zip(ours["shared"].get_weights(), shared.get_weights(), strict=True):
        np.testing.assert_array_equal(got, weights)


def test_copies_of_a_shared_layer_in_a_legacy_file_are_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = random_separable(rng, name="shared")
    x = keras.Input((None, CHANNELS))
    inner = keras.Sequential([keras.Input((None, CHANNELS)), shared], name="inner")
    model = keras.Model(x, inner(shared(x)))
    model.save(tmp_path / "model.h5")
    ours = from_keras(tmp_path / "model.h5")
    assert list(ours) == ["shared"]
    for got, weights in zip(ours["shared"].get_weights(), shared.get_weights(), strict=True):
        np.testing.assert_array_equal(got, weights)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_policies(policy: str, suffix: str, tmp_path: Path) -> None:
    layer = layers.SeparableConv1D(3, 2, dtype=policy)
    other = layers.SeparableConv1D(3, 2, name="other")
    model = keras.Sequential([keras.Input((9, CHANNELS)), layer, other])
    model.save(tmp_path / f"model{suffix}")
    ours = from_keras(tmp_path / f"model{suffix}")
    assert [own.config.dtype for own in ours.values()] == [policy, "float32"]
    for got, weights in zip(ours[layer.name].get_weights(), layer.get_weights(), strict=True):
        assert got.dtype == weights.dtype
        np.testing.assert_array_equal(got, weights)


def test_channels_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layer = random_separable(rng, 5, data_format="channels_first")
    model = keras.Sequential([keras.Input((CHANNELS, None)), layer])
    randomize(model, rng)
    check(model, tmp_path / "model.keras")


def test_optimizer_in_the_file_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((9, CHANNELS)), random_separable(rng)])
    model.compile("adam", "mse")
    x = np.zeros((2, 9, CHANNELS), np.float32)
    model.train_on_batch(x, x)
    check(model, tmp_path / "model.keras")


def test_bfloat16_variables_are_widened(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layer = random_separable(rng, dtype="bfloat16")
    model = keras.Sequential([keras.Input((9, CHANNELS)), layer])
    model.save(tmp_path / "model.keras")
    (saved,) = read_model(tmp_path / "model.keras", only={"SeparableConv1D"})
    for got, weights in zip(saved.weights, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(got, np.asarray(weights, np.float32))


def test_subclassed_model_is_refused(tmp_path: Path) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layers.SeparableConv1D(3, 2)

        def call(self, x: Any) -> Any:
            return self.conv(x)

    model = Net()
    model(np.zeros((1, 9, CHANNELS), np.float32))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="no SeparableConv1D layer"):
        from_keras(tmp_path / "model.keras")
