"""CUDA: the layer as one kernel whose pointwise stage runs on the tensor cores.

For float16 and bfloat16, and for float32 where TF32 is allowed (from sm_80 on), with sums in
float32. A thread block owns ``step_tile`` output steps of ``filter_tile`` filters of one sample and
takes the channels in chunks of ``channel_tile``:

1. the chunk's input rows with their halo, zeros outside the input, and its pointwise weights come
   to shared memory by cp.async, with two ``buffers`` while the chunk before is computed;
2. depthwise on the ordinary cores: a thread has a pair of channels (one, where four bytes or a
   row's end forbid pairs) of ``run`` steps, whose rows pass through a window of ``run`` registers:
   one row and one weight are read a tap, for ``run`` multiply-adds a channel. The sums are rounded
   once, to the operand's type, and left in shared memory;
3. pointwise: each of ``step_warps`` × ``filter_warps`` warps adds the chunk to its own tile of the
   outputs, in registers, by mma.sync with operands from ldmatrix;
4. the sums began with the bias; after the last chunk, the activation in the registers, and out.

Stride s and dilation d need no form of their own: with g = gcd(s, d), taps of one residue modulo
s/g and steps d/g apart share rows, so that is how a thread's steps lie. channels_first exchanges
the operands, filters down and steps along, so that neighbours in a lane are neighbours in memory.

sm_75 runs the same kernel with one buffer, as it cannot copy in the background: another block of
its multiprocessor works meanwhile. The device functions copy at once there and make an mma.sync of
float16 from two of half the depth. bfloat16 it has none of: each lane gathers its operands by 32
shuffles, 208 instructions in all for 64 multiply-adds, a quarter of the ordinary cores' speed; in
place of a schedule of its own.

Shared memory is padded: rows of the two operands are 16 bytes longer than a multiple of 32 (TF32
weights 32), so that the eight rows of an ldmatrix lie in different banks.

Counted in the machine code for sm_90 (nvcc 13.0), 256 to 256 channels, 33 taps, the default for
much work. float16: eight taps are 173 instructions, 128 of them FFMA; a chunk is 925 a warp, 1850
cycles of a scheduler; in shared memory and L1 it takes 2030 cycles, 768 of them for ldmatrix and
528 for the depthwise weights, which is the limit, and 830 in the tensor cores. TF32: 90
instructions, 64 of them FFMA; 669 a warp and chunk, 1340 cycles; 1770 (768 operands, 264 weights);
830. So 32 x 1024 steps would take 31 500 and 55 000 cycles. Predictions: it never ran on a GPU.

Rejected: wmma, whose accumulators an epilogue reaches only through shared memory; weights in
fragment order straight from L2, which reads them ``step_warps`` times; depthwise in half2, which
halves its time but rounds at every tap; all taps written out, or one address for the weights of
eight taps, which spills at 128 registers; two warps for the same filters in TF32, which round each
weight twice (807 instructions). Not done: two runs of 16 pairs of channels a warp, which would read
weights once for both, but need rows of the input in another order, lest they meet in a bank.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_sepconv.compiler.schedules.cuda_packing import CHANNELS, LANES, padded
from tvm_sepconv.compiler.schedules.cuda_tensor_plan import Plan, Tiling

from tvm_sepconv import compiler
from tvm_sepconv.config import KernelConfig

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

DEVICE_SOURCE = Path(compiler.__file__).parent / "cuda_functions.cuh"
"""The device functions that the kernels call; the text stands before them in a library."""

TF32_CAPABILITY = ASYNC_CAPABILITY = 80
"""The first compute capability with TF32, and with copies in the background."""

_SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}
_REGISTERS = 255
_CANDIDATES = 192


def shared_bytes(config: KernelConfig, tiling: Tiling) -> int:
    """Return the shared memory a block takes, in bytes."""
    return int(Plan(config, tiling).shared_bytes)


def functions(config: KernelConfig, tiling: Tiling, aligned: bool) -> dict[str, PrimFunc]:
    """Return the form's one kernel, ``sepconv1d``; `aligned` is the variant of 16-byte moves."""
    # TVM is not needed to read records and to choose.
    from tvm_sepconv.compiler.schedules import cuda_tensor_kernel

    return {"sepconv1d": cuda_tensor_kernel.kernel(Plan(config, tiling), aligned)}


