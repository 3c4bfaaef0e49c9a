"""`convert`: models of Keras with compiled layers put in, on whichever backend is set."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("tvm")

from tvm_sepconv.interop import keras_layer  # noqa: E402 - Keras reads its backend at import
from tvm_sepconv.interop.keras import SeparableConv1D, convert  # noqa: E402

layers = keras.layers
CHANNELS, STEPS = 5, 12


def conv(name: str, filters: int = CHANNELS, **arguments: Any) -> Any:
    return layers.SeparableConv1D(filters, 3, padding="same", name=name, **arguments)


def trained(model: Any) -> Any:
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = rng.normal(size=weight.shape)
        weight.assign(abs(value) + 0.3 if "variance" in weight.path else value)
    return model


def nested_model() -> Any:
    inner = keras.Sequential(
        [
            keras.Input((None, CHANNELS)),
            conv("conv", use_bias=False),
            layers.BatchNormalization(name="bn"),
            layers.Activation("swish", name="swish"),
        ],
        name="inner",
    )
    x = inputs = keras.Input((None, CHANNELS))
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(conv("conv")(x)))
    x = inner(keras.ops.add(x, 1.0))
    x = layers.Dropout(0.5)(conv("last", 6, activation="softmax")(x))
    x = layers.Dense(2)(layers.GlobalAveragePooling1D()(x))
    return trained(keras.Model(inputs, x))


def data(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, STEPS, CHANNELS)).astype(np.float32)


def test_nested_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = nested_model()
    before = model.get_weights()
    ours = convert(model, data())
    np.testing.assert_allclose(
        ours.predict(data(3), verbose=0), model.predict(data(3), verbose=0), rtol=1e-4, atol=1e-5
    )
    assert [layer.name for layer in ours.layers] == [layer.name for layer in model.layers]
    assert isinstance(ours.get_layer("conv"), SeparableConv1D)
    assert ours.get_layer("conv").activation is keras.activations.relu
    assert isinstance(ours.get_layer("bn"), layers.Identity)
    inner = ours.get_layer("inner").get_layer("conv")
    assert inner.use_bias and inner.compiled_calls > 0
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:]] == [
        "layer", "conv + bn + relu", "inner/conv + bn + swish", "last", "the model",
    ]  # fmt: skip
    assert all(re.search(r"\de[+-]0\d of .* ms .* ms$", line) for line in lines[-4:])


def test_what_was_converted_can_be_saved(tmp_path: Path) -> None:
    ours = convert(nested_model(), data())
    ours.save(tmp_path / "fast.keras")
    again = keras.models.load_model(tmp_path / "fast.keras")
    assert isinstance(again.get_layer("conv"), SeparableConv1D)
    np.testing.assert_array_equal(
        again.predict(data(3), verbose=0), ours.predict(data(3), verbose=0)
    )


def test_sequential_and_random_data(capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(
        keras.Sequential([keras.Input((None, CHANNELS)), conv("a"), layers.BatchNormalization()])
    )
    ours = convert(model)
    assert_same(ours(data()), model(data()))
    assert "the model" in capsys.readouterr().out


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = map(keras.ops.convert_to_numpy, (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_name", [False, True], ids=["list", "dict"])
def test_several_inputs_and_outputs(by_name: bool) -> None:
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    steps = keras.Input((STEPS, CHANNELS), name="steps")
    x = layers.Add()([layers.Embedding(2, CHANNELS)(tokens), steps])
    shared = conv("shared")
    first = shared(x)
    inputs = {"tokens": tokens, "steps": steps} if by_name else [tokens, steps]
    model = trained(keras.Model(inputs, [first, layers.BatchNormalization()(shared(first))]))
    ours = convert(model)
    arrays: Any = [np.ones((2, STEPS), np.int32), data()]
    arrays = dict(zip(["tokens", "steps"], arrays, strict=True)) if by_name else arrays
    for a, b in zip(ours(arrays), model(arrays), strict=True):
        assert_same(a, b)


def test_what_cannot_be_converted() -> None:
    class Own(keras.Model):
        pass

    for model in (Own(), keras.Sequential([conv("a")])):
        with pytest.raises(ValueError, match="`model` must be a built Sequential or Functional"):
            convert(model)
    with pytest.raises(ValueError, match="found no SeparableConv1D layer"):
        convert(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))


def test_outputs_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = keras_layer._Kernel.run
    monkeypatch.setattr(keras_layer._Kernel, "run", lambda *given: run(*given) * 1.1)
    model = trained(keras.Sequential([keras.Input((None, CHANNELS)), conv("a")]))
    with pytest.raises(ValueError, match=r"outputs differ from the original's by .* more than"):
        convert(model, data())
