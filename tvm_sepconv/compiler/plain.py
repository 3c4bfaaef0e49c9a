"""The layer as a plain tensor expression, without any thought of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import tvm
from tvm import te, tirx

from tvm_sepconv.compiler.static import Shape, declare
from tvm_sepconv.config import KernelConfig

Array = npt.NDArray[Any]


def workload(config: KernelConfig, shape: Shape) -> tvm.IRModule:
    """The layer of one shape: (x, depthwise, pointwise, bias if any, output).

    ``depthwise (kernel, [m,] channels)`` and ``pointwise ([m,] channels, filters)`` may be laid out
    anew; the depth multiplier's axis is left out where it is 1.

    Raises
    ------
    ValueError
        For an activation that has no plain form here.
    """
    activation = _activation(config.activation)
    mids = (*(config.depth_multiplier,) * (config.depth_multiplier > 1), config.channels)
    x = te.placeholder(_at(config, shape.batch, shape.steps, config.channels), name="x")
    depthwise_kernel = te.placeholder((config.kernel_size, *mids), name="depthwise_kernel")
    pointwise_kernel = te.placeholder((*mids, config.filters), name="pointwise_kernel")
    bias = te.placeholder((config.filters,), name="bias")
    depthwise = _depthwise(config, shape, x, depthwise_kernel)
    pointwise = _pointwise(config, shape, depthwise, pointwise_kernel)

    def finished(n: Any, t: Any, f: Any) -> Any:
        value = pointwise[_at(config, n, t, f)]
        return activation(value + bias[f] if config.use_bias else value)

    output = te.compute(pointwise.shape, _indexed(config, finished), name="output")
    biases = [bias] * config.use_bias
    func = te.create_prim_func([x, depthwise_kernel, pointwise_kernel, *biases, output])
    func = declare(declare(func, "x", "align=4"), "output", "align=4")
    return tvm.IRModule({"main": func.with_attr("layout_free_buffers", [1, 2])})


def _depthwise(config: KernelConfig, shape: Shape, x: te.Tensor, kernel: te.Tensor) -> te.Tensor:
    long = (shape.out_steps - 1) * config.strides + config.effective_kernel
    taps = te.reduce_axis((0, config.kernel_size), "tap")

    def padded(n: Any, t: Any, c: Any) -> Any:
        inside = te.all(t >= shape.left, t < shape.left + shape.steps)
        return te.if_then_else(inside, x[_at(config, n, t - shape.left, c)], 0.0)

    sizes = _at(config, shape.batch, long, config.channels)
    pad = te.compute(sizes, _indexed(config, padded), name="pad")

    def filtered(n: Any, t: Any, *mid: Any) -> Any:
        row = t * config.strides + taps * config.dilation_rate
        weight = (taps, *mid)
        return te.sum(pad[_at(config, n, row, mid[-1])] * kernel[weight], axis=taps)

    sizes = _at(config, shape.batch, shape.out_steps, *kernel.shape[1:])
    return te.compute(sizes, _indexed(config, filtered), name="depthwise")


def _pointwise(
    config: KernelConfig, shape: Shape, depthwise: te.Tensor, kernel: te.Tensor
) -> te.Tensor:
    *mids, filters = kernel.shape
    axes = [te.reduce_axis((0, extent), f"mid{i}") for i, extent in enumerate(mids)]

    def mixed(n: Any, t: Any, f: Any) -> Any:
        weight = (*axes, f)
        return te.sum(depthwise[_at(config, n, t, *axes)] * kernel[weight], axis=axes)

    sizes = _at(config, shape.batch, shape.out_steps, filters)
    return te.compute(sizes, _indexed(config, mixed), name="pointwise")


def _at(config: KernelConfig, sample: Any, step: Any, *channels: Any) -> tuple[Any, ...]:
    """Indices or sizes in the order of the data format."""
    if config.data_format == "channels_last":
        return sample, step, *channels
    return sample, *channels, step


def _indexed(config: KernelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of (sample, step, channels…) as one of indices in the order of the data format."""
    if config.data_format == "channels_last":
        return lambda n, t, *channels: function(n, t, *channels)
    return lambda n, *rest: function(n, rest[-1], *rest[:-1])


def _linear(x: Any) -> Any:
    return x


def _relu(x: Any) -> Any:
    return te.max(x, 0.0)


def _elu(x: Any) -> Any:
    return tirx.Select(x > 0.0, x, te.exp(x) - 1.0)


def _silu(x: Any) -> Any:
    return x / (te.exp(-x) + 1.0)


# Our own forms bind intermediate values, for which TVM 0.27 cannot estimate the work.
_ACTIVATIONS = {"linear": _linear, "relu": _relu, "elu": _elu, "silu": _silu}


def _activation(name: str) -> Callable[[Any], Any]:
    if name not in _ACTIVATIONS:
        raise ValueError(
            "The `activation` of a layer for MetaSchedule's own space must be one of "
            f"{sorted(_ACTIVATIONS)} here. Received: activation={name}"
        )
    return _ACTIVATIONS[name]


def arranged(config: KernelConfig, weights: Sequence[Array]) -> tuple[Array, ...]:
    """Keras's weights as `workload` takes them."""
    channels, multiplier = config.channels, config.depth_multiplier
    depthwise = weights[0].transpose(0, 2, 1)
    pointwise = weights[1].reshape(channels, multiplier, config.filters).swapaxes(0, 1)
    if multiplier == 1:
        depthwise, pointwise = depthwise[:, 0], pointwise[0]
    return depthwise, pointwise, *weights[2:]
