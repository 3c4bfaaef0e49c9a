"""Tune a kernel and write its record."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import jit
from tvm_sepconv.bundle import RUNTIME
from tvm_sepconv.compiler import build, default_space
from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.static import Shape
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import history, logs, measure
from tvm_sepconv.compiler.tuning.history import History, Trial, Writer
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.compiler.tuning.runner import Runner, here, machine
from tvm_sepconv.compiler.tuning.search import Progress, Search
from tvm_sepconv.compiler.tuning.space import Space
from tvm_sepconv.config import KernelConfig

FINALISTS = 3
FINAL_SAMPLES = 41
REPLAY = "replay.jsonl"  # beside the history: that may be the one which is replayed
_SAME = ("config", "target", "batch", "steps", "threads", "space")
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
    target: CpuTarget,
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
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Tune the long variant of a kernel and write its record.

    The default is the first candidate, the decisions in use are another, and all that might be
    recorded are measured in alternation at the end: the record is the default's unless another is
    faster beyond chance.

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
        Where to measure; None is here.
    record
        Whether to begin with the records there are, and to write one.
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
    if trials < 2:
        raise ValueError(
            "The `trials` argument must be at least 2: the first one measures the default. "
            f"Received: trials={trials}"
        )
    if resume and replay:
        raise ValueError("A search is resumed or replayed, not both")
    place = history.folder(work_dir, target.name, config.key, space).absolute()
    header = {
        "config": config.to_dict(), "workload": workload, "target": target.name, "batch": batch,
        "steps": steps, "threads": threads, "space": space, "seed": seed, "trials": trials,
        "tvm": importlib.metadata.version("apache-tvm"), "machine": None, "date": _now(),
        "modelled": False,
    }  # fmt: skip
    if space != history.OWN_SPACE:
        if resume or replay or runner:
            raise ValueError(
                "A search of MetaSchedule's own space measures on this machine, from its beginning:"
                " it cannot be resumed, replayed or measured elsewhere"
            )
        return _default_space(config, target, place, header, report, should_stop)
    out_steps = measure.layer_config(config).out_steps(steps)
    own = Space(config, target, out_steps)
    if replay:
        given = _replayable(replay, history.folder(replay, target.name, config.key, space), header)
        return _replay(own, target, place, given, header, report)
    return _search(own, target, place, header, resume, runner, record, report, should_stop)


def _search(
    space: Space, target: CpuTarget, place: Path, header: dict[str, Any], resume: bool,
    runner: Runner | None, recording: bool, report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Result:  # fmt: skip
    config, threads, progress = space.config, header["threads"], Progress(of=header["trials"])
    folder = logs.writable() if recording else None
    match = logs.lookup(config, target.name, threads=threads) if recording else None
    with ExitStack() as stack:
        runtime = place / RUNTIME
        if runner is None:
            runner = stack.enter_context(closing(here(runtime, threads)))
        known = [t for t in (space.default, match and match.tiling) if t in space.tilings]
        first = list(dict.fromkeys([*known, *space.neighbours(space.default)]))
        header |= {"machine": runner.machine, "first": [tiling.to_dict() for tiling in first]}
        earlier = _earlier(place / history.NAME, header) if resume else None
        _clear(place, keep=earlier is not None)
        writer = Writer(place / history.NAME, None if earlier else header)
        stack.enter_context(closing(writer))
        search = Search(space, target, place, runner, writer, progress, report, should_stop)
        stack.enter_context(closing(search))
        stack.enter_context(_seeded(header["seed"]))
        search.start()
        measure.write_task(search.task, config, header["batch"], header["steps"])
        build.build_runtime(target, runtime)
        if earlier:
            search.know(earlier.trials)
        try:
            search.run(first, header["seed"])
            finalists = _finalists(known, search.trials)
            samples = search.alternate(finalists, FINAL_SAMPLES)
        except RunnerError as error:
            raise RunnerError(
                f"{error} {progress.trials} trials are kept in {writer.path}: go on with --resume"
            ) from error
        winner = _winner(samples)
        record = _record(header, finalists[winner], samples[winner], samples[0], progress.trials)
        path = None
        try:
            worked = sum(trial.secs is not None for trial in search.trials.values())
            if folder is not None and worked > 1:
                again = match.record if match and match.tiling in finalists else None
                path = logs.write(record, folder, again)
        finally:
            writer.final(
                default_secs=record.default_secs, best_secs=record.median_secs,
                noise=record.noise, decisions=record.decisions, recorded=path and str(path),
            )  # fmt: skip
    return Result(
        progress, writer.path, record.default_secs, record.median_secs, record.noise,
        record.decisions, record, path,
    )  # fmt: skip


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
    space: Space, target: CpuTarget, place: Path, given: History, header: dict[str, Any],
    report: Callable[[Progress], None],
) -> Result:  # fmt: skip
    decisions = given.header.get("first", [space.default.to_dict()])
    header |= {"machine": given.header["machine"], "first": decisions}
    progress = Progress(of=header["trials"])
    times = {t: trial for trial in given.trials if (t := space.tiling(trial.decisions))}
    first = [t for t in map(space.tiling, decisions) if t]
    place.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=place) as scratch,
        closing(Writer(place / REPLAY, header)) as writer,
        closing(
            Search(space, target, Path(scratch), None, writer, progress, report, replayed=times)
        ) as search,
        _seeded(header["seed"]),
    ):
        search.run(first, header["seed"])
        best = min(search.trials, key=lambda tiling: search.trials[tiling].median_secs)
    return Result(
        progress, writer.path, progress.default_secs, progress.best_secs, decisions=best.to_dict()
    )


def _replayable(path: Path, usual: Path, header: Mapping[str, Any]) -> History:
    """The history at `path`, or in the `usual` folder of the work folder that it is."""
    if path.is_dir():
        path = (
            next((f for f in (usual, path) if (f / history.NAME).is_file()), usual) / history.NAME
        )
    found = history.read_history(path)
    _check_same(found, header, _SAME, "replayed")
    return found


def _record(
    header: Mapping[str, Any], tiling: Tiling, samples: Sequence[float], default: Sequence[float],
    trials: int,
) -> logs.Record:  # fmt: skip
    low, median, high = (float(n) for n in np.percentile(samples, [25, 50, 75]))
    return logs.Record(
        config=KernelConfig.from_dict(header["config"]),
        variant=logs.LONG,
        target=header["target"],
        threads=header["threads"],
        batch=header["batch"],
        steps=header["steps"],
        decisions=tiling.to_dict(),
        median_secs=median,
        default_secs=float(np.median(default)),
        noise=(high - low) / median,
        trials=trials,
        machine=header["machine"],
        tvm=header["tvm"],
        date=_now(),
    )


def _earlier(path: Path, header: Mapping[str, Any]) -> History | None:
    """The history to go on with; None if there is none."""
    if not path.is_file():
        return None
    found = history.read_history(path)
    _check_same(found, header, (*_SAME, "machine", "tvm"), "resumed: search anew, without it")
    return found


def _check_same(
    found: History, header: Mapping[str, Any], names: Sequence[str], cannot: str
) -> None:
    for name in names:
        if found.header.get(name) != header[name]:
            raise ValueError(
                f"{found.path} is of another search and cannot be {cannot}. It has {name}="
                f"{found.header.get(name)!r}. Received: {name}={header[name]!r}"
            )


def _clear(place: Path, keep: bool) -> None:
    """Remove what an earlier search left; with `keep` only what is made anew from its history."""
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    for name in _DATABASE:
        (place / name).unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _finalists(known: Sequence[Tiling], trials: Mapping[Tiling, Trial]) -> list[Tiling]:
    """The known tilings that work, the default first, and the fastest of all."""
    working = [tiling for tiling in trials if trials[tiling].secs is not None]
    fastest = sorted(working, key=lambda tiling: trials[tiling].median_secs)[:FINALISTS]
    return list(dict.fromkeys([*(tiling for tiling in known if tiling in working), *fastest]))


def _winner(samples: Sequence[Sequence[float]]) -> int:
    """The fastest of alternated samples; 0, the default, unless another is faster beyond chance."""
    table = np.array(samples)
    best = int(np.argmin(np.median(table, axis=1)))
    low, ratio, high = np.percentile(table[best] / table[0], [25, 50, 75])
    # 95 % of medians: the notch of a box plot (McGill, Tukey and Larsen 1978).
    return best if ratio + 1.57 * (high - low) / table.shape[1] ** 0.5 < 1 else 0


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The cost model draws from NumPy's global generator until it has learned something."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