def refusal(config: KernelConfig, allow_tf32: bool, arch: str, tiling: Tiling) -> str | None:
    """Return why `tiling` cannot serve the layer on `arch`, None where it can."""
    capability = int(arch.removeprefix("sm_"))
    if config.accumulation_dtype != "float32" or config.dtype == "float64":
        return "tensor cores add in float32 only"
    if config.dtype == "float32" and not allow_tf32:
        return "TF32 is not allowed"
    if config.dtype == "float32" and capability < TF32_CAPABILITY:
        return "no TF32 before sm_80"
    if tiling.buffers > 1 and capability < ASYNC_CAPABILITY:
        return "no asynchronous copies before sm_80"
    if shared_bytes(config, tiling) > 1024 * _SHARED_KIB.get(capability, 99):
        return "more shared memory than a block may have"
    # Beside the sums: the window and the results, and addresses.
    needed = tiling.sums + 2 * tiling.run * Plan(config, tiling).width + 32
    if needed > min(_REGISTERS, 65536 // (tiling.warps * LANES)):
        return "more registers than a thread may have"
    return None


def default_tilings(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the tilings of a layer that nobody has tuned: for much work, and for little.

    Much: 64 steps by up to 256 filters on eight warps are 64 accumulators a thread, which leaves
    two blocks a multiprocessor (128 registers a thread): one multiplies while the other sums its
    taps, as the stages of one block follow each other. A block has all filters where it can,
    because every block beside the first repeats the depthwise stage, whose FFMA are the limit:
    64 × 64 channels × 33 taps are 1056 cycles of a multiprocessor's 128 lanes, 64 × 256 × 64 on
    its tensor cores some 800.

    Little (the most blocks from one sample): 16 steps by 64 filters on four warps.

    Chunks of 64 channels of 16 bits give a warp pairs of a whole row, 32 of float32 the same. Where
    two blocks of them have no room (before sm_90, or a long halo), `cost` takes smaller ones; a
    halo that fits no way is read where it is.

    Raises
    ------
    ValueError
        If `arch` has no tensor cores for the dtype, or the dtype none anywhere.
    """
    most = 64 if config.dtype != "float32" else 32
    tilings = []
    for steps, width, step_warps in ((64, 256, 2), (16, 64, 1)):
        width = min(width, padded(config.filters, LANES))
        width = _even(padded(config.filters, LANES), width)
        filter_warps = math.gcd(width // 16, 4)
        if config.dtype == "float32" and step_warps == 2 and width % 128 == 0:
            step_warps, filter_warps = 1, 8  # or two warps round each weight to TF32
        options = [
            Tiling(steps, width, min(channels, padded(config.channels, CHANNELS)), step_warps,
                   filter_warps, run, buffers, stage)
            for stage in (True, False)
            for buffers in (2, 1)
            for channels in (most, 32, 16)
            for run in ((8,) if steps == 64 else (4,))
        ]  # fmt: skip
        reasons = [refusal(config, allow_tf32, arch, t) for t in options]
        if None not in reasons:
            raise ValueError(
                f"The tensor cores of {arch} do not serve a kernel of dtype {config.dtype} with "
                f"allow_tf32={allow_tf32}: {reasons[-1]}; take the form of the ordinary cores"
            )
        serving = [t for t, reason in zip(options, reasons, strict=True) if reason is None]
        tilings.append(min(serving, key=lambda t: (not t.stage_input, cost(config, t, arch))))
    return tuple(dict.fromkeys(tilings))


def _even(filters: int, most: int) -> int:
    """The smallest tile of whole panels that covers the filters in as few blocks as `most` does."""
    blocks = -(-filters // most)
    return int(padded(-(-filters // blocks), LANES))


def candidates(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return up to `_CANDIDATES` tilings for tuning, all of which serve.

    The defaults come first, then the best by `cost` in turns, so that the first few serve both: two
    for much work, one for little, which tiles of at most 32 steps are.
    """
    filters, channels = padded(config.filters, LANES), padded(config.channels, CHANNELS)
    tiles = dict.fromkeys(_even(filters, min(filters, width)) for width in (256, 128, 64, 32))
    chunks = dict.fromkeys(min(channels, chunk) for chunk in (128, 64, 32, 16))
    grids = [(s, f) for s in (1, 2, 4) for f in (1, 2, 4, 8) if s * f in (2, 4, 8, 16)]
    found: dict[bool, list[Tiling]] = {True: [], False: []}
    for steps, width, chunk, (step_warps, filter_warps), run, buffers in itertools.product(
        (128, 64, 32, 16), tiles, chunks, grids, (16, 8, 4), (2, 1)
    ):
        if steps % (16 * step_warps) or width % (16 * filter_warps):
            continue
        tiling = Tiling(steps, width, chunk, step_warps, filter_warps, run, buffers)
        if 8 <= tiling.sums <= 128 and refusal(config, allow_tf32, arch, tiling) is None:
            found[steps <= 32].append(tiling)
    few, much = (sorted(found[key], key=lambda t: cost(config, t, arch)) for key in (True, False))
    third = _CANDIDATES // 3
    turns = itertools.zip_longest(much[: 2 * third : 2], few[:third], much[1 : 2 * third : 2])
    best = *default_tilings(config, allow_tf32, arch), *itertools.chain.from_iterable(turns)
    return tuple(t for t in dict.fromkeys(best) if t is not None)[:_CANDIDATES]


def cost(config: KernelConfig, tiling: Tiling, arch: str) -> float:
    """Estimate the cycles of a multiprocessor for one step of one sample, all its filters.

    A scheduler issues one warp's instruction a cycle, a tensor core of sm_80 to sm_90 takes 256
    multiply-adds of 16 bits a cycle by mma.sync (half as many of TF32), shared memory moves 128
    bytes and L2 some 48. With two blocks on a multiprocessor the stages of one hide those of the
    other; alone, they add up, and every barrier costs a few hundred cycles.
    """
    plan, threads = Plan(config, tiling), tiling.warps * LANES
    turns = -(-plan.runs * tiling.channel_tile // (plan.width * threads))
    work = tiling.run * plan.width  # multiply-adds a tap, beside reads, conversions and weights
    issued = turns * tiling.warps * config.kernel_size * (work + 2 + plan.width) / 4
    products = tiling.step_tile * tiling.filter_tile * tiling.channel_tile
    tensor = products / (1024 * 2 // plan.size)
    if config.dtype == "float32":  # each weight is read alone, and rounded by two instructions
        issued += 3 / 4 * tiling.filter_tile * tiling.channel_tile * tiling.step_warps / LANES
    operands = tiling.step_tile * tiling.filter_warps + tiling.filter_tile * tiling.step_warps
    moved = operands * tiling.channel_tile * plan.size / 128
    fetched = (plan.rows + tiling.filter_tile) * tiling.channel_tile * plan.size / 48
    registers = tiling.sums + 2 * work + 32
    capability = int(arch.removeprefix("sm_"))
    kib = _SHARED_KIB.get(capability, 99)
    resident = min(65536 // (threads * registers), kib * 1024 // (plan.shared_bytes + 1024))
    hidden = resident >= 2 and (tiling.buffers == 2 or capability < ASYNC_CAPABILITY)
    parts = (issued, tensor + moved / 2, fetched)
    chunk = max(parts) + 200 / max(resident, 1) if hidden else sum(parts) + 400
    groups = -(-plan.filters // tiling.filter_tile)
    return float(chunk * plan.chunks * config.depth_multiplier * groups / tiling.step_tile)
