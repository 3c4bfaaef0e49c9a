"""Which limit of the machine holds a call of the fused kernel: arithmetic, nothing is measured.

The model counts the bytes that must cross into the first cache from the second ("L2"), into the
second from the third ("L3"), and into that from memory ("DRAM"), on one thread. A strip is one
register tile's share of a matrix over all channels of the intermediate.

======== ===============================================================================
of       L2
======== ===============================================================================
input    each tile's rows once, halo included; once a depthwise block of steps if its
         footprint (rows, taps, result) over a channel block exceeds the first cache
taps     once a tile; once a depthwise block in the same case
result   the intermediate is written once and read once a strip of weights, unless a tile
         of it and a strip of weights fit the first cache together: then never
weights  once a tile, unless a strip of weights and one of the intermediate exceed the
         first cache together: then once a register block of steps
output   once
======== ===============================================================================

From further away: input and output once, from the nearest level that holds the whole working set
(cold: from DRAM); the weights once a tile from the nearest level that holds them and the scratch
of a tile. What crosses one boundary crosses all that are nearer. Bytes written count as bytes read
(see `limits`), and what a smarter cache could avoid is not counted: the times are lower bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvm_sepconv.bench.limits import Limits
from tvm_sepconv.kernel_config import DTYPE_BYTES, KernelConfig

FMA = "FMA"
MEMORY = ("L2", "L3", "DRAM")


@dataclass(frozen=True)
class Traffic:
    """What one call must move.

    Parameters
    ----------
    bytes
        By the level that delivers them: "L2", "L3", "DRAM"; none crosses a level that is not there.
    working_set_bytes
        Input, packed weights, output and the scratch of one tile.
    source
        The level that input and output come from.
    """

    bytes: dict[str, int]
    working_set_bytes: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Traffic:
        """Undo `to_dict`."""
        return cls(**plain)


@dataclass(frozen=True)
class Bound:
    """The least time that one of the machine's limits leaves a call.

    Parameters
    ----------
    level
        "FMA", "L2", "L3" or "DRAM".
    gbps
        That level's bandwidth in GB/s; None for "FMA".
    """

    level: str
    time_us: float
    gbps: float | None


def bound(traffic: Traffic, flops: int, limits: Limits, isa: str) -> Bound:
    """Return the limit that takes longest."""
    multiply_adds = Bound(FMA, flops / limits.peak_gflops[isa] / 1e3, None)
    return max(multiply_adds, memory_bound(traffic, limits), key=lambda b: b.time_us)


def memory_bound(traffic: Traffic, limits: Limits) -> Bound:
    """Return the level of memory that takes longest, whether or not it takes longest of all."""
    times = (
        Bound(level, traffic.bytes[level] / gbps / 1e3, gbps)
        for level, gbps in limits.bandwidth.items()
        if level in traffic.bytes
    )
    return max(times, key=lambda b: b.time_us)


def traffic(
    config: KernelConfig,
    tiling: Mapping[str, Any],
    lanes: int,
    batch: int,
    steps: int,
    out_steps: int,
    cache_bytes: Mapping[str, int],
    cold: bool = False,
) -> Traffic:
    """Return the bytes that one call moves, by the model above.

    Parameters
    ----------
    tiling
        The decisions of the library's long variant: ``variant.to_dict()["decisions"]``.
    lanes
        Elements of the accumulation dtype in a vector.
    steps, out_steps
        Of the input and of the output.
    cache_bytes
        As of `limits.Limits`.
    cold
        Input and output lie in memory, wherever they would fit.
    """
    call = _Call(config, _Decisions.of(config, tiling, lanes), lanes, batch, steps, out_steps)
    working_set = call.input + call.output + call.weights + call.scratch
    caches = {level: size for level, size in cache_bytes.items() if level in MEMORY}
    ends_from = "DRAM" if cold else _holder(working_set, caches)
    weights_from = _holder(call.weights + call.scratch, caches)
    moved = {
        level: (call.input + call.output) * _crosses(ends_from, level)
        + call.weights * call.tiles * _crosses(weights_from, level)
        for level in MEMORY[1:]
        if level == "DRAM" or level in caches
    }
    first = cache_bytes["L1"]
    nearest = call.depthwise(first) + call.matrix_product(first) + call.output
    return Traffic({"L2": max(nearest, *moved.values()), **moved}, working_set, ends_from)


def _holder(size: int, caches: Mapping[str, int]) -> str:
    """The nearest level of memory, from the second on, in which so many bytes lie."""
    return next((level for level in MEMORY if size <= caches.get(level, 0)), "DRAM")


def _crosses(source: str, level: str) -> bool:
    """Whether what lies in `source` is delivered by `level` on its way."""
    return MEMORY.index(source) >= MEMORY.index(level)


@dataclass(frozen=True)
class _Decisions:
    """All that the model knows of the schedule.

    The last two are of register tiles; packed weights lie together by panels, so that a strip of
    them is whole panels, however many of its filters the tile has.
    """

    tile_steps: int
    channel_block: int
    depthwise_steps: int
    register_steps: int
    strip_filters: int
    strips: int

    @classmethod
    def of(cls, config: KernelConfig, tiling: Mapping[str, Any], lanes: int) -> _Decisions:
        """Read a record's decisions; rows and blocks are of steps or, channels first, not."""
        rows, vectors = map(int, tiling["register_tile"])
        block, deep = map(int, tiling["depthwise_block"])
        last = config.data_format == "channels_last"
        channel_block = int(tiling.get("channel_block") or config.channels)
        return cls(
            tile_steps=int(tiling["step_tile"]),
            channel_block=min(channel_block, config.channels),
            depthwise_steps=block if last else deep * lanes,
            register_steps=rows if last else vectors * lanes,
            strip_filters=vectors * lanes if last else lanes,
            strips=-(-config.filters // (vectors * lanes if last else rows)),
        )


class _Call:
    """Sizes of one call, in bytes."""

    def __init__(
        self,
        config: KernelConfig,
        decisions: _Decisions,
        lanes: int,
        batch: int,
        steps: int,
        out_steps: int,
    ) -> None:
        item, self._item = DTYPE_BYTES[config.dtype], DTYPE_BYTES[config.accumulation_dtype]
        self._config, self._decisions, self._out_steps = config, decisions, batch * out_steps
        self._depth = config.mid_channels * self._item  # of one step of the intermediate
        self.tiles = batch * -(-out_steps // decisions.tile_steps)
        self.input = batch * steps * config.channels * item
        self.output = batch * out_steps * config.filters * item
        self._taps = config.kernel_size * self._depth
        self._pointwise = -(-config.filters // lanes) * lanes * self._depth
        self.weights = self._taps + self._pointwise
        self._tile = min(decisions.tile_steps, out_steps)  # in steps
        self._tile_input = self._rows(self._tile) * config.channels * item
        self._tile_result = self._tile * self._depth
        self.scratch = self._tile_input + self._tile_result

    def _rows(self, steps: int) -> int:
        """Input steps that so many neighbouring output steps are made of; gaps are left out."""
        config = self._config
        reach = (steps - 1) * config.strides + config.effective_kernel
        return min(reach, steps * config.kernel_size)

    def depthwise(self, first_cache: int) -> int:
        """What crosses between the first two caches for the depthwise stage, result excepted."""
        config, steps = self._config, min(self._decisions.depthwise_steps, self._tile)
        rows = self._rows(steps)
        results = (steps + config.kernel_size) * config.depth_multiplier
        if (rows + results) * self._decisions.channel_block * self._item <= first_cache:
            return self.tiles * (self._tile_input + self._taps)
        blocks = -(-self._out_steps // steps)
        return blocks * (rows * config.channels * self._item + self._taps)

    def matrix_product(self, first_cache: int) -> int:
        """What crosses between them for the intermediate and the pointwise weights."""
        decisions = self._decisions
        strip = decisions.strip_filters * self._depth
        crossed = 0
        if self._tile_result + strip > first_cache:
            crossed = self._out_steps * self._depth * (1 + decisions.strips)
        if decisions.register_steps * self._depth + strip <= first_cache:
            return crossed + self.tiles * self._pointwise
        blocks = -(-self._out_steps // decisions.register_steps)
        return crossed + blocks * self._pointwise
