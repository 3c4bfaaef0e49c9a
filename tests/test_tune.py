"""The design space, a real search, and what goes wrong in one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm_sepconv.compiler.schedules import arm, cpu, x86

import tvm_sepconv
from tvm_sepconv import jit, reference, targets
from tvm_sepconv.compiler import build, compute, logs, measure, search, tune
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.search import Progress, Search
from tvm_sepconv.compiler.space import Space, tiling_of
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.workloads import workloads

HERE = [isa for isa in targets.runnable() if isa.startswith("x86_64")]
pytestmark = pytest.mark.skipif(not HERE, reason="kernels are measured on an x86 machine")
TARGET = CpuTarget(HERE[0] if HERE else "x86_64-avx2")
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
STEPS, TRIALS = 130, 8


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


# ---- the design space --------------------------------------------------------------------------


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
    build.build_runtime(target, folder / "runtime.so")
    for number, tiling in enumerate(tilings):
        path = folder / f"{number}.so"  # a path of its own: a process opens each only once
        variants = build.with_long(config, target, build.Variant(tiling))
        build.build_library(config, target, path, variants)
        runtime = str(folder / "runtime.so")
        try:
            measure._task(str(folder / "task.npz")).verified(str(path), runtime)
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


def test_a_child_differs_from_its_parent_in_one_decision() -> None:
    space = Space(CONFIG, TARGET, STEPS)
    ((mutator, _),) = space.generator().mutator_probs.items()
    parent = space.scheduled(space.default).trace.simplified(remove_postproc=True)
    before = _indices(parent)
    changed = set()
    for _ in range(40):
        after = _indices(mutator.apply(parent))
        differing = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert len(differing) == 1
        changed.update(differing)
    assert changed == {i for i, c in enumerate(space.choices.values()) if len(c) > 1}


def _proposals(seed: int, folder: Path) -> list[cpu.Tiling]:
    one = _search(folder)
    with tune._seeded(seed):
        model = ms.cost_model.XGBModel()
        context = one.started(seed, TRIALS, ms.database.MemoryDatabase(), model)
        proposed = context.generate_measure_candidates()
    one.close()
    return [tiling_of(candidate.sch.mod) for candidate in proposed]


def test_the_seed_decides_the_first_proposals(tmp_path: Path) -> None:
    first, again, another = (_proposals(seed, tmp_path / "work") for seed in (1, 1, 2))
    assert first == again != another
    assert "tvm.s_tir.tensor_intrin" not in sys.modules  # 13 s that nobody needs


# ---- a search ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    result: tune.Result
    folder: Path
    work: Path
    reports: list[Progress]
    secs: float


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """The real thing: eight trials of a small layer."""
    folder, work = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("work")
    reports: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_SEPCONV_LOGS", str(folder))
        patch.setattr(logs, "packaged", lambda: folder / "none")
        start = time.monotonic()
        result = tune.tune(
            CONFIG, TARGET, 2, STEPS, trials=TRIALS, work_dir=work,
            report=lambda now: reports.append(dataclasses.replace(now)),
        )  # fmt: skip
        yield Found(result, folder, work, reports, time.monotonic() - start)


@pytest.fixture
def with_record(found: Found, monkeypatch: pytest.MonkeyPatch) -> Found:
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(found.folder))
    return found


def test_a_search_writes_one_record(found: Found) -> None:
    assert found.result.path == found.folder / f"{TARGET.name}.jsonl"
    (record,) = logs.read(found.result.path)
    assert (record.config, record.target) == (CONFIG, TARGET.name)
    assert (record.batch, record.steps, record.trials) == (2, STEPS, TRIALS)
    assert 0 < record.median_secs <= record.default_secs < 0.01
    assert cpu.Tiling.from_dict(dict(record.decisions)) in Space(CONFIG, TARGET, STEPS).tilings
    assert record.noise >= 0
    assert "processors" in record.machine


def test_every_trial_is_reported(found: Found) -> None:
    assert [now.trials for now in found.reports] == list(range(1, TRIALS + 1))
    last = found.reports[-1]
    assert (last.build_failures, last.run_failures, last.failure) == (0, 0, "")
    assert last.best_secs <= last.default_secs == found.reports[0].default_secs
    assert found.secs < 60


def test_metaschedule_keeps_its_database_in_the_work_folder(found: Found) -> None:
    folder = found.work / TARGET.name / CONFIG.key
    lines = (folder / "database_tuning_record.json").read_text().splitlines()
    assert len(lines) == TRIALS
    for line in lines:
        (instructions, decisions), run_secs, *_ = json.loads(line)[1]
        kinds = [kind for kind, *_ in instructions if kind not in ("GetSBlock", "Annotate")]
        assert kinds == ["SampleCategorical"] * 4
        assert len(decisions) == 4
        assert len(run_secs) == search.SAMPLES


def test_the_next_build_uses_the_record(with_record: Found, tmp_path: Path) -> None:
    record = with_record.result.record
    long, *shorter = build.variants(CONFIG, TARGET)
    assert long.to_dict() == {
        "decisions": record.decisions, "origin": "tuned", "record_secs": record.median_secs,
        "distance": None,
    }  # fmt: skip
    defaults = TARGET.family.default_tilings(CONFIG, TARGET.isa)
    assert [v.tiling for v in shorter] == [
        t for t in defaults[1:] if t.step_tile < long.tiling.step_tile
    ]
    assert {v.origin for v in shorter} == {"default"}


def _layer(**changes: Any) -> tvm_sepconv.SeparableConv1D:
    arguments = {"padding": "same", "activation": "relu", "bias_initializer": "normal", **changes}
    layer = tvm_sepconv.SeparableConv1D(CONFIG.filters, CONFIG.kernel_size, seed=3, **arguments)
    layer.build((None, None, CONFIG.channels))
    return layer


def test_the_next_call_of_such_a_layer_uses_the_record(
    with_record: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = jit.library(CONFIG)
    x = np.random.default_rng(0).standard_normal((2, 300, CONFIG.channels), np.float32)
    layer = _layer()
    y = layer(x)
    expected = reference.separable_conv1d(x, *layer.get_weights(), layer.config)
    np.testing.assert_allclose(y, expected, 1e-5, 1e-5)
    assert layer._library == tuned
    monkeypatch.delenv("TVM_SEPCONV_LOGS")
    assert jit.library(CONFIG)[0] != tuned[0]


def test_a_bundle_says_where_its_decisions_are_from(with_record: Found, tmp_path: Path) -> None:
    layers = {
        "tuned": _layer(),
        "transferred": _layer(activation="elu"),
        "default": _layer(strides=9),
    }
    tvm_sepconv.save(layers, tmp_path / "b.sepconv", [TARGET.name])
    manifest = json.loads((tmp_path / "b.sepconv" / "manifest.json").read_text())
    for name, entry in manifest["layers"].items():
        variants = manifest["libraries"][TARGET.name][entry["library"]]["variants"]
        assert variants[0]["origin"] == name
        assert variants[0]["distance"] == (pytest.approx(0.1) if name == "transferred" else None)
        assert (variants[0]["record_secs"] is None) == (name == "default")
        assert {v["origin"] for v in variants[1:]} == {"default"}
    assert set(tvm_sepconv.load(tmp_path / "b.sepconv")) == set(layers)


def test_tuning_again_starts_from_what_is_known(found: Found, tmp_path: Path) -> None:
    # Two trials are the default and the record's decisions, or one that the search proposes.
    (tmp_path / "logs").mkdir()
    space = Space(CONFIG, TARGET, STEPS)
    known = min(space.tilings - {space.default}, key=str)
    slow = {"decisions": known.to_dict(), "median_secs": 1e-9}  # of another, dreamlike machine
    logs.write(dataclasses.replace(found.result.record, **slow), tmp_path / "logs")
    result = tune.tune(CONFIG, TARGET, 1, STEPS, trials=2, work_dir=tmp_path / "work")
    assert result.progress.trials == 2
    libraries = {path.name for path in (tmp_path / "work").rglob("*.so")}
    assert Path(search._library("", known)).name in libraries
    (record,) = logs.read(tmp_path / "logs" / f"{TARGET.name}.jsonl")
    assert record == logs.Record.from_dict(json.loads(json.dumps(result.record.to_dict())))


def test_stopping_keeps_what_was_found(tmp_path: Path) -> None:
    trials: list[int] = []
    result = tune.tune(
        CONFIG, TARGET, 1, STEPS, trials=4, work_dir=tmp_path,
        report=lambda now: trials.append(now.trials), should_stop=lambda: len(trials) >= 2,
    )  # fmt: skip
    assert trials == [1, 2]
    assert result.path is not None
    (record,) = logs.read(result.path)
    assert record.trials == 2


def test_too_few_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`trials` argument must be at least 2.*Received: trials=1"
    ):
        tune.tune(CONFIG, TARGET, 1, STEPS, trials=1, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [((1, 0.9, 0.95), 1), ((1, 1.1, 1.05), 0), ((1, 0.999), 0), ((1,), 0)],
)
def test_the_default_stays_unless_another_is_faster_beyond_chance(
    factors: tuple[float, ...], expected: int
) -> None:
    draw = np.random.default_rng(0)
    samples = [f * draw.normal(1, 0.01, tune.FINAL_SAMPLES) for f in factors]
    assert tune._winner(samples) == expected


# ---- what goes wrong ---------------------------------------------------------------------------


def _search(folder: Path) -> Search:
    space = Space(CONFIG, TARGET, STEPS)
    return Search(space, TARGET, folder, Progress(of=9), lambda now: None, lambda: False)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    monkeypatch.setattr(search, "RUN_LIMIT_SECS", 2)  # the process's own start not included
    one = _search(tmp_path / "search")
    measure.write_task(one.task, CONFIG, 1, STEPS)
    build.build_runtime(TARGET, one.runtime)
    yield one
    one.close()


def _candidate(folder: Path, body: str) -> str:
    """A library of CONFIG whose kernels do `body`."""
    description = build._description(CONFIG, TARGET, build.variants(CONFIG, TARGET))
    (folder / "library.c").write_text(description)
    kernels = "".join(
        f"int {name}(void* self, const TVMFFIAny* a, int32_t n, TVMFFIAny* r) {{"
        f"(void)self; (void)a; (void)n; (void)r; {body} }}\n"
        for name in dict.fromkeys(re.findall(r"__tvm_ffi_\w+", description))
    )
    (folder / "kernel.c").write_text(f"#include <tvm/ffi/c_api.h>\n{kernels}")
    tools = toolchain(TARGET.triple)
    native = Path(tvm_sepconv.__file__).parent / "native"
    for name in ("kernel", "library"):
        include = (native, build._ffi_include())
        tools.object_file(folder / f"{name}.c", folder / f"{name}.o", include)
    tools.shared_library([folder / "kernel.o", folder / "library.o"], folder / "bad.so")
    return str(folder / "bad.so")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 0;", r"ValueError: 4160 of 4160 outputs are wrong"),
        ("*(volatile int*)0 = 1; return 0;", "The measuring process died"),
        ("for (volatile int i = 0;; i = i) {}", "No result after 2 s"),
    ],
    ids=["wrong", "crash", "hang"],
)
def test_a_bad_candidate_is_named_and_the_next_is_measured(
    body: str, message: str, prepared: Search, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=message):
        prepared.sample([_candidate(tmp_path, body)], 3)
    good = prepared.library(prepared.space.default)
    build.build_library(CONFIG, TARGET, Path(good), build.variants(CONFIG, TARGET))
    (samples,) = prepared.sample([good], 3)
    assert len(samples) == 3


def _only_the_default(*arguments: Any, config: KernelConfig, target: str, folder: str) -> str:
    if tiling_of(arguments[0]) != CpuTarget(target).family.candidates(config, target)[0]:
        raise ValueError("no such tile, says the test")
    return search.build_candidate(*arguments, config=config, target=target, folder=folder)


def _nothing(*arguments: Any, **more: Any) -> str:
    raise ValueError("nothing builds, says the test")


@pytest.fixture
def failing_builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # the builder's processes cannot import tests
    yield monkeypatch
    cloudpickle.unregister_pickle_by_value(module)


def test_failed_builds_are_counted_and_shown(
    failing_builds: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing_builds.setattr(search, "build_candidate", _only_the_default)
    result = tune.tune(CONFIG, TARGET, 1, STEPS, trials=4, work_dir=tmp_path)
    now = result.progress
    assert (now.trials, now.build_failures, now.run_failures) == (4, 3, 0)
    assert "no such tile, says the test" in now.failure
    assert result.path is None  # only the default worked
    assert not list((tmp_path / "logs").glob("*.jsonl"))


def test_a_default_that_fails_ends_the_search(
    failing_builds: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing_builds.setattr(search, "build_candidate", _nothing)
    with pytest.raises(RuntimeError, match=r"(?s)the default kernel fails.*nothing builds"):
        tune.tune(CONFIG, TARGET, 1, STEPS, trials=4, work_dir=tmp_path)
