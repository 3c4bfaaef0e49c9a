"""The layer as a TVM tensor expression for GPUs; no schedule in here.

One expression for both data formats: every stage between input and output has the axes (batch,
step, channel or filter), and only ``x`` and ``output`` know how they lie in memory. The stages
carry the names that schedules look for: ``pad depthwise pointwise activation output``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tvm import te
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27
from tvm.tirx import PrimFunc

from tvm_sepconv.compiler import epilogue
from tvm_sepconv.compiler.compute import relax_arguments
from tvm_sepconv.compiler.schedules.cuda_packing import (
    CHANNELS,
    LANES,
    MAX_STEP_TILE,
    packed_shapes,
)
from tvm_sepconv.config import KernelConfig


@functools.lru_cache(maxsize=64)  # a library's variants are schedules of the same one or two
def sepconv1d(config: KernelConfig, vector: int = 1) -> PrimFunc:
    """SeparableConv1D as a schedulable function of NumPy-like buffers.

    Arguments, in order: ``x (batch, steps, channels)`` or ``(batch, channels, steps)``, the packed
    weights of `packed_shapes`, ``left`` (int32, zeros before the first step; negative skips steps)
    and ``output`` in the layout of ``x``, whose extent along time says how many steps to compute.
    ``x`` and ``output`` may have any stride along batch and rows; sizes and strides are int32.

    With a `vector` of more than 1, channels and filters (channels_last) or output steps
    (channels_first) are multiples of it, so that a move of that many elements needs one predicate.
    """
    a = _Arguments(config, vector)
    depthwise = a.depthwise()
    _, m, lined = packed_shapes(config)["depthwise"]
    multiplier = te.reduce_axis((0, m), "multiplier")
    channel = te.reduce_axis((0, lined), "channel")

    def products(n: PrimExpr, t: PrimExpr, f: PrimExpr) -> PrimExpr:
        weight = a.pointwise_kernel[f // LANES, multiplier * lined + channel, f % LANES]
        return te.sum(depthwise[n, t, multiplier, channel] * weight, axis=[multiplier, channel])

    weights = [a.depthwise_kernel, a.pointwise_kernel, *a.biases]
    function = te.create_prim_func([a.x, *weights, a.left, a.output(products)])
    return relax_arguments(function, config.dtype)


@functools.lru_cache(maxsize=64)
def depthwise_conv1d(config: KernelConfig, vector: int = 1) -> PrimFunc:
    """The first half of `sepconv1d`: x, depthwise kernel, left and ``intermediate``.

    ``intermediate (batch, m*channels', out_steps)`` is compact, rows ordered as the weights'.
    """
    a = _Arguments(config, vector)
    depthwise = a.depthwise()
    _, m, lined = packed_shapes(config)["depthwise"]
    intermediate = te.compute(
        (a.batch, m * lined, a.out_steps),
        lambda n, r, t: depthwise[n, t, r // lined, r % lined],
        name="intermediate",
    )
    function = te.create_prim_func([a.x, a.depthwise_kernel, a.left, intermediate])
    return relax_arguments(function, config.dtype, ("x",))


@functools.lru_cache(maxsize=64)
def pointwise_conv1d(config: KernelConfig, vector: int = 1) -> PrimFunc:
    """The second half of `sepconv1d`: ``intermediate``, pointwise kernel, bias and output."""
    a = _Arguments(config, vector)
    _, rows, _ = packed_shapes(config)["pointwise"]
    source = te.placeholder((a.batch, rows, a.out_steps), "float32", name="intermediate")
    pad = te.compute(
        (a.batch, rows, a.long),
        lambda n, r, t: te.if_then_else(t < a.out_steps, source[n, r, t], te.const(0, "float32")),
        name="pad",
    )
    row = te.reduce_axis((0, rows), "row")

    def products(n: PrimExpr, t: PrimExpr, f: PrimExpr) -> PrimExpr:
        return te.sum(pad[n, row, t] * a.pointwise_kernel[f // LANES, row, f % LANES], axis=row)

    weights = [a.pointwise_kernel, *a.biases]
    function = te.create_prim_func([source, *weights, a.output(products)])
    return relax_arguments(function, config.dtype, ("output",))


class _Arguments:
    """Placeholders and sizes, and the stages at both ends."""

    def __init__(self, config: KernelConfig, vector: int) -> None:
        self.config, self.vector = config, vector
        self.batch, self.steps, self.out_steps, self.left = (
            te.var(name, "int32") for name in ("batch", "steps", "out_steps", "left")
        )
        self.last = config.data_format == "channels_last"
        acc, shapes = config.accumulation_dtype, packed_shapes(config)
        time, channels = self.steps, config.channels
        x_shape = (self.batch, *((time, channels) if self.last else (channels, time)))
        self.x = te.placeholder(x_shape, config.dtype, name="x")
        self.depthwise_kernel = te.placeholder(shapes["depthwise"], acc, name="depthwise_kernel")
        self.pointwise_kernel = te.placeholder(shapes["pointwise"], acc, name="pointwise_kernel")
        bias = te.placeholder(shapes["bias"], acc, name="bias")
        self.biases = [bias] if config.use_bias else []
        self.filters = shapes["bias"][0]
        # So much longer than the output that TVM proves, without a predicate in the hot loops, that
        # a ragged last tile stays inside; cut down to one tile when it is lowered.
        vectors = self.out_steps if self.last or vector == 1 else self.out_steps // vector * vector
        self.whole, self.long = vectors, vectors + MAX_STEP_TILE

    def _padded(self, n: PrimExpr, r: PrimExpr, ch: PrimExpr) -> PrimExpr:
        c, at, acc = self.config.channels, r - self.left, self.config.accumulation_dtype
        inside = [r >= self.left, r < self.left + self.steps]
        if c % CHANNELS:
            width = self.vector if self.last else 1
            inside.append(ch // width < c // width)
        value = (self.x[n, at, ch] if self.last else self.x[n, ch, at]).astype(acc)
        return te.if_then_else(te.all(*inside), value, te.const(0, acc))

    def depthwise(self) -> te.Tensor:
        """The stages ``pad`` and ``depthwise (batch, step, multiplier, channel)``."""
        config = self.config
        taps, m, lined = packed_shapes(config)["depthwise"]
        stride, dilation = config.strides, config.dilation_rate
        tap = te.reduce_axis((0, taps), "tap")
        rows = (self.long + MAX_STEP_TILE) * stride + (taps - 1) * dilation
        pad = te.compute((self.batch, rows, lined), self._padded, name="pad")
        return te.compute(
            (self.batch, self.long, m, lined),
            lambda n, t, j, ch: te.sum(
                pad[n, t * stride + tap * dilation, ch] * self.depthwise_kernel[tap, j, ch],
                axis=tap,
            ),
            name="depthwise",
        )

    def output(self, products: Callable[[PrimExpr, PrimExpr, PrimExpr], PrimExpr]) -> te.Tensor:
        """The stages ``pointwise``, of these sums, ``activation`` and ``output``."""
        config = self.config
        shape = (self.batch, self.long, self.filters)
        pointwise = te.compute(shape, products, name="pointwise")

        def finish(n: PrimExpr, t: PrimExpr, f: PrimExpr) -> PrimExpr:
            value = pointwise[n, t, f]
            for bias in self.biases:
                value = value + bias[f]
            return epilogue.apply(config.activation, value)

        activation = te.compute(shape, finish, name="activation")

        if self.last:
            return te.compute(
                (self.batch, self.out_steps, config.filters),
                lambda n, t, f: activation[n, t, f].astype(config.dtype),
                name="output",
            )
        return te.compute(
            (self.batch, config.filters, self.whole),
            lambda n, f, t: activation[n, t, f].astype(config.dtype),
            name="output",
        )
