"""The fused CPU schedule, shared by the vector families: two forms as named moves.

Both compute one tile of output steps at a time, in scratch that stays in cache:

1. ``pad``: the tile's input rows, zeros outside the input, rounded up to whole vectors;
2. ``depthwise``: the tile of the intermediate, taps outermost round a register block;
3. ``pointwise``: a matrix product whose register tile accumulates over all channels;
4. ``activation`` and ``output``: bias and activation of that register tile, stored as it is done.

Nothing between the stages goes further than the second-level cache, and only the last stage knows
that the last tile may be ragged: the hot loops carry no predicate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_sepconv.config import KernelConfig


@dataclass(frozen=True)
class Tiling:
    """The decisions of the fused schedule, by name; records store exactly these.

    ``step_tile`` output steps share the scratch. ``register_tile`` is (rows, vectors) of
    accumulators: rows are steps (channels_last) or filters (channels_first), vectors run along the
    other. ``depthwise_block`` is (steps, vectors) or (channels, vectors) accumulated over the taps.
    """

    step_tile: int
    register_tile: tuple[int, int]
    depthwise_block: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, decisions: dict[str, Any]) -> Tiling:
        """The tiling a record's decisions describe.

        Raises
        ------
        ValueError
            If a decision is missing or unknown: the record is of another schedule.
        """
        known = {"step_tile", "register_tile", "depthwise_block"}
        if set(decisions) != known:
            raise ValueError(
                f"The schedule's decisions are {sorted(known)}. Received: {sorted(decisions)}"
            )
        pair = {k: tuple(decisions[k]) for k in ("register_tile", "depthwise_block")}
        return cls(step_tile=int(decisions["step_tile"]), **pair)


@dataclass(frozen=True)
class VectorUnit:
    """What the schedule needs to know of an instruction set: vector length and registers."""

    bytes: int
    registers: int

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` in one vector."""
        return self.bytes // (8 if dtype == "float64" else 4)


# Three quarters of a 1 MiB second-level cache; weights and outputs stream through the rest.
SCRATCH_BYTES = 768 * 1024
LATENCY = 4  # cycles of a multiply-add: fewer accumulators than this leave the unit waiting


