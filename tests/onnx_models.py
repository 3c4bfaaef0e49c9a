"""Small ONNX models for the tests of `from_onnx`."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

CHANNELS, FILTERS, STEPS = 5, 7, 31
OPSETS = (13, 22)  # the oldest that is read; the newest of every ONNX Runtime the tests may meet


def normal(*shape: int, dtype="float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Model:
    """A chain of nodes from "x" on, with its constants."""

    def __init__(self, dims=("batch", CHANNELS, "steps"), dtype="float32"):
        self.nodes, self.constants, self.last = [], [], "x"
        self.dims, self.dtype = dims, dtype

    def constant(self, name: str, value) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, self.dtype), name))
        return name

    def add(self, kind: str, *constants, name: str | None = None, **attributes) -> Model:
        number = len(self.nodes)
        inputs = [self.last, *(self.constant(f"w{number}_{i}", c) for i, c in enumerate(constants))]
        self.last = f"y{number}"
        name = f"node{number}" if name is None else name
        self.nodes.append(helper.make_node(kind, inputs, [self.last], name, **attributes))
        return self

    def conv(self, *shape: int, bias: bool = False, **attributes) -> Model:
        weight = normal(*shape, seed=len(self.nodes)) / np.sqrt(np.prod(shape[1:]))
        return self.add("Conv", weight, *([normal(shape[0])] if bias else []), **attributes)

    def pair(self, kernel=3, multiplier=1, bias=(False, True), norms="", **attributes) -> Model:
        middle = CHANNELS * multiplier
        self.conv(middle, 1, kernel, bias=bias[0], group=CHANNELS, **attributes)
        if "between" in norms:
            self.norm(middle)
        self.conv(FILTERS, middle, 1, bias=bias[1])
        return self.norm(FILTERS) if "after" in norms else self

    def norm(self, channels: int, **attributes) -> Model:
        values = [normal(channels, seed=i) for i in range(4)]
        return self.add("BatchNormalization", *values[:3], np.abs(values[3]) + 0.5, **attributes)

    def proto(self, opset: int = OPSETS[0]) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        x = helper.make_tensor_value_info("x", kind, self.dims)
        y = helper.make_tensor_value_info(self.last, kind, list("nchw")[: len(self.dims)])
        graph = helper.make_graph(self.nodes, "graph", [x], [y], self.constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
