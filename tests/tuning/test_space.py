"""The design space: candidates, decisions in traces, and how one is made from another."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tvm.s_tir import Schedule
from tvm_sepconv.compiler.schedules import arm, cpu, x86

from tvm_sepconv import targets
from tvm_sepconv.compiler import build, compute
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import measure
from tvm_sepconv.compiler.tuning.space import Space, tiling_of
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.workloads import workloads

HERE = [isa for isa in targets.runnable() if isa.startswith("x86_64")]
TARGET = CpuTarget("x86_64-avx2")
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
STEPS = 130


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("isa", [*x86.UNITS, *arm.UNITS])
def test_every_candidate_is_legal_and_the_default_comes_first(isa: str, data_format: str) -> None:
    family = CpuTarget(isa).family
    for workload in list(workloads().values())[::4]:
        config = workload.config(data_format=data_format).kernel_config(workload.channels)
        candidates = family.candidates(config, isa)
        assert candidates[0] == family.default_tilings(config, isa)[0]
        assert len(set(candidates)) == len(candidates) > 1
        assert all(cpu.legal(config, family.UNITS[isa], t) for t in candidates)


def test_no_legal_tile_is_longer_than_the_compute_allows() -> None:
    assert cpu.LONGEST_TILE <= compute.MAX_STEP_TILE


# Ragged in every way, whole vectors in every way: channels, filters and steps.
SMALL = {
    "ragged": KernelConfig(12, 40, 3, strides=2, depth_multiplier=2),
    "whole": KernelConfig(32, 32, 2, dilation_rate=3),
}
FEW = {"ragged": KernelConfig(7, 5, 2, strides=2), "whole": KernelConfig(16, 16, 3)}
each_format = pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])


def _assert_right(
    config: KernelConfig, target: CpuTarget, tilings: Iterable[cpu.Tiling], folder: Path
) -> None:
    """Build a library for each tiling, run it and compare it with the reference."""
    measure.write_task(folder / "task.npz", config, 2, 401)
    task = measure.Task(folder / "task.npz")
    build.build_runtime(target, folder / "runtime.so")
    for number, tiling in enumerate(tilings):
        path = folder / f"{number}.so"  # a path of its own: a process opens each only once
        variants = build.with_long(config, target, build.Variant(tiling))
        build.build_library(config, target, path, variants)
        runtime = str(folder / "runtime.so")
        try:
            task.verified(str(path), runtime)
        except ValueError as error:
            raise AssertionError(f"{config.key} {tiling}") from error
        path.unlink()


@each_format
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_candidates_compute_the_layer(
    config: KernelConfig, isa: str, data_format: str, tmp_path: Path
) -> None:
    config, target = dataclasses.replace(config, data_format=data_format), CpuTarget(isa)
    candidates = target.family.candidates(config, isa)
    _assert_right(config, target, random.Random(isa + data_format).sample(candidates, 1), tmp_path)


@pytest.mark.full
@each_format
@pytest.mark.parametrize("isa", [isa for isa in HERE if isa != "x86_64-sse42"])
@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_every_candidate_computes_the_layer(
    config: KernelConfig, isa: str, data_format: str, tmp_path: Path
) -> None:
    config, target = dataclasses.replace(config, data_format=data_format), CpuTarget(isa)
    _assert_right(config, target, target.family.candidates(config, isa), tmp_path)


def _indices(trace: Any) -> list[int]:
    """Which of its choices every decision is, in the order they were drawn in."""
    # The decisions are a map without an order of its own; the instructions have one.
    samples = [i for i in trace.insts if i.kind.name == "SampleCategorical"]
    return [int(trace.decisions[sample]) for sample in samples]


def test_a_schedule_leaves_its_decisions_in_the_trace_and_in_the_module() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    chosen = max(space.tilings, key=lambda t: (t.register_tile, *dataclasses.astuple(t)))
    sch = space.scheduled(chosen)
    assert tiling_of(sch.mod) == chosen
    trace = sch.trace.simplified(remove_postproc=True)
    decisions = zip(space.choices.items(), _indices(trace), strict=True)
    assert {name: choices[i] for (name, choices), i in decisions} == dataclasses.asdict(chosen)


def test_decisions_that_do_not_go_together_are_refused() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    combinations = [
        cpu.Tiling(**dict(zip(space.choices, decisions, strict=True)))
        for decisions in itertools.product(*space.choices.values())
    ]
    refused = next(t for t in combinations if t not in space.tilings)
    sch = Schedule(space.workload())
    space.sample(sch, refused)
    assert space.apply(sch) is False


def test_no_tile_is_longer_than_the_input() -> None:
    space = Space(CONFIG, TARGET, 100)
    assert max(space.choices["step_tile"]) <= 100
    with pytest.raises(ValueError, match=r"default tile is \d+ steps\. Received: 5 output steps"):
        Space(CONFIG, TARGET, 5)


def _parent(space: Space, tiling: cpu.Tiling) -> Any:
    return space.scheduled(tiling).trace.simplified(remove_postproc=True)


def _chosen(space: Space, trace: Any) -> cpu.Tiling:
    decisions = zip(space.choices.items(), _indices(trace), strict=True)
    return cpu.Tiling(**{name: choices[i] for (name, choices), i in decisions})


@pytest.mark.parametrize("which", ["default", "last"])
def test_a_child_differs_from_its_parent_in_one_decision_and_is_a_candidate(which: str) -> None:
    space = Space(CONFIG, TARGET, STEPS)
    ((mutator, _),) = space.generator().mutator_probs.items()
    tiling = {"default": space.default, "last": max(space.tilings, key=str)}[which]
    parent, changed = _parent(space, tiling), set()
    for _ in range(60):
        child = _chosen(space, mutator.apply(parent))
        (name,) = [n for n in space.choices if getattr(child, n) != getattr(tiling, n)]
        changed.add(name)
        assert child in space.tilings
    possible = {
        name
        for name, choices in space.choices.items()
        for value in choices
        if dataclasses.replace(tiling, **{name: value}) in space.tilings - {tiling}
    }
    assert changed == possible != set()


def test_a_candidate_without_neighbours_has_no_children() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    ((mutator, _),) = space.generator().mutator_probs.items()
    parent = _parent(space, space.default)
    space.tilings = frozenset({space.default})
    assert mutator.apply(parent) is None


@pytest.mark.parametrize("workload", ["QN-B1", "MB-1", "CT-d128"])
def test_neighbours_change_every_decision_a_step_down_and_up(workload: str) -> None:
    row = workloads()[workload]
    space = Space(row.config().kernel_config(row.channels), TARGET, row.out_steps)
    near = space.neighbours(space.default)
    assert set(near) <= space.tilings - {space.default}
    for name, choices in space.choices.items():
        at = choices.index(getattr(space.default, name))
        beside = {choices[i] for i in (at - 1, at + 1) if 0 <= i < len(choices)}
        assert beside <= {getattr(t, name) for t in near}
    assert len(near) <= 2 * len(space.choices)


def test_refused_decisions_are_counted_by_their_reason() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    huge = dataclasses.replace(space.default, register_tile=(24, 4))
    idle = dataclasses.replace(space.default, register_tile=(1, 1))
    reasons = [space.refusal(tiling) for tiling in (space.default, huge, idle)]
    assert reasons[0] is None
    assert "need more registers than there are" in str(reasons[1])
    assert "too few accumulators" in str(reasons[2])
    space.choices["register_tile"] = [*space.choices["register_tile"], (24, 4)]
    sch = Schedule(space.workload())
    space.sample(sch, huge)
    assert space.apply(sch) is False
    assert space.rejections == {reasons[1]: 1}


def test_decisions_of_another_schedule_are_no_candidate() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    decisions = space.default.to_dict()
    assert space.tiling(decisions) == space.default
    assert space.tiling({**decisions, "unheard_of": 1}) is None
    assert space.tiling(None) is None
