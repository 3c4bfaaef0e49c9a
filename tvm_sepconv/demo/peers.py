"""A layer of the demo's network elsewhere, to be timed beside ours: NumPy, and ONNX Runtime.

Both are written for what that network has: stride 1, padding "same", depth multiplier 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from tvm_sepconv.interop.keras import SavedLayer

Apply = Callable[[np.ndarray], np.ndarray]

# The ONNX operators that make up each activation the demo's network has.
_ONNX_ACTIVATIONS = {"linear": (), "relu": ("Relu",), "silu": ("Sigmoid", "Mul")}


def numpy_layer(layer: SavedLayer) -> Apply:
    """Return the layer in float32 NumPy, (batch, steps, channels) to (batch, steps, filters).

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


def missing_for_onnxruntime() -> list[str]:
    """Return which of the packages that this peer needs are not installed."""
    return [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]


def onnxruntime_layer(layer: SavedLayer, threads: int) -> Apply:
    """Return the layer as two convolutions in ONNX Runtime, on the CPU.

    It takes (batch, channels, steps) and gives (batch, filters, steps): the layout of ONNX's
    convolutions, so that no transposition counts against it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _onnx_model(layer).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def apply(x: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"x": x})[0])

    return apply


def _onnx_model(layer: SavedLayer) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    kernel, pointwise, bias = layer.weights
    taps, channels, _ = kernel.shape
    (dilation,) = layer.config["dilation_rate"]
    total = (taps - 1) * dilation
    constants = {"dw": kernel.transpose(1, 2, 0), "pw": pointwise.transpose(2, 1, 0), "b": bias}
    depthwise = helper.make_node(
        "Conv",
        ["x", "dw"],
        ["depthwise"],
        group=channels,
        pads=[total // 2, total - total // 2],
        dilations=[dilation],
    )
    nodes = [depthwise, helper.make_node("Conv", ["depthwise", "pw", "b"], ["z"])]
    result = "z"
    for operator in _ONNX_ACTIVATIONS[layer.config["activation"]]:
        inputs = ["z", result] if operator == "Mul" else [result]
        result = f"z_{operator}"
        nodes.append(helper.make_node(operator, inputs, [result]))
    graph = helper.make_graph(
        nodes,
        layer.names[-1],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, channels, None])],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [None, len(bias), None])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )
    # Opset 17 and IR 8 are read by every ONNX Runtime since 1.12 (2022).
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
