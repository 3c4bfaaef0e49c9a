"""One search by MetaSchedule: proposing, building, verifying, timing, learning.

The strategy, the cost model and the database are MetaSchedule's. Every candidate is built as the
library that would be shipped, and measured where a `Runner` does it.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, TypeVar

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Trace

from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.tuning import builder
from tvm_sepconv.compiler.tuning.evolution import Candidates, evolve
from tvm_sepconv.compiler.tuning.history import Trial, Writer
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.compiler.tuning.runner import Runner, apart
from tvm_sepconv.compiler.tuning.space import tiling_of

BATCH = 8  # candidates between two lessons of the cost model
SAMPLES = 15

T = TypeVar("T")


@dataclass
class Progress:
    """Where a search stands: it changes while the search goes on.

    ``rejected`` candidates were refused unbuilt, for the reasons that ``rejections`` counts; they
    are no trials. ``phase`` is "building", "measuring" or, at the end, "comparing".
    """

    of: int
    trials: int = 0
    build_failures: int = 0
    run_failures: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    failure: str = ""
    default_secs: float = math.nan
    best_secs: float = math.nan
    elapsed_secs: float = 0.0
    phase: str = "building"

    @property
    def rejected(self) -> int:
        """How many, whatever the reason."""
        return sum(self.rejections.values())

    def count(self, trial: Trial, built: bool = True) -> None:
        """Take a trial into account."""
        self.trials += 1
        self.elapsed_secs = trial.elapsed_secs
        self.failure = self.failure or trial.error or ""
        if trial.error is not None:
            self.run_failures += built
            self.build_failures += not built
        elif not self.best_secs <= trial.median_secs:  # it may be NaN yet
            self.best_secs = trial.median_secs


class Search:
    """A search, its processes, and the trials so far.

    Parameters
    ----------
    space, target
        What to search: a `Space` of a CPU target; `cuda_search` has another.
    folder
        For libraries and the database.
    runner
        Where to measure; None only if `replayed` has all.
    replayed
        Times to take from there instead of building and measuring.
    history
        Gets every trial.
    report
        Called after every trial, and when another phase begins.
    should_stop
        Asked between trials.
    """

    def __init__(
        self,
        space: Any,
        target: Any,
        folder: Path,
        runner: Runner | None,
        history: Writer,
        progress: Progress,
        report: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
        replayed: Mapping[Tiling, Trial] | None = None,
    ) -> None:
        self.space, self.target, self.folder = space, target, folder.absolute()
        self.runner, self.replayed, self.history = runner, replayed, history
        self.progress, self.report, self.should_stop = progress, report, should_stop
        self.task = self.folder / "task.npz"
        self.trials: dict[Tiling, Trial] = {}
        self.began = time.monotonic()
        self._aside = apart(runner.workers if runner else 1)
        self._pool = builder.processes()
        self._builder: builder.Builder | None = None

    def start(self) -> None:
        """Start to build what all candidates share."""
        if self.replayed is None:
            arguments = (self.space.config, self.target, self.folder, self._pool)
            self._builder = self._apart(builder.of_candidates, *arguments)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()
        self._aside.shutdown()

    def know(self, trials: Sequence[Trial]) -> None:
        """Take trials of an earlier part of this search as done."""
        for trial in trials:
            tiling = self.space.tiling(trial.decisions)
            if tiling is not None:
                self.trials[tiling] = trial
            self.progress.count(trial)
        self._see_default()
        self.began = time.monotonic() - self.progress.elapsed_secs

    def run(self, first: Sequence[Tiling], seed: int) -> None:
        """Measure `first`, the default foremost, and then what the evolutionary search proposes.

        Raises
        ------
        RuntimeError
            If the default does not build, does not run or is wrong.
        RunnerError
            If nothing can be measured any more.
        OSError
            If the history cannot be written.
        """
        model = cost_model(seed)
        database = ms.database.JSONDatabase(work_dir=str(self.folder))
        context = self.started(seed, database, model)
        tilings = list(dict.fromkeys([*self.trials, *first]))
        candidates = [_candidate(self.space.scheduled(tiling)) for tiling in tilings]
        evolve(context, database, model, self._measured, candidates, _without_schedule, self._done)

    def started(
        self, seed: int, database: ms.database.Database, model: ms.cost_model.CostModel
    ) -> ms.TuneContext:
        """MetaSchedule's side of the search, ready to propose candidates."""
        strategy = ms.search_strategy.EvolutionarySearch(
            # A few thousand candidates in all: larger populations would find the same ones again.
            population_size=8 * BATCH, init_min_unmeasured=2 * BATCH, genetic_num_iters=2,
            eps_greedy=1 / BATCH,  # one of a batch by chance
        )  # fmt: skip
        with _without_intrinsics():
            context = ms.TuneContext(
                self.space.workload(),
                target=self.target.tvm(),
                space_generator=self.space.generator(),
                search_strategy=strategy,
                rand_state=1 + seed % (2**31 - 2),
                num_threads=1,  # the schedule is Python; more threads would make the order chance
            )
        # What it proposes again costs no trial, so it may propose more than there are trials.
        proposals = 4 * self.progress.of
        context.pre_tuning(proposals, BATCH, context.generate_design_space(), database, model)
        return context

    def alternate(
        self, tilings: Sequence[Tiling], rounds: int, task: Path | None = None
    ) -> list[list[float]]:
        """Measure candidates in turns, on another `task` if one is given.

        A runner's errors pass through.
        """
        self._phase("comparing")
        absent = [t for t in tilings if not builder.library(self.folder, t).is_file()]
        for artifact in self._build([self.space.module(t) for t in absent]):
            if artifact.error_msg:  # it was built before: the machine is short of something
                raise RuntimeError(str(artifact.error_msg))
        return self._apart(self._sample, tilings, rounds, task)

    def _measured(
        self, candidates: Candidates, target: tvm.target.Target
    ) -> list[ms.runner.RunnerResult]:
        """Try those that are new, as long as there are trials left and nobody says stop.

        Returns the results of all up to the first that was not tried any more.
        """
        modules = [candidate.sch.mod for candidate in candidates]
        self._attempt({tiling_of(mod): mod for mod in modules})
        tried = itertools.takewhile(self.trials.__contains__, map(tiling_of, modules))
        return [_result(self.trials[tiling]) for tiling in tried]

    def _attempt(self, scheduled: Mapping[Tiling, tvm.IRModule]) -> None:
        """Try those that are new, as long as there are trials left and nobody says stop."""
        self.progress.rejections = dict(self.space.rejections)
        new = [tiling for tiling in scheduled if tiling not in self.trials]
        new = new[: max(self.progress.of - self.progress.trials, 0)]
        if self.should_stop():
            new = [tiling for tiling in new if tiling == self.space.default]
        if self.replayed is None:
            self._try({tiling: scheduled[tiling] for tiling in new})
        else:
            for tiling in new:
                self._note(tiling, self.replayed.get(tiling, self._missing(tiling)))

    def _done(self) -> bool:
        return self.progress.trials >= self.progress.of or self.should_stop()

    def _try(self, scheduled: Mapping[Tiling, tvm.IRModule]) -> None:
        """Build all, then measure as many at a time as the runner has workers."""
        self._phase("building")
        built = self._build(list(scheduled.values()))
        self._phase("measuring")
        errors = {t: str(a.error_msg) for t, a in zip(scheduled, built, strict=True) if a.error_msg}
        assert self.runner is not None
        trials = [t for t in scheduled if t not in errors or not self._rejected(t, errors[t])]
        for some in _chunks(trials, self.runner.workers):
            if self.should_stop() and self.space.default in self.trials:
                return
            futures = {t: self._aside.submit(self._sample, [t]) for t in some if t not in errors}
            lost = None
            for tiling in some:
                secs, error = None, errors.get(tiling)
                if error is None:
                    try:
                        (secs,) = futures[tiling].result()
                    except RunnerError as reason:
                        lost = reason
                        continue
                    except RuntimeError as reason:
                        error = str(reason)
                self._note(tiling, self._trial(tiling, secs, error), tiling not in errors)
            if lost:
                raise lost

    def _rejected(self, tiling: Tiling, error: str) -> bool:
        """Whether a build that failed is no trial."""
        return False

    def _sample(
        self, tilings: Sequence[Tiling], rounds: int = SAMPLES, task: Path | None = None
    ) -> list[list[float]]:
        assert self.runner is not None
        libraries = [str(builder.library(self.folder, tiling)) for tiling in tilings]
        return self.runner.measure(task or self.task, libraries, rounds)

    def _build(self, modules: Sequence[tvm.IRModule]) -> list[ms.builder.BuilderResult]:
        if not modules:
            return []
        assert self._builder is not None
        target = self.target.tvm()
        inputs = [ms.builder.BuilderInput(mod, target) for mod in modules]
        return self._apart(self._builder.build, inputs)

    def _apart(self, call: Callable[..., T], *arguments: object) -> T:
        """Call in a thread whose processes no signal reaches."""
        return self._aside.submit(call, *arguments).result()

    def _missing(self, tiling: Tiling) -> Trial:
        return self._trial(tiling, None, "The replayed history has no time of these decisions")

    def _trial(self, tiling: Tiling, secs: Sequence[float] | None, error: str | None) -> Trial:
        elapsed_secs = round(time.monotonic() - self.began, 3)
        number = self.progress.trials + 1
        return Trial(number, tiling.to_dict(), secs, error, elapsed_secs)

    def _note(self, tiling: Tiling, trial: Trial, built: bool = True) -> None:
        """Write a trial down and keep count."""
        trial = self._trial(tiling, trial.secs, trial.error)
        self.history.trial(trial)
        self.trials[tiling] = trial
        self.progress.count(trial, built)
        self._see_default()
        if tiling == self.space.default and trial.error:
            raise RuntimeError(f"There is nothing to tune: the default kernel fails. {trial.error}")
        self.report(self.progress)

    def _see_default(self) -> None:
        trial = self.trials.get(self.space.default)
        if trial is not None and trial.secs:
            self.progress.default_secs = median(trial.secs)

    def _phase(self, name: str) -> None:
        self.progress.phase = name
        self.progress.elapsed_secs = time.monotonic() - self.began
        self.report(self.progress)


def _chunks(everything: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(everything), count):
        yield everything[start : start + count]


def _result(trial: Trial) -> ms.runner.RunnerResult:
    return ms.runner.RunnerResult(trial.secs and list(trial.secs), trial.error)


def cost_model(seed: int) -> ms.cost_model.XGBModel:
    """MetaSchedule's, which predicts as soon as it has learned from one batch."""
    learning = ms.cost_model.xgb_model.XGBConfig(seed=seed, nthread=1)
    return ms.cost_model.XGBModel(config=learning, num_warmup_samples=BATCH)


def _without_schedule(trace: Trace) -> Trace:
    return trace.simplified(remove_postproc=True)


def _candidate(sch: Schedule) -> ms.search_strategy.MeasureCandidate:
    info = ms.arg_info.ArgInfo.from_entry_func(sch.mod, True)
    return ms.search_strategy.MeasureCandidate(sch, info)


@contextmanager
def _without_intrinsics() -> Iterator[None]:
    """Keep TuneContext from importing every family's tensor intrinsics: 13 s, and none is used."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