def tilings(config: KernelConfig, unit: VectorUnit) -> tuple[Tiling, ...]:
    """Return the default variants of a library, longest tile first.

    Long tiles amortise the halo and the pass over the weights; the runtime gives what is left of a
    sequence to the shorter ones, the last of which serves single steps.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    form = _tilings_last if config.data_format == "channels_last" else _tilings_first
    return form(config, unit, lanes)


def cost(config: KernelConfig, lanes: int, tiling: Tiling) -> float:
    """Estimate the cycles of one tile; the runtime covers a sequence with the cheapest tiles.

    Every multiply-add takes a cycle, but a register tile takes at least its loads (two broadcasts a
    cycle) and at least the latency of one multiply-add. Copying a vector of the input takes two.
    """
    rows, vectors = tiling.register_tile
    step = max(rows * vectors, vectors + rows / 2, LATENCY) / (rows * vectors)
    last = config.data_format == "channels_last"
    channels = -(-config.channels // lanes) if last else config.channels
    filters = -(-config.filters // lanes) if last else -(-config.filters // rows) * rows
    steps = tiling.step_tile if last else tiling.step_tile / lanes
    copied = (tiling.step_tile - 1) * config.strides + config.effective_kernel
    copy = 2 * channels * copied / (1 if last else lanes)
    depthwise = steps * channels * config.depth_multiplier * config.kernel_size
    return copy + depthwise + steps * filters * config.mid_channels * step


def _tilings_last(config: KernelConfig, unit: VectorUnit, lanes: int) -> tuple[Tiling, ...]:
    panels = -(-config.filters // lanes)
    # Vectors of filters must divide the panels: a partial group would put a predicate in the hot
    # loop. Two (three) of them and eight rows keep the loads below the multiply-adds.
    wide = _divisor(panels, 3 if unit.registers > 16 else 2, 2)
    rows = {32: {1: 16, 2: 8, 3: 8}, 16: {1: 8, 2: 6}}[unit.registers][wide]
    steps = 8 if unit.registers > 16 else 4
    deep = _divisor(-(-config.channels // lanes), 2)
    long = 64 // rows * rows
    while long > 2 * rows and _scratch(config, long, lanes) > SCRATCH_BYTES:
        long = max(long // 2 // rows * rows, 2 * rows)
    # A few steps have few rows of accumulators; more vectors make up for them.
    tiles = {long: (rows, wide), 2 * rows: (rows, wide)}
    tiles[4] = (4, _divisor(panels, unit.registers // 8))
    tiles[1] = (1, _divisor(panels, unit.registers // 4))
    return tuple(
        Tiling(step_tile=tile, register_tile=tiles[tile], depthwise_block=(math.gcd(steps, tile), deep))
        for tile in sorted(tiles, reverse=True)
    )


def _divisor(number: int, most: int, prefer: int = 0) -> int:
    """The largest divisor of `number` up to `most`, or `prefer` if that is one."""
    if prefer and number % prefer == 0:
        return prefer
    return max(d for d in range(1, most + 1) if number % d == 0)


def _tilings_first(config: KernelConfig, unit: VectorUnit, lanes: int) -> tuple[Tiling, ...]:
    rows = min(8 if unit.registers > 16 else 4, lanes, 1 << (config.filters - 1).bit_length())
    channels = math.gcd(4, config.channels)
    long = max(64, 2 * lanes)
    while long > 2 * lanes and _scratch(config, long, lanes) > SCRATCH_BYTES:
        long //= 2
    return tuple(
        Tiling(
            step_tile=tile,
            register_tile=(rows, min(2, tile // lanes)),
            depthwise_block=(channels, min(2, tile // lanes)),
        )
        for tile in sorted({long, 2 * lanes, lanes}, reverse=True)
    )


def _scratch(config: KernelConfig, tile: int, lanes: int) -> int:
    """Bytes of the padded input and of the intermediate for one tile."""
    channels = -(-config.channels // lanes) * lanes
    rows = (tile - 1) * config.strides + config.effective_kernel + tile * config.depth_multiplier
    return rows * channels * (8 if config.accumulation_dtype == "float64" else 4)


def fuse(sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling) -> Schedule:
    """Apply the fused schedule to ``sepconv1d(config, lanes)``, in place."""
    form = _fuse_last if config.data_format == "channels_last" else _fuse_first
    form(sch, config, lanes, tiling)
    return sch


def _fuse_last(sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling) -> None:
    pad, depthwise, pointwise, activation, output = _stages(sch)
    rows, vectors = tiling.register_tile
    batch, step, filter_ = sch.get_loops(output)
    tile, block, row = sch.split(step, [None, tiling.step_tile // rows, rows])
    panels, panel, lane = sch.split(filter_, [None, vectors, lanes])
    sch.reorder(batch, tile, panels, block, row, panel, lane)
    if config.filters % lanes == 0:  # whole vectors: store straight from the accumulators
        sch.compute_inline(activation)
        _unroll(sch, [row, panel], lane)
    else:  # the last vector is partial: finish whole vectors first, store what exists of them
        sch.compute_at(activation, block, preserve_unit_loops=True)
        _unroll(sch, sch.get_loops(activation)[-3:-1], sch.get_loops(activation)[-1])
    sch.compute_at(pointwise, block, preserve_unit_loops=True)
    sch.set_scope(pointwise, 0, "local")
    sch.compute_at(depthwise, tile, preserve_unit_loops=True)
    *_, row, panel, lane, multiplier, channel = sch.get_loops(pointwise)
    sch.reorder(multiplier, channel, row, panel, lane)
    _accumulate(sch, pointwise, multiplier, [row, panel], lane)
    _depthwise_last(sch, depthwise, lanes, tiling)
    sch.compute_at(pad, tile, preserve_unit_loops=True)
    *_, channel = sch.get_loops(pad)
    _vectorize_head(sch, channel, config.channels, lanes)


def _depthwise_last(sch: Schedule, block: SBlockRV, lanes: int, tiling: Tiling) -> None:
    steps, vectors = tiling.depthwise_block
    *_, step, multiplier, channel, tap = sch.get_loops(block)
    blocks, row = sch.split(step, [None, steps])
    # The pointwise stage reads the real channels only; computing the padding lanes of the last
    # vector as well is what keeps the loop free of a predicate. The scratch has room for them.
    groups, vector, lane = sch.split(channel, [None, vectors, lanes], disable_predication=True)
    sch.reorder(blocks, multiplier, groups, tap, row, vector, lane)
    _accumulate(sch, block, tap, [row, vector], lane)


def _fuse_first(sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling) -> None:
    pad, depthwise, pointwise, activation, output = _stages(sch)
    rows, vectors = tiling.register_tile
    batch, filter_, step = sch.get_loops(output)
    width = vectors * lanes
    tile, column, lane = sch.split(step, [None, tiling.step_tile // width, width])
    panel, group, row = sch.split(filter_, [None, lanes // rows, rows])
    sch.reorder(batch, tile, panel, group, column, row, lane)
    sch.compute_at(activation, column, preserve_unit_loops=True)
    sch.compute_at(pointwise, column, preserve_unit_loops=True)
    sch.set_scope(pointwise, 0, "local")
    sch.compute_at(depthwise, tile, preserve_unit_loops=True)
    *_, out_row, step = sch.get_loops(activation)
    _unroll(sch, [out_row], *_split_lanes(sch, step, lanes))
    *_, panel, row, step, multiplier, channel = sch.get_loops(pointwise)
    vector, lane = _split_lanes(sch, step, lanes)
    sch.reorder(multiplier, channel, panel, row, vector, lane)
    _accumulate(sch, pointwise, multiplier, [panel, row, vector], lane)
    channels, vectors = tiling.depthwise_block
    *_, multiplier, channel, step, tap = sch.get_loops(depthwise)
    groups, row = sch.split(channel, [None, channels])
    blocks, vector, lane = sch.split(step, [None, vectors, lanes])
    sch.reorder(multiplier, groups, blocks, tap, row, vector, lane)
    _accumulate(sch, depthwise, tap, [row, vector], lane)
    sch.compute_at(pad, tile, preserve_unit_loops=True)


def _stages(sch: Schedule) -> list[SBlockRV]:
    return [sch.get_sblock(n) for n in ("pad", "depthwise", "pointwise", "activation", "output")]


def _split_lanes(sch: Schedule, loop: LoopRV, lanes: int) -> list[LoopRV]:
    return sch.split(loop, [None, lanes])


def _unroll(sch: Schedule, loops: list[LoopRV], *inner: LoopRV) -> None:
    """Unroll all of the loops but the last, which becomes the vector."""
    *more, lane = inner
    for loop in [*loops, *more]:
        sch.unroll(loop)
    sch.vectorize(lane)


def _accumulate(
    sch: Schedule, block: SBlockRV, outermost: LoopRV, tile: list[LoopRV], lane: LoopRV
) -> None:
    """Make `tile` x `lane` a register tile that is cleared before the reduction `outermost`."""
    _unroll(sch, tile, lane)
    init = sch.decompose_reduction(block, outermost)
    *_, lane = loops = sch.get_loops(init)
    _unroll(sch, loops[-len(tile) - 1 : -1], lane)


def _vectorize_head(sch: Schedule, loop: LoopRV, extent: int, lanes: int) -> None:
    """Copy the whole vectors of `extent` elements as vectors, the rest one by one."""
    whole = extent // lanes * lanes
    if whole != extent:
        if not whole:
            return  # fewer channels than lanes: the code generator finds masked or narrow moves
        loop, *_ = sch.loop_partition(loop, [whole, extent - whole])
    _, lane = sch.split(loop, [None, lanes])
    sch.vectorize(lane)
