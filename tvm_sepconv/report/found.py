"""What there is to report: searches' histories, records, times in alternation, bench reports."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_sepconv import jit
from tvm_sepconv.bench.report import Report
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.workloads import workloads

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.history import History, Trial
    from tvm_sepconv.compiler.tuning.logs import Record

OURS, METASCHEDULE = "tvm_sepconv", "metaschedule"  # design spaces, as histories name them
MOST_NAMES = 8  # of kernels in a line; of more there is the number


@dataclass(frozen=True)
class Search:
    """One search: what its history's first line says, and its trials."""

    config: KernelConfig
    target: str
    batch: int
    steps: int
    threads: int
    space: str
    asked: int
    machine: str
    tvm: str
    date: str
    modelled: bool
    trials: Sequence[Trial]
    final: Mapping[str, Any] | None

    @classmethod
    def of(cls, history: History) -> Search:
        """Take what is shown out of a history.

        Raises
        ------
        KeyError, TypeError, ValueError
            If its first line lacks something.
        """
        head = history.header
        return cls(
            config=KernelConfig.from_dict(head["config"]), target=str(head["target"]),
            batch=int(head["batch"]), steps=int(head["steps"]), threads=int(head["threads"]),
            space=str(head["space"]), asked=int(head["trials"]), machine=str(head["machine"]),
            tvm=str(head["tvm"]), date=str(head["date"]), modelled=bool(head.get("modelled")),
            trials=history.trials, final=history.final,
        )  # fmt: skip

    @property
    def failures(self) -> int:
        """Candidates that did not build, did not run or were wrong."""
        return sum(trial.secs is None for trial in self.trials)

    @property
    def best(self) -> list[Trial]:
        """The trials that were the fastest so far, each faster than the one before."""
        result: list[Trial] = []
        for trial in self.trials:
            if trial.secs and (not result or trial.median_secs < result[-1].median_secs):
                result.append(trial)
        return result

    @property
    def best_secs(self) -> float:
        """The least median of any trial; infinite if none was measured."""
        return self.best[-1].median_secs if self.best else math.inf

    @property
    def default_secs(self) -> float | None:
        """Our default schedule's: of the alternation at the end, else of the first trial."""
        if self.space != OURS:
            return None
        if self.final is not None:
            return float(self.final["default_secs"])
        return self.trials[0].median_secs if self.trials and self.trials[0].secs else None

    def first_within(self, secs: float) -> Trial | None:
        """The first trial that took no longer."""
        return next((trial for trial in self.best if trial.median_secs <= secs), None)


