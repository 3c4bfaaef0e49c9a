"""The decisions of the fused CPU schedule (`fused`), argued from registers, lanes and caches.

What was tried (2-core AMD EPYC, Zen 4, 118 GFLOP/s a core for AVX2 and AVX-512 alike, 32 KiB and
1 MiB of cache; shares of that peak, one thread, float32, layers by their id in workloads.json):

================================== ============================== ===============================
tried                              predicted                      measured
================================== ============================== ===============================
pad copied a channel block at a    the copy stays in L1, also     QN-C2 (236 rows a tile): 84 to
time, 2 vectors, not all channels  where k·dilation is long       94 %; others the same
… 1 vector at a time               the same                       QN-C2 91 %: half a line pair
reading long taps in place if the  saves the copy                 lost once the copy was in L1:
rows are aligned                                                  QN-B1 88 against 90 %; removed
register tile 4 x 4, not 8 x 2     8 loads for 16, not 10         + 0.5 %
step tile 128, not 64              half the passes over weights   the same; 256 loses 3 %
depthwise 4 x 2 where taps are     12 streams of input, not 24    CT-d128 81 to 87 %; elsewhere
further apart than a tile                                         8 x 1 leads by 1 to 3 %
prefetching the next tile's rows   hides the L3's latency         + 1 to 2 % on CT-d128, 0
during the matrix product                                         elsewhere; not kept
1 step: 2 panels at a time, not 8  8 streams 16 KiB apart fight   QN-B1 4.2 to 3.9 µs; 2.2 µs is
                                   for one set of L1              L2's bandwidth
channels_first: store whole        no predicate, no copy of the   MB-1 65 to 79 %, QA-7 87 to
vectors, the last one overlapping  output                         90 %, QN-C1 67 to 72 %
channels_first with strides: no   the compiler's gathers need    CN-1d 74 to 83 %
bounds tested in the inner tiles   no masks
channels_first, many taps: those   a load that crosses a line     QN-B5 - 7 % of the time, QN-B1
a vector apart at a time           takes two turns: 16 of them    - 4 %, QN-C2 - 6 %, MB-e
(``taps_sharing``)                 for 40 products, not 40        - 10 %; AVX2 - 5, - 5, - 4, - 7 %
… 2 or 4 taps at most, not 8       fewer registers                QN-B5 - 4 %; AVX2 + 6, - 4 %
… where only 2 of 33 taps share    fewer loads                    QN-C1 + 2 %: not below 1.5 times
                                                                  that distance
sums in scope "global", not        no stores of dead sums         SSE4.2 - 2 % (SWW-2 - 9 %, SEED
"local"                                                           - 13 %), AVX-512 SEED, EEG-SSVEP
                                                                  - 4 to - 8 %; others the same
… and ``local_sums`` on AVX2       no cleared scratch             QN-B1, MB-1, MB-e + 3 to + 4 %
                                                                  of the time; not kept
depthwise sums in local variables  no dead stores of their zeros  channels_first: QA-7 84 to
(``local_sums``), 32 registers                                    90 %, QN-C1 76 to 79 %, SWW-2
                                                                  50 to 58 %, rows counted anew
                                                                  (below) included
… 16 registers                     the same                       CN-1d on AVX2 59 to 26 %: the
                                                                  matrix product spills; kept
                                                                  for tuning only
in place: rows counted from the    addresses without a            channels_last: QA-7 and CN-0
tile's first, not padding - row    subtraction each               + 2 to 4 % in quiet runs
taps left in a loop by LLVM        no spills with 16 registers    its options have no effect
SSE4.2: 2 x 4, not 6 x 2           a broadcast costs a shuffle:   QN-B1 62 to 65 % of 57 GFLOP/s;
                                   fewer rows                     copies of registers, which
                                                                  SSE's two operands need, and
                                                                  shuffles fill the front end
SSE4.2: each element 4 times in    no shuffles: 91 % in a loop    QN-B1 64 to 81 %, the 20 rows
scratch, tiles of 6 x 2            inside L1                      49 to 68 % (geometric means)
half of 64 bytes where channels or half the work; on units of 64  SEED - 22 % of the time,
filters fill no more (EPYC: units  bytes the same                 EEG-SSVEP - 17, 8 to 8 k9 - 49,
of 32 bytes)                                                      64 to 3 k9 - 26 %
… both, also for 17 to 24 filters  3 half vectors, not 4          - 20 to - 45 %, but on units of
                                                                  64 bytes 1.5 times the work: not
                                                                  kept
ragged channels: blocks too, last  the copy stays in L1: LITE-1   LITE-1 - 3 %, AVX2 + 7 %; 23 to
vector by clamped indices          - 7 %                          64 + 6 %, 31 to 32 + 10 %: not
                                                                  kept
… in one, rows an odd number of    rows fill all sets of L1       LITE-1 - 1 %, nine others - 2 to
vectors apart                                                     + 1 %: not kept
================================== ============================== ===============================
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm_sepconv.config import KernelConfig


@dataclass(frozen=True)
class Tiling:
    """The decisions of the fused schedule, by name; records store exactly these.

    ``step_tile`` output steps share the scratch. ``register_tile`` is (rows, vectors) of
    accumulators: rows are steps (channels_last) or filters (channels_first), vectors run along the
    other. ``depthwise_block`` is (steps, vectors) or (channels, vectors) accumulated over the taps.
    ``channel_block`` vectors of channels, or channels, are copied and convolved together.
    ``in_place``: tiles whose taps all lie inside the input read it where it lies. ``local_sums``:
    the depthwise sums are variables of their own, stored once, and not updated in the scratch.
    """

    step_tile: int
    register_tile: tuple[int, int]
    depthwise_block: tuple[int, int]
    channel_block: int
    in_place: bool
    local_sums: bool

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
        known = [field.name for field in fields(cls)]
        if set(decisions) != set(known):
            raise ValueError(
                f"The schedule's decisions are {sorted(known)}. Received: {sorted(decisions)}"
            )
        return cls(
            step_tile=int(decisions["step_tile"]),
            register_tile=tuple(decisions["register_tile"]),
            depthwise_block=tuple(decisions["depthwise_block"]),
            channel_block=int(decisions["channel_block"]),
            in_place=bool(decisions["in_place"]),
            local_sums=bool(decisions["local_sums"]),
        )


@dataclass(frozen=True)
class VectorUnit:
    """What the schedule needs to know of an instruction set: vector length and registers.

    ``broadcasts``: whether a number in memory becomes a vector without a shuffle. ``by_lane``:
    whether a multiply-add takes one lane of a register as its factor for all lanes.
    """

    bytes: int
    registers: int
    broadcasts: bool = True
    by_lane: bool = False

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` in one vector."""
        return self.bytes // (8 if dtype == "float64" else 4)

    def spreads(self, config: KernelConfig) -> bool:
        """Whether the intermediate is stored with each of its elements as a vector, once for all.

        Else each would be shuffled into one for every register tile of filters.
        """
        return not self.broadcasts and config.data_format == "channels_last"


