"""Which convolutions of an ONNX graph are a pair, and the layer that they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_sepconv.arguments import Padding
from tvm_sepconv.interop import folding
from tvm_sepconv.kernel_config import DTYPE_BYTES
from tvm_sepconv.layer import SeparableConv1D

Array = npt.NDArray[Any]

_SAME = ("SAME_UPPER", "SAME_LOWER")  # Keras's "same" is the first
_TRANSPARENT = ("Identity", "Dropout")
# ONNX operators that are one of the functions which a kernel applies, with the attributes, where
# they have some, that make them so. The defaults are ONNX's.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Relu": ("relu", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": (0.2, 0.01)}),
    "Elu": ("elu", {"alpha": (1.0, 1.0)}),
    "Celu": ("celu", {"alpha": (1.0, 1.0)}),
    "Gelu": ("gelu", {"approximate": (b"none", b"none")}),
    "Swish": ("silu", {"alpha": (1.0, 1.0)}),
    "HardSwish": ("hard_silu", {}),
    "Mish": ("mish", {}),
    "Sigmoid": ("sigmoid", {}),
    "Tanh": ("tanh", {}),
    "Softplus": ("softplus", {}),
    "Softsign": ("softsign", {}),
}


class NotTakenError(ValueError):
    """Why a pair is not read."""


class Graph:
    """A model's graph by tensor: what makes each, what uses it, and the constants.

    Parameters
    ----------
    model
        A ModelProto with its external data loaded.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made = {name: node for node in model.graph.node for name in node.output if name}
        self._uses: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in _inputs(node):
                self._uses.setdefault(name, []).append(node)
        self._outputs = {output.name for output in model.graph.output}
        self._heights: dict[str, int] | None = None
        names = [node.name for node in model.graph.node]
        self._named = {name for name in names if name and names.count(name) == 1}

    def name_of(self, node: Any) -> str:
        """Return the node's name, or that of its output where it has none of its own."""
        return str(node.name if node.name in self._named else node.output[0])

    def next(self, node: Any) -> Any:
        """Return the one node that takes the output of `node`, and nothing else does.

        Raises
        ------
        NotTakenError
            If there is none, with the reason.
        """
        output = node.output[0]
        uses = self._uses.get(output, [])
        if output in self._outputs:
            raise NotTakenError(f"{output!r} is an output of the model")
        if len(uses) != 1:
            raise NotTakenError(f"{output!r} is used {len(uses)} times")
        return uses[0]

    def constant(self, name: str) -> Array:
        """Return the constant tensor `name`.

        Raises
        ------
        NotTakenError
            If it is computed, or given to the model, or cannot be read.
        """
        from onnx import external_data_helper, numpy_helper

        tensor = self._stored.get(name)
        maker = self._made.get(name)
        if maker is not None and maker.op_type == "Identity":
            return self.constant(maker.input[0])
        if maker is not None and maker.op_type == "Constant":
            tensor = next((a.t for a in maker.attribute if a.name == "value"), None)
        if tensor is None:
            quantized = maker is not None and maker.op_type == "DequantizeLinear"
            why = "quantized" if quantized else "not constant"
            raise NotTakenError(f"its weight {name!r} is {why}")
        if external_data_helper.uses_external_data(tensor):
            raise NotTakenError(f"its weight {name!r} lies in a file that is not loaded")
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except (TypeError, ValueError) as error:
            raise NotTakenError(f"its weight {name!r} cannot be read: {error}") from error

    def has_one_input_channel(self, node: Any) -> bool:
        """Whether a convolution's weight is known, and has one input channel in each group."""
        tensor = self._stored.get(node.input[1])
        return tensor is not None and len(tensor.dims) > 2 and tensor.dims[1] == 1

    def height(self, name: str) -> int | None:
        """Return the height of a 4-D tensor, None where the model does not say."""
        if self._heights is None:
            self._heights = dict(_heights(self._model))
        return self._heights.get(name)


