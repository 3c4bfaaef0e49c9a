"""What a search proposes, how it learns, and how it goes on or is done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick_searches import Inventing
from tvm.s_tir import meta_schedule as ms
from tvm_sepconv.compiler.schedules.cpu import Tiling

from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import history, logs, search, tune
from tvm_sepconv.compiler.tuning.history import Trial, Writer, read_history
from tvm_sepconv.compiler.tuning.search import Progress, Search
from tvm_sepconv.compiler.tuning.space import Space, tiling_of
from tvm_sepconv.config import KernelConfig

TARGET = CpuTarget("x86_64-avx2")
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
STEPS = 130
MEASURED = Path(__file__).parent / "data" / "search_ct_d128.jsonl"


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def _proposals(seed: int, folder: Path) -> list[Mapping[str, Any]]:
    folder.mkdir(exist_ok=True)
    writer = Writer(folder / history.NAME, {})
    space = Space(CONFIG, TARGET, STEPS)
    with (
        closing(writer),
        closing(Search(space, TARGET, folder, None, writer, Progress(of=9), replayed={})) as one,
        tune._seeded(seed),
    ):
        model = ms.cost_model.XGBModel()
        context = one.started(seed, ms.database.MemoryDatabase(), model)
        proposed = context.generate_measure_candidates()
    return [tiling_of(candidate.sch.mod).to_dict() for candidate in proposed]


def test_the_seed_decides_the_first_batch_in_any_process(tmp_path: Path) -> None:
    code = (
        "import json, pathlib, sys, test_search as t; "
        f"print(json.dumps(t._proposals(1, pathlib.Path({str(tmp_path / 'other')!r})))); "
        "assert 'tvm.s_tir.tensor_intrin' not in sys.modules"  # 13 s that nobody needs
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    first, another = (_proposals(seed, tmp_path / "work") for seed in (1, 2))
    output, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(json.dumps(first)) == json.loads(output)
    assert first != another
    assert len(first) == search.BATCH


# ---- replaying ---------------------------------------------------------------------------------


def _invented_secs(tiling: Tiling) -> float:
    """Best for 128 steps a tile and 12 accumulators."""
    rows, vectors = tiling.register_tile
    return 1e-5 * (1 + abs(tiling.step_tile - 128) / 256 + abs(rows * vectors - 12) / 24)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history that has every candidate."""
    path, space = tmp_path_factory.mktemp("histories") / "all.jsonl", Space(CONFIG, TARGET, STEPS)
    header = {
        "config": CONFIG.to_dict(), "target": TARGET.name, "batch": 1, "steps": STEPS, "seed": 0,
        "threads": 1, "space": "tvm_sepconv", "machine": "an invented one",
        "first": [space.default.to_dict()],
    }  # fmt: skip
    with closing(Writer(path, header)) as writer:
        for number, tiling in enumerate(sorted(space.tilings, key=str), 1):
            writer.trial(Trial(number, tiling.to_dict(), [_invented_secs(tiling)], None, 0.0))
    return path


@pytest.fixture
def everything(lasting: Path, tmp_path: Path) -> Path:
    """The same, for a test that changes it."""
    return Path(shutil.copy(lasting, tmp_path))


def _replay(path: Path, work: Path, seed: int = 0, trials: int = 26) -> tune.Result:
    return tune.tune(CONFIG, TARGET, 1, STEPS, trials=trials, seed=seed, replay=path, work_dir=work)


def _decisions(path: Path) -> list[Mapping[str, Any] | None]:
    return [trial.decisions for trial in read_history(path).trials]


@dataclass
class Replayed:
    """A search, and of how many measured candidates its model learned each time."""

    result: tune.Result
    folder: Path
    learned: list[int]


@pytest.fixture(scope="module")
def replayed(lasting: Path, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    folder, learned, made = tmp_path_factory.mktemp("replayed"), list[int](), search.cost_model

    def watched(seed: int) -> Any:
        model = made(seed)
        train = model._train

        def note(xs: list[Any], ys: Any) -> None:
            train(xs, ys)
            assert model.booster is not None
            learned.append(len(xs))

        model._train = note
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "cost_model", watched)
        patch.setattr(logs, "packaged", lambda: folder / "none")
        patch.setenv("XDG_DATA_HOME", str(folder))
        return Replayed(_replay(lasting, folder / "work"), folder, learned)