L1_BYTES = 32 * 1024  # of most cores since 2010; newer ones have 48 KiB or 64
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
    cycle, a vector of weights a cycle, or three if they come from the second-level cache) and at
    least the latency of one multiply-add. Copying a vector of the input takes two: a load and a
    store; only ratios between variants count here.
    """
    rows, vectors = tiling.register_tile
    last = config.data_format == "channels_last"
    load = 3 if last and _weight_bytes(config, lanes) > L1_BYTES else 1
    step = max(rows * vectors, vectors * load + rows / 2, LATENCY) / (rows * vectors)
    channels = -(-config.channels // lanes) if last else config.channels
    filters = -(-config.filters // lanes) if last else -(-config.filters // rows) * rows
    steps = tiling.step_tile if last else tiling.step_tile / lanes
    copied = _copied(config, tiling.step_tile)
    copy = 2 * channels * copied / (1 if last else lanes)
    depthwise = steps * channels * config.depth_multiplier * config.kernel_size
    return copy + depthwise + steps * filters * config.mid_channels * step


def _copied(config: KernelConfig, tile: int) -> int:
    """Input steps that a tile needs, halo included."""
    return (tile - 1) * config.strides + config.effective_kernel


def _element_bytes(config: KernelConfig) -> int:
    return 8 if config.accumulation_dtype == "float64" else 4


def _weight_bytes(config: KernelConfig, lanes: int) -> int:
    return config.mid_channels * -(-config.filters // lanes) * lanes * _element_bytes(config)


def _reads_in_place(config: KernelConfig, tile: int) -> bool:
    """Whether a variant gains by an interior form, which reads the input where it lies.

    Copying a tile's rows costs about 3.5 cycles a vector, halo included. It aligns them, where most
    arrays are not: then half of a load's cycles are lost in place, for every tap. (AVX-512 on a
    2-core EPYC, 2026-11-22, 128 channels, in place against copied: 5 taps 114 and 109 GFLOP/s, 7
    taps 112 and 110, 13 taps the same.)
    """
    last = config.data_format == "channels_last"
    if tile < 16 and last:
        return False
    if config.strides > 1 and not last:
        return True  # it copies, but asks of no element whether it lies in the input
    return config.kernel_size / 2 <= 3.5 * _copied(config, tile) / tile


def _tilings_last(config: KernelConfig, unit: VectorUnit, lanes: int) -> tuple[Tiling, ...]:
    panels = -(-config.filters // lanes)
    # Vectors of filters must divide the panels: a partial group would put a predicate in the hot
    # loop. A tile that is nearly square needs the fewest loads (4 x 4: 8 for 16 multiply-adds,
    # 8 x 2: 10).
    many = unit.registers > 16
    wide = _divisor(panels, 4 if many else 2)
    rows = {1: 8, 2: 6}.get(wide, 0)
    if many:  # rows by lane take a register each
        rows = ({1: 12, 2: 8, 3: 6, 4: 4} if unit.by_lane else {1: 16, 2: 8, 3: 8, 4: 4})[wide]
    long = (64 if unit.broadcasts else 48) // rows * rows
    middle = max(16 // rows, 2) * rows
    while long > middle and _scratch(config, long, lanes) > SCRATCH_BYTES:
        long = max(long // 2 // rows * rows, middle)
    # A few steps have few rows of accumulators; more vectors make up for them. Only whole lines of
    # weights that stream from the second-level cache are better taken two at a time.
    few = 2 if unit.bytes == 64 and _weight_bytes(config, lanes) > L1_BYTES else 4
    tiles = {long: (rows, wide), middle: (rows, wide)}
    tiles[4] = (4, _divisor(panels, unit.registers // 8))
    tiles[1] = (1, _divisor(panels, few))
    return tuple(
        _with_blocks(config, unit, lanes, tile, tiles[tile]) for tile in sorted(tiles, reverse=True)
    )


def _with_blocks(
    config: KernelConfig, unit: VectorUnit, lanes: int, tile: int, register_tile: tuple[int, int]
) -> Tiling:
    """Choose the depthwise block and the channel block of a channels_last tile."""
    groups = -(-config.channels // lanes)
    # 8 x 1 for 8 x 2 gained 4 % with 32 registers, lost 8 % with 16. Where the taps are further
    # apart than the tile, each row is a stream of its own: fewer rows, more of each at a time.
    apart = config.effective_kernel > tile and config.kernel_size <= 4
    steps, deep = (8, 1) if unit.registers > 16 and not apart else (4, _divisor(groups, 2))
    if not unit.broadcasts and not apart:  # few taps are all unrolled and keep their inputs
        steps, deep = (12 if config.kernel_size > 8 else 4), 1
    if config.channels % lanes:
        block = groups  # the partial vector is copied by itself, once
    else:
        row_bytes = _copied(config, tile) * lanes * _element_bytes(config)
        block = _block(groups, deep, L1_BYTES // row_bytes // (1 if unit.broadcasts else 2))
    return Tiling(
        step_tile=tile,
        register_tile=register_tile,
        depthwise_block=(math.gcd(steps, tile), deep),
        channel_block=block,
        in_place=_reads_in_place(config, tile),
        local_sums=unit.by_lane,
    )


def _block(number: int, unit: int, most: int) -> int:
    """The largest divisor of `number` up to `most` that is a multiple of `unit`, else `unit`."""
    fitting = [d for d in range(unit, most + 1, unit) if number % d == 0]
    return max(fitting, default=unit)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


def _tilings_first(config: KernelConfig, unit: VectorUnit, lanes: int) -> tuple[Tiling, ...]:
    rows = min(8 if unit.registers > 16 else 4, lanes, 1 << (config.filters - 1).bit_length())
    channels = math.gcd(4 if unit.by_lane else 2, config.channels)
    wide = 4 if unit.by_lane else 2  # by lane, a vector of weights serves all rows
    long = max(64, 2 * lanes)
    while long > 2 * lanes and _scratch(config, long, lanes) > SCRATCH_BYTES:
        long //= 2
    row_bytes = _element_bytes(config) * (_copied(config, long) + lanes)
    return tuple(
        Tiling(
            step_tile=tile,
            register_tile=(rows, min(wide, tile // lanes)),
            depthwise_block=(channels, min(4, tile // lanes)),
            channel_block=_block(config.channels, channels, L1_BYTES // row_bytes),
            in_place=_reads_in_place(config, tile),
            # Sums side by side in memory keep the store of their first zeros.
            local_sums=unit.registers > 16,
        )
        for tile in sorted({long, 2 * lanes, lanes}, reverse=True)
    )


def _scratch(config: KernelConfig, tile: int, lanes: int) -> int:
    """Bytes of the intermediate for one tile, beside L1's worth of padded input."""
    channels = -(-config.channels // lanes) * lanes
    return L1_BYTES + tile * config.depth_multiplier * channels * _element_bytes(config)


def fits(config: KernelConfig, unit: VectorUnit, tiling: Tiling) -> bool:
    """Whether the scratch of `tiling` takes at most twice what the default allows itself.

    Some machines have 2 MiB of second-level cache.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    return _scratch(config, tiling.step_tile, lanes) <= 2 * SCRATCH_BYTES


def legal(config: KernelConfig, unit: VectorUnit, tiling: Tiling) -> bool:
    """Whether the schedule computes whole tiles with `tiling`: no predicate, no spilled register.

    The accumulators share the registers with one vector of weights (channels_last) or inputs a
    column, and with a broadcast where the multiply-add cannot take it from memory.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    (rows, vectors), (block, deep) = tiling.register_tile, tiling.depthwise_block
    tile, together = tiling.step_tile, tiling.channel_block
    if min(tile, rows, vectors, block, deep, together) < 1 or tile > LONGEST_TILE:
        return False
    broadcast = 0 if unit.registers > 16 else 1
    operands = vectors + broadcast
    if unit.by_lane and config.data_format == "channels_last":
        operands = rows + min(vectors, 2)  # a vector of each row, and one of weights in advance
    if max(rows * vectors + operands, (block + 1) * deep + broadcast) > unit.registers:
        return False
    if config.data_format == "channels_last":
        panels, groups = -(-config.filters // lanes), -(-config.channels // lanes)
        if config.channels % lanes and together != groups:
            return False
        whole = panels % vectors == groups % together == together % deep == 0
        return whole and tile % rows == tile % block == 0
    whole = lanes % rows == config.channels % together == together % block == 0
    return whole and tile % (vectors * lanes) == tile % (deep * lanes) == 0


def candidates(config: KernelConfig, unit: VectorUnit) -> tuple[Tiling, ...]:
    """Return the design space of a library's long variant: every tiling worth measuring.

    Register tiles keep two multiply-add units busy for their latency, depthwise blocks, which
    wait for their input anyway, one. The scratch fits (`fits`). The default comes first.
    """
    lanes = unit.lanes(config.accumulation_dtype)
    last = config.data_format == "channels_last"
    counts, widths = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24), (1, 2, 3, 4)
    pairs = tuple(itertools.product(counts, widths))
    parts = -(-config.channels // lanes) if last else config.channels
    blocks = (parts,) if parts < 2 else (*(n for n in (2, 4, 8, 16) if n < parts), parts)
    space = (
        Tiling(tile, register_tile, block, together, in_place, local_sums)
        for tile in ((16, 24, 32, 48, 64, 96, 128, 192, 256) if last else _whole_vectors(lanes))
        if _scratch(config, tile, lanes) <= 2 * SCRATCH_BYTES
        for register_tile in pairs
        if math.prod(register_tile) >= 2 * LATENCY
        for block in pairs
        if math.prod(block) >= LATENCY
        for in_place in (False, True)
        # What is read in place is in no block: of the few tiles at the ends, any will do.
        for together in (blocks[:1] if in_place and (last or config.strides == 1) else blocks)
        for local_sums in (False, True)
    )
    default = tilings(config, unit)[0]
    return tuple(dict.fromkeys([default, *(t for t in space if legal(config, unit, t))]))


def _whole_vectors(lanes: int) -> tuple[int, ...]:
    return tuple(n * lanes for n in (2, 3, 4, 6, 8, 12, 16))
