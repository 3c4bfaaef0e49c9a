"""CUDA: the layer as one kernel on the ordinary cores, in full float32.

A thread block owns ``step_tile`` output steps of ``filter_tile`` filters of one sample (steps on
``blockIdx.x``, filters on ``blockIdx.y``, batch on ``blockIdx.z``) and takes the channels in chunks
of ``channel_tile``:

1. ``pad``: the chunk's input rows with their halo, zeros outside the input, to shared memory;
2. ``depthwise``: for one multiplier at a time, summed over the taps in a register and left in
   shared memory, where every filter reads it;
3. ``pointwise``: each thread adds the chunk to its own accumulators, all in registers;
4. ``activation`` and ``output``: after the last chunk, bias and activation, stored as it is done.

The 32 threads of a warp lie along the axis that is contiguous in memory, filters (channels_last)
or steps (channels_first), so that their accesses to global memory coalesce.

This is the plain form. Known to be missing, and with it most of the machine's speed: tensor cores
(TF32, half precision), copies that overlap with arithmetic, pointwise weights staged in shared
memory, moves wider than one element, a sliding window over the taps, and splitting the channels
over blocks when batch and steps are few. It has been compiled and emulated, never timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_sepconv.compiler.compute import MAX_STEP_TILE, padded
from tvm_sepconv.config import KernelConfig

LANES = 32
"""Threads of a warp; weights are packed so that neighbouring threads read neighbouring filters."""

SHARED_BYTES = 48 * 1024
"""What every architecture gives a block without asking; more differs from one to the next."""


@dataclass(frozen=True)
class Tiling:
    """The decisions of the CUDA schedule, by name; records store exactly these.

    Parameters
    ----------
    step_tile, filter_tile
        A block's outputs, each a multiple of `LANES`.
    channel_tile
        Channels that pass through shared memory at a time, a power of two.
    warps
        Warps of a block, a power of two up to 32 and at least ``step_tile`` / `LANES`.
    stage_input
        Whether the input rows go through shared memory, or every tap reads them where they are.

    Raises
    ------
    ValueError
        If a number breaks its rule.
    """

    step_tile: int
    filter_tile: int
    channel_tile: int
    warps: int
    stage_input: bool

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("step_tile", self.step_tile in range(LANES, MAX_STEP_TILE + 1, LANES),
             f"a multiple of {LANES} up to {MAX_STEP_TILE}"),
            ("filter_tile", self.filter_tile > 0 and self.filter_tile % LANES == 0,
             f"a multiple of {LANES}"),
            ("channel_tile", _is_power(self.channel_tile), "a power of two"),
            ("warps", self.step_tile / LANES <= self.warps <= 32 and _is_power(self.warps),
             f"a power of two up to 32 and at least `step_tile` / {LANES}"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(
                    f"The `{name}` decision must be {rule}. Received: {name}={getattr(self, name)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, decisions: Mapping[str, Any]) -> Tiling:
        """The tiling a record's decisions describe.

        Raises
        ------
        ValueError
            If a decision is missing or unknown: the record is of another schedule.
        """
        known = {field.name for field in fields(cls)}
        if set(decisions) != known:
            raise ValueError(
                f"The schedule's decisions are {sorted(known)}. Received: {sorted(decisions)}"
            )
        numbers = {k: int(v) for k, v in decisions.items() if k != "stage_input"}
        return cls(**numbers, stage_input=bool(decisions["stage_input"]))


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _channels(config: KernelConfig) -> int:
    """The extent of the channels before the pointwise stage."""
    last = config.data_format == "channels_last"
    return padded(config.channels, LANES) if last else config.channels


def shared_bytes(config: KernelConfig, tiling: Tiling) -> int:
    """Return the shared memory a block takes at most, in bytes."""
    stride, halo = config.strides, config.effective_kernel - 1
    if config.data_format == "channels_last":
        rows = (tiling.step_tile - 1) * stride + halo + 1
    else:  # split by phase of the stride, every phase as long as the longest
        rows = min(stride, halo + 1) * (tiling.step_tile + halo // stride)
    channels = min(tiling.channel_tile, _channels(config))
    # Where nothing stops it TVM gives every thread work in the last round.
    staged = padded(rows * channels, tiling.warps * LANES) * tiling.stage_input
    return 4 * (staged + tiling.step_tile * channels)


def default_tiling(config: KernelConfig) -> Tiling:
    """Return the tiling of a layer that nobody has tuned.

    64 steps by up to 128 filters on eight warps are at most 32 accumulators a thread, a quarter of
    the registers with which two blocks share a multiprocessor. Filters are taken as wide as that
    allows, because every block beside the first repeats the depthwise stage, and only whole, so
    that no thread of the inner loops stands idle.

    Shared memory decides the rest. 32 channels fill a warp; 16 and 8 still read whole sectors of 32
    bytes, so they come before a shorter step tile, which shares the halo among fewer steps. A
    halo that fits no way (some 1400 rows) is read where it is.
    """
    panels = -(-config.filters // LANES)
    width = next(n for n in (4, 3, 2, 1) if panels % n == 0) * LANES
    most = 1 << (_channels(config).bit_length() - 1)  # a power of two, and no more than there are
    sizes = [(steps, min(most, channels)) for steps in (64, 32) for channels in (32, 16, 8)]
    tilings = [
        Tiling(steps, width, channels, warps=min(8, steps * channels // LANES), stage_input=stage)
        for stage in (True, False)
        for steps, channels in sizes
    ]
    return next(t for t in tilings if shared_bytes(config, t) <= SHARED_BYTES)


def fuse(sch: Schedule, config: KernelConfig, tiling: Tiling) -> Schedule:
    """Apply the fused schedule to ``sepconv1d(config, LANES, ragged=step_tile/LANES)``, in place.

    Raises
    ------
    ValueError
        If the depthwise tile of a chunk does not give every thread the same number of elements.
    """
    tile = tiling.step_tile * min(tiling.channel_tile, _channels(config))
    # Not only for speed: where a warp has none of them, TVM 0.27 leaves out a barrier.
    if tile % (tiling.warps * LANES):
        raise ValueError(
            f"{tiling.warps * LANES} threads cannot share the {tile} depthwise results of a chunk "
            f"evenly; lower `warps`. Received: {tiling} for {_channels(config)} channels"
        )
    pad, depthwise, pointwise, activation, output = (
        sch.get_sblock(n) for n in ("pad", "depthwise", "pointwise", "activation", "output")
    )
    bind = _bind_last if config.data_format == "channels_last" else _bind_first
    thread = bind(sch, output, tiling)
    for block in (activation, pointwise):
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, thread, preserve_unit_loops=True)
    *_, multiplier, channel = sch.get_loops(pointwise)
    axes = 4 if config.data_format == "channels_last" else 5
    outputs = sch.get_loops(activation)[-axes:]  # one thread's part of the axes
    accumulators = sch.get_loops(pointwise)[-axes - 2 : -2]
    chunk, channel = sch.split(channel, [None, tiling.channel_tile])
    sch.reorder(chunk, multiplier, channel, *accumulators)

    sch.set_scope(depthwise, 0, "shared")
    copy = sch.cache_write(depthwise, 0, "local")
    sch.compute_at(depthwise, _share_out(sch, copy, multiplier, tiling), preserve_unit_loops=True)
    if tiling.stage_input:
        sch.set_scope(pad, 0, "shared")
        _share_out(sch, pad, chunk, tiling)
    else:
        sch.compute_inline(pad)

    *_, tap = sch.get_loops(depthwise)
    sch.decompose_reduction(depthwise, tap)
    cleared = sch.get_loops(sch.decompose_reduction(pointwise, chunk))[-axes:]
    # Registers have no addresses: every index into the accumulators must be a constant.
    for loop in (*cleared, *accumulators, *outputs, sch.get_loops(output)[-1]):
        sch.unroll(loop)
    return sch


def _bind_last(sch: Schedule, output: SBlockRV, tiling: Tiling) -> LoopRV:
    """Lay warps along steps and their threads along filters; return the loop of one thread."""
    batch, step, filter_ = sch.get_loops(output)
    tile, warp, row = sch.split(step, [None, tiling.warps, tiling.step_tile // tiling.warps])
    group, panel, lane = sch.split(filter_, [None, tiling.filter_tile // LANES, LANES])
    sch.reorder(batch, group, tile, panel, warp, lane, row)
    return _bind(sch, batch, group, tile, panel, warp, lane)


def _bind_first(sch: Schedule, output: SBlockRV, tiling: Tiling) -> LoopRV:
    """Lay warps along filters and their threads along steps; return the loop of one thread."""
    batch, filter_, step = sch.get_loops(output)
    rows = LANES // tiling.warps
    factors = [None, tiling.filter_tile // LANES, tiling.warps, rows]
    group, panel, warp, row = sch.split(filter_, factors)
    tile, column, lane = sch.split(step, [None, tiling.step_tile // LANES, LANES])
    sch.reorder(batch, group, tile, panel, column, warp, lane, row)
    sch.bind(column, "vthread.y")
    return _bind(sch, batch, group, tile, panel, warp, lane)


def _bind(sch: Schedule, *loops: LoopRV) -> LoopRV:
    # Virtual threads give a thread elements 32 apart, so that a warp's elements lie side by side.
    axes = ("blockIdx.z", "blockIdx.y", "blockIdx.x", "vthread.x", "threadIdx.y", "threadIdx.x")
    for loop, axis in zip(loops, axes, strict=True):
        sch.bind(loop, axis)
    return loops[-1]


def _share_out(sch: Schedule, block: SBlockRV, under: LoopRV, tiling: Tiling) -> LoopRV:
    """Compute `block` under a loop with the whole thread block; return the loop of one thread."""
    axes = len(sch.get_loops(block))
    sch.compute_at(block, under, preserve_unit_loops=True)
    *outer, lane = sch.get_loops(block)[-axes:]
    if sch.get(lane).extent == LANES:  # fused, it is no longer found where warps do not divide
        _, warp = sch.split(sch.fuse(*outer), [None, tiling.warps])
    else:
        _, warp, lane = sch.split(sch.fuse(*outer, lane), [None, tiling.warps, LANES])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    return lane
