"""Our layer as two kernels, to compare the fused one with: what does fusing gain?

The depthwise stage runs over the whole sequence and leaves its result in memory, the pointwise one
reads it from there. All else is as in the fused form: the packed weights, the register tiles, the
depthwise block, input read in place or copied by the same rule, and about the same tiles of steps.
Batch and steps are fixed, so that whole tiles cover them with little waste, and where the input is
read in place only the rows at the ends that meet the padding are copied. Threads share the tiles in
TVM's own pool.

Measured (AVX-512, 2-core EPYC, one thread, 2026-11-22), two kernels over fused: 1.11 for 3999 steps
of 512→128 k3, whose intermediate array of 8 MB leaves the second-level cache; 1.00 for 300 steps of
1024→1024 k15; 0.97 for 500 steps of 256→256 k33 and 0.95 for 128 of 128→64 k13, where it stays
there: with the fused form's own tiles and copies they take as long as it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import te
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.tirx import PrimFunc

from tvm_sepconv.compiler import build, compute, epilogue
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.schedules import fused
from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.static import Shape, declare, set_threads
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.config import KernelConfig

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Output steps that one depthwise kernel computes, ``step_tile`` at a time.

    ``copied``: each tile's input rows are copied into scratch, with zeros outside the input.
    """

    first: int
    rows: int
    step_tile: int
    copied: bool


