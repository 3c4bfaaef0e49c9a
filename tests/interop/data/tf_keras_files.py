"""Writes the files beside it: models that TF-Keras saved, and what it computed with them.

Made on 2026-11-22 with ``pip install tensorflow-cpu==2.21.0 tf_keras==2.21.0`` on Python 3.11:
``python tests/interop/data/tf_keras_files.py``. TF-Keras is not installed for the tests.
"""

from pathlib import Path

import numpy as np
import tf_keras as keras

FOLDER = Path(__file__).parent
layers = keras.layers


def build():
    inner = keras.Sequential(
        [
            keras.Input((None, 6)),
            layers.SeparableConv1D(5, 2, padding="same", use_bias=False, name="conv"),
            layers.BatchNormalization(name="bn", scale=False),
            layers.Activation("swish", name="swish"),
        ],
        name="inner",
    )
    x = inputs = keras.Input((None, 4), name="steps")
    x = layers.SeparableConv1D(6, 3, padding="causal", dilation_rate=2, name="conv")(x)
    x = layers.BatchNormalization(name="bn", epsilon=0.01)(x)
    x = layers.ReLU(max_value=6.0, name="relu6")(x)
    x = inner(x)
    x = layers.SeparableConv1D(
        6, 4, strides=2, padding="same", depth_multiplier=2, trainable=False, name="frozen"
    )(x)
    x = layers.SeparableConv1D(3, 3, activation="tanh", name="half", dtype="mixed_float16")(x)
    return keras.Model(inputs, x, name="outer"), inner


def main():
    rng = np.random.default_rng(0)
    model, inner = build()
    for weight in model.weights:
        positive = "variance" in weight.name
        value = rng.uniform(0.5, 2, weight.shape) if positive else rng.normal(size=weight.shape)
        weight.assign(value)
    x = rng.normal(size=(2, 17, 4)).astype(np.float32)
    values, y = {}, x
    for layer in model.layers[1:]:
        if layer is inner:
            inside = y
            for own in inner.layers:
                inside = values[f"inner/{own.name}"] = own(inside)
        y = values[layer.name] = layer(y)
    np.savez(FOLDER / "tf_keras.npz", x=x, **{k: v.numpy() for k, v in values.items()})
    model.save(FOLDER / "tf_keras.h5")
    model.save(FOLDER / "tf_keras.keras")
    model.save_weights(FOLDER / "tf_keras_by_name.h5")


if __name__ == "__main__":
    main()
