"""The decisions of the CUDA-core schedule (`cuda_cores_fuse`) and their arithmetic; plain Python.

What bounds it: in full float32 a multiprocessor (132 of them in an H100 or H200) starts four
instructions a cycle, of 32 multiply-adds each, and reads 128 bytes of shared memory. A multiply-add
therefore may take less than a byte a lane from there:

- the pointwise stage with 8 x 8 accumulators a thread reads 8 + 8 elements for 64 multiply-adds,
  four 16-byte loads; with a warp of 4 x 8 threads these are 64 and 128 different bytes. So 64 of
  68 instructions multiply (94 %), and the loads take at most half of their time;
- a depthwise task of ``run`` 8 and 33 taps reads 40 inputs and 33 weights for 264 multiply-adds,
  at the limit of shared memory (0.28 loads each, the limit is 0.25); 16 steps need 0.15. It is
  a tenth of the layer's work, and other blocks multiply meanwhile.

64 accumulators, two operands of 16 and addresses are 128 registers: two blocks of 256 threads fill
a multiprocessor's 65536, one sums taps while the other multiplies. 64 steps x 256 filters are such
a block; all filters in one block, or every other one repeats the depthwise stage.

Little work (a sample of some hundred steps) fills no multiprocessor that way: then blocks are
smaller, 16 steps x 128 filters, for four times as many, at the price of summing the taps once more
for each tile of filters. Not done: splitting the channels over blocks, whose sums meet either in
atomics on a buffer that somebody must have cleared (a second launch, or memory that a call may not
allocate) or in a cluster's shared memory (sm_90 only, and its launch is not TVM's to write).

Counted in the machine code for sm_90 (nvcc 13.0), 256 to 256 channels, 33 taps, the default: the
matrix product is 512 FFMA and 32 LDS.128 every 8 channels, the depthwise stage 264 FFMA and 73 LDS;
of the 2678 instructions a warp has for a chunk of 32 channels 2312 are FFMA (86 %), 13 copies, and
none a branch but its loops' (`cuda.without_branches`). 127 registers, nothing spilt. `cost`
predicts 177 000 cycles for 32 x 1024 steps, of which 143 000 are the least that the multiply-adds
take (81 %). A prediction: it has never run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from tvm_sepconv.compiler.schedules.cuda_packing import CHANNELS, LANES, MAX_STEP_TILE, padded

from tvm_sepconv.config import KernelConfig

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

FORM = "cores"

LONG_STEPS, SHORT_STEPS = 32 * 1024, 512
"""Output steps of all samples for which the defaults are chosen."""

CANDIDATES = 40

# By compute capability, in KiB: what a block may have, and all blocks of a multiprocessor.
_SHARED_KIB = {75: (64, 64), 80: (163, 164), 86: (99, 100), 87: (163, 164), 89: (99, 100),
               90: (227, 228)}  # fmt: skip
_REGISTERS = 65536  # of a multiprocessor
_SCHEDULERS = 4
_MULTIPROCESSORS = 132
_CHUNK_CYCLES = 600  # three barriers, first reads after each; hidden only by another block
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step_tile": (lambda t: t.step_tile in range(8, MAX_STEP_TILE + 1) and _power(t.step_tile),
                  f"a power of two from 8 to {MAX_STEP_TILE}"),
    "filter_tile": (lambda t: t.filter_tile > 0 and t.filter_tile % LANES == 0,
                    f"a multiple of {LANES}"),
    "channel_tile": (lambda t: t.channel_tile > 0 and t.channel_tile % CHANNELS == 0,
                     f"a multiple of {CHANNELS}"),
    "rows": (lambda t: t.rows in (2, 4, 8, 16) and t.step_tile % t.rows == 0,
             "2, 4, 8 or 16, and at most `step_tile`"),
    "columns": (lambda t: t.columns > 0 and t.columns % 4 == 0
                and t.filter_tile % t.columns == 0 and _power(t.filter_tile // t.columns)
                and t.filter_tile // t.columns >= 4,
                "a multiple of 4 of which a power of two, at least 4, make up `filter_tile`"),
    "run": (lambda t: t.run in (2, 4, 8, 16) and t.step_tile % t.run == 0
            # Not only for speed: where a warp has no task, TVM 0.27 leaves out a barrier.
            and t.step_tile // t.run * t.channel_tile % t.threads == 0,
            "2, 4, 8 or 16, such that the threads share `step_tile` / `run` x `channel_tile` tasks "
            "evenly"),
    "stages": (lambda t: t.stages in (1, 2), "1 or 2"),
    "blocks": (lambda t: 1 <= t.blocks <= 32, "from 1 to 32"),
}  # fmt: skip


def _power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@dataclass(frozen=True, order=True)
class Tiling:
    """The decisions of the CUDA-core schedule, by name; records store exactly these.

    Parameters
    ----------
    step_tile, filter_tile
        A block's outputs.
    channel_tile
        Channels that pass through shared memory at a time.
    rows, columns
        Steps and filters whose accumulators a thread has.
    run
        Neighbouring steps of a channel that a thread sums in the depthwise stage.
    stages
        Chunks of channels in shared memory at a time; one is computed, the others are copied.
    blocks
        Blocks a multiprocessor shall hold at least, which limits the registers of a thread.
    stage_input
        Whether input rows and taps go through shared memory, or are read where they are.

    Raises
    ------
    ValueError
        If a number breaks its rule.
    """

    step_tile: int
    filter_tile: int
    channel_tile: int
    rows: int
    columns: int
    run: int
    stages: int = 2
    blocks: int = 1
    stage_input: bool = True

    def __post_init__(self) -> None:
        for name, (holds, rule) in _RULES.items():
            if not holds(self):
                raise ValueError(
                    f"The `{name}` decision must be {rule}. Received: {name}={getattr(self, name)} "
                    f"in {self}"
                )
        warps = self.threads / LANES
        if warps not in range(1, 33) or self.step_tile // self.rows % self._lanes[0]:
            raise ValueError(
                "A block must be 1 to 32 whole warps of 4 x 8 or 8 x 4 threads; change `rows` or "
                f"`columns`. Received: {self.threads} threads in {self}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"form": FORM, **asdict(self)}

    @classmethod
    def from_dict(cls, decisions: Mapping[str, Any]) -> Tiling:
        """The tiling a record's decisions describe.

        Raises
        ------
        ValueError
            If a decision is missing, unknown or not a number: the record is of another schedule.
        """
        known = {field.name: field for field in fields(cls)}
        given = {name: value for name, value in decisions.items() if name != "form"}
        if set(given) != set(known) or not all(
            isinstance(value, bool if name == "stage_input" else int)
            for name, value in given.items()
        ):
            raise ValueError(
                f"The schedule's decisions are {sorted(known)}, numbers but for `stage_input`. "
                f"Received: {given}"
            )
        return cls(**given)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.step_tile // self.rows) * (self.filter_tile // self.columns)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return int(self.threads // LANES)

    @property
    def registers(self) -> int:
        """Registers of a thread, about: accumulators, two pairs of operands, addresses."""
        return self.rows * self.columns + 2 * (self.rows + self.columns) + 32

    @property
    def _lanes(self) -> tuple[int, int]:
        columns = min(8, self.filter_tile // self.columns)
        return int(LANES // columns), columns

    @property
    def step_factors(self) -> tuple[int, int, int, int]:
        """(turns, warps, threads of a warp, neighbours) along the steps of a block."""
        near, threads = min(4, self.rows), self._lanes[0]
        return self.rows // near, self.step_tile // self.rows // threads, threads, near

    @property
    def filter_factors(self) -> tuple[int, int, int, int]:
        """(turns, warps, threads of a warp, neighbours) along the filters of a block."""
        threads = self._lanes[1]
        return self.columns // 4, self.filter_tile // self.columns // threads, threads, 4


def shared_bytes(config: KernelConfig, tiling: Tiling) -> int:
    """Return the shared memory a block takes at most, in bytes."""
    rows = (tiling.step_tile - 1) * config.strides + config.effective_kernel
    if config.data_format == "channels_first":
        rows |= 1
    # Where nothing stops it TVM gives every thread work in the last round of a copy.
    whole = tiling.threads * 4
    channels = tiling.channel_tile
    copies = [channels * tiling.filter_tile]
    copies += [channels * config.kernel_size, channels * rows] * tiling.stage_input
    staged = sum(int(padded(elements, whole)) for elements in copies)
    return 4 * (tiling.stages * staged + channels * (tiling.step_tile + 4))


def refusal(config: KernelConfig, allow_tf32: bool, arch: str, tiling: Tiling) -> str | None:
    """Return why `tiling` cannot serve the layer on `arch`, None where it can."""
    capability = int(arch.removeprefix("sm_"))
    block_kib, all_kib = _SHARED_KIB.get(capability, _SHARED_KIB[86])
    size = shared_bytes(config, tiling)
    for broken, reason in (
        # float64: TVM 0.27 writes double constants into CUDA C with 15 decimals, 2⁻⁵¹² as 0.
        ((config.dtype, config.accumulation_dtype) != ("float32", "float32"),
         "the ordinary cores' form is for float32 only"),
        (padded(config.filters, LANES) % tiling.filter_tile, "its tiles do not divide the filters"),
        (padded(config.channels, CHANNELS) % tiling.channel_tile,
         "its chunks do not divide the channels"),
        (tiling.stages > 1 and capability < 80, "no asynchronous copies before sm_80"),
        (size > 1024 * block_kib, "more shared memory than a block may have"),
        (tiling.blocks * (size + 1024) > 1024 * all_kib + 1023,
         "more shared memory than a multiprocessor has"),
        (tiling.registers > 255, "more registers than a thread may have"),
        (tiling.registers * tiling.threads * tiling.blocks > _REGISTERS,
         "more registers than a multiprocessor has"),
    ):  # fmt: skip
        if broken:
            return reason
    return None


def cost(config: KernelConfig, tiling: Tiling, out_steps: int) -> float:
    """Return the cycles that a call of so many output steps, of all samples, takes about.

    What a warp starts for a chunk, times the chunks, warps and blocks of the fullest
    multiprocessor. The last term of each: other warps hide most of a warp's waits, another block
    most of what a block waits for barriers and copies.
    """
    chunks = config.depth_multiplier * -(-config.channels // tiling.channel_tile)
    filters = -(-config.filters // tiling.filter_tile)
    blocks = -(-out_steps // tiling.step_tile) * filters
    fullest = -(-blocks // _MULTIPROCESSORS)
    together = min(tiling.blocks, fullest)
    turns = max(together * tiling.warps / _SCHEDULERS, 1) + 0.25
    waiting = _CHUNK_CYCLES * (1 if tiling.stages > 1 else 2) / together**2
    return -(-fullest // together) * chunks * (_instructions(config, tiling) * turns + waiting)


def _instructions(config: KernelConfig, tiling: Tiling) -> float:
    """What a warp starts for a chunk, a read of shared memory that others wait for being four."""
    channels, threads, rows, columns = (
        tiling.channel_tile, tiling.threads, tiling.rows, tiling.columns,
    )  # fmt: skip
    multiply = channels * (rows * columns + (rows + columns) / 4)
    read = {
        step * config.strides + tap * config.dilation_rate
        for step in range(tiling.run)
        for tap in range(config.kernel_size)
    }
    loads = len(read) + config.kernel_size
    tasks = tiling.step_tile // tiling.run * channels // threads
    sums = tasks * max(config.kernel_size * tiling.run + loads, _SCHEDULERS * loads)
    width = 4 if config.data_format == "channels_last" else 1
    copies = (tiling.filter_tile + config.kernel_size) / 4
    copies += tiling.step_tile * config.strides / width
    return multiply + sums + 5 * channels * copies / threads


def default_tilings(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the tilings of a layer that nobody has tuned: for much work, and for little.

    Of all that serve, the ones of least `cost` for `LONG_STEPS` and `SHORT_STEPS`.

    Raises
    ------
    ValueError
        If the layer is not of float32.
    """
    every = _serving(config, allow_tf32, arch)
    best = (min(every, key=lambda t: (cost(config, t, n), t)) for n in (LONG_STEPS, SHORT_STEPS))
    return tuple(dict.fromkeys(best))


