"""Other people's frameworks, each in its best honest form. For now ONNX Runtime, on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_sepconv import activations
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.timing import interleave
from tvm_sepconv.config import SepConvConfig

Array = npt.NDArray[Any]

ONNXRUNTIME = "ONNX Runtime"
TRIAL_SECS = 0.1
# ONNX's convolutions are given one spatial axis, or two with a height of 1: the CPU provider has
# its blocked layout for two only, more than twice as fast for some shapes and no gain for others.
_FORMS = {"1-D": False, "2-D, height 1": True}
# The ONNX operators that make up an activation.
_ACTIVATIONS = {"linear": (), "relu": ("Relu",), "elu": ("Elu",), "silu": ("Sigmoid", "Mul")}


class Prepared(NamedTuple):
    """A peer that was checked and can be timed: NumPy in, NumPy out, in its own layout."""

    call: Callable[[], Array]
    form: str


def missing_for_onnxruntime() -> list[str]:
    """Return which of the packages that this peer needs are not installed."""
    return [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]


def available() -> tuple[dict[str, Callable[[Case, int], Prepared]], list[str]]:
    """Return the peers that can be measured here, by name, and the packages missing for others."""
    missing = missing_for_onnxruntime()
    return ({} if missing else {ONNXRUNTIME: prepare_onnxruntime}), missing


def prepare_onnxruntime(case: Case, threads: int) -> Prepared:
    """Return the faster of ONNX Runtime's forms of a case, in its own layout, channels first.

    Raises
    ------
    AssertionError
        If the output of one of them is not the layer's.
    """
    x, expected, allowed = (case.channels_first(a) for a in (case.x, case.expected, case.allowed))
    calls: dict[str, Callable[[], Array]] = {}
    for form, height in _FORMS.items():
        shape = (x.shape[0], case.steps)
        run = onnxruntime_layer(case.config, case.weights, threads, shape, height=height)
        calls[form] = _bind(run, x[:, :, None] if height else x)
        check(f"{ONNXRUNTIME} ({form})", calls[form]().reshape(expected.shape), expected, allowed)
    times = interleave(calls, TRIAL_SECS, settle=threads > 1)
    form = min(times, key=lambda name: times[name].median_us)
    return Prepared(calls[form], form)


def _bind(run: Callable[[Array], Array], x: Array) -> Callable[[], Array]:
    return lambda: run(x)


def onnxruntime_layer(
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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = onnx_model(config, weights, shape, height)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [output.name for output in session.get_outputs()]

    def run(x: Array) -> Array:
        return session.run(outputs, {"x": x})[0]  # type: ignore[no-any-return]

    return run


def onnx_model(
    config: SepConvConfig,
    weights: Sequence[Array],
    shape: tuple[int | None, int | None],
    height: bool,
) -> Any:
    """Return the layer as an ``onnx.ModelProto``; arguments as of `onnxruntime_layer`."""
    from onnx import TensorProto, helper, numpy_helper

    channels, multiplier = weights[0].shape[1:]
    depthwise = weights[0].transpose(1, 2, 0).reshape(channels * multiplier, 1, -1)
    constants = {"depthwise": depthwise, "pointwise": weights[1].transpose(2, 1, 0)}
    spatial = {
        "pads": _pads(config, shape[1]),
        "dilations": [config.dilation_rate],
        "strides": [config.strides],
    }
    ones: list[int] = []
    if height:
        ones = [1]
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
    dims = {"x": [batch, channels, *ones, steps], result: [batch, config.filters, *ones, None]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in dims.items())
    arrays = {**constants, **bias}
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in arrays.items()]
    graph = helper.make_graph(nodes, config.name, [x], [y], initializers)
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
            f"The `activation` of a layer in ONNX Runtime must be one of {list(_ACTIVATIONS)}. "
            f"Received: activation={name}"
        )
    return _ACTIVATIONS[name]
