"""Tune a kernel and write its record."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tvm_sepconv import jit
from tvm_sepconv.bundle import RUNTIME
from tvm_sepconv.compiler import build, default_space
from tvm_sepconv.compiler.static import Shape
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import history, logs, measure
from tvm_sepconv.compiler.tuning.finalists import (
    finalists,
    not_beaten,
    now,
    record_of,
    settled,
    winner,
)
from tvm_sepconv.compiler.tuning.history import History, Writer
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.compiler.tuning.modelled.runner import Modelled
from tvm_sepconv.compiler.tuning.runner import Runner, here, machine
from tvm_sepconv.compiler.tuning.search import Progress, Search
from tvm_sepconv.compiler.tuning.space import Space
from tvm_sepconv.config import KernelConfig

FINAL_SAMPLES = 41
LONGER = 4  # times the steps: a record serves every length, so it may not lose on a longer input
REPLAY = "replay.jsonl"  # beside the history: that may be the one which is replayed
_DATABASE = ("database_workload.json", "database_tuning_record.json")


@dataclass(frozen=True)
class Result:
    """What a search found.

    Parameters
    ----------
    default_secs, best_secs, noise
        Of the alternation at the end. Without one, which is so after a replay and in MetaSchedule's
        space, the search's own; then the noise is NaN, and so is the default where there is none.
    decisions
        The best; None where a space has no names for them.
    record, path
        What was recorded, and the log; None if nothing was.
    """

    progress: Progress
    history: Path
    default_secs: float
    best_secs: float
    noise: float = math.nan
    decisions: Mapping[str, Any] | None = None
    record: logs.Record | None = None
    path: Path | None = None


def tune(
    config: KernelConfig,
    target: Any,
    batch: int,
    steps: int,
    *,
    trials: int = 32,
    seed: int = 0,
    work_dir: Path,
    workload: str | None = None,
    threads: int = 1,
    space: str = history.OWN_SPACE,
    resume: bool = False,
    replay: Path | None = None,
    runner: Runner | None = None,
    record: bool = True,
    allow_tf32: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Tune a variant of a kernel, of a CPU's the long one, and write its record.

    The default is the first candidate, the decisions in use are another, and all that might be
    recorded are measured in alternation at the end: the record is the default's unless another is
    faster beyond chance, and on a CPU not slower than it on an input four times as long.

    Parameters
    ----------
    batch, steps
        The input to measure on; the record serves every other.
    trials
        Candidates to measure, those of a search that is resumed among them.
    work_dir
        For libraries, MetaSchedule's database and the history; what an earlier search of the same
        kernel left there is replaced.
    workload
        The layer's name, for the history.
    threads
        That one call may use; the record says so.
    space
        "metaschedule" is MetaSchedule's own, to compare with: measured, never recorded.
    resume
        Go on with the search that was in `work_dir`, if there was one.
    replay
        A history to take times from instead of measuring, or a `work_dir` that has it; nothing is
        recorded.
    runner
        Where to measure; None is here, for CUDA on the first GPU.
    record
        Whether to begin with the records there are, and to write one.
    allow_tf32
        On a GPU, whether float32 may be multiplied as TF32.
    report
        Called after every trial, and when another phase begins.
    should_stop
        Asked between trials: True ends the search, and what it found is kept.

    Raises
    ------
    ValueError
        For fewer than two trials, an input too short for the long variant, or a history of another
        search.
    RuntimeError
        If the default kernel cannot be built, or is wrong.
    RunnerError
        If nothing can be measured any more.
    OSError
        If the history or the record cannot be written.
    """
    _check(trials, space, resume, replay, runner)
    own: Any = None
    if space == history.OWN_SPACE:
        own = _space(config, target, batch, steps, allow_tf32)
    usual = own is None or own.variant == logs.LONG
    key = config.key if usual else f"{config.key}_{own.variant}"
    header = _header(config, target, batch, steps, workload, threads, space, seed, trials)
    place = history.folder(work_dir, header["target"], key, space).absolute()
    if own is None:
        assert isinstance(target, CpuTarget)
        return _default_space(config, target, place, header, report, should_stop)
    if replay:
        given = history.replayable(replay, key, header)
        return _replay(own, target, place, given, header, report)
    return _search(own, target, place, header, resume, runner, record, report, should_stop)


