"""The CPU schedules' design space as MetaSchedule sees it.

The decisions are sampled and noted on the last stage; a postprocessor reads the notes and applies
the schedule function. So a trace holds the decisions and nothing else, the schedule stays plain
Python, and a candidate whose decisions do not go together is refused before it costs anything.
(In a trace of the schedule's own instructions every factor would be a random variable, and TVM
0.27 cannot store arithmetic between those: "Stringifying is not supported for type".)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tvm_sepconv.compiler import compute
from tvm_sepconv.compiler.schedules.cpu import Tiling, legal
from tvm_sepconv.compiler.schedules.fused import fuse
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import measure
from tvm_sepconv.compiler.tuning.records import LONG
from tvm_sepconv.config import KernelConfig

_PREFIX = "tvm_sepconv."
_TILING = _PREFIX + "tiling"


class Space:
    """The design space of a kernel's long variant, for inputs of one length.

    Parameters
    ----------
    out_steps
        Longer tiles are left out: the runtime would never call them.

    Raises
    ------
    ValueError
        If every tile is longer.
    """

    def __init__(self, config: KernelConfig, target: CpuTarget, out_steps: int) -> None:
        every = target.family.candidates(config, target.isa)
        self.config = config
        self.lanes = target.lanes(config.accumulation_dtype)
        self.unit = target.family.UNITS[target.isa]
        self.out_steps = out_steps
        self.variant = LONG
        self.default: Tiling = every[0]
        self.tilings = frozenset(t for t in every if t.step_tile <= out_steps)
        if self.default not in self.tilings:
            raise ValueError(
                f"Only the variant for long inputs is tuned, and its default tile is "
                f"{self.default.step_tile} steps. Received: {out_steps} output steps"
            )
        self.choices: dict[str, list[Any]] = {
            name: sorted({getattr(t, name) for t in self.tilings}) for name in asdict(self.default)
        }
        self.rejections: Counter[str] = Counter()  # why candidates were refused unbuilt

    def refusal(self, tiling: Tiling) -> str | None:
        """Say why decisions are no candidate; None if they are one."""
        if tiling in self.tilings:
            return None
        if not legal(self.config, self.unit, tiling):
            return "tiles do not divide the layer, or need more registers than there are"
        return "too much scratch memory, too few accumulators, or the same as another"

    def tiling(self, decisions: Mapping[str, Any] | None) -> Tiling | None:
        """The candidate that has these decisions; None if none has."""
        try:
            tiling = Tiling.from_dict(dict(decisions or {}))
        except (TypeError, ValueError):  # of a schedule with other decisions
            return None
        return tiling if tiling in self.tilings else None

    def neighbours(self, tiling: Tiling) -> list[Tiling]:
        """The candidates a step away: each decision's next choice down and up.

        Where nothing else may stay as it is, what follows from that choice changes too.
        """
        found = []
        for name, choices in self.choices.items():
            at = choices.index(getattr(tiling, name))
            for value in (*choices[:at][-1:], *choices[at + 1 :][:1]):
                among = (t for t in self.tilings if getattr(t, name) == value)
                found.append(min(among, key=lambda t: self._apart(tiling, t)))
        return list(dict.fromkeys(found))

    def _apart(self, a: Tiling, b: Tiling) -> tuple[int, int, str]:
        steps = [
            abs(c.index(getattr(a, n)) - c.index(getattr(b, n))) for n, c in self.choices.items()
        ]
        return sum(step > 0 for step in steps), sum(steps), str(b)

    def write_task(self, path: Path, batch: int, steps: int) -> None:
        """See `measure.write_task`."""
        measure.write_task(path, self.config, batch, steps)

    def workload(self) -> tvm.IRModule:
        """The kernel for one sample of the measured length: MetaSchedule's view of it.

        Its cost model and its argument list want constant extents. Kernels are built and measured
        with symbolic ones, from the same decisions.
        """
        config, steps = self.config, self.out_steps * self.config.strides
        function = compute.sepconv1d(config, self.lanes)
        x, *_, left, output = function.params
        last = config.data_format == "channels_last"
        shapes = {
            x: (1, steps, config.channels) if last else (1, config.channels, steps),
            output: (1, self.out_steps, config.filters)
            if last
            else (1, config.filters, self.out_steps),
        }
        fixed: dict[Any, Any] = {var: _with_shape(var, shape) for var, shape in shapes.items()}
        fixed[left] = tirx.IntImm("int32", (config.effective_kernel - 1) // 2)
        return tvm.IRModule({"main": function.specialize(fixed)})

    def sample(self, sch: Schedule, tiling: Tiling | None = None) -> None:
        """Draw the decisions, or take those of `tiling`, and note them on the output's block."""
        block = sch.get_sblock("output")
        for name, choices in self.choices.items():
            count = len(choices)
            decision = None if tiling is None else choices.index(getattr(tiling, name))
            index = sch.sample_categorical(list(range(count)), [1 / count] * count, decision)
            sch.annotate(block, _PREFIX + name, index)

    def apply(self, sch: Schedule) -> bool:
        """Follow the noted decisions; False if no candidate has them."""
        block = sch.get_sblock("output")
        notes = sch.get(block).annotations
        tiling = Tiling(**{n: c[int(notes[_PREFIX + n])] for n, c in self.choices.items()})
        if reason := self.refusal(tiling):
            self.rejections[reason] += 1
            return False
        for name in self.choices:
            sch.unannotate(block, _PREFIX + name)
        sch.annotate(block, _TILING, json.dumps(tiling.to_dict()))
        fuse(sch, self.config, self.unit, tiling)
        return True

    def scheduled(self, tiling: Tiling) -> Schedule:
        """The workload under `tiling`, with the trace a search would have left."""
        sch = Schedule(self.workload())
        self.sample(sch, tiling)
        sch.enter_postproc()
        assert self.apply(sch), tiling
        return sch

    def module(self, tiling: Tiling) -> tvm.IRModule:
        """What the builder gets of a candidate."""
        return self.scheduled(tiling).mod

    def generator(self) -> ms.space_generator.ScheduleFn:
        """The space for a `TuneContext`."""
        return ms.space_generator.ScheduleFn(
            self.sample, sch_rules=[], postprocs=[_Apply(self)], mutator_probs={_Mutate(self): 1.0}
        )


