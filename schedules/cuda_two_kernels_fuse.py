"""The schedules of `cuda_two_kernels`: the depthwise stage to memory, and a matrix product.

1. ``depthwise``: a block owns ``step_tile`` steps of 16 or 32 channels of one sample; its input
   rows go to shared memory, each thread sums ``run`` neighbouring steps of a channel;
2. ``pointwise``: as in `cuda_cores_fuse`, but its operand is copied, and no stage is between.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc
from tvm_sepconv.compiler.schedules.cuda_cores_fuse import (
    COPY,
    SHARED,
    UNROLLED,
    bind_output,
    copy,
    finish,
    stage_input,
    sum_taps,
    unroll,
    unroll_copies,
)
from tvm_sepconv.compiler.schedules.cuda_packing import LANES
from tvm_sepconv.compiler.schedules.cuda_two_kernels import Tiling, depthwise_channels

from tvm_sepconv.compiler.compute_cuda import depthwise_conv1d, pointwise_conv1d
from tvm_sepconv.config import KernelConfig


def schedule(config: KernelConfig, tiling: Tiling, aligned: bool) -> dict[str, PrimFunc]:
    """Return both scheduled kernels by name."""
    return {
        "depthwise": _depthwise(config, tiling, aligned),
        "pointwise": _pointwise(config, tiling, aligned),
    }


def _depthwise(config: KernelConfig, tiling: Tiling, aligned: bool) -> PrimFunc:
    sch = Schedule(depthwise_conv1d(config, COPY if aligned else 1))
    depthwise, store = sch.get_sblock("depthwise"), sch.get_sblock("intermediate")
    channels = depthwise_channels(config)
    runs = tiling.step_tile // tiling.run
    batch, row, step = sch.get_loops(store)
    group, channel = sch.split(row, [None, channels])
    tile, run, near = sch.split(step, [None, runs, tiling.run])
    sch.reorder(batch, group, tile, run, channel, near)
    warp, lane = sch.split(sch.fuse(run, channel), [None, LANES])
    axis = {batch: "blockIdx.z", group: "blockIdx.y", tile: "blockIdx.x"}
    for loop, name in (axis | {warp: "threadIdx.y", lane: "threadIdx.x"}).items():
        sch.bind(loop, name)
    sch.unroll(near)
    sch.set_scope(depthwise, 0, "local")
    sum_taps(sch, depthwise, lane, config, tiling)
    stage_input(sch, config, tile, runs * channels // LANES, aligned)
    *_, tap, _ = sch.get_loops(depthwise)
    unroll(sch, sch.get_loops(sch.decompose_reduction(depthwise, tap))[-1])
    unroll_copies(sch, tile)
    return sch.mod["main"]


def _pointwise(config: KernelConfig, tiling: Tiling, aligned: bool) -> PrimFunc:
    sch = Schedule(pointwise_conv1d(config, COPY if aligned else 1))
    pad, pointwise, activation, output = (
        sch.get_sblock(n) for n in ("pad", "pointwise", "activation", "output")
    )
    tile, thread = bind_output(sch, output, config, tiling, aligned)
    for block in (activation, pointwise):
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, thread, preserve_unit_loops=True)
    unroll(sch, *sch.get_loops(activation)[-3:])
    *_, sample, step, filter_, channel = sch.get_loops(pointwise)
    factors = [None, tiling.channel_tile // UNROLLED, UNROLLED]
    chunk, middle, channel = sch.split(channel, factors)
    sch.reorder(chunk, middle, channel, sample, step, filter_)
    unroll(sch, channel, sample, step, filter_)
    copy(sch, sch.cache_read(pointwise, 1, SHARED), chunk, tiling.warps, COPY)
    sch.set_scope(pad, 0, SHARED)
    copy(sch, pad, chunk, tiling.warps, 1)
    sch.storage_align(pad, 0, axis=-2, factor=8, offset=4)
    unroll(sch, *sch.get_loops(sch.decompose_reduction(pointwise, chunk))[-3:])
    finish(sch, tile, chunk, tiling, copies=2, rest=1)
    return sch.mod["main"]