class TwoKernels:
    """The layer as two kernels, compiled for one shape and ready to run.

    Parameters
    ----------
    weights
        In Keras's order and shapes.

    Raises
    ------
    ValueError
        For channels_first, dtypes other than float32, or no output steps.
    """

    def __init__(
        self,
        config: KernelConfig,
        target: CpuTarget,
        shape: Shape,
        weights: Sequence[Array],
        threads: int = 1,
    ) -> None:
        _check(config, shape)
        tilings = [variant.tiling for variant in build.variants(config, target)]
        # The fused form gives a sequence to the longest tiles that fit into it.
        tiling = next((t for t in tilings if t.step_tile <= shape.out_steps), tilings[-1])
        lanes = target.lanes(config.accumulation_dtype)
        sharing = threads if shape.batch % threads else 1  # of one sample's tiles
        parts = depthwise_parts(config, lanes, tiling, shape, sharing)
        tile = even_tile(shape.out_steps, tiling.step_tile, tiling.register_tile[0], sharing)
        # Rows beyond the last step are computed, as in the fused form, but never stored.
        rows = max(-(-shape.out_steps // tile) * tile, max(p.first + p.rows for p in parts))
        functions = {
            f"depthwise{i}": _depthwise(config, lanes, tiling, shape, part, rows, threads)
            for i, part in enumerate(parts)
        }
        functions["pointwise"] = _pointwise(config, lanes, tiling, shape, rows, tile, threads)
        copied = all(part.copied for part in parts)
        self.form = f"{tile} steps a tile, input {'copied' if copied else 'in place'}"
        self.run = _linked(functions, target, config.use_bias)
        set_threads(threads)
        packed = packed_weights(config, lanes, weights)
        mid = np.zeros((shape.batch, rows, *packed[0].shape[1:]), np.float32)
        self.middle = tvm.runtime.tensor(mid)
        whole = np.from_dlpack(self.middle)
        views = [tvm_ffi.from_dlpack(whole[:, p.first : p.first + p.rows]) for p in parts]
        depthwise, *rest = (tvm.runtime.tensor(array) for array in packed)
        self.arguments = (depthwise, *views, self.middle, *rest)

    def __call__(self, x: Array, output: Array) -> None:
        """Compute `output` from `x`: float32, contiguous, of the shapes compiled for."""
        self.run(x, *self.arguments, output)


def packed_weights(config: KernelConfig, lanes: int, weights: Sequence[Array]) -> tuple[Array, ...]:
    """Keras's weights in the shapes of `compute.packed_shapes`; without a bias two of them."""
    shapes = compute.packed_shapes(config, lanes)
    multiplier, channels = config.depth_multiplier, config.channels
    panels = shapes["pointwise"][0]
    depthwise = np.zeros(shapes["depthwise"], np.float32)
    depthwise[..., :channels] = weights[0].transpose(0, 2, 1)
    by_filter = np.zeros((multiplier * channels, panels * lanes), np.float32)
    pointwise = weights[1].reshape(channels, multiplier, config.filters)
    by_filter[:, : config.filters] = pointwise.swapaxes(0, 1).reshape(-1, config.filters)
    pointwise = np.ascontiguousarray(by_filter.reshape(-1, panels, lanes).swapaxes(0, 1))
    bias = np.zeros(panels * lanes, np.float32)
    if not config.use_bias:
        return depthwise, pointwise
    bias[: config.filters] = weights[2]
    return depthwise, pointwise, bias


def even_tile(steps: int, longest: int, granule: int, threads: int = 1) -> int:
    """The tile up to `longest`, a multiple of `granule`, that covers `steps` with least waste.

    Longer ones first among equals. What counts is the share of the thread that has most tiles.
    """
    longest = min(longest, compute.padded(steps, granule))
    tiles = range(max(longest // 2 // granule, 1) * granule, longest + 1, granule)
    return min(tiles, key=lambda tile: (-(-steps // (tile * threads)) * tile, -tile))


def depthwise_parts(
    config: KernelConfig, lanes: int, tiling: Tiling, shape: Shape, threads: int = 1
) -> tuple[Part, ...]:
    """Cut the output steps in parts: all copied, or all but the ends read in place.

    By the rule of the fused form.
    """
    granule = tiling.depthwise_block[0]

    def copied(first: int, end: int) -> Part:
        tile = even_tile(end - first, max(tiling.step_tile, granule), granule, threads)
        return Part(first, -(-(end - first) // tile) * tile, tile, True)

    if not tiling.in_place:
        return (copied(0, shape.out_steps),)
    # In place a row is read up to a whole vector: so much must follow the last row read.
    beyond = -(-(compute.padded(config.channels, lanes) - config.channels) // config.channels)
    last = shape.steps - beyond + shape.left - config.effective_kernel
    first = -(-shape.left // (config.strides * granule)) * granule
    rows = min(last // config.strides + 1, shape.out_steps) - first
    tiles = range(max(tiling.step_tile // 2 // granule, 1) * granule, tiling.step_tile + 1, granule)
    tile = max(tiles, key=lambda tile: (rows // (tile * threads) * tile, tile))
    whole = rows // (tile * threads) * tile * threads
    if whole <= 0:
        return (copied(0, shape.out_steps),)
    parts = [Part(first, whole, tile, False)]
    if first > 0:
        parts.insert(0, copied(0, first))
    if first + whole < shape.out_steps:
        parts.append(copied(first + whole, shape.out_steps))
    return tuple(parts)


def _depthwise(
    config: KernelConfig,
    lanes: int,
    tiling: Tiling,
    shape: Shape,
    part: Part,
    rows: int,
    threads: int,
) -> PrimFunc:
    """The scheduled kernel of a part: (x, weights, its rows of the middle of `rows` steps)."""
    m, c, stride, left = config.depth_multiplier, config.channels, config.strides, shape.left
    x = te.placeholder((shape.batch, shape.steps, c), name="x")
    weights = te.placeholder(compute.packed_shapes(config, lanes)["depthwise"], name="weights")
    lined = weights.shape[2]
    taps = te.reduce_axis((0, config.kernel_size), "tap")
    first = part.first * stride - left  # the input row of the part's first tap

    def read(n: Any, r: Any, ch: Any) -> Any:
        return x[n, r + first, ch]

    source = read
    if part.copied:
        long = (part.rows - 1) * stride + config.effective_kernel
        source = te.compute(
            (shape.batch, long, lined),
            lambda n, r, ch: te.if_then_else(
                te.all(r + first >= 0, r + first < shape.steps, ch < c), read(n, r, ch), 0.0
            ),
            name="pad",
        )
    depthwise = te.compute(
        (shape.batch, part.rows, m, lined),
        lambda n, t, j, ch: te.sum(
            source(n, t * stride + taps * config.dilation_rate, ch) * weights[taps, j, ch],
            axis=taps,
        ),
        name="depthwise",
    )
    strides = (rows * m * lined, m * lined, lined, 1)
    func = te.create_prim_func([x, weights, depthwise])
    sch = Schedule(declare(declare(func, "x", "align=4"), "depthwise", f"strides={strides}"))
    block = sch.get_sblock("depthwise")
    batch, step, *_ = sch.get_loops(block)
    tile, step = sch.split(step, [None, part.step_tile])
    tile = _shared(sch, batch, tile, shape.batch * part.rows // part.step_tile, threads)
    together = tiling.channel_block if part.copied else -(-c // lanes)
    channels = fused.depthwise_last(sch, block, lanes, tiling, together)
    if part.copied:
        pad = sch.get_sblock("pad")
        sch.compute_at(pad, channels, preserve_unit_loops=True)
        fused.vectorize_head(sch, sch.get_loops(pad)[-1], min(together * lanes, c), lanes)
    return sch.mod["main"]


def _pointwise(
    config: KernelConfig,
    lanes: int,
    tiling: Tiling,
    shape: Shape,
    mid_rows: int,
    step_tile: int,
    threads: int,
) -> PrimFunc:
    """The scheduled kernel (middle, weights, bias if any, output)."""
    m, c = config.depth_multiplier, config.channels
    shapes = compute.packed_shapes(config, lanes)
    panels = shapes["pointwise"][0]
    middle = te.placeholder((shape.batch, mid_rows, m, shapes["depthwise"][2]), name="middle")
    weights = te.placeholder(shapes["pointwise"], name="weights")
    bias = te.placeholder(shapes["bias"], name="bias")
    multiplier = te.reduce_axis((0, m), "multiplier")
    channel = te.reduce_axis((0, c), "channel")
    whole = -(-shape.out_steps // step_tile) * step_tile
    pointwise = te.compute(
        (shape.batch, whole, panels, lanes),
        lambda n, t, fo, fi: te.sum(
            middle[n, t, multiplier, channel] * weights[fo, multiplier * c + channel, fi],
            axis=[multiplier, channel],
        ),
        name="pointwise",
    )

    def finished(n: Any, t: Any, fo: Any, fi: Any) -> Any:
        value = pointwise[n, t, fo, fi]
        value = value + bias[fo * lanes + fi] if config.use_bias else value
        return epilogue.apply(config.activation, value)

    activation = te.compute(pointwise.shape, finished, name="activation")
    output = te.compute(
        (shape.batch, shape.out_steps, config.filters),
        lambda n, t, f: activation[n, t, f // lanes, f % lanes],
        name="output",
    )
    func = te.create_prim_func([middle, weights, *[bias] * config.use_bias, output])
    sch = Schedule(declare(func, "output", "align=4"))
    _schedule_pointwise(sch, config, lanes, tiling, step_tile, threads)
    return sch.mod["main"]


def _schedule_pointwise(
    sch: Schedule,
    config: KernelConfig,
    lanes: int,
    tiling: Tiling,
    step_tile: int,
    threads: int,
) -> None:
    """The last stages of the fused form, without the depthwise one in their tile."""
    names = ("pointwise", "activation", "output")
    pointwise, activation, output = (sch.get_sblock(name) for name in names)
    rows, vectors = tiling.register_tile
    batches, step, filter_ = sch.get_loops(output)
    tile, block, row = sch.split(step, [None, step_tile // rows, rows])
    group, panel, lane = sch.split(filter_, [None, vectors, lanes])
    sch.reorder(batches, tile, group, block, row, panel, lane)
    _shared(sch, batches, tile, threads, threads)
    if config.filters % lanes == 0:
        sch.compute_inline(activation)
        fused.unroll(sch, [row, panel], lane)
    else:
        sch.compute_at(activation, block, preserve_unit_loops=True)
        fused.unroll(sch, sch.get_loops(activation)[-3:-1], sch.get_loops(activation)[-1])
    sch.compute_at(pointwise, block, preserve_unit_loops=True)
    sch.set_scope(pointwise, 0, "local")
    *_, row, panel, lane, multiplier, channel = sch.get_loops(pointwise)
    sch.reorder(multiplier, channel, row, panel, lane)
    fused.accumulate(sch, pointwise, multiplier, [row, panel], lane)


def _shared(sch: Schedule, batch: LoopRV, tile: LoopRV, tiles: int, threads: int) -> LoopRV:
    """Let threads share the tiles of all samples, if there are enough; returns the tiles' loop."""
    tile = sch.fuse(batch, tile)
    if 1 < threads <= tiles:
        sch.parallel(tile)
    return tile


def _linked(functions: dict[str, PrimFunc], target: CpuTarget, use_bias: bool) -> Any:
    """One function (x, depthwise weights, views, middle, pointwise weights, bias, output)."""
    kernels = build.compile_kernels(functions, target)
    tools = toolchain(target.triple)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kernels.write_to_file(str(work / "kernels.o"))
        (work / "calls.c").write_text(_calls(len(functions) - 1, use_bias))
        include = Path(tvm_ffi.libinfo.find_include_path())
        tools.object_file(work / "calls.c", work / "calls.o", (include,))
        tools.shared_library([work / "kernels.o", work / "calls.o"], work / "both.so")
        return tvm_ffi.load_module(str(work / "both.so"), keep_module_alive=True)["both"]


def _calls(parts: int, use_bias: bool) -> str:
    """C that calls the kernels one after the other: one call from Python, as of the fused form."""
    middle = 2 + parts
    calls: dict[str, tuple[int, ...]] = {f"depthwise{i}": (0, 1, 2 + i) for i in range(parts)}
    calls["pointwise"] = tuple(range(middle, middle + 3 + use_bias))
    lines = ["#include <tvm/ffi/c_api.h>"]
    signature = "(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result)"
    lines += [f"int __tvm_ffi_{name}{signature};" for name in calls]
    lines += [f"int __tvm_ffi_both{signature};", f"int __tvm_ffi_both{signature} {{"]
    lines += ["  int status = 0;", "  (void)count;"]
    for name, taken in calls.items():
        values = ", ".join(f"args[{i}]" for i in taken)
        call = f"__tvm_ffi_{name}(self, a, {len(taken)}, result)"
        lines.append(f"  if (!status) {{ TVMFFIAny a[] = {{{values}}}; status = {call}; }}")
    return "\n".join([*lines, "  return status;", "}", ""])


def _check(config: KernelConfig, shape: Shape) -> None:
    if config.data_format != "channels_last":
        raise ValueError(
            "The `data_format` of the two-kernel form must be 'channels_last'; measure it with "
            f"that format. Received: data_format={config.data_format}"
        )
    if config.dtype != "float32":
        raise ValueError(
            "The `dtype` of the two-kernel form must be 'float32', as the benchmark's weights are. "
            f"Received: dtype={config.dtype}"
        )
    if min(shape.batch, shape.out_steps) < 1:
        raise ValueError(
            "The two-kernel form needs at least one sample and one output step. "
            f"Received: batch={shape.batch}, out_steps={shape.out_steps}"
        )