def _check(
    trials: int, space: str, resume: bool, replay: Path | None, runner: Runner | None
) -> None:
    if trials < 2:
        raise ValueError(
            "The `trials` argument must be at least 2: the first one measures the default. "
            f"Received: trials={trials}"
        )
    if resume and replay:
        raise ValueError("A search is resumed or replayed, not both")
    if space != history.OWN_SPACE and (resume or replay or runner):
        raise ValueError(
            "A search of MetaSchedule's own space measures on this machine, from its beginning:"
            " it cannot be resumed, replayed or measured elsewhere"
        )


def _header(
    config: KernelConfig, target: Any, batch: int, steps: int, workload: str | None, threads: int,
    space: str, seed: int, trials: int,
) -> dict[str, Any]:  # fmt: skip
    """What a history begins with."""
    # Of a GPU without the processor beside it: builds look for its architecture's records.
    name = target.name if isinstance(target, CpuTarget) else target.name.partition("@")[0]
    return {
        "config": config.to_dict(), "workload": workload, "target": name, "batch": batch,
        "steps": steps, "threads": threads, "space": space, "seed": seed, "trials": trials,
        "tvm": importlib.metadata.version("apache-tvm"), "machine": None, "date": now(),
        "modelled": False,
    }  # fmt: skip


def _space(config: KernelConfig, target: Any, batch: int, steps: int, allow_tf32: bool) -> Any:
    out_steps = measure.layer_config(config).out_steps(steps)
    if isinstance(target, CpuTarget):
        return Space(config, target, out_steps)
    return _cuda().Grid(config, target, batch, out_steps, allow_tf32)


def _searcher(space: Any) -> type[Search]:
    found: type[Search] = Search if isinstance(space, Space) else _cuda().GridSearch
    return found


def _cuda() -> ModuleType:
    from tvm_sepconv.compiler.tuning import cuda_search

    return cuda_search


