"""The hot loops of compiled x86 kernels, beside what a kernel's tiling says that they do.

How often LLVM unrolls the tiling does not say. It is read from the loop: a sum of products that
goes on from turn to turn grows by one multiply-add for each tap or channel unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass

import assembly
from assembly import Loop, Work
from tvm_sepconv.compiler.schedules.cpu import Tiling, VectorUnit
from tvm_sepconv.compiler.schedules.fused import taps_sharing

from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.kernel_config import KernelConfig

# Instructions of a turn that no multiply-add, load or store accounts for: two pointers, a
# comparison, a jump; to leave an odd number of turns in the middle, two more; and for strides, or
# where all taps or channels are unrolled and the turns are those of a loop outside, addresses.
TURN, LEAVING, ADDRESSES = 4, 2, 8


@dataclass(frozen=True)
class Stage:
    """What one of the two products does for `steps` taps or channels, from the tiling alone."""

    rows: int
    vectors: int
    extent: int  # taps or channels in all
    broadcasts: int  # a step
    offsets: tuple[tuple[int, ...], ...] | None  # a tap: where its vectors of input begin

    @property
    def sums(self) -> int:
        return self.rows * self.vectors

    def loads(self, steps: int, shared: bool = True) -> int:
        """Numbers and vectors to load. Neighbouring taps share inputs unless products end them."""
        if self.offsets is None:
            return steps * (self.rows + self.vectors)
        weights = self.broadcasts or self.vectors
        inputs = [offset for tap in self.offsets[:steps] for offset in tap]
        return steps * weights + self.sums * len(set(inputs) if shared else inputs) // len(
            self.offsets[0]
        )


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the loops with multiply-adds, innermost or not, and all its code."""

    config: KernelConfig
    unit: VectorUnit
    tiling: Tiling
    hot: tuple[tuple[Loop, Work], ...]
    code: Work

    @property
    def pointwise(self) -> Stage:
        rows, vectors = self.tiling.register_tile
        broadcasts = 0 if self.unit.spreads(self.config) else rows
        return Stage(rows, vectors, self.config.mid_channels, broadcasts, None)

    @property
    def depthwise(self) -> Stage:
        block, vectors = self.tiling.depthwise_block
        config, lanes = self.config, self.unit.lanes(self.config.accumulation_dtype)
        if config.data_format == "channels_last":
            width, step, broadcasts = block, config.strides, 0
        else:  # phases of the stride lie one behind the other
            width, step, broadcasts = vectors, lanes * config.strides, block
        number, apart = self.taps_sharing
        order = sorted(range(config.kernel_size), key=lambda t: (t // apart // number, t % apart))
        offsets = tuple(
            tuple(row * step + tap * config.dilation_rate for row in range(width)) for tap in order
        )
        return Stage(block, vectors, config.kernel_size, broadcasts, offsets)

    @property
    def taps_sharing(self) -> tuple[int, int]:
        """How many taps one turn takes at least, and how far they are from each other."""
        if self.config.data_format == "channels_last":
            return 1, self.config.kernel_size
        return taps_sharing(self.config, self.unit)

    def steps(self, stage: Stage, found: Work) -> int | None:
        """Steps of `stage` in one turn of a loop that does nothing else; None if it does more."""
        if len(found.chains) != 1:
            return None
        ((length, carried), sums) = next(iter(found.chains.items()))
        if not carried:
            whole = self._whole(stage, length, sums) or self._first_turn(stage, length, sums)
            return sums // stage.sums * length if whole else None
        right = (sums, found.broadcasts) == (stage.sums, length * stage.broadcasts)
        return length if right else None

    def _whole(self, stage: Stage, length: int, sums: int) -> bool:
        """Whether these are sums over all taps or channels, in whole tiles."""
        return length == stage.extent and sums % stage.sums == 0

    def _first_turn(self, stage: Stage, length: int, sums: int) -> bool:
        """Whether this is a turn by itself, for it alone has the last of the taps that share."""
        number, apart = self.taps_sharing
        peeled = number > 1 and stage == self.depthwise and self.config.kernel_size % apart == 1
        return peeled and length == number and sums % stage.sums == 0

    def stage_of(self, found: Work) -> Stage | None:
        """The stage that is all a loop does."""
        fitting = {s: n for s in (self.pointwise, self.depthwise) if (n := self.steps(s, found))}
        # As many sums in both, and no broadcasts in either: they differ in what they load.
        return min(
            fitting, key=lambda s: abs(s.loads(fitting[s]) - found.vector_loads), default=None
        )

    def does(self, stage: Stage) -> bool:
        """Whether some loop computes `stage`, by itself or among others."""
        return any(
            self.stage_of(found) == stage
            or any(not c and self._whole(stage, n, sums) for (n, c), sums in found.chains.items())
            for _, found in self.hot
        )

    def loops(self) -> list[Hot]:
        """Innermost loops that compute one stage and nothing else."""
        pairs = [(self.stage_of(w), loop, w) for loop, w in self.hot if not loop.inner]
        return [Hot(self, stage, len(loop.own), w) for stage, loop, w in pairs if stage is not None]


@dataclass(frozen=True)
class Hot:
    """A loop that computes one stage of a kernel, and what its tiling allows it."""

    kernel: Kernel
    stage: Stage
    blocks: int
    done: Work

    @property
    def is_pointwise(self) -> bool:
        return self.stage == self.kernel.pointwise

    @property
    def carried(self) -> bool:
        """Whether the sums go on from turn to turn; else a turn makes them from first to last."""
        return next(iter(self.done.chains))[1]

    @property
    def length(self) -> int:
        """Taps or channels unrolled in one turn."""
        return next(iter(self.done.chains))[0]

    @property
    def tiles(self) -> int:
        """Register tiles that a turn computes, one after the other."""
        return sum(self.done.chains.values()) // self.stage.sums

    @property
    def loads(self) -> int:
        # A product of SSE overwrites an operand: loading that again is as good as having copied
        # it. In channels_first taps share inputs only where they are whole vectors apart.
        last = self.kernel.config.data_format == "channels_last"
        number, apart = self.kernel.taps_sharing
        shared = self.kernel.unit.broadcasts and (last or number > 1)
        # What some turns only have, the last tap of the sharing ones, loads for itself.
        ragged = number > 1 and self.kernel.config.kernel_size % apart and not self.is_pointwise
        return self.tiles * self.stage.loads(self.length, shared) + (self.blocks - 1) * bool(ragged)

    @property
    def stores(self) -> int:
        if self.carried:
            return 0
        unit, config = self.kernel.unit, self.kernel.config
        copies = unit.lanes(config.accumulation_dtype) if unit.spreads(config) else 1
        return self.tiles * self.stage.sums * copies

    @property
    def instructions(self) -> int:
        """The most a turn may take: every load by itself, none within a multiply-add."""
        stage, config, done = self.stage, self.kernel.config, self.done
        copies = 0 if self.carried else self.stores  # a sum's first product needs a register
        arithmetic = done.multiply_adds
        if not self.kernel.unit.broadcasts:
            # SSE: a product and a sum each, a shuffle a broadcast. Of r + v operands in registers
            # all but one end in a product of their own; the other products need a copy.
            copies = self.length * (stage.rows - 1) * (stage.vectors - 1)
            arithmetic += done.multiply_adds + done.broadcasts
            if self.kernel.unit.spreads(config):
                copies += self.stores  # a shuffle before each
        addresses = config.strides > 1 or self.length in (config.kernel_size, config.channels)
        round_trip = TURN + LEAVING * (self.blocks - 1) + ADDRESSES * addresses
        return arithmetic + self.loads + self.stores + copies + round_trip


def compiled(
    config: KernelConfig, isa: str, kernels: dict[str, tuple[Tiling, bool]]
) -> dict[str, Kernel]:
    """Kernels by name from their tilings, and whether they are of the interior form."""
    target = cpu(f"x86_64-{isa}")
    scheduled = {
        name: build.scheduled(config, target, tiling, interior)
        for name, (tiling, interior) in kernels.items()
    }
    text = build.compile_kernels(scheduled, target).inspect_source("asm")
    functions = assembly.functions(text)
    found = {}
    for name, (tiling, _) in kernels.items():
        # Unpacking the arguments and the loops are functions of their own.
        blocks = [b for function, own in functions.items() if name in function for b in own]
        loops = [loop for outer in assembly.loops(blocks) for loop in outer.walk()]
        work = [(loop, assembly.work(loop.body)) for loop in loops]
        hot = tuple((loop, done) for loop, done in work if done.multiply_adds)
        code = assembly.work([i for b in blocks for i in b.body])
        found[name] = Kernel(config, target.family.UNITS[target.isa], tiling, hot, code)
    return found
