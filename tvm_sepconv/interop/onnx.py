"""Layers of an ONNX model: every depthwise convolution with the pointwise one after it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sepconv.interop.onnx_pairs import Graph, NotTakenError, read_pair
from tvm_sepconv.layer import SeparableConv1D

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 13
_QUANTIZED = ("QLinearConv", "ConvInteger")


def from_onnx(model: str | os.PathLike[str] | onnx.ModelProto) -> dict[str, SeparableConv1D]:
    """Read every depthwise-separable 1-D convolution of an ONNX model.

    That is a ``Conv`` whose ``group`` is its number of input channels, followed by a ``Conv`` of
    one tap; or two 2-D ones of height 1. ``BatchNormalization`` between the two, and one and an
    element-wise activation after them, become part of the layer.

    Parameters
    ----------
    model
        A file, with the files of its external data beside it, or a loaded model. Opset 13 or newer.
        Reading it needs the package onnx (the ``[onnx]`` extra).

    Returns
    -------
    dict
        Built channels_first layers by the name of the depthwise node, or of its output where the
        node has none. A layer of a 2-D convolution takes its input without the height.

    Warns
    -----
    UserWarning
        Of grouped convolutions that are not read, with their names and the reason for each.

    Raises
    ------
    ValueError
        The file is damaged or no ONNX model, of an older opset, or has no such pair.
    FileNotFoundError
        There is no such file.
    TypeError
        `model` is neither path nor model.
    ImportError
        The package onnx is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import helper, numpy_helper
    >>> nodes = [
    ...     helper.make_node("Conv", ["x", "w"], ["y"], "depthwise", group=4, pads=[1, 1]),
    ...     helper.make_node("Conv", ["y", "v"], ["z"], "pointwise"),
    ... ]
    >>> weights = [
    ...     numpy_helper.from_array(np.ones((4, 1, 3), np.float32), "w"),
    ...     numpy_helper.from_array(np.ones((2, 4, 1), np.float32), "v"),
    ... ]
    >>> x, z = (helper.make_tensor_value_info(name, 1, (1, None, None)) for name in "xz")
    >>> graph = helper.make_graph(nodes, "graph", [x], [z], weights)
    >>> layers = from_onnx(helper.make_model(graph))
    >>> layers["depthwise"](np.ones((1, 4, 5), np.float32))[0, 0].tolist()
    [8.0, 12.0, 12.0, 12.0, 8.0]
    """
    proto = _load(model)
    graph = Graph(proto)
    layers, refused = {}, dict(_in_subgraphs(proto.graph))
    for node in proto.graph.node:
        if not _is_grouped(node, graph):
            continue
        name = graph.name_of(node)
        try:
            layers[name] = read_pair(node, graph)
        except NotTakenError as reason:
            if _group(node) > 1:  # with one input channel and nothing after it, an ordinary one
                refused[name] = str(reason)
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    if not layers:
        raise ValueError(
            "`from_onnx` found no Conv with group = input channels and a Conv of one tap after it "
            f"that it can read. Received: {_shown(model)}{reasons}"
        )
    if refused:
        warnings.warn(f"`from_onnx` left these convolutions out:{reasons}", stacklevel=2)
    return layers


def _shown(model: Any) -> str:
    return (
        f"model={os.fspath(model)!r}" if isinstance(model, (str, os.PathLike)) else "a ModelProto"
    )


def _load(model: Any) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "Reading an ONNX model needs the package onnx, which the base install leaves out: "
            "pip install 'tvm-sepconv[onnx]'"
        ) from error
    if isinstance(model, onnx.ModelProto):
        proto = model
    elif isinstance(model, (str, os.PathLike)):
        proto = _read(Path(model), onnx)
    else:
        raise TypeError(
            f"The `model` argument must be a path or an onnx.ModelProto. Received: {type(model)}"
        )
    received = f"Received: {_shown(model)}"
    if not proto.graph.node or not proto.opset_import:
        raise ValueError(
            f"`model` must be a complete ONNX model, but it has no nodes or no opset. {received}"
        )
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise ValueError(
            f"`model` must be of opset {OLDEST_OPSET} or newer, but it is of {opset}. Convert "
            f"it with onnx.version_converter.convert_version(model, {OLDEST_OPSET}). {received}"
        )
    # Newer exporters write a model's modules as functions, whose nodes would not be seen.
    if proto.functions:
        from onnx import inliner

        return inliner.inline_local_functions(proto)
    return proto


def _read(path: Path, onnx: Any) -> Any:
    received = f"Received: model={str(path)!r}"
    if path.is_dir():
        raise ValueError(f"`model` must be an ONNX file, but it is a folder. {received}")
    if not path.exists():
        raise FileNotFoundError(f"`model` must be an ONNX file, but there is none. {received}")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, which onnx does not name
        raise ValueError(
            "`model` must be an ONNX file, but it cannot be read as one: it is truncated, damaged "
            f"or something else. Copy or export it again. {received}"
        ) from error
    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ValueError(
            "`model` keeps its weights in other files, which must lie beside it as they were "
            f"written, but one is missing or damaged: {error} {received}"
        ) from error
    return proto


def _group(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _is_grouped(node: Any, graph: Graph) -> bool:
    """Whether `node` is a convolution that may be a depthwise one, or is taken for one."""
    if node.op_type in _QUANTIZED:
        return _group(node) > 1
    return node.op_type == "Conv" and (_group(node) > 1 or graph.has_one_input_channel(node))


def _in_subgraphs(graph: Any, outer: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and reason of each grouped convolution in the branches and loops of `graph`."""
    for node in graph.node:
        if outer and node.op_type == "Conv" and _group(node) > 1:
            yield node.name or node.output[0], f"it lies in a branch or loop ({outer})"
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _in_subgraphs(inner, node.op_type)
