"""The layer in MetaSchedule's own design space, as somebody would tune it who writes no schedule.

The layer is a plain tensor expression. Space, search strategy and cost model are MetaSchedule's own
for the target, which include rewriting the weights' layouts. Candidates are built, verified and
timed as ours are. The fastest is kept as a compiled library with its weights' layouts.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_sepconv.compiler.default_library import Tuned as Tuned
from tvm_sepconv.compiler.default_library import best as best
from tvm_sepconv.compiler.default_library import describe, sample, write
from tvm_sepconv.compiler.default_library import folder as folder
from tvm_sepconv.compiler.default_library import keep as keep
from tvm_sepconv.compiler.plain import workload
from tvm_sepconv.compiler.static import Shape
from tvm_sepconv.compiler.targets import CpuTarget, cpu
from tvm_sepconv.compiler.tuning.builder import Builder, processes
from tvm_sepconv.compiler.tuning.evolution import evolve
from tvm_sepconv.compiler.tuning.history import Trial, Writer
from tvm_sepconv.compiler.tuning.runner import Local, apart
from tvm_sepconv.compiler.tuning.search import SAMPLES, Progress
from tvm_sepconv.config import KernelConfig

STRATEGY = "evolutionary"
BATCH = 64  # candidates between two lessons of the cost model, as MetaSchedule has it
_INTRINSICS = "tvm.s_tir.tensor_intrin"


def tune(
    config: KernelConfig,
    target: CpuTarget,
    shape: Shape,
    threads: int,
    trials: int,
    work_dir: Path,
    task: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    history: Writer | None = None,
    seed: int = 0,
) -> tuple[Path, Progress]:
    """Search for `trials` candidates and leave the fastest one in a new folder in `work_dir`.

    Parameters
    ----------
    work_dir
        For the database and the candidates' libraries.
    task
        An input and weights with the right answer, as `measure.save_task` writes them: every
        candidate must give it.
    report
        Called after every trial.
    should_stop
        Asked between trials: True ends the search, and what it found is kept.
    history
        Gets every trial.

    Returns
    -------
    tuple
        A folder for `Tuned`, and where the search stands.

    Raises
    ------
    ValueError
        If `trials` is not positive.
    RuntimeError
        If none of the candidates could be built and run; it says why.
    """
    if trials < 1:
        raise ValueError(f"The `trials` argument must be at least 1. Received: trials={trials}")
    work_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="search-", dir=work_dir)).absolute()
    chosen = tvm.target.Target({**target.description, "num-cores": threads})
    batch = min(BATCH, max(trials // 4, 1))
    database = ms.database.JSONDatabase(work_dir=str(scratch))
    # It warms up for 100 candidates by itself, more than some have to spend.
    model = ms.cost_model.XGBModel(num_warmup_samples=batch, num_tuning_cores=1)
    context = started(workload(config, shape), chosen, seed)
    context.pre_tuning(trials, batch, context.generate_design_space(), database, model)
    with ExitStack() as stack:
        runner = stack.enter_context(closing(Local(partial(sample, threads=threads))))
        threadpool, pool = stack.enter_context(apart(1)), processes()
        stack.callback(pool.shutdown)
        candidates = _Candidates(
            _builder(target, scratch, pool), runner, threadpool, task, Progress(of=trials), report,
            should_stop, history,
        )  # fmt: skip
        evolve(context, database, model, candidates.measured)
    now = candidates.progress
    if candidates.best is None:
        raise RuntimeError(
            f"None of MetaSchedule's {now.trials} candidates ran: "
            f"{now.build_failures} builds and {now.run_failures} runs failed. "
            f"The first failure: {now.failure}"
        )
    result = scratch / "result"
    candidates.best.rename(result)
    failed = now.build_failures + now.run_failures
    facts = {"trials": trials, "threads": threads, "best_secs": now.best_secs, "failed": failed}
    describe(result, facts)
    return result, now


class _Candidates:
    """Builds and measures MetaSchedule's candidates, and keeps the best one's folder."""

    def __init__(
        self,
        builder: ms.builder.Builder,
        runner: Local,
        threads: ThreadPoolExecutor,
        task: Path,
        progress: Progress,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        history: Writer | None,
    ) -> None:
        self.builder, self.runner, self.threads, self.task = builder, runner, threads, task
        self.progress, self.report, self.should_stop = progress, report, should_stop
        self.history = history
        self.best: Path | None = None
        self.began = time.monotonic()

    def measured(
        self, candidates: Sequence[ms.search_strategy.MeasureCandidate], target: tvm.target.Target
    ) -> list[ms.runner.RunnerResult]:
        """Results up to the first candidate that was not tried any more."""
        self._phase("building")
        inputs = [ms.builder.BuilderInput(c.sch.mod, target) for c in candidates]
        built = self.threads.submit(self.builder.build, inputs).result()
        self._phase("measuring")
        results = []
        for artifact in built:
            if self.should_stop():
                break
            results.append(self._measure(artifact))
        for artifact in built:
            if artifact.artifact_path and Path(artifact.artifact_path) != self.best:
                shutil.rmtree(artifact.artifact_path, ignore_errors=True)
        return results

    def _measure(self, artifact: ms.builder.BuilderResult) -> ms.runner.RunnerResult:
        secs, error = None, artifact.error_msg and str(artifact.error_msg)
        if not error:
            try:
                call = partial(self.runner.measure, self.task, [artifact.artifact_path], SAMPLES)
                (secs,) = self.threads.submit(call).result()
            except RuntimeError as reason:
                error = str(reason)
        now = self.progress
        elapsed_secs = round(time.monotonic() - self.began, 3)
        trial = Trial(now.trials + 1, None, secs, error, elapsed_secs)
        if not now.best_secs <= trial.median_secs and not error:
            if self.best is not None:
                shutil.rmtree(self.best)
            self.best = Path(artifact.artifact_path)
        if self.history is not None:
            self.history.trial(trial)
        now.count(trial, built=not artifact.error_msg)
        self.report(now)
        return ms.runner.RunnerResult(secs, error)

    def _phase(self, name: str) -> None:
        self.progress.phase = name
        self.report(self.progress)


def started(mod: tvm.IRModule, target: tvm.target.Target, seed: int = 0) -> ms.TuneContext:
    """MetaSchedule's own space and search strategy for a workload."""
    with _own_intrinsics():
        return ms.TuneContext(
            mod,
            target=target,
            space_generator="post-order-apply",
            search_strategy=STRATEGY,
            rand_state=1 + seed % (2**31 - 2),
            num_threads=len(os.sched_getaffinity(0)),
        )


def build_candidate(mod: tvm.IRModule, *, target: str, path: str) -> str:
    """Compile a candidate in one of the builder's processes; returns its folder for `Tuned`."""
    entry = tempfile.mkdtemp(dir=path)
    write(Path(entry), Schedule(mod), cpu(target), {})
    return entry


def _builder(target: CpuTarget, scratch: Path, pool: PopenPoolExecutor) -> Builder:
    return Builder(partial(build_candidate, target=target.name, path=str(scratch)), pool)


@contextmanager
def _own_intrinsics() -> Iterator[None]:
    """Let TuneContext import x86's tensor intrinsics alone; all families' take 13 s.

    The space for AVX-512 asks for them by name, though no layer in float32 has a use for them.
    """
    if _INTRINSICS in sys.modules:
        yield
        return
    package = ModuleType(_INTRINSICS)
    package.__path__ = [str(Path(tvm.s_tir.__file__).parent / "tensor_intrin")]
    sys.modules[_INTRINSICS] = package
    try:
        importlib.import_module(f"{_INTRINSICS}.x86")
        yield
    finally:
        del sys.modules[_INTRINSICS]  # its module x86 stays: it can be registered once only
