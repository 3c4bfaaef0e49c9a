"""A real search, its record, and what is measured at its end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick_searches import Inventing
from tvm_sepconv.compiler.schedules import cpu

import tvm_sepconv
from tvm_sepconv import jit, reference, targets
from tvm_sepconv.compiler import build, default_space
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import builder, finalists, logs, measure, search, tune
from tvm_sepconv.compiler.tuning.history import best_at, read_history
from tvm_sepconv.compiler.tuning.search import Progress
from tvm_sepconv.compiler.tuning.space import Space
from tvm_sepconv.config import KernelConfig

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
    assert 0 < record.median_secs <= record.default_secs < 1
    assert cpu.Tiling.from_dict(dict(record.decisions)) in Space(CONFIG, TARGET, STEPS).tilings
    assert record.noise >= 0
    assert "processors" in record.machine


def test_every_trial_is_reported(found: Found) -> None:
    assert list(dict.fromkeys(now.trials for now in found.reports)) == list(range(TRIALS + 1))
    phases = [phase for phase, _ in itertools.groupby(now.phase for now in found.reports)]
    assert phases == ["building", "measuring", "comparing"]
    last = found.reports[-1]
    assert (last.build_failures, last.run_failures, last.failure) == (0, 0, "")
    assert last.best_secs <= last.default_secs
    assert last.elapsed_secs <= found.secs


def test_metaschedule_keeps_its_database_in_the_work_folder(found: Found) -> None:
    folder = found.work / TARGET.name / CONFIG.key
    lines = (folder / "database_tuning_record.json").read_text().splitlines()
    assert len(lines) == TRIALS
    for line in lines:
        (instructions, decisions), run_secs, *_ = json.loads(line)[1]
        kinds = [kind for kind, *_ in instructions if kind not in ("GetSBlock", "Annotate")]
        assert kinds == ["SampleCategorical"] * len(dataclasses.fields(cpu.Tiling))
        assert len(decisions) == len(kinds)
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


def test_tuning_again_starts_from_what_is_known(
    found: Found, builds_here: None, tmp_path: Path
) -> None:
    # Two trials are the default and the record's decisions, or one that the search proposes.
    (tmp_path / "logs").mkdir()
    space = Space(CONFIG, TARGET, STEPS)
    known = min(space.tilings - {space.default}, key=str)
    slow = {"decisions": known.to_dict(), "median_secs": 1e-9}  # of another, dreamlike machine
    logs.write(dataclasses.replace(found.result.record, **slow), tmp_path / "logs")
    result = tune.tune(
        CONFIG, TARGET, 1, STEPS, trials=2, work_dir=tmp_path / "work", runner=Inventing()
    )
    assert result.progress.trials == 2
    libraries = {path.name for path in (tmp_path / "work").rglob("*.so")}
    assert builder.library(Path(), known).name in libraries
    (record,) = logs.read(tmp_path / "logs" / f"{TARGET.name}.jsonl")
    assert record == logs.Record.from_dict(json.loads(json.dumps(result.record.to_dict())))


class Lengths(Inventing):
    """Every candidate is faster than the one before, and the last ones lose on longer inputs.

    Parameters
    ----------
    losing
        How many of those that were measured last.
    """

    workers = 1

    def __init__(self, losing: int) -> None:
        super().__init__()
        self.losing, self.seen, self.steps = losing, dict[str, int](), set[int]()

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        super().measure(task, libraries, rounds)
        steps = measure.loaded(task).cases[0].x.shape[1]
        self.steps.add(steps)
        numbers = [self.seen.setdefault(name, len(self.seen)) for name in self.asked[-1]]
        if steps == STEPS:
            return [[1e-4 - 1e-6 * number] * rounds for number in numbers]
        lost = len(self.seen) - self.losing
        return [
            [1e-4 if 0 < number < lost else 2e-4 + 1e-6 * number] * rounds for number in numbers
        ]


@pytest.mark.parametrize(("losing", "won"), [(0, 4), (1, 3), (4, 0)])
def test_the_winner_does_not_lose_to_the_default_on_a_longer_input(
    losing: int, won: int, builds_here: None, tmp_path: Path
) -> None:
    runner = Lengths(losing)
    result = tune.tune(CONFIG, TARGET, 1, STEPS, trials=5, work_dir=tmp_path, runner=runner)
    assert runner.steps == {STEPS, 4 * STEPS}
    decisions = dict(read_history(result.history).trials[won].decisions or {})
    assert cpu.Tiling.from_dict(dict(result.decisions or {})) == cpu.Tiling.from_dict(decisions)
    assert result.best_secs == pytest.approx(1e-4 - 1e-6 * won)


def test_stopping_keeps_what_was_found(builds_here: None, tmp_path: Path) -> None:
    trials = [0]
    result = tune.tune(
        CONFIG, TARGET, 1, STEPS, trials=4, work_dir=tmp_path, runner=Inventing(),
        report=lambda now: trials.append(now.trials), should_stop=lambda: max(trials) >= 2,
    )  # fmt: skip
    assert max(trials) == 2
    assert result.path is not None
    (record,) = logs.read(result.path)
    assert record.trials == 2


def test_the_history_has_every_trial_and_the_end(found: Found) -> None:
    record, whole = found.result.record, read_history(found.result.history)
    assert record is not None
    assert whole.path == (found.work / TARGET.name / CONFIG.key / "history.jsonl").absolute()
    assert KernelConfig.from_dict(whole.header["config"]) == CONFIG
    expected = {"target": TARGET.name, "batch": 2, "steps": STEPS, "threads": 1, "seed": 0}
    expected |= {"space": "tvm_sepconv", "trials": TRIALS, "workload": None, "modelled": False}
    assert {name: whole.header[name] for name in expected} == expected
    assert whole.header["machine"] == record.machine
    assert [trial.trial for trial in whole.trials] == list(range(1, TRIALS + 1))
    default = Space(CONFIG, TARGET, STEPS).default
    assert cpu.Tiling.from_dict(dict(whole.trials[0].decisions or {})) == default
    assert all(len(trial.secs or ()) == search.SAMPLES for trial in whole.trials)
    assert whole.final == {
        "default_secs": record.default_secs, "best_secs": record.median_secs,
        "noise": record.noise, "decisions": json.loads(json.dumps(record.decisions)),
        "recorded": str(found.result.path),
    }  # fmt: skip
    best = best_at(whole.path, [1, TRIALS, TRIALS + 1])
    assert best == {1: whole.trials[0].median_secs, TRIALS: found.reports[-1].best_secs}


def test_metaschedules_own_space_is_searched_and_never_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_space, "STRATEGY", "replay-trace")  # an evolution takes a minute
    monkeypatch.setattr(jit, "cache_root", lambda: tmp_path / "cache")
    shown: list[Progress] = []
    result = tune.tune(
        CONFIG, TARGET, 1, STEPS, trials=3, work_dir=tmp_path / "work", space="metaschedule",
        report=lambda now: shown.append(dataclasses.replace(now)),
    )  # fmt: skip
    assert (result.record, result.path) == (None, None)
    assert not list(tmp_path.rglob(f"{TARGET.name}.jsonl"))
    whole = read_history(result.history)
    assert (whole.header["space"], whole.header["steps"]) == ("metaschedule", STEPS)
    assert [trial.trial for trial in whole.trials] == [1, 2, 3]
    measured = [trial.median_secs for trial in whole.trials if trial.secs]
    assert measured and result.best_secs == min(measured)
    assert (shown[-1].trials, shown[-1].run_failures) == (3, 3 - len(measured))


@pytest.mark.parametrize(
    ("factors", "expected"),
    [((1, 0.9, 0.95), 1), ((1, 1.1, 1.05), 0), ((1, 0.999), 0), ((1,), 0)],
)
def test_the_default_stays_unless_another_is_faster_beyond_chance(
    factors: tuple[float, ...], expected: int
) -> None:
    draw = np.random.default_rng(0)
    samples = [f * draw.normal(1, 0.01, tune.FINAL_SAMPLES) for f in factors]
    assert finalists.winner(samples) == expected


@pytest.mark.parametrize(
    ("spreads", "taken", "runs"),
    [((0.01,), 0, 1), ((0.5, 0.02), 1, 2), ((0.5, 0.2, 0.3), 1, 3)],
    ids=["quiet", "again", "the-quietest"],
)
def test_disturbed_alternations_are_repeated(
    spreads: tuple[float, ...], taken: int, runs: int
) -> None:
    results = [[[1.0] * 30, [1.0, 1 + spread, 1 + 2 * spread] * 10] for spread in spreads]
    left = list(results)
    assert finalists.settled(lambda: left.pop(0)) is results[taken]
    assert len(left) == len(results) - runs
