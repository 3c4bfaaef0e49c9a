"""A layer of the demo's network elsewhere, to be timed beside ours: NumPy, and ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np

from tvm_sepconv.bench.contestants import onnxruntime
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop.keras import SavedLayer

Apply = Callable[[np.ndarray], np.ndarray]

ONNXRUNTIME = "ONNX Runtime"


def missing_for_onnxruntime() -> list[str]:
    """Return which of the packages that ONNX Runtime needs are not installed."""
    return [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]


def numpy_layer(layer: SavedLayer) -> Apply:
    """Return the layer in float32 NumPy, (batch, steps, channels) to (batch, steps, filters).

    For what the demo's network has: stride 1, padding "same", depth multiplier 1.
    A multiply-add a tap, then one matrix product for the whole batch. At the demo's lengths einsum
    over sliding windows takes 1.5 to 1.9 times as long; one dense product over all taps and
    channels is faster with 12 channels (0.7 times), slower with more.
    """
    kernel, pointwise, bias = layer.weights
    taps, channels, _ = kernel.shape
    (dilation,) = layer.config["dilation_rate"]
    activation = layer.config["activation"]
    total = (taps - 1) * dilation
    left = total // 2
    rows = np.ascontiguousarray(kernel[:, :, 0])

    def apply(x: np.ndarray) -> np.ndarray:
        batch, steps, _ = x.shape
        padded = np.zeros((batch, steps + total, channels), np.float32)
        padded[:, left : left + steps] = x
        y = padded[:, :steps] * rows[0]
        for tap in range(1, taps):
            start = tap * dilation
            y += padded[:, start : start + steps] * rows[tap]
        z = y.reshape(batch * steps, channels) @ pointwise[0]
        z += bias
        if activation == "relu":
            np.maximum(z, 0, out=z)
        elif activation == "silu":
            z /= 1 + np.exp(-z)
        return np.asarray(z.reshape(batch, steps, -1))

    return apply


def onnxruntime_layer(layer: SavedLayer, threads: int) -> Apply:
    """Return the layer in ONNX Runtime, (batch, channels, steps) to (batch, filters, steps)."""
    config = SepConvConfig.from_dict(layer.config)
    run = onnxruntime.layer(config, layer.weights, threads)
    return lambda x: run(x[:, :, None])[:, :, 0]