def _inputs(node: Any) -> list[str]:
    """Return what a node uses, the graphs inside it included."""
    inner = [g for a in node.attribute for g in (a.g, *a.graphs)]
    return [*node.input, *(name for g in inner for n in g.node for name in _inputs(n))]


def _heights(model: Any) -> list[tuple[str, int]]:
    from onnx import shape_inference

    try:
        graph = shape_inference.infer_shapes(model).graph
    except Exception:  # a model of more than 2 GB, operators of other domains: then it is not known
        graph = model.graph
    known = []
    for value in (*graph.input, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[2].HasField("dim_value"):
            known.append((value.name, int(dims[2].dim_value)))
    return known


# ---- one convolution -----------------------------------------------------------------------------


class _Conv(NamedTuple):
    """A Conv node in one dimension; `pads` is one of `_SAME` or the two numbers."""

    weight: Array  # (out, in / group, taps)
    bias: Array | None
    group: int
    stride: int
    dilation: int
    pads: Any


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _read_conv(node: Any, graph: Graph) -> _Conv:
    if node.op_type != "Conv":
        raise NotTakenError(f"it is quantized ({node.op_type}); kernels are for floating point")
    given = _attributes(node)
    weight = graph.constant(node.input[1])
    if weight.dtype.name not in DTYPE_BYTES:
        raise NotTakenError(f"its weight is of {weight.dtype}; kernels are for floating point")
    pads = _pads(given, weight.ndim - 2)
    if weight.ndim == 4 and weight.shape[2] == 1 and graph.height(node.input[0]) in (None, 1):
        weight = weight[:, :, 0]
    if weight.ndim != 3:
        raise NotTakenError(f"it is {weight.ndim - 2}-D, with a weight of shape {weight.shape}")
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    stride, dilation = (given.get(key, [1])[-1] for key in ("strides", "dilations"))
    return _Conv(weight, bias, given.get("group", 1), stride, dilation, pads)


def _pads(given: dict[str, Any], dimensions: int) -> Any:
    auto = given.get("auto_pad", b"NOTSET").decode()
    if auto.startswith("SAME"):
        return auto
    pads = given.get("pads", []) if auto == "NOTSET" else []
    before, after = pads[:dimensions] or [0], pads[dimensions:] or [0]
    if any(before[:-1] + after[:-1]) or min(before[-1], after[-1]) < 0:
        raise NotTakenError(f"its padding {pads} is negative, or not along the steps")
    return before[-1], after[-1]


def _padding(conv: _Conv) -> Padding:
    taps = conv.weight.shape[2]
    total = (taps - 1) * conv.dilation
    if conv.pads == _SAME[0]:
        return "same"
    if conv.pads not in _SAME:
        left, right = conv.pads
        return folding.padding(left, right, taps, conv.stride, conv.dilation)
    if conv.stride > 1:
        raise NotTakenError("its auto_pad=SAME_LOWER with strides depends on the number of steps")
    return folding.padding(total - total // 2, total // 2, taps, 1, conv.dilation)


# ---- the pair ------------------------------------------------------------------------------------


def read_pair(node: Any, graph: Graph) -> SeparableConv1D:
    """Return the layer that begins with the convolution `node`.

    Raises
    ------
    NotTakenError
        If none does, with the reason.
    """
    depthwise = _read_conv(node, graph)
    if depthwise.weight.shape[1] != 1:
        channels = depthwise.weight.shape[1] * depthwise.group
        raise NotTakenError(
            f"it is grouped but not depthwise: group={depthwise.group}, input channels={channels}"
        )
    padding = _padding(depthwise)
    between, last = _between(node, graph)
    pointwise = _read_conv(last, graph)
    _check_pointwise(pointwise, depthwise, graph.name_of(last))
    after, activation = _after(last, graph)
    weights = folding.fold(
        depthwise.weight[:, 0],
        depthwise.bias,
        between,
        pointwise.weight[..., 0],
        pointwise.bias,
        after,
    )
    name = graph.name_of(node).replace("/", ".").strip(".")
    return _layer(name or "separable_conv1d", depthwise, padding, weights, activation)


def _layer(
    name: str, depthwise: _Conv, padding: Padding, weights: folding.Weights, activation: str
) -> SeparableConv1D:
    outputs, _, taps = depthwise.weight.shape
    try:
        layer = SeparableConv1D(
            len(weights.pointwise),
            taps,
            strides=depthwise.stride,
            padding=padding,
            data_format="channels_first",
            dilation_rate=depthwise.dilation,
            depth_multiplier=outputs // depthwise.group,
            activation=activation,
            use_bias=weights.bias is not None,
            name=name,
            dtype=depthwise.weight.dtype.name,
        )
        layer.config.kernel_config(depthwise.group)
    except ValueError as error:
        raise NotTakenError(str(error)) from error
    layer.build((None, depthwise.group, None))
    layer.set_weights(weights.keras(depthwise.group))
    return layer


def _between(node: Any, graph: Graph) -> tuple[list[folding.Affine], Any]:
    """Return the normalisations between the two convolutions, and the second one."""
    normal: list[folding.Affine] = []
    while True:
        node = graph.next(node)
        if node.op_type == "Conv":
            return normal, node
        if node.op_type == "BatchNormalization":
            normal.append(_affine(node, graph))
        elif node.op_type not in _TRANSPARENT:
            what = f"{graph.name_of(node)!r} ({node.op_type})"
            if _activation(node, graph):
                raise NotTakenError(f"{what} follows: the fused kernel has no activation there")
            raise NotTakenError(f"{what} follows, not a pointwise convolution")


def _check_pointwise(conv: _Conv, depthwise: _Conv, name: str) -> None:
    _, inputs, taps = conv.weight.shape
    plain = (taps, conv.stride, conv.group) == (1, 1, 1)
    if not plain or conv.pads not in ((0, 0), *_SAME) or inputs != len(depthwise.weight):
        raise NotTakenError(
            f"{name!r} follows, which is not pointwise: weight {conv.weight.shape}, stride "
            f"{conv.stride}, group {conv.group}, padding {conv.pads}"
        )
    if conv.weight.dtype != depthwise.weight.dtype:
        raise NotTakenError(f"{name!r} has another dtype, {conv.weight.dtype}")


def _after(node: Any, graph: Graph) -> tuple[list[folding.Affine], str]:
    """Return what follows the pointwise convolution and becomes part of the layer."""
    normal: list[folding.Affine] = []
    while True:
        try:
            node = graph.next(node)
            if node.op_type == "BatchNormalization":
                normal.append(_affine(node, graph))
            elif node.op_type not in _TRANSPARENT:
                return normal, _activation(node, graph) or "linear"
        except NotTakenError:  # the layer ends here
            return normal, "linear"


def _affine(node: Any, graph: Graph) -> folding.Affine:
    given = _attributes(node)
    if given.get("training_mode", 0):
        raise NotTakenError(f"{graph.name_of(node)!r} takes its statistics from each batch")
    gamma, beta, mean, variance = (graph.constant(n).astype("f8") for n in node.input[1:5])
    return folding.batch_norm(gamma, beta, mean, variance, given.get("epsilon", 1e-5))


def _activation(node: Any, graph: Graph) -> str | None:
    """Return Keras's name of the activation that `node` is, None if kernels have none such."""
    if node.op_type == "Clip":
        return "relu6" if _is_relu6(node, graph) else None
    name, wanted = _ACTIVATIONS.get(node.op_type, (None, {}))
    given = _attributes(node)
    for key, (value, default) in wanted.items():
        got = given.get(key, default)
        if got != (np.float32(value) if isinstance(value, float) else value):  # as it is stored
            return None
    return name


def _is_relu6(node: Any, graph: Graph) -> bool:
    try:
        return [float(graph.constant(name)) for name in node.input[1:]] == [0.0, 6.0]
    except NotTakenError:
        return False
