"""The fused CPU schedule, shared by the vector families: two forms as named moves.

Both compute one tile of output steps at a time, in scratch that stays in cache:

1. ``pad``: the tile's input rows, zeros outside the input, rounded up to whole vectors;
2. ``depthwise``: the tile of the intermediate, taps outermost round a register block;
3. ``pointwise``: a matrix product whose register tile accumulates over all channels;
4. ``activation`` and ``output``: bias and activation of that register tile, stored as it is done.

The interior form, for whole tiles whose taps all lie inside the input, has no ``pad``: it reads the
input where it lies (`reads_in_place` says when that pays).

Nothing between the stages goes further than the second-level cache, and only the last stage knows
that the last tile may be ragged: the hot loops carry no predicate.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tvm_sepconv.config import KernelConfig

if TYPE_CHECKING:  # tunings are looked up in processes that never load TVM
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import LoopRV, SBlockRV


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
LONGEST_TILE = 256  # steps; at most compute.MAX_STEP_TILE, beyond which kernels overrun
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
    cycle) and at least the latency of one multiply-add. Copying a vector of the input takes two:
    a load and a store; only ratios between variants count here.
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


def reads_in_place(config: KernelConfig, tiling: Tiling) -> str:
    """When a variant gains by reading the input where it lies: "never", "aligned" or "always".

    Copying a tile's rows costs about 3.5 cycles a vector, halo included. It aligns them, where most
    arrays are not: then half of a load's cycles are lost in place, for every tap. (AVX-512 on a
    2-core EPYC, 2026-11-22, 128 channels, in place against copied: 5 taps 114 and 109 GFLOP/s, 7
    taps the same, 11 taps 106 and 109, aligned 112 and 109.)
    """
    last = config.data_format == "channels_last"
    if (config.strides > 1 and not last) or (tiling.step_tile < 16 and last):
        return "never"
    copied = (tiling.step_tile - 1) * config.strides + config.effective_kernel
    cheap = config.kernel_size / 2 <= 3.5 * copied / tiling.step_tile
    return "always" if cheap or not last else "aligned"


def _tilings_last(config: KernelConfig, unit: VectorUnit, lanes: int) -> tuple[Tiling, ...]:
    panels = -(-config.filters // lanes)
    # Vectors of filters must divide the panels: a partial group would put a predicate in the hot
    # loop. A tile that is nearly square needs the fewest loads (4 x 4: 8 for 16 multiply-adds,
    # 8 x 2: 10). Depthwise: 8 x 1 for 8 x 2 gained 4 % with 32 registers, lost 8 % with 16.
    many = unit.registers > 16
    wide = _divisor(panels, 4 if many else 2)
    rows = ({1: 16, 2: 8, 3: 8, 4: 4} if many else {1: 8, 2: 6})[wide]
    steps, deep = (8, 1) if many else (4, _divisor(-(-config.channels // lanes), 2))
    long = 64 // rows * rows
    middle = max(16 // rows, 2) * rows
    while long > middle and _scratch(config, long, lanes) > SCRATCH_BYTES:
        long = max(long // 2 // rows * rows, middle)
    # A few steps have few rows of accumulators; more vectors make up for them.
    tiles = {long: (rows, wide), middle: (rows, wide)}
    tiles[4] = (4, _divisor(panels, unit.registers // 8))
    tiles[1] = (1, _divisor(panels, unit.registers // 4))
    return tuple(
        Tiling(
            step_tile=tile,
            register_tile=tiles[tile],
            depthwise_block=(math.gcd(steps, tile), deep),
        )
        for tile in sorted(tiles, reverse=True)
    )


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
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


def legal(config: KernelConfig, unit: VectorUnit, tiling: Tiling) -> bool:
    """Whether the schedule computes whole tiles with `tiling`: no predicate, no spilled register.

    The accumulators share the registers with one vector of weights (channels_last) or inputs a
    column, and with a broadcast where the multiply-add cannot take it from memory.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    tile, (rows, vectors), (block, deep) = (
        tiling.step_tile, tiling.register_tile, tiling.depthwise_block,
    )  # fmt: skip
    if min(tile, rows, vectors, block, deep) < 1 or tile > LONGEST_TILE:
        return False
    broadcast = 0 if unit.registers > 16 else 1
    if max((rows + 1) * vectors, (block + 1) * deep) + broadcast > unit.registers:
        return False
    if config.data_format == "channels_last":
        panels, groups = -(-config.filters // lanes), -(-config.channels // lanes)
        steps = (rows, block)
        return panels % vectors == groups % deep == 0 and all(tile % n == 0 for n in steps)
    steps = (vectors * lanes, deep * lanes)
    return lanes % rows == config.channels % block == 0 and all(tile % n == 0 for n in steps)


def candidates(config: KernelConfig, unit: VectorUnit) -> tuple[Tiling, ...]:
    """Return the design space of a library's long variant: every tiling worth measuring.

    Register tiles keep two multiply-add units busy for their latency, depthwise blocks, which
    wait for their input anyway, one. Scratch may take twice what the default allows itself: some
    machines have 2 MiB of second-level cache. The default comes first.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    last = config.data_format == "channels_last"
    counts, widths = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24), (1, 2, 3, 4)
    pairs = tuple(itertools.product(counts, widths))
    space = (
        Tiling(tile, register_tile, block)
        for tile in ((16, 24, 32, 48, 64, 96, 128, 192, 256) if last else _whole_vectors(lanes))
        if _scratch(config, tile, lanes) <= 2 * SCRATCH_BYTES
        for register_tile in pairs
        if math.prod(register_tile) >= 2 * LATENCY
        for block in pairs
        if math.prod(block) >= LATENCY
    )
    default = tilings(config, unit)[0]
    return tuple(dict.fromkeys([default, *(t for t in space if legal(config, unit, t))]))


def _whole_vectors(lanes: int) -> tuple[int, ...]:
    return tuple(n * lanes for n in (2, 3, 4, 6, 8, 12, 16))


def fuse(
    sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling, interior: bool = False
) -> Schedule:
    """Apply the fused schedule to ``sepconv1d(config, lanes, interior)``, in place."""
    if config.data_format == "channels_last":
        _fuse_last(sch, config, lanes, tiling, interior)
    elif interior:
        _fuse_first_interior(sch, config, lanes, tiling)
    else:
        _fuse_first(sch, lanes, tiling)
    return sch


def _fuse_last(
    sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling, interior: bool
) -> None:
    depthwise, pointwise, activation, output = _stages(sch)
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
    if interior:
        return
    pad = sch.get_sblock("pad")
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


def _fuse_first(sch: Schedule, lanes: int, tiling: Tiling) -> None:
    depthwise, pointwise, activation, output = _stages(sch)
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
    _unroll(sch, [out_row], *sch.split(step, [None, lanes]))
    *_, panel, row, step, multiplier, channel = sch.get_loops(pointwise)
    vector, lane = sch.split(step, [None, lanes])
    sch.reorder(multiplier, channel, panel, row, vector, lane)
    _accumulate(sch, pointwise, multiplier, [panel, row, vector], lane)
    channels, vectors = tiling.depthwise_block
    *_, multiplier, channel, step, tap = sch.get_loops(depthwise)
    groups, row = sch.split(channel, [None, channels])
    blocks, vector, lane = sch.split(step, [None, vectors, lanes])
    sch.reorder(multiplier, groups, blocks, tap, row, vector, lane)
    _accumulate(sch, depthwise, tap, [row, vector], lane)
    sch.compute_at(sch.get_sblock("pad"), tile, preserve_unit_loops=True)


def _fuse_first_interior(sch: Schedule, config: KernelConfig, lanes: int, tiling: Tiling) -> None:
    depthwise, pointwise, activation, output = _stages(sch)
    rows, vectors = tiling.register_tile
    batch, filter_, step, lane = sch.get_loops(output)
    tile, column, vector = sch.split(step, [None, tiling.step_tile // (vectors * lanes), vectors])
    panel, group, row = sch.split(filter_, [None, lanes // rows, rows])
    sch.reorder(batch, tile, panel, group, column, row, vector, lane)
    sch.compute_inline(activation)
    _unroll(sch, [row, vector], lane)
    sch.compute_at(pointwise, column, preserve_unit_loops=True)
    sch.set_scope(pointwise, 0, "local")
    sch.compute_at(depthwise, tile, preserve_unit_loops=True)
    *_, panel, row, vector, lane, multiplier, channel = sch.get_loops(pointwise)
    sch.reorder(multiplier, channel, panel, row, vector, lane)
    _accumulate(sch, pointwise, multiplier, [panel, row, vector], lane)
    channels, vectors = tiling.depthwise_block
    *_, multiplier, channel, step, lane, tap = sch.get_loops(depthwise)
    groups, row = sch.split(channel, [None, channels])
    blocks, vector = sch.split(step, [None, vectors])
    sch.reorder(multiplier, groups, blocks, tap, row, vector, lane)
    _accumulate(sch, depthwise, tap, [row, vector], lane)


def _stages(sch: Schedule) -> list[SBlockRV]:
    return [sch.get_sblock(n) for n in ("depthwise", "pointwise", "activation", "output")]


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