def tiling_of(mod: tvm.IRModule) -> Tiling:
    """The decisions a candidate of the space was scheduled with."""
    sch = Schedule(mod)
    return Tiling.from_dict(json.loads(sch.get(sch.get_sblock("output")).annotations[_TILING]))


def _with_shape(var: tirx.Var, shape: tuple[int, int, int]) -> tirx.Buffer:
    declared = var.ty
    return tirx.decl_buffer(
        shape,
        str(declared.dtype),
        name=var.name,
        strides=(shape[1] * shape[2], shape[2], 1),
        elem_offset=declared.elem_offset,
        data_alignment=declared.data_alignment,
        offset_factor=declared.offset_factor,
    )


@derived_object
class _Apply(ms.postproc.PyPostproc):  # type: ignore[misc]
    """Turn noted decisions into a schedule."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, sch: Schedule) -> bool:
        return self.space.apply(sch)

    def clone(self) -> Any:
        return _Apply(self.space)


@derived_object
class _Mutate(ms.mutator.PyMutator):  # type: ignore[misc]
    """Change one decision, so that it stays a candidate; MetaSchedule's know perfect tiles only."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: Any, rand_state: int) -> Any:
        samples = [i for i in trace.insts if i.kind.name == "SampleCategorical"]
        indices = [int(trace.decisions[sample]) for sample in samples]
        choices = self.space.choices
        parent = Tiling(**{n: c[i] for (n, c), i in zip(choices.items(), indices, strict=True)})
        changes = []
        for sample, at, (name, values) in zip(samples, indices, choices.items(), strict=True):
            others = [i for i in range(len(values)) if i != at]
            fitting = [
                i
                for i in others
                if self.space.refusal(replace(parent, **{name: values[i]})) is None
            ]
            if fitting:
                changes.append((sample, fitting))
        if not changes:
            return None
        draw = np.random.default_rng(int(rand_state))
        # The decision first: one with many choices has no more to do with speed.
        sample, fitting = changes[draw.integers(len(changes))]
        decision = fitting[draw.integers(len(fitting))]
        return trace.with_decision(sample, decision, remove_postproc=True)

    def clone(self) -> Any:
        return _Mutate(self.space)
