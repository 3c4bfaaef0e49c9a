"""The layer as one kernel on a GPU's ordinary cores, in full float32.

A thread block owns ``step_tile`` output steps of ``filter_tile`` filters of one sample (steps on
``blockIdx.x``, filters on ``blockIdx.y``, batch on ``blockIdx.z``) and takes the channels in chunks
of ``channel_tile``. For each chunk:

1. the pointwise weights, the taps and ``pad``, the input rows with their halo, zeros outside the
   input, go to shared memory, 16 bytes a copy. With two stages they are copied (cp.async) while
   the chunk before is computed;
2. ``depthwise``: a thread sums ``run`` neighbouring steps of one channel in registers, the taps
   unrolled, so that an input element is read once from shared memory for all the taps that use
   it; the sums go to shared memory, steps contiguous;
3. ``pointwise``: each thread adds the chunk to its ``rows`` x ``columns`` accumulators, reading
   both operands 16 bytes at a time.

After the last chunk ``activation`` and ``output``: bias and activation in registers, 16 bytes a
store. The two data formats differ in ``pad`` and ``output`` only.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import PrimFunc
from tvm_sepconv.compiler.schedules.cuda_cores import Tiling
from tvm_sepconv.compiler.schedules.cuda_packing import LANES

from tvm_sepconv.compiler.compute_cuda import sepconv1d
from tvm_sepconv.config import KernelConfig

SHARED = "shared.dyn"
UNROLLED = 8  # channels of the pointwise loop that are written out
COPY = 4  # elements of the widest move


_UNROLLED_TAPS = 2048
"""Multiply-adds of one thread's depthwise sums that are written out; beyond, taps are a loop."""


def fuse(config: KernelConfig, tiling: Tiling, aligned: bool) -> PrimFunc:
    """Return the scheduled kernel of one variant; `aligned` as in `cuda.can_align`."""
    sch = Schedule(sepconv1d(config, COPY if aligned else 1))
    depthwise, pointwise, activation, output = (
        sch.get_sblock(n) for n in ("depthwise", "pointwise", "activation", "output")
    )
    tile, thread = bind_output(sch, output, config, tiling, aligned)
    for block in (activation, pointwise):
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, thread, preserve_unit_loops=True)
    # Registers have no addresses: every index into the accumulators must be a constant.
    unroll(sch, *sch.get_loops(activation)[-3:])
    chunk = take_channels_in_chunks(sch, pointwise, tiling)
    copy(sch, sch.cache_read(pointwise, 1, SHARED), chunk, tiling.warps, COPY)
    _share_depthwise(sch, depthwise, chunk, config, tiling)
    if tiling.stage_input:
        copy(sch, sch.cache_read(depthwise, 1, SHARED), chunk, tiling.warps, COPY)
        stage_input(sch, config, chunk, tiling.warps, aligned)
    else:
        sch.compute_inline(sch.get_sblock("pad"))
    _decompose(sch, depthwise, pointwise, chunk)
    finish(sch, tile, chunk, tiling, copies=3 if tiling.stage_input else 1, rest=2)
    return sch.mod["main"]


def finish(
    sch: Schedule, tile: LoopRV, chunk: LoopRV, tiling: Tiling, copies: int, rest: int
) -> None:
    """Let the `copies` of a chunk overlap with the `rest` of the one before."""
    if tiling.stages > 1:
        sch.annotate(chunk, "software_pipeline_stage", [0] * copies + [1] * rest)
        sch.annotate(chunk, "software_pipeline_order", list(range(copies + rest)))
        sch.annotate(chunk, "software_pipeline_async_stages", [0])
    unroll_copies(sch, tile)


def unroll_copies(sch: Schedule, tile: LoopRV) -> None:
    """Have short loops below `tile` written out by nvcc."""
    sch.annotate(tile, "pragma_auto_unroll_max_step", 16)
    sch.annotate(tile, "pragma_unroll_explicit", 0)


def bind_output(
    sch: Schedule, output: SBlockRV, config: KernelConfig, tiling: Tiling, aligned: bool
) -> tuple[LoopRV, LoopRV]:
    """Return the loop over tiles and that of one thread.

    A warp is 4 x 8 threads (8 x 4 where there are only four columns of them), so that its operands
    are 4 and 8 different 16 bytes. What a thread has beyond 4 x 4 elements lies a warp's width
    further, as virtual threads: so neighbouring threads read and write neighbouring 16 bytes.
    """
    last = config.data_format == "channels_last"
    batch, *axes = sch.get_loops(output)
    step, filter_ = axes if last else reversed(axes)
    tile, *steps = sch.split(step, [None, *tiling.step_factors])
    group, *filters = sch.split(filter_, [None, *tiling.filter_factors])
    inner = [steps.pop(), filters.pop()]
    if not last:
        inner.reverse()
    pairs = (loop for pair in zip(steps, filters, strict=True) for loop in pair)
    sch.reorder(batch, group, tile, *pairs, *inner)
    (far_row, warp_row, row), (far_column, warp_column, column) = steps, filters
    warp, thread = sch.fuse(warp_row, warp_column), sch.fuse(row, column)
    axis = {batch: "blockIdx.z", group: "blockIdx.y", tile: "blockIdx.x"}
    axis |= {far_row: "vthread.y", far_column: "vthread.x"}
    for loop, name in (axis | {warp: "threadIdx.y", thread: "threadIdx.x"}).items():
        sch.bind(loop, name)
    unroll(sch, *inner[: 1 + (not aligned)])
    if aligned:
        sch.vectorize(inner[1])
    return tile, thread


