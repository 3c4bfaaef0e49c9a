"""Tune a kernel on this machine and write its record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_sepconv.bench.machine import cpu_name
from tvm_sepconv.compiler import build, logs, measure
from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.search import Progress, Search
from tvm_sepconv.compiler.space import Space
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.config import KernelConfig

FINALISTS = 3
FINAL_SAMPLES = 41


@dataclass(frozen=True)
class Result:
    """What a search found; ``path`` is the log, None if nothing but the default worked."""

    record: logs.Record
    path: Path | None
    progress: Progress


def tune(
    config: KernelConfig,
    target: CpuTarget,
    batch: int,
    steps: int,
    *,
    trials: int = 32,
    seed: int = 0,
    work_dir: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Tune the long variant of a kernel on this machine and write its record.

    The default is the first candidate, the decisions in use are another, and all that might be
    recorded are measured in alternation at the end: the record is the default's unless another is
    faster beyond chance.

    Parameters
    ----------
    batch, steps
        The input to measure on; the record serves every other.
    trials
        Candidates to measure.
    work_dir
        For libraries and MetaSchedule's database; what an earlier search of the same kernel left
        there is removed.
    report
        Called after every trial.
    should_stop
        Asked between trials: True ends the search, and what it found is kept.

    Raises
    ------
    ValueError
        For fewer than two trials, or an input too short for the long variant.
    RuntimeError
        If the default kernel cannot be built, or is wrong.
    OSError
        If no folder for records can be written.
    """
    if trials < 2:
        raise ValueError(
            "The `trials` argument must be at least 2: the first one measures the default. "
            f"Received: trials={trials}"
        )
    folder = logs.writable()
    space = Space(config, target, measure.layer_config(config).out_steps(steps))
    match = logs.lookup(config, target.name)
    known = [space.default, *([match.tiling] if match else [])]
    known = [tiling for tiling in dict.fromkeys(known) if tiling in space.tilings]
    scratch, progress = work_dir / target.name / config.key, Progress(of=trials)
    with _seeded(seed), closing(
        Search(space, target, scratch, progress, report, should_stop)
    ) as search:  # fmt: skip
        measure.write_task(search.task, config, batch, steps)
        build.build_runtime(target, search.runtime)
        search.run(known, seed)
        finalists = _finalists(known, search.secs)
        samples = search.sample([search.library(t) for t in finalists], FINAL_SAMPLES)
    winner = _winner(samples)
    low, median, high = np.percentile(samples[winner], [25, 50, 75])
    record = logs.Record(
        config=config,
        variant=logs.LONG,
        target=target.name,
        threads=logs.THREADS,
        batch=batch,
        steps=steps,
        decisions=finalists[winner].to_dict(),
        median_secs=float(median),
        default_secs=float(np.median(samples[0])),
        noise=float((high - low) / median),
        trials=progress.trials,
        machine=f"{cpu_name()}, {os.cpu_count()} processors",
        tvm=importlib.metadata.version("apache-tvm"),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    if len(search.secs) == 1:
        return Result(record, None, progress)
    measured_again = match.record if match and match.tiling in finalists else None
    return Result(record, logs.write(record, folder, measured_again), progress)


def _finalists(known: Sequence[Tiling], secs: dict[Tiling, list[float]]) -> list[Tiling]:
    """The known tilings that work, the default first, and the fastest of all."""
    fastest = sorted(secs, key=lambda tiling: float(np.median(secs[tiling])))[:FINALISTS]
    return list(dict.fromkeys([*(tiling for tiling in known if tiling in secs), *fastest]))


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
