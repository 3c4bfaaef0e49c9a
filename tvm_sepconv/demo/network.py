"""The demo's network from its ``.keras`` file: separable layers by any callable, rest in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tvm_sepconv.interop.keras import SavedLayer, read_model

# What Keras skips outside training, and its record of the input.
_IDENTITY = {"InputLayer", "Dropout", "GaussianNoise"}
_NORMALIZATION_EPSILON = 1e-7

Apply = Callable[[np.ndarray], np.ndarray]


def load_network(path: Path) -> list[SavedLayer]:
    """Read the layers of a saved Sequential network, in order, without those that do nothing."""
    return [layer for layer in read_model(path) if layer.class_name not in _IDENTITY]


def logits(
    network: list[SavedLayer], separable: Mapping[str, Apply], utterance: np.ndarray
) -> np.ndarray:
    """Run the network on one utterance.

    Parameters
    ----------
    network
        From `load_network`.
    separable
        For each SeparableConv1D, by name, what to call in its place: (1, frames, channels)
        float32 to (1, frames, filters).
    utterance
        (frames, 12) float32.

    Returns
    -------
    numpy.ndarray
        (9,) float32, one score a speaker.
    """
    x = utterance[None]
    for layer in network:
        x = _apply(layer, separable, x)
    return np.asarray(x[0])


def _apply(layer: SavedLayer, separable: Mapping[str, Apply], x: np.ndarray) -> np.ndarray:
    if layer.class_name == "SeparableConv1D":
        return separable[layer.names[-1]](x)
    if layer.class_name == "Normalization":
        mean, variance = layer.weights[:2]
        scale = np.maximum(np.sqrt(variance), np.float32(_NORMALIZATION_EPSILON))
        return np.asarray((x - mean) / scale)
    if layer.class_name == "GlobalAveragePooling1D":
        return np.asarray(x.mean(axis=1))
    if layer.class_name == "Dense" and layer.config["activation"] == "linear":
        kernel, bias = layer.weights
        return np.asarray(x @ kernel + bias)
    raise ValueError(
        "`network` must be made of the layers the demo's network has: SeparableConv1D, "
        "Normalization, GlobalAveragePooling1D and linear Dense. "
        f"Received: {layer.class_name} '{layer.names[-1]}'"
    )