def take_channels_in_chunks(sch: Schedule, pointwise: SBlockRV, tiling: Tiling) -> LoopRV:
    """Return the loop over chunks, which are of one multiplier each."""
    *_, sample, row, column, multiplier, channel = sch.get_loops(pointwise)
    factors = [None, tiling.channel_tile // UNROLLED, UNROLLED]
    outer, middle, channel = sch.split(channel, factors)
    sch.reorder(multiplier, outer, middle, channel, sample, row, column)
    unroll(sch, channel, sample, row, column)
    return sch.fuse(multiplier, outer)


def copy(sch: Schedule, block: SBlockRV, under: LoopRV, warps: int, vector: int) -> None:
    """Compute `block` under a loop with the whole thread block, `vector` elements a thread."""
    axes = len(sch.get_loops(block))
    sch.compute_at(block, under, preserve_unit_loops=True)
    together = sch.fuse(*sch.get_loops(block)[-axes:])
    _, warp, lane, moved = sch.split(together, [None, warps, LANES, vector])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(moved)


def _share_depthwise(
    sch: Schedule, block: SBlockRV, under: LoopRV, config: KernelConfig, tiling: Tiling
) -> None:
    # Neighbouring threads have neighbouring channels: reading rows of channels meets no bank twice,
    # nor does writing 16 bytes every `step_tile` + 4 elements.
    sch.transform_layout(block, ("write", 0), lambda n, t, j, c: (n, j, c, t))
    sch.set_scope(block, 0, SHARED)
    store = sch.cache_write(block, 0, "local")
    sch.compute_at(store, under, preserve_unit_loops=True)
    sch.storage_align(store, 0, axis=-2, factor=8, offset=4)
    *_, sample, multiplier, channel, step = sch.get_loops(store)
    group, *run = sch.split(step, [None, tiling.run // min(4, tiling.run), min(4, tiling.run)])
    sch.reorder(sample, multiplier, group, channel, *run)
    tasks = sch.fuse(sample, multiplier, group, channel)
    _, warp, lane = sch.split(tasks, [None, tiling.warps, LANES])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.unroll(run[0])
    sch.vectorize(run[1])
    sum_taps(sch, block, lane, config, tiling)


def sum_taps(
    sch: Schedule, block: SBlockRV, under: LoopRV, config: KernelConfig, tiling: Tiling
) -> None:
    """Sum a thread's run in registers, every tap written out: its inputs slide through them."""
    sch.compute_at(block, under, preserve_unit_loops=True)
    *_, sample, step, multiplier, channel, tap = sch.get_loops(block)
    sch.reorder(sample, multiplier, channel, tap, step)
    sch.unroll(step)
    if config.kernel_size * tiling.run <= _UNROLLED_TAPS:
        sch.unroll(tap)


def stage_input(
    sch: Schedule, config: KernelConfig, under: LoopRV, warps: int, aligned: bool
) -> None:
    """Bring the input rows of some channels to shared memory."""
    pad = sch.get_sblock("pad")
    sch.set_scope(pad, 0, SHARED)
    if config.data_format == "channels_last":
        copy(sch, pad, under, warps, COPY if aligned else 1)
        return
    # As in memory, steps contiguous; an odd pitch, as threads read different channels.
    sch.transform_layout(pad, ("write", 0), lambda n, t, c: (n, c, t))
    sample, step, channel = sch.get_loops(pad)
    sch.reorder(sample, channel, step)
    copy(sch, pad, under, warps, 1)
    sch.storage_align(pad, 0, axis=-2, factor=2, offset=1)


def _decompose(sch: Schedule, depthwise: SBlockRV, pointwise: SBlockRV, chunk: LoopRV) -> None:
    *_, tap, _ = sch.get_loops(depthwise)
    unroll(sch, sch.get_loops(sch.decompose_reduction(depthwise, tap))[-1])
    unroll(sch, *sch.get_loops(sch.decompose_reduction(pointwise, chunk))[-3:])


def unroll(sch: Schedule, *loops: LoopRV) -> None:
    """Write out every turn of the loops."""
    for loop in loops:
        sch.unroll(loop)
