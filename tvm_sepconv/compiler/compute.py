"""The layer as one TVM tensor expression; no target and no schedule in here.

A kernel serves every batch and every number of steps: both are symbolic, and the left padding is
a run-time integer, so "valid", "same", causal and explicit padding are one kernel. The stages
carry the names that schedules look for: ``pad depthwise pointwise activation output``.
"""

from __future__ import annotations

import functools
import re

import tvm
from tvm import te, tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27
from tvm.tirx import PrimFunc

from tvm_sepconv.compiler import epilogue
from tvm_sepconv.config import KernelConfig

# No schedule may tile the steps coarser than this: the stages before `output` are declared that
# much longer than it, which is how TVM proves, without a predicate in the hot loops, that a
# ragged last tile stays inside them. Scratch is cut down to one tile when it is lowered.
MAX_STEP_TILE = 1024


def padded(extent: int, lanes: int) -> int:
    """`extent` rounded up to whole vectors of `lanes` elements."""
    return -(-extent // lanes) * lanes


def filled(extent: int, lanes: int, dtype: str) -> int:
    """Lanes of the vectors along an axis: half of 64 bytes where `extent` fills no more of them.

    That takes half the time on machines whose units are 32 bytes wide, and as long on others; 16
    bytes take as long as 32 on all. Packed weights are in whole vectors all the same.
    """
    is_widest = lanes == (8 if dtype == "float64" else 16)
    return lanes // 2 if is_widest and extent <= lanes // 2 else lanes


def packed_shapes(config: KernelConfig, lanes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed weights a kernel takes, for vectors of `lanes` elements.

    ``depthwise (kernel, m, channels')``, ``pointwise (filters'/lanes, m*channels, lanes)`` and
    ``bias (filters',)``; primes are rounded up to whole vectors and filled with zeros (channels
    only where the channels are the vector axis). The multiplier is the slower axis of the
    intermediate, so the depthwise stage never has to broadcast or gather a channel.
    """
    channels = config.channels
    lined = padded(channels, lanes) if config.data_format == "channels_last" else channels
    panels = padded(config.filters, lanes) // lanes
    multiplier = config.depth_multiplier
    return {
        "depthwise": (config.kernel_size, multiplier, lined),
        "pointwise": (panels, multiplier * channels, lanes),
        "bias": (panels * lanes,),
    }


@functools.lru_cache(maxsize=64)  # a library's variants are schedules of the same one or two
def sepconv1d(
    config: KernelConfig,
    lanes: int,
    interior: bool = False,
    ragged: int = 0,
    spread: bool = False,
) -> PrimFunc:
    """SeparableConv1D as a schedulable function of NumPy-like buffers.

    Arguments, in order: ``x (batch, steps, channels)`` or ``(batch, channels, steps)``, the packed
    weights of `packed_shapes`, ``left`` (int32, zeros before the first step; negative skips steps)
    and ``output`` in the layout of ``x``, whose extent along time says how many steps to compute.
    ``x`` and ``output`` may have any stride along batch and rows and need the alignment of one
    element only; the packed weights are 64-byte aligned.

    In channels_last, channels or filters that fill no more than half of 64 bytes are computed in
    half vectors (`filled`).

    The interior form has no stage ``pad``: it reads ``x`` where it lies. It is for whole tiles none
    of whose taps leave the input, takes no notice of ``left``, and in channels_last reads up to a
    vector beyond the last channel of a row. With strides in channels_first the stage stays, to
    separate the phases; it then reads up to ``strides - 1`` steps beyond the last tap.

    In channels_first the output is ``(batch, filters, steps/lanes, lanes)``, whole vectors only,
    except in the `ragged` form, which is for any number of steps.

    The `spread` form, of channels_last, has a stage more: it writes every element of the
    intermediate as a whole vector, for units that do not multiply by a number in memory.
    """
    if config.data_format == "channels_last":
        arguments = _channels_last(config, lanes, interior, spread)
    else:
        arguments = _channels_first(config, lanes, interior, ragged)
    return relax_arguments(te.create_prim_func(arguments), config.dtype)


class _Arguments:
    """Placeholders and sizes that both data formats share."""

    def __init__(self, config: KernelConfig, lanes: int) -> None:
        self.batch, self.steps, self.out_steps, self.left = (
            te.var(name, "int32") for name in ("batch", "steps", "out_steps", "left")
        )
        shapes = packed_shapes(config, lanes)
        acc = config.accumulation_dtype
        self.depthwise = te.placeholder(shapes["depthwise"], acc, name="depthwise_kernel")
        self.pointwise = te.placeholder(shapes["pointwise"], acc, name="pointwise_kernel")
        self.bias = te.placeholder(shapes["bias"], acc, name="bias") if config.use_bias else None
        self.long_steps = self.out_steps + MAX_STEP_TILE
        self.halo = (config.kernel_size - 1) * config.dilation_rate
        self.zero = te.const(0, acc)
        self.taps = te.reduce_axis((0, config.kernel_size), "tap")
        self.multiplier = te.reduce_axis((0, config.depth_multiplier), "multiplier")
        self.channels = te.reduce_axis((0, config.channels), "channel")

    def inside(self, row: PrimExpr) -> PrimExpr:
        """Whether row `row` of the padded input lies in the input."""
        return te.all(row >= self.left, row < self.left + self.steps)

    def finish(self, config: KernelConfig, value: PrimExpr, filter_: PrimExpr) -> PrimExpr:
        """Bias and activation of one output element, in the accumulation dtype."""
        if self.bias is not None:
            value = value + self.bias[filter_]
        return epilogue.apply(config.activation, value)

    def list(self, x: te.Tensor, output: te.Tensor) -> list[te.Tensor | tirx.Var]:
        """The function's arguments in order."""
        bias = [] if self.bias is None else [self.bias]
        return [x, self.depthwise, self.pointwise, *bias, self.left, output]


def _channels_last(
    config: KernelConfig, lanes: int, interior: bool, spread: bool
) -> list[te.Tensor | tirx.Var]:
    a = _Arguments(config, lanes)
    acc, m, c = config.accumulation_dtype, config.depth_multiplier, config.channels
    stride, dilation = config.strides, config.dilation_rate
    panels, _, _ = a.pointwise.shape
    lined = padded(c, filled(c, lanes, acc))
    lanes = filled(config.filters, lanes, acc)
    x = te.placeholder((a.batch, a.steps, c), config.dtype, name="x")

    def read(n: PrimExpr, r: PrimExpr, ch: PrimExpr) -> PrimExpr:
        return x[n, r if interior else r - a.left, ch].astype(acc)

    source = read
    if not interior:
        source = te.compute(
            (a.batch, a.long_steps * stride + a.halo + MAX_STEP_TILE * stride, lined),
            lambda n, r, ch: te.if_then_else(te.all(a.inside(r), ch < c), read(n, r, ch), a.zero),
            name="pad",
        )
    depthwise = te.compute(
        (a.batch, a.long_steps, m, lined),
        lambda n, t, j, ch: te.sum(
            source(n, t * stride + a.taps * dilation, ch) * a.depthwise[a.taps, j, ch], axis=a.taps
        ),
        name="depthwise",
    )
    if spread:
        vectors = te.compute(
            (a.batch, a.long_steps, m, lined, lanes),
            lambda n, t, j, ch, i: depthwise[n, t, j, ch],
            name="spread",
        )

    def factor(n: PrimExpr, t: PrimExpr, lane: PrimExpr) -> PrimExpr:
        if spread:
            return vectors[n, t, a.multiplier, a.channels, lane]
        return depthwise[n, t, a.multiplier, a.channels]

    pointwise = te.compute(
        (a.batch, a.long_steps, panels, lanes),
        lambda n, t, fo, fi: te.sum(
            factor(n, t, fi) * a.pointwise[fo, a.multiplier * c + a.channels, fi],
            axis=[a.multiplier, a.channels],
        ),
        name="pointwise",
    )
    activation = te.compute(
        (a.batch, a.long_steps, panels, lanes),
        lambda n, t, fo, fi: a.finish(config, pointwise[n, t, fo, fi], fo * lanes + fi),
        name="activation",
    )
    output = te.compute(
        (a.batch, a.out_steps, config.filters),
        lambda n, t, f: activation[n, t, f // lanes, f % lanes].astype(config.dtype),
        name="output",
    )
    return a.list(x, output)


def _channels_first(
    config: KernelConfig, lanes: int, interior: bool, ragged: int
) -> list[te.Tensor | tirx.Var]:
    # The vector axis is time here: steps are (vector, lane), and that the last vector is whole is
    # in the shape, not in a predicate. The padded input is split by phase of the stride, so that
    # the taps of neighbouring outputs are neighbours in memory whatever the stride is.
    a = _Arguments(config, lanes)
    acc, m, c = config.accumulation_dtype, config.depth_multiplier, config.channels
    stride, dilation = config.strides, config.dilation_rate
    panels, _, _ = a.pointwise.shape
    vectors = te.var("vectors", "int32")
    if ragged:  # in terms of tiles, or TVM cannot prove that tiles of three vectors stay inside
        vectors = (a.out_steps + ragged * lanes - 1) // (ragged * lanes) * ragged
    long = vectors + MAX_STEP_TILE // lanes
    x = te.placeholder((a.batch, c, a.steps), config.dtype, name="x")

    def read(n: PrimExpr, ch: PrimExpr, r: PrimExpr) -> PrimExpr:
        return x[n, ch, r if interior else r - a.left].astype(acc)

    def source(n: PrimExpr, ch: PrimExpr, t: PrimExpr) -> PrimExpr:
        tap = a.taps * dilation
        if pad is None:
            return read(n, ch, t + tap)
        return pad[n, ch, tap % stride, t + tap // stride]

    def padded_read(n: PrimExpr, ch: PrimExpr, phase: PrimExpr, r: PrimExpr) -> PrimExpr:
        row = r * stride + phase
        value = read(n, ch, row)
        return value if interior else te.if_then_else(a.inside(row), value, a.zero)

    pad = None
    if not interior or stride > 1:
        shape = (a.batch, c, stride, long * lanes + a.halo // stride + MAX_STEP_TILE)
        pad = te.compute(shape, padded_read, name="pad")
    depthwise = te.compute(
        (a.batch, m, c, long, lanes),
        lambda n, j, ch, v, i: te.sum(
            source(n, ch, v * lanes + i) * a.depthwise[a.taps, j, ch], axis=a.taps
        ),
        name="depthwise",
    )
    pointwise = te.compute(
        (a.batch, panels, lanes, long, lanes),
        lambda n, fo, fi, v, i: te.sum(
            depthwise[n, a.multiplier, a.channels, v, i]
            * a.pointwise[fo, a.multiplier * c + a.channels, fi],
            axis=[a.multiplier, a.channels],
        ),
        name="pointwise",
    )
    activation = te.compute(
        (a.batch, panels, lanes, long, lanes),
        lambda n, fo, fi, v, i: a.finish(config, pointwise[n, fo, fi, v, i], fo * lanes + fi),
        name="activation",
    )

    def store(n: PrimExpr, f: PrimExpr, v: PrimExpr, i: PrimExpr) -> PrimExpr:
        return activation[n, f // lanes, f % lanes, v, i].astype(config.dtype)

    if ragged:
        output = te.compute(
            (a.batch, config.filters, a.out_steps),
            lambda n, f, t: store(n, f, t // lanes, t % lanes),
            name="output",
        )
    else:
        output = te.compute((a.batch, config.filters, vectors, lanes), store, name="output")
    return a.list(x, output)


_PREFIX = {"x": "x", "output": "y"}


def relax_arguments(
    func: PrimFunc, dtype: str, names: tuple[str, ...] = ("x", "output")
) -> PrimFunc:
    """Give `x` and `output` free batch and row strides and one element's alignment.

    `create_prim_func` always declares compact buffers aligned to 64 bytes, and the code then uses
    aligned vector moves: an ordinary array would crash the process. `specialize` refuses to change
    that, so the signature is rewritten in TVM's own script and parsed again.
    """
    bits = int(re.sub(r"\D", "", dtype))
    script = func.script()
    for name in names:
        prefix = _PREFIX[name]
        old = re.search(rf'\b{name}: T\.Buffer\((\(.*?\))(, "\w+")?\)', script)
        assert old is not None, script  # TVM prints every argument so
        shape = old[1].replace(" // 4 * 4", "")  # whole vectors of symbolic steps: see compute_cuda
        *_, extent = extents = shape.strip("()").split(", ")
        inner = "1" if len(extents) == 3 else f"{extent}, 1"
        new = (
            f"{name}: T.Buffer({shape}{old[2] or ''}, "
            f'strides=("{prefix}_batch", "{prefix}_row", {inner}), align={bits // 8})'
        )
        script = script.replace(old[0], new, 1)
    variables = [f"{_PREFIX[name]}_{axis}" for name in names for axis in ("batch", "row")]
    declared = f"{', '.join(variables)} = {', '.join(['T.int32()'] * len(variables))}"
    script = script.replace("    T.func_attr", f"    {declared}\n    T.func_attr", 1)
    return tvm.script.from_source(script)
