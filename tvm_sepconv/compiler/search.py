"""One search by MetaSchedule: proposing, building, verifying, timing, learning.

The strategy, the cost model, the builder and the database are MetaSchedule's. Every candidate is
built as the library that would be shipped, and timed in a process apart, which a wrong one may take
down.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_sepconv.bundle import RUNTIME
from tvm_sepconv.compiler import build, measure
from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.space import Space, tiling_of
from tvm_sepconv.compiler.targets import CpuTarget, cpu
from tvm_sepconv.config import KernelConfig

BATCH = 8  # candidates between two lessons of the cost model
SAMPLES = 15
BUILD_LIMIT_SECS = 120
RUN_LIMIT_SECS = 60
_FAILED_SECS = 1e10  # what MetaSchedule puts down for a candidate that did not run


@dataclass
class Progress:
    """Where a search stands: it changes while the search goes on."""

    of: int
    trials: int = 0
    build_failures: int = 0
    run_failures: int = 0
    failure: str = ""
    default_secs: float = float("nan")
    best_secs: float = float("nan")


class Search:
    """A search's processes, its database, and the times so far.

    Parameters
    ----------
    folder
        For libraries and the database; what is there is removed.
    report
        Called after every trial.
    should_stop
        Asked between trials.
    """

    def __init__(
        self,
        space: Space,
        target: CpuTarget,
        folder: Path,
        progress: Progress,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder.absolute()
        self.space, self.target = space, target
        self.progress, self.report, self.should_stop = progress, report, should_stop
        self.task, self.runtime = self.folder / "task.npz", self.folder / RUNTIME
        self.secs: dict[Tiling, list[float]] = {}
        self.pool = PopenPoolExecutor(1, RUN_LIMIT_SECS)
        # Processes inherit the mask of the thread that starts them: Ctrl-C, which a terminal sends
        # to all, reaches none but this one, which can keep what was found.
        mask = (signal.SIG_BLOCK, {signal.SIGINT})
        self.aside = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=mask)

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown()
        self.aside.shutdown()

    def run(self, known: Sequence[Tiling], seed: int) -> None:
        """Measure `known`, the default first, and then what the evolutionary search proposes.

        Raises
        ------
        RuntimeError
            If the default does not build, does not run or is wrong.
        """
        learning = ms.cost_model.xgb_model.XGBConfig(seed=seed, nthread=1)
        model = ms.cost_model.XGBModel(config=learning, num_warmup_samples=BATCH)
        database = ms.database.JSONDatabase(work_dir=str(self.folder))
        context = self.started(seed, max(self.progress.of - len(known), 1), database, model)
        workload = database.commit_workload(context.mod)
        builder = self.aside.submit(self._builder).result()
        first = [_candidate(self.space.scheduled(tiling)) for tiling in known]
        while proposed := context.generate_measure_candidates():
            candidates = [*first, *proposed][: self.progress.of - self.progress.trials]
            results = self._measure(builder, candidates, len(first))
            for candidate, result in zip(candidates, results, strict=False):
                trace = candidate.sch.trace.simplified(remove_postproc=True)
                measured = (result.run_secs or [_FAILED_SECS], context.target, candidate.args_info)
                database.commit_tuning_record(ms.database.TuningRecord(trace, workload, *measured))
            if len(results) < len(first) + len(proposed) or self.should_stop():
                return
            context.notify_runner_results(proposed, results[len(first) :])
            model.update(context, candidates, results)
            first = []

    def started(
        self, seed: int, trials: int, database: ms.database.Database, model: ms.cost_model.CostModel
    ) -> ms.TuneContext:
        """MetaSchedule's side of the search, ready to propose candidates."""
        strategy = ms.search_strategy.EvolutionarySearch(
            # A few hundred candidates in all: larger populations would be the same ones again.
            population_size=4 * BATCH, init_min_unmeasured=2 * BATCH, genetic_num_iters=2,
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
        context.pre_tuning(trials, BATCH, context.generate_design_space(), database, model)
        return context

    def _builder(self) -> ms.builder.LocalBuilder:
        arguments = {"target": self.target.name, "folder": str(self.folder)}
        return ms.builder.LocalBuilder(
            max_workers=len(os.sched_getaffinity(0)),
            timeout_sec=BUILD_LIMIT_SECS,
            f_build=partial(build_candidate, config=self.space.config, **arguments),
            f_export=str,
        )

    def _measure(
        self,
        builder: ms.builder.LocalBuilder,
        candidates: Sequence[ms.search_strategy.MeasureCandidate],
        needed: int,
    ) -> list[ms.runner.RunnerResult]:
        """Build all, then time one after the other until told to stop, but `needed` at least."""
        target = self.target.tvm()
        candidates = candidates[:needed] if self.should_stop() else candidates
        inputs = [ms.builder.BuilderInput(c.sch.mod, target) for c in candidates]
        built = self.aside.submit(builder.build, inputs).result()
        results: list[ms.runner.RunnerResult] = []
        for candidate, artifact in zip(candidates, built, strict=True):
            if len(results) >= needed and self.should_stop():
                break
            error = self._time(tiling_of(candidate.sch.mod), artifact)
            if error and not self.secs:
                raise RuntimeError(f"There is nothing to tune: the default kernel fails. {error}")
            secs = None if error else self.secs[tiling_of(candidate.sch.mod)]
            results.append(ms.runner.RunnerResult(secs, error))
            self.report(self.progress)
        return results

    def _time(self, tiling: Tiling, artifact: ms.builder.BuilderResult) -> str | None:
        """Time one library and keep count; returns what went wrong."""
        now, error = self.progress, artifact.error_msg and str(artifact.error_msg)
        now.trials += 1
        if error:
            now.build_failures += 1
        else:
            try:
                (self.secs[tiling],) = self.sample([str(artifact.artifact_path)], SAMPLES)
            except RuntimeError as reason:
                now.run_failures += 1
                error = str(reason)
        now.failure = now.failure or error or ""
        medians = {known: float(np.median(secs)) for known, secs in self.secs.items()}
        now.default_secs = medians.get(self.space.default, float("nan"))
        now.best_secs = min(medians.values(), default=float("nan"))
        return error

    def sample(self, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        """Verify and time libraries in alternation, in the measuring process; see `measure.sample`.

        Raises
        ------
        RuntimeError
            Whatever goes wrong there, the end of the process and of its time included.
        """
        call = partial(measure.sample, str(self.task), str(self.runtime), list(libraries), rounds)
        try:
            future = self.aside.submit(self.pool.submit, call).result()
            result: list[list[float]] = future.result()
        except TimeoutError as error:
            raise RuntimeError(f"No result after {RUN_LIMIT_SECS} s") from error
        except ChildProcessError as error:
            raise RuntimeError("The measuring process died") from error
        except Exception as error:  # of any kind: it is the candidate's
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return result

    def library(self, tiling: Tiling) -> str:
        """Where the builder puts a candidate's library."""
        return _library(str(self.folder), tiling)


def build_candidate(
    mod: tvm.IRModule, _target: Any, _params: Any, *, config: KernelConfig, target: str, folder: str
) -> str:
    """Build the library of a candidate, in one of LocalBuilder's processes; return its path."""
    tiling, chosen = tiling_of(mod), cpu(target)
    path = _library(folder, tiling)
    long = build.Variant(tiling)
    build.build_library(config, chosen, Path(path), build.with_long(config, chosen, long))
    return path


def _library(folder: str, tiling: Tiling) -> str:
    (rows, vectors), (block, deep) = tiling.register_tile, tiling.depthwise_block
    name = f"{tiling.step_tile}_{rows}x{vectors}_{block}x{deep}_{tiling.channel_block}.so"
    return os.path.join(folder, name)


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
