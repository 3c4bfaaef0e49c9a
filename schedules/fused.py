"""The fused CPU schedule, shared by the vector families: two data formats as named moves.

Both compute one tile of output steps at a time, in scratch that stays in cache:

1. ``pad``: the tile's input rows of some channels, zeros outside the input, whole vectors of them;
2. ``depthwise``: those channels of the intermediate, taps outermost round a register block;
3. ``pointwise``: a matrix product whose register tile accumulates over all channels;
4. ``activation`` and ``output``: bias and activation of that register tile, stored as it is done.

The interior form, for whole tiles whose taps all lie inside the input, has no ``pad``: it reads the
input where it lies (the decision ``in_place``).

Nothing between the stages goes further than the second-level cache, and only the last stage knows
that the last tile may be ragged: the hot loops carry no predicate. In channels_first not even that
one does: whole vectors of steps are stored, and a form of its own serves less than a vector.

Register tiles are buffers of the scope "global": below 1 KiB TVM keeps those on the stack, where
LLVM takes them apart into registers. "local" ones become workspace, whose last values are stored.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm_sepconv.compiler.schedules.cpu import Tiling, VectorUnit

from tvm_sepconv.compiler.compute import filled
from tvm_sepconv.config import KernelConfig


def fuse(
    sch: Schedule, config: KernelConfig, unit: VectorUnit, tiling: Tiling, interior: bool = False
) -> Schedule:
    """Apply the fused schedule to ``sepconv1d(config, lanes, interior)`` of that unit, in place."""
    if config.data_format == "channels_last":
        _fuse_last(sch, config, unit, tiling, interior)
    else:
        _fuse_first(sch, config, unit, tiling, interior)
    return sch


def _fuse_last(
    sch: Schedule, config: KernelConfig, unit: VectorUnit, tiling: Tiling, interior: bool
) -> None:
    dtype = config.accumulation_dtype
    lanes, wide = (filled(n, unit.lanes(dtype), dtype) for n in (config.filters, config.channels))
    depthwise, pointwise, activation, output = _stages(sch)
    rows, vectors = tiling.register_tile
    batch, step, filter_ = sch.get_loops(output)
    tile, block, row = sch.split(step, [None, tiling.step_tile // rows, rows])
    panels, panel, lane = sch.split(filter_, [None, vectors, lanes])
    sch.reorder(batch, tile, panels, block, row, panel, lane)
    if config.filters % lanes == 0 and _inlines(config):  # store straight from the accumulators
        sch.compute_inline(activation)
        unroll(sch, [row, panel], lane)
    else:  # the last vector is partial: finish whole vectors first, store what exists of them
        sch.compute_at(activation, block, preserve_unit_loops=True)
        unroll(sch, sch.get_loops(activation)[-3:-1], sch.get_loops(activation)[-1])
    sch.compute_at(pointwise, block, preserve_unit_loops=True)
    stage = sch.get_sblock("spread") if unit.spreads(config) else depthwise
    sch.compute_at(stage, tile, preserve_unit_loops=True)
    *_, row, panel, lane, multiplier, channel = sch.get_loops(pointwise)
    if unit.by_lane:
        group, channel = sch.split(channel, [None, wide])
        sch.reorder(multiplier, group, channel, row, panel, lane)
        load_lanes(sch, pointwise, 0, group)
        sch.unroll(channel)
    else:
        sch.reorder(multiplier, channel, row, panel, lane)
    accumulate(sch, pointwise, multiplier, [row, panel], lane)
    groups = -(-config.channels // wide)
    together = groups if interior else tiling.channel_block  # nothing is copied: rows as they lie
    taps = taps_together(config) if unit.by_lane else 1
    if unit.spreads(config):
        channels = _spread_last(sch, stage, depthwise, wide, tiling, together)
    else:
        channels = depthwise_last(sch, depthwise, wide, tiling, together, taps)
    if interior:
        return
    pad = sch.get_sblock("pad")
    sch.compute_at(pad, channels, preserve_unit_loops=True)
    *_, channel = sch.get_loops(pad)
    vectorize_head(sch, channel, min(tiling.channel_block * wide, config.channels), wide)


def depthwise_last(
    sch: Schedule,
    block: SBlockRV,
    lanes: int,
    tiling: Tiling,
    together: int,
    taps: int = 1,
) -> LoopRV:
    """Returns the loop over channel blocks, `together` vectors of channels each.

    `taps` at a time are unrolled, to share the inputs that they have in common.
    """
    steps, vectors = tiling.depthwise_block
    *_, step, multiplier, channel, tap = sch.get_loops(block)
    tap, *few = sch.split(tap, [None, taps]) if taps > 1 else [tap]
    blocks, row = sch.split(step, [None, steps])
    # The pointwise stage reads the real channels only; computing the padding lanes of the last
    # vector as well is what keeps the loop free of a predicate. The scratch has room for them.
    factors = [None, together // vectors, vectors, lanes]
    outer, groups, vector, lane = sch.split(channel, factors, disable_predication=True)
    sch.reorder(outer, blocks, multiplier, groups, tap, *few, row, vector, lane)
    if tiling.local_sums:
        sums_apart(sch, block, groups, [row, vector])
    accumulate(sch, block, tap, [row, vector], lane)
    for loop in few:
        sch.unroll(loop)
    return outer


def _spread_last(
    sch: Schedule, block: SBlockRV, depthwise: SBlockRV, lanes: int, tiling: Tiling, together: int
) -> LoopRV:
    """Like `depthwise_last`, but each sum is stored as a whole vector of itself."""
    steps, vectors = tiling.depthwise_block
    *_, step, multiplier, channel, copy = sch.get_loops(block)
    blocks, row = sch.split(step, [None, steps])
    factors = [None, together // vectors, vectors, lanes]
    outer, groups, vector, lane = sch.split(channel, factors, disable_predication=True)
    sch.reorder(outer, blocks, multiplier, groups, row, vector, lane, copy)
    sch.compute_at(depthwise, groups, preserve_unit_loops=True)
    *_, sums, _, channel, tap = sch.get_loops(depthwise)
    column, sum_lane = sch.split(channel, [vectors, lanes])
    sch.reorder(tap, sums, column, sum_lane)
    accumulate(sch, depthwise, tap, [sums, column], sum_lane)
    unroll(sch, [row, vector, lane], copy)
    return outer


def _fuse_first(
    sch: Schedule, config: KernelConfig, unit: VectorUnit, tiling: Tiling, interior: bool
) -> None:
    lanes = unit.lanes(config.accumulation_dtype)
    depthwise, pointwise, activation, output = _stages(sch)
    rows, vectors = tiling.register_tile
    batch, filter_, step, *inner = sch.get_loops(output)
    ragged = not inner
    if ragged:
        step, *inner = sch.split(step, [None, lanes])
    tile, column, vector = sch.split(step, [None, tiling.step_tile // (vectors * lanes), vectors])
    panel, group, row = sch.split(filter_, [None, lanes // rows, rows])
    sch.reorder(batch, tile, panel, group, column, row, vector, *inner)
    if ragged or not _inlines(config):
        sch.compute_at(activation, column, preserve_unit_loops=True)
        unroll(sch, sch.get_loops(activation)[-3:-1], sch.get_loops(activation)[-1])
    else:
        sch.compute_inline(activation)
    if not ragged:
        unroll(sch, [row, vector], *inner)
    sch.compute_at(pointwise, column, preserve_unit_loops=True)
    sch.compute_at(depthwise, tile, preserve_unit_loops=True)
    *_, panel, row, vector, lane, multiplier, channel = sch.get_loops(pointwise)
    sch.reorder(multiplier, channel, panel, row, vector, lane)
    if unit.by_lane:
        load_lanes(sch, pointwise, 1, channel)
    accumulate(sch, pointwise, multiplier, [panel, row, vector], lane)
    channels, vectors = tiling.depthwise_block
    *_, multiplier, channel, step, lane, tap = sch.get_loops(depthwise)
    in_place = interior and config.strides == 1
    together = config.channels if in_place else tiling.channel_block
    blocks, groups, row = sch.split(channel, [None, together // channels, channels])
    columns, vector = sch.split(step, [None, vectors])
    outer, few, tap = sch.split(tap, [None, *taps_sharing(config, unit)])
    sch.reorder(blocks, multiplier, groups, columns, outer, tap, row, few, vector, lane)
    if unit.by_lane and channels > 1:
        load_lanes(sch, depthwise, 1, tap)
    if tiling.local_sums:
        sums_apart(sch, depthwise, columns, [row, vector])
    accumulate(sch, depthwise, outer, [row, vector], lane)
    sch.unroll(few)
    if not in_place:
        pad = sch.get_sblock("pad")
        sch.compute_at(pad, blocks, preserve_unit_loops=True)
        if config.strides > 1:  # neighbours in memory belong to different phases
            *_, phase, row = sch.get_loops(pad)
            sch.reorder(row, phase)
            sch.unroll(phase)


def _inlines(config: KernelConfig) -> bool:
    # TVM 0.27 rounds to bfloat16 by writing the value down several times, but refuses to vectorize
    # a variable that is bound more than once, as those of an activation then are.
    return config.dtype != "bfloat16"


def _stages(sch: Schedule) -> list[SBlockRV]:
    return [sch.get_sblock(n) for n in ("depthwise", "pointwise", "activation", "output")]


def unroll(sch: Schedule, loops: list[LoopRV], *inner: LoopRV) -> None:
    """Unroll all of the loops but the last, which becomes the vector."""
    *more, lane = inner
    for loop in [*loops, *more]:
        sch.unroll(loop)
    sch.vectorize(lane)


def load_lanes(sch: Schedule, block: SBlockRV, operand: int, outside: LoopRV) -> None:
    """Load an operand as vectors once a turn of `outside`, for products with one of their lanes."""
    load = sch.cache_read(block, operand, "global")
    sch.compute_at(load, outside, preserve_unit_loops=True)
    *_, lane = loops = sch.get_loops(load)
    unroll(sch, loops[-3:-1], lane)


def taps_together(config: KernelConfig) -> int:
    """Taps to unroll, which must divide them all; LLVM itself unrolls a few of them."""
    return next((n for n in (3, 4, 5, 2) if config.kernel_size % n == 0), 1)


def taps_sharing(config: KernelConfig, unit: VectorUnit) -> tuple[int, int]:
    """How many taps of channels_first to unroll, and how far they are from each other.

    So far that their inputs are one vector of steps apart: what a tap loads for one vector of sums,
    the next one takes for the vector before. It pays where most loads cross a line of the cache,
    which takes two turns, and not for the sake of one or two taps.
    """
    steps = unit.lanes(config.accumulation_dtype) * config.strides
    apart = steps // config.dilation_rate
    if unit.bytes < 32 or steps % config.dilation_rate or 2 * config.kernel_size < 3 * apart:
        return 1, 1
    number = -(-config.kernel_size // apart)
    return -(-number // -(-number // 8)), apart  # more than 8 would want registers


def sums_apart(sch: Schedule, block: SBlockRV, outside: LoopRV, tile: list[LoopRV]) -> None:
    """Sum in variables of their own, and store a whole register tile once a turn of `outside`."""
    store = sch.cache_write(block, 0, "global")
    sch.reverse_compute_at(store, outside, preserve_unit_loops=True)
    *_, lane = loops = sch.get_loops(store)
    unroll(sch, loops[-len(tile) - 1 : -1], lane)


def accumulate(
    sch: Schedule, block: SBlockRV, outermost: LoopRV, tile: list[LoopRV], lane: LoopRV
) -> None:
    """Make `tile` x `lane` a register tile that is cleared before the reduction `outermost`."""
    unroll(sch, tile, lane)
    init = sch.decompose_reduction(block, outermost)
    *_, lane = loops = sch.get_loops(init)
    unroll(sch, loops[-len(tile) - 1 : -1], lane)


def vectorize_head(sch: Schedule, loop: LoopRV, extent: int, lanes: int) -> None:
    """Copy the whole vectors of `extent` elements as vectors, the rest one by one."""
    whole = extent // lanes * lanes
    if whole != extent:
        if not whole:
            return  # fewer channels than lanes: the code generator finds masked or narrow moves
        loop, *_ = sch.loop_partition(loop, [whole, extent - whole])
    _, lane = sch.split(loop, [None, lanes])
    sch.vectorize(lane)