def test_replaying_with_the_same_seed_tries_the_same_candidates(
    replayed: Replayed, tmp_path: Path
) -> None:
    first = replayed.result
    assert first.progress.trials == 26
    assert (first.path, first.record) == (None, None)
    assert not list(replayed.folder.rglob("*.so"))  # nothing was built
    again = _replay(first.history, tmp_path / "2")
    assert _decisions(again.history) == _decisions(first.history)
    assert again.progress.run_failures == 0
    # It found its way: chance would be among the best 2 % in two searches of five.
    best = _invented_secs(Tiling.from_dict(dict(first.decisions or {})))
    every = sorted(_invented_secs(t) for t in Space(CONFIG, TARGET, STEPS).tilings)
    assert best == first.best_secs <= every[len(every) // 50]


def test_replaying_with_another_seed_tries_what_nobody_knows(
    replayed: Replayed, tmp_path: Path
) -> None:
    other = _replay(replayed.result.history, tmp_path, seed=1, trials=1 + search.BATCH)
    assert other.progress.run_failures > 0
    assert "has no time of these decisions" in other.progress.failure
    assert other.progress.trials == 1 + search.BATCH


def test_replaying_leaves_the_history_that_it_replays(everything: Path, tmp_path: Path) -> None:
    folder = history.folder(tmp_path / "work", TARGET.name, CONFIG.key, "tvm_sepconv")
    folder.mkdir(parents=True)
    before = everything.read_bytes()
    (folder / history.NAME).write_bytes(before)
    result = _replay(tmp_path / "work", tmp_path / "work", trials=2)
    assert (folder / history.NAME).read_bytes() == before
    assert result.history == folder / tune.REPLAY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steps": 131},
            r"all\.jsonl is of another search and cannot be replayed\. It has steps=131",
        ),
        ({"history": 2}, r"does not begin as a search's history does \(version 2, expected 1\)"),
    ],
    ids=["steps", "version"],
)
def test_a_history_of_another_search_is_refused(
    change: dict[str, int], message: str, everything: Path, tmp_path: Path
) -> None:
    head, *rest = everything.read_text().splitlines()
    everything.write_text("\n".join([json.dumps({**json.loads(head), **change}), *rest]))
    with pytest.raises(ValueError, match=message):
        _replay(everything, tmp_path / "work")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": True, "replay": Path("x")}, "resumed or replayed, not both"),
        ({"resume": True, "space": "metaschedule"}, "measures on this machine"),
        ({"trials": 1}, r"`trials` argument must be at least 2.*Received: trials=1"),
    ],
    ids=["both", "metaschedule", "trials"],
)
def test_arguments_that_do_not_go_together(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tune.tune(CONFIG, TARGET, 1, STEPS, work_dir=tmp_path, **arguments)


# ---- going on ----------------------------------------------------------------------------------


def test_a_search_goes_on_where_it_stopped(builds_here: None, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"work_dir": tmp_path / "work", "workload": "QN-B1", "threads": 2}
    runner = Inventing()
    first = tune.tune(CONFIG, TARGET, 1, STEPS, trials=3, runner=runner, **arguments)
    lines = first.history.read_text().splitlines()
    head = json.loads(lines[0])
    assert (head["workload"], head["machine"]) == ("QN-B1", "an invented one")
    first.history.write_text("\n".join(lines[:-1]) + '\n{"trial": 4, "deci')  # was killed
    again = Inventing()
    with pytest.warns(UserWarning, match=r"history\.jsonl, line 5, is no trial"):
        result = tune.tune(
            CONFIG, TARGET, 1, STEPS, trials=6, runner=again, resume=True, **arguments
        )
    assert result.history.read_text().splitlines()[:4] == lines[:4]
    with pytest.warns(UserWarning, match="line 5"):
        found = read_history(result.history)
    assert [trial.trial for trial in found.trials] == [1, 2, 3, 4, 5, 6]
    assert len({str(trial.decisions) for trial in found.trials}) == 6
    elapsed = [trial.elapsed_secs for trial in found.trials]
    assert elapsed == sorted(elapsed)
    singles = [names for names in again.asked if len(names) == 1]
    assert len(singles) == 3 and not set(map(tuple, singles)) & set(map(tuple, runner.asked))
    assert found.final is not None and found.final["recorded"] == str(result.path)
    (record,) = logs.read(Path(str(result.path)))
    assert (record.threads, record.trials, record.machine) == (2, 6, "an invented one")


def test_another_search_is_not_gone_on_with(builds_here: None, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"work_dir": tmp_path, "trials": 2, "runner": Inventing()}
    tune.tune(CONFIG, TARGET, 1, STEPS, **arguments)
    with pytest.raises(ValueError, match=r"cannot be resumed.*has batch=1\. Received: batch=2"):
        tune.tune(CONFIG, TARGET, 2, STEPS, resume=True, **arguments)


# ---- learning ----------------------------------------------------------------------------------


def _ranks(values: Sequence[float]) -> Any:
    return np.argsort(np.argsort(values))


def test_the_model_ranks_measured_candidates_that_it_has_not_seen() -> None:
    """Times of `tests/data/search_ct_d128.jsonl`: its first line says where they are from."""
    found = read_history(MEASURED)
    config = KernelConfig.from_dict(found.header["config"])
    space = Space(config, CpuTarget(found.header["target"]), found.header["steps"])
    trials = [t for t in found.trials if t.secs and space.tiling(t.decisions)]
    assert len(trials) >= 48, "the schedule's decisions changed: make this file anew"
    order = np.random.default_rng(0).permutation(len(trials))
    candidates = [search._candidate(space.scheduled(_tiling(space, t))) for t in trials]
    results = [search._result(t) for t in trials]
    with search._without_intrinsics():
        context = ms.TuneContext(space.workload(), target=CpuTarget(found.header["target"]).tvm())
    half = len(trials) // 2
    seen, unseen = order[:half], order[half:]
    model = search.cost_model(0)
    model.update(context, [candidates[i] for i in seen], [results[i] for i in seen])
    assert model.booster is not None
    assert model.data_size == half
    scores = model.predict(context, [candidates[i] for i in unseen])
    speeds = [-trials[i].median_secs for i in unseen]
    assert np.corrcoef(_ranks(scores), _ranks(speeds))[0, 1] > 0.5  # by chance 0 +- 0.18


def _tiling(space: Space, trial: Trial) -> Tiling:
    tiling = space.tiling(trial.decisions)
    assert tiling is not None
    return tiling


def test_a_search_trains_its_model_after_every_batch(replayed: Replayed) -> None:
    # The last batch is one trial, from which nobody would propose any more.
    assert replayed.learned == [1 + search.BATCH * n for n in (1, 2, 3)]
