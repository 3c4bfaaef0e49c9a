"""Layers' modelled cycles, beside the least that their multiply-adds would take."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.build import Variant
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import measure
from tvm_sepconv.compiler.tuning.measure import Task
from tvm_sepconv.compiler.tuning.modelled.cycles import (
    FMA_PIPES,
    Block,
    Counts,
    Model,
    disassembled,
    executed,
    model_of,
)
from tvm_sepconv.compiler.tuning.modelled.emulation import Emulator
from tvm_sepconv.config import KernelConfig

MOST_MACS = 40_000_000  # of one emulated call, about a second; longer inputs are shortened …
LEAST_STEPS = 128  # … to no fewer output steps: the longest tiles have to be used


@dataclass(frozen=True)
class Score:
    """What one call of a library executes, and its modelled cycles.

    Parameters
    ----------
    steps
        Of the input that was run: fewer than were asked for where that had taken too long.
    floor_cycles
        If every multiply-add were a lane of a vector one and nothing else took time.
    model
        LLVM's name of the core.
    """

    batch: int
    steps: int
    instructions: int
    cycles: float
    floor_cycles: float
    model: str
    counts: Counts

    @property
    def share(self) -> float:
        """Of the floor: 1 is the best there is."""
        return self.floor_cycles / self.cycles


@dataclass(frozen=True)
class Hot:
    """A block with its share of all cycles."""

    block: Block
    count: int
    cycles: float
    share: float
    text: Sequence[str]


class Scorer:
    """Builds libraries for a target, runs them under emulation, and models its core's cycles.

    Use it as a context: its folder goes with it.

    Raises
    ------
    RuntimeError
        If a program is missing, naming what to install.
    """

    def __init__(self, target: CpuTarget) -> None:
        self.target = target
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._emulator = Emulator(target, self._folder)
            self._stack = stack.pop_all()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def score(
        self,
        config: KernelConfig,
        batch: int,
        steps: int,
        decisions: Mapping[str, Any] | None = None,
    ) -> Score:
        """Score a layer; its library has the decisions in use, or the default's with `decisions`.

        Raises
        ------
        RuntimeError
            If it does not build or run.
        ValueError
            If its answers are wrong.
        """
        steps = shortened(config, batch, steps)
        counts = self.counts(config, batch, steps, decisions)
        out_steps = measure.layer_config(config).out_steps(steps)
        lanes = 16 // (8 if config.accumulation_dtype == "float64" else 4)
        model = self.model
        return Score(
            batch=batch,
            steps=steps,
            instructions=executed(counts),
            cycles=model.cycles(counts),
            floor_cycles=config.flops(batch, out_steps) / 2 / lanes / FMA_PIPES,
            model=model.core,
            counts=counts,
        )

    @functools.cached_property
    def model(self) -> Model:
        """The target's core; ValueError if it has no model."""
        return Model(self._emulator.tools, model_of(self.target))

    def counts(
        self,
        config: KernelConfig,
        batch: int,
        steps: int,
        decisions: Mapping[str, Any] | None = None,
    ) -> Counts:
        """Return what one call executes; arguments and errors as of `score`."""
        steps = shortened(config, batch, steps)
        library, path = self._folder / "layer.so", self._folder / "task.npz"
        build.build_library(config, self.target, library, self._variants(config, decisions))
        measure.write_task(path, config, batch, steps)
        return self._emulator.count(Task(path), library)

    def hot(self, score: Score, number: int) -> list[Hot]:
        """Return the blocks that take the most cycles, these first."""
        cycles = {block: self.model.of_block(block) for block in score.counts}
        order = sorted(score.counts, key=lambda block: -cycles[block] * score.counts[block])
        texts = disassembled(self._emulator.tools, [block.code for block in order[:number]])
        return [
            Hot(b, n := score.counts[b], cycles[b], cycles[b] * n / score.cycles, text)
            for b, text in zip(order, texts, strict=False)
        ]

    def _variants(
        self, config: KernelConfig, decisions: Mapping[str, Any] | None
    ) -> tuple[Variant, ...]:
        if decisions is None:
            return build.variants(config, self.target)
        default = self.target.family.default_tilings(config, self.target.isa)[0]
        tiling = replace(default, **decisions)
        return build.with_long(config, self.target, Variant(tiling))


def shortened(config: KernelConfig, batch: int, steps: int) -> int:
    """Return so many steps of an input that an emulated call takes a second or two at most."""
    out_steps = measure.layer_config(config).out_steps(steps)
    parts = -(-config.flops(batch, out_steps) // (2 * MOST_MACS))
    return min(steps, max(steps // parts, LEAST_STEPS * config.strides))