def _search(
    space: Any, target: Any, place: Path, header: dict[str, Any], resume: bool,
    runner: Runner | None, recording: bool, report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Result:  # fmt: skip
    progress = Progress(of=header["trials"])
    folder = logs.writable() if recording else None
    key = (space.config, header["target"], header["threads"])
    match = logs.lookup(*key, variant=space.variant) if recording else None
    with ExitStack() as stack:
        if runner is None:
            runner = stack.enter_context(closing(_here(space, place, header["threads"])))
        known = [t for t in (space.default, match and match.tiling) if t in space.tilings]
        first = list(dict.fromkeys([*known, *space.neighbours(space.default)]))
        header |= {"machine": runner.machine, "first": [tiling.to_dict() for tiling in first]}
        header["modelled"] = isinstance(runner, Modelled) and runner.core
        earlier = history.earlier(place / history.NAME, header) if resume else None
        _clear(place, keep=earlier is not None)
        writer = Writer(place / history.NAME, None if earlier else header)
        stack.enter_context(closing(writer))
        searcher = _searcher(space)
        search = searcher(space, target, place, runner, writer, progress, report, should_stop)
        stack.enter_context(closing(search))
        stack.enter_context(_seeded(header["seed"]))
        _start(search, header, earlier)
        try:
            search.run(first, header["seed"])
            best, samples, won = _decided(search, known, header)
        except RunnerError as error:
            raise RunnerError(
                f"{error} {progress.trials} trials are kept in {writer.path}: go on with --resume"
            ) from error
        values = {**header, "variant": space.variant, "decisions": best[won].to_dict()}
        record = record_of(values, samples[won], samples[0], progress.trials)
        again = match.record if match and match.tiling in best else None
        path = _written(record, folder if len(best) > 1 else None, again, writer)
    return Result(
        progress, writer.path, record.default_secs, record.median_secs, record.noise,
        record.decisions, record, path,
    )  # fmt: skip


def _here(space: Any, place: Path, threads: int) -> Any:
    """The runner of this machine."""
    return here(place / RUNTIME, threads) if isinstance(space, Space) else _cuda().here()


def _start(search: Search, header: Mapping[str, Any], earlier: History | None) -> None:
    """Make what all candidates share, and take what an earlier part of the search has tried."""
    search.start()
    search.space.write_task(search.task, header["batch"], header["steps"])
    if isinstance(search.target, CpuTarget):
        build.build_runtime(search.target, search.folder / RUNTIME)
    if earlier:
        search.know(earlier.trials)


def _decided(
    search: Search, known: Sequence[Any], header: Mapping[str, Any]
) -> tuple[list[Any], Sequence[Sequence[float]], int]:
    """The finalists, their samples in alternation, and which of them wins."""
    best = finalists(known, search.trials)
    samples = settled(partial(search.alternate, best, FINAL_SAMPLES))
    won = winner(samples)
    if won and isinstance(search.space, Space) and not header["modelled"]:
        won = _anywhere(search, best, samples, header)
    return best, samples, won


def _written(
    record: logs.Record, folder: Path | None, again: logs.Record | None, writer: Writer
) -> Path | None:
    """Write the record, if there is a folder for it, and the history's end; return the log's path.

    `again` is the record there was, if its decisions were measured again.
    """
    if record.modelled and again and again.modelled is None:
        again = None  # what was measured is no worse for what was modelled
    path = None
    try:
        if folder is not None:
            path = logs.write(record, folder, again)
    finally:
        writer.final(
            default_secs=record.default_secs, best_secs=record.median_secs,
            noise=record.noise, decisions=record.decisions, recorded=path and str(path),
        )  # fmt: skip
    return path


def _anywhere(
    search: Search, best: Sequence[Any], samples: Sequence[Sequence[float]],
    header: Mapping[str, Any],
) -> int:  # fmt: skip
    """Which of `best` wins among those that the default does not beat on a longer input."""
    longer = search.folder / "longer.npz"
    search.space.write_task(longer, header["batch"], LONGER * header["steps"])
    fit = not_beaten(settled(partial(search.alternate, best, FINAL_SAMPLES, longer)))
    return fit[winner([samples[n] for n in fit])]


def _default_space(
    config: KernelConfig, target: CpuTarget, place: Path, header: dict[str, Any],
    report: Callable[[Progress], None], should_stop: Callable[[], bool],
) -> Result:  # fmt: skip
    batch, steps, threads = header["batch"], header["steps"], header["threads"]
    shape = Shape.of(measure.layer_config(config), batch, steps)
    header["machine"] = machine()
    _clear(place, keep=False)
    task = place / "task.npz"
    measure.write_task(task, config, batch, steps)
    with closing(Writer(place / history.NAME, header)) as writer:
        found, progress = default_space.tune(
            config, target, shape, threads, header["trials"], place, task, report, should_stop,
            writer, header["seed"],
        )  # fmt: skip
    kept = default_space.folder(jit.cache_root(), config, target, shape, threads)
    default_space.keep(found, kept, progress.trials)
    return Result(progress, writer.path, math.nan, progress.best_secs)


def _replay(
    space: Any, target: Any, place: Path, given: History, header: dict[str, Any],
    report: Callable[[Progress], None],
) -> Result:  # fmt: skip
    decisions = given.header.get("first", [space.default.to_dict()])
    header |= {"machine": given.header["machine"]}
    header["modelled"] = given.header.get("modelled", False)  # older histories do not say
    header["first"] = decisions
    progress = Progress(of=header["trials"])
    times = {t: trial for trial in given.trials if (t := space.tiling(trial.decisions))}
    first = [t for t in map(space.tiling, decisions) if t]
    place.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=place) as scratch,
        closing(Writer(place / REPLAY, header)) as writer,
        closing(
            _searcher(space)(
                space, target, Path(scratch), None, writer, progress, report, replayed=times
            )
        ) as search,
        _seeded(header["seed"]),
    ):
        search.run(first, header["seed"])
        best = min(search.trials, key=lambda tiling: search.trials[tiling].median_secs)
    return Result(
        progress, writer.path, progress.default_secs, progress.best_secs, decisions=best.to_dict()
    )


def _clear(place: Path, keep: bool) -> None:
    """Remove what an earlier search left; with `keep` only what is made anew from its history."""
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    for name in _DATABASE:
        (place / name).unlink(missing_ok=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The cost model draws from NumPy's global generator until it has learned something."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
