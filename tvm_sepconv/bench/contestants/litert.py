"""The layer in LiteRT (TensorFlow Lite) with XNNPACK, as convolutions on an image of height 1.

The model is written with LiteRT's own schema, so that TensorFlow's converter is not needed: it
makes the same two operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import activations
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared

Array = npt.NDArray[Any]
FORM = "DEPTHWISE_CONV_2D, CONV_2D, height 1"


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return LiteRT's form of a case, in its own layout, channels last."""
    from ai_edge_litert.interpreter import Interpreter

    x = case.channels_last(case.x)[:, None]
    # XNNPACK is the default; it packs the weights when tensors are allocated.
    interpreter = Interpreter(model_content=model(case), num_threads=threads)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    result = interpreter.get_output_details()[0]["index"]

    def run(x: Array) -> Array:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(result)  # type: ignore[no-any-return]

    return [Prepared(FORM, run, x, case.from_channels_last)]


class _Graph:
    """A TFLite model while it is written: tensors, the operators between them, their codes."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.description = "separable convolution"
        self.model.buffers = [schema.BufferT()]  # the first one means "no data", by convention
        self.model.operatorCodes = []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, shape: Sequence[int], data: Array | None = None) -> int:
        """Add a tensor, a constant if there is `data`; returns its number."""
        tensor = self.schema.TensorT()
        tensor.shape = list(shape)
        types = self.schema.TensorType
        tensor.type = types.INT32 if data is not None and data.dtype == np.int32 else types.FLOAT32
        tensor.name = f"t{len(self.graph.tensors)}"
        tensor.buffer = 0
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(
        self, name: str, inputs: Sequence[int], shape: Sequence[int], **options: Any
    ) -> int:
        """Add an operator with its options; returns the number of its output."""
        schema, result = self.schema, self.tensor(shape)
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode = code.builtinCode
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = list(inputs), [result]
        kind = _OPTIONS.get(name)
        if kind:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            for key, value in options.items():
                setattr(operator.builtinOptions, key, value)
        self.graph.operators.append(operator)
        return result

    def packed(self, source: int, result: int) -> bytes:
        """Return the file of the graph from one tensor to another."""
        import flatbuffers

        self.graph.inputs, self.graph.outputs = [source], [result]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


_OPTIONS = {
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "CONV_2D": "Conv2DOptions",
    "PAD": "PadOptions",
    "MUL": "MulOptions",
}


def model(case: Case) -> bytes:
    """Return the layer as a ``.tflite`` file.

    Raises
    ------
    ValueError
        For an activation that has no form here.
    """
    from ai_edge_litert import schema_py_generated as schema

    config, graph = case.config, _Graph(schema)
    batch, channels, mid = case.x.shape[0], case.channels, case.channels * config.depth_multiplier
    out = (batch, 1, config.out_steps(case.steps), config.filters)
    source = value = graph.tensor((batch, 1, case.steps, channels))
    padding = schema.Padding.SAME if config.padding == "same" else schema.Padding.VALID
    if not isinstance(config.padding, str):
        pads = np.array([(0, 0), (0, 0), config.padding, (0, 0)], np.int32)
        shape = (batch, 1, case.steps + sum(config.padding), channels)
        value = graph.operator("PAD", [value, graph.tensor((4, 2), pads)], shape)
    depthwise = case.weights[0].reshape(1, 1, config.kernel_size, mid)
    nothing = np.zeros(mid, np.float32)  # the operator's bias is not optional everywhere
    value = graph.operator(
        "DEPTHWISE_CONV_2D",
        [value, graph.tensor(depthwise.shape, depthwise), graph.tensor((mid,), nothing)],
        (*out[:3], mid),
        padding=padding, strideW=config.strides, strideH=config.strides,
        depthMultiplier=config.depth_multiplier, dilationWFactor=config.dilation_rate,
        dilationHFactor=1,
    )  # fmt: skip
    pointwise = case.weights[1].transpose(2, 0, 1)[:, None]
    bias = case.weights[2] if config.use_bias else np.zeros(config.filters, np.float32)
    name = activations.name_of(config.activation)
    fused = schema.ActivationFunctionType
    value = graph.operator(
        "CONV_2D",
        [value, graph.tensor(pointwise.shape, pointwise), graph.tensor(bias.shape, bias)],
        out,
        padding=schema.Padding.VALID, strideW=1, strideH=1, dilationWFactor=1, dilationHFactor=1,
        fusedActivationFunction=fused.RELU if name == "relu" else fused.NONE,
    )  # fmt: skip
    return graph.packed(source, _activated(graph, name, value, out))


def _activated(graph: _Graph, name: str | None, value: int, shape: Sequence[int]) -> int:
    if name in ("linear", "relu"):  # fused above
        return value
    if name == "elu":
        return graph.operator("ELU", [value], shape)
    if name == "silu":
        return graph.operator("MUL", [value, graph.operator("LOGISTIC", [value], shape)], shape)
    raise ValueError(
        "The `activation` of a layer in LiteRT must be one of linear, relu, elu, silu here. "
        f"Received: activation={name}"
    )
