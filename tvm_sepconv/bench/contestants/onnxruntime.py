"""The layer in ONNX Runtime on the CPU, and as an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import activations
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared
from tvm_sepconv.config import SepConvConfig

Array = npt.NDArray[Any]

# ONNX's convolutions are given one spatial axis, or two with a height of 1: the CPU provider has
# its blocked layout for two only, more than twice as fast for some shapes and no gain for others.
FORMS = {"1-D": False, "2-D, height 1": True}
# The ONNX operators that make up an activation.
_ACTIVATIONS = {"linear": (), "relu": ("Relu",), "elu": ("Elu",), "silu": ("Sigmoid", "Mul")}


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return ONNX Runtime's forms of a case, in its own layout, channels first."""
    x = case.channels_first(case.x)
    result = []
    for form, height in FORMS.items():
        shape = (x.shape[0], case.steps)
        run = layer(case.config, case.weights, threads, shape, height=height)
        result.append(Prepared(form, run, x[:, :, None] if height else x, case.from_channels_first))
    return result


def layer(
    config: SepConvConfig,
    weights: Sequence[Array],
    threads: int,
    shape: tuple[int | None, int | None] = (None, None),
    *,
    height: bool = True,
) -> Callable[[Array], Array]:
    """Return the layer as two convolutions in ONNX Runtime.

    It takes (batch, channels, steps) and gives (batch, filters, steps): the layout of ONNX's
    convolutions, so that no transposition counts against it. With `height` both have an axis of
    size 1 before the steps.

    Parameters
    ----------
    weights
        In Keras's order and shapes, float32.
    shape
        Batch and steps where they are known.

    Raises
    ------
    ValueError
        For an activation that has no ONNX form here, or unknown steps where the padding depends on
        them.
    """
    return session(onnx_model(config, weights, shape, height), threads)


def session(model: Any, threads: int) -> Callable[[Array], Array]:
    """Return an ``onnx.ModelProto`` of one input ``x`` and one output as a function."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    loaded = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [output.name for output in loaded.get_outputs()]

    def run(x: Array) -> Array:
        return loaded.run(outputs, {"x": x})[0]  # type: ignore[no-any-return]

    return run


def onnx_model(
    config: SepConvConfig,
    weights: Sequence[Array],
    shape: tuple[int | None, int | None],
    height: bool,
) -> Any:
    """Return the layer as an ``onnx.ModelProto``; arguments as of `layer`."""
    from onnx import helper

    channels, multiplier = weights[0].shape[1:]
    depthwise = weights[0].transpose(1, 2, 0).reshape(channels * multiplier, 1, -1)
    constants = {"depthwise": depthwise, "pointwise": weights[1].transpose(2, 1, 0)}
    spatial = {
        "pads": _pads(config, shape[1]),
        "dilations": [config.dilation_rate],
        "strides": [config.strides],
    }
    if height:
        left, right = spatial["pads"]
        spatial = {name: [1, *values] for name, values in spatial.items()}
        spatial["pads"] = [0, left, 0, right]
        constants = {name: values[:, :, None] for name, values in constants.items()}
    bias = {"bias": weights[2]} if config.use_bias else {}
    nodes = [
        helper.make_node("Conv", ["x", "depthwise"], ["mid"], group=channels, **spatial),
        helper.make_node("Conv", ["mid", "pointwise", *bias], ["z"]),
    ]
    result = "z"
    for operator in _operators(config):
        inputs = ["z", result] if operator == "Mul" else [result]
        result = f"z_{operator}"
        nodes.append(helper.make_node(operator, inputs, [result]))
    batch, steps = shape
    ones = [1] * height
    dims = {"x": [batch, channels, *ones, steps], result: [batch, config.filters, *ones, None]}
    return graph_model(config.name, nodes, dims, {**constants, **bias})


def graph_model(
    name: str, nodes: Sequence[Any], dims: dict[str, list[int | None]], arrays: dict[str, Array]
) -> Any:
    """Return a model of these nodes; `dims` of its input and of its output, by name."""
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in dims.items())
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in arrays.items()]
    graph = helper.make_graph(list(nodes), name, [x], [y], initializers)
    # Opset 17 and IR 8 are read by every ONNX Runtime since 1.12 (2022).
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _pads(config: SepConvConfig, steps: int | None) -> list[int]:
    if steps is None and config.padding == "same" and config.strides > 1:
        raise ValueError(
            "The steps in `shape` must be known for padding='same' with strides > 1: how much is "
            f"padded depends on them. Received: steps=None, strides={config.strides}"
        )
    return list(config.pad_amounts(config.effective_kernel if steps is None else steps))


def _operators(config: SepConvConfig) -> tuple[str, ...]:
    name = activations.name_of(config.activation)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"The `activation` of a layer in ONNX must be one of {list(_ACTIVATIONS)}. "
            f"Received: activation={name}"
        )
    return _ACTIVATIONS[name]