def candidates(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the tilings that tuning tries, all of which serve, by turns the best for much and for
    little work; the defaults first.
    """
    every = _serving(config, allow_tf32, arch)
    orders = (
        sorted(every, key=lambda t: (cost(config, t, n), t)) for n in (LONG_STEPS, SHORT_STEPS)
    )
    ranked = itertools.chain.from_iterable(zip(*orders, strict=True))
    return tuple(itertools.islice(dict.fromkeys(ranked), CANDIDATES))


def functions(config: KernelConfig, tiling: Tiling, aligned: bool) -> dict[str, PrimFunc]:
    """Return the form's one kernel, ``sepconv1d``; `aligned` is the variant of 16-byte moves."""
    # TVM is not needed to read records and to choose.
    from tvm_sepconv.compiler.schedules import cuda_cores_fuse

    return {"sepconv1d": cuda_cores_fuse.fuse(config, tiling, aligned)}


@functools.lru_cache(maxsize=8)  # the defaults and the candidates are drawn from the same
def _serving(config: KernelConfig, allow_tf32: bool, arch: str) -> tuple[Tiling, ...]:
    """All tilings worth considering that serve, each with as many blocks as fit."""
    for stage in (True, False):  # only a halo that fits no way is read where it is
        found = [
            _fill(config, allow_tf32, arch, tiling)
            for tiling in _space(config, stage)
            if refusal(config, allow_tf32, arch, tiling) is None
        ]
        if found:
            return tuple(found)
    raise ValueError(
        f"The ordinary cores of {arch} do not serve this kernel: "
        f"{refusal(config, allow_tf32, arch, Tiling(16, 32, 16, 4, 4, 4, 1, 1, False))}; cast "
        f"input and weights to float32. Received: dtype={config.dtype}, "
        f"accumulation_dtype={config.accumulation_dtype}"
    )


def _space(config: KernelConfig, stage: bool) -> Iterator[Tiling]:
    filters, channels = padded(config.filters, LANES), padded(config.channels, CHANNELS)
    widths = [w for w in range(LANES, min(filters, 512) + 1, LANES) if filters % w == 0]
    chunks = [c for c in (16, 32, 64) if channels % c == 0]
    for width, threads, steps, rows in itertools.product(
        widths, (4, 8, 16, 32, 64), (128, 64, 32, 16, 8), (8, 4, 2)
    ):
        if width % (threads * 4) or not 16 <= rows * (width // threads) <= 128:
            continue
        for chunk, run, stages in itertools.product(chunks, (16, 8, 4), (2, 1)):
            with contextlib.suppress(ValueError):  # the rules are written down once
                columns = width // threads
                yield Tiling(steps, width, chunk, rows, columns, run, stages, 1, stage)


def _fill(config: KernelConfig, allow_tf32: bool, arch: str, tiling: Tiling) -> Tiling:
    for blocks in (4, 3, 2):
        more = replace(tiling, blocks=blocks)
        if refusal(config, allow_tf32, arch, more) is None:
            return more
    return tiling