@dataclass(frozen=True)
class Ratio:
    """A library's time over the default's, round by round of an alternation."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Times:
    """Libraries of one kernel measured in alternation: one with no record, and others.

    Parameters
    ----------
    samples
        Seconds of one call, by "default", "transferred", "tuned"; as many of each.
    source
        Whose record was transferred, and from how far; empty if none was.
    record_date
        Of the record that "tuned" was built from.
    """

    samples: Mapping[str, Sequence[float]]
    source: str
    batch: int
    steps: int
    machine: str
    date: str
    record_date: str

    def secs(self, name: str) -> float:
        """The median of "default", "transferred" or "tuned"."""
        return float(np.median(self.samples[name]))

    def ratio(self, name: str) -> Ratio:
        """Over the default, which was called just before or after."""
        ratios = np.divide(self.samples[name], self.samples["default"])
        low, median, high = np.percentile(ratios, [10, 50, 90])
        return Ratio(float(median), float(low), float(high))


@dataclass(frozen=True)
class Found:
    """All of it.

    Parameters
    ----------
    times
        By the records' keys.
    missing
        What cannot be shown, and what would make it.
    """

    searches: tuple[Search, ...] = ()
    records: tuple[Record, ...] = ()
    times: Mapping[tuple[Any, ...], Times] = field(default_factory=dict)
    benches: tuple[Report, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def targets(self) -> list[str]:
        """Every target of which there is something."""
        names = {one.target for one in self.searches} | {one.target for one in self.records}
        return sorted(names | {one.target for one in self.benches})


def read(work_dir: Path, bench_files: Sequence[Path], target: str | None) -> Found:
    """Read what there is; records where builds look for them.

    Parameters
    ----------
    work_dir
        Where searches leave their histories.
    target
        The only one to take, by its full name; None for all.

    Raises
    ------
    OSError, ValueError
        If one of `bench_files` cannot be read or is no report.
    """
    damaged: list[str] = []
    searches = [s for s in _searches(work_dir, damaged) if target in (None, s.target)]
    searches.sort(key=lambda search: (search.target, place(search.config), search.space))
    used = records(target)
    benches = tuple(b for b in map(_bench, bench_files) if target in (None, b.target))
    times = {r.key: one for r in used if (one := _times(work_dir, r)) is not None}
    found = Found(tuple(searches), tuple(used), times, benches, tuple(damaged))
    return replace(found, missing=(*damaged, *_missing(found, work_dir)))


def records(target: str | None) -> list[Record]:
    """Return the records that builds use, of one target or of all: of each key the first one."""
    logs = jit.compiler("tvm_sepconv.compiler.tuning.logs")
    result: dict[Any, Record] = {}
    for folder in logs.folders():
        for path in sorted(folder.glob("*.jsonl")):
            for record in logs.read(path):
                result.setdefault(record.key, record)
    chosen = [record for record in result.values() if target in (None, record.target)]
    return sorted(chosen, key=lambda record: (record.target, place(record.config), record.threads))


def times_path(work_dir: Path, record: Record) -> Path:
    """Where the times of a record's libraries are: beside its search's history."""
    return work_dir / record.target / record.config.key / f"times-{record.threads}.json"


def name(config: KernelConfig) -> str:
    """A kernel for people: its id in the workload table, if it is there, and its shape."""
    words: str = jit.compiler("tvm_sepconv.compiler.tuning.records").kernel_name(config)
    return words


def workload(config: KernelConfig) -> str:
    """The id of the published layer with this kernel; empty if there is none."""
    known: str = jit.compiler("tvm_sepconv.compiler.tuning.records").workload_id(config)
    return known


def place(config: KernelConfig) -> tuple[int, str]:
    """What sorts kernels as the workload table does, those that are not in it at the end."""
    known = workload(config)
    table = list(workloads())
    return table.index(known) if known else len(table), config.key


def _searches(work_dir: Path, damaged: list[str]) -> Iterator[Search]:
    history = jit.compiler("tvm_sepconv.compiler.tuning.history")
    for path in sorted(work_dir.rglob(history.NAME)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                search = Search.of(history.read_history(path))
            except (KeyError, OSError, TypeError, ValueError) as error:
                damaged.append(f"{path} cannot be shown: {type(error).__name__}: {error}")
                continue
        damaged.extend(str(warning.message) for warning in caught)
        yield search


def _bench(path: Path) -> Report:
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no report of `tvm-sepconv bench --json`: {error}") from error


def _times(work_dir: Path, record: Record) -> Times | None:
    """None without any, and if they are of another record."""
    try:
        times = Times(**json.loads(times_path(work_dir, record).read_text()))
        return times if times.record_date == record.date else None
    except (OSError, TypeError, ValueError):
        return None


def _missing(found: Found, work_dir: Path) -> Iterable[str]:
    if not found.searches:
        yield f"Search curves and decisions: no search left a history in {work_dir}"
    for space, way in ((OURS, ""), (METASCHEDULE, " --space auto")):
        if found.searches and all(one.space != space for one in found.searches):
            yield f"Curves of the space {space}: none was searched (tvm-sepconv tune{way})"
    if not found.records:
        yield "Tuned times: there are no records (tvm-sepconv tune)"
    elif lacking := [r for r in found.records if r.key not in found.times]:
        names = ", ".join(name(record.config) for record in lacking)
        if len(lacking) > MOST_NAMES:
            names = f"{len(lacking)} of {len(found.records)} records"
        yield f"Transferred times: not measured for {names} (tvm-sepconv report --measure)"
    if not found.benches:
        yield "Peers: no file of `tvm-sepconv bench --json FILE` was given (--bench FILE)"
