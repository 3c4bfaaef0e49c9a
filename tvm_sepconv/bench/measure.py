"""A run: the machine's limits, then everybody on every subject."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_sepconv import jit
from tvm_sepconv.bench import contest, environments, limits, machine, roofline
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import CONTESTANTS, Contestant
from tvm_sepconv.bench.process import ContestantError, Worker, workers
from tvm_sepconv.bench.report import OURS, Report, Row
from tvm_sepconv.subjects import Subject

COLD_CACHES = 2  # inputs and outputs that calls go through exceed the largest cache so many times


@dataclass(frozen=True)
class Terms:
    """What holds for all rows of a run.

    Parameters
    ----------
    target
        The instruction set that ours is compiled for.
    contestants
        Keys of the others that are to be measured; None for all.
    """

    threads: int
    target: str
    cold: bool = False
    contestants: tuple[str, ...] | None = None

    @property
    def isa(self) -> str:
        """The target without its core."""
        return self.target.partition("@")[0]

    def takes(self, contestant: Contestant) -> bool:
        """Whether a contestant is to be measured."""
        chosen = self.contestants
        return chosen is None or contestant.name == OURS or contestant.key in chosen


def measure(
    subjects: Sequence[Subject],
    terms: Terms,
    command: str,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure the machine, then everybody on every subject.

    Parameters
    ----------
    command
        For the report.
    progress
        Is told what is being done.

    Raises
    ------
    RuntimeError
        If our own layer cannot be compiled or called, or its output is wrong.
    """
    progress("measuring the machine")
    measured = limits.measure()
    pythons, missing = _present(terms)
    others = machine.OthersWork()
    rows, peaks, versions = [], [], machine.versions(("numpy",))
    with workers(pythons, terms.threads) as contestants:
        for number, subject in enumerate(subjects):
            head = f"{number + 1} of {len(subjects)}, {subject.id}: "
            tell = functools.partial(_headed, progress, head)
            row, peak = _row(subject, terms, contestants, measured, tell)
            rows.append(row)
            peaks.append(peak)
        for worker in contestants.values():
            versions.update(_versions(worker))
    best = max(peaks, default=0.0)
    progress("")
    return Report(
        command=command,
        where=machine.where(terms.threads),
        threads=terms.threads,
        target=terms.target,
        data_format=" and ".join(dict.fromkeys(s.config.data_format for s in subjects)),
        cold=terms.cold,
        others_processors=others.processors(),
        versions=versions,
        limits=_with_peak(measured, terms.isa, best),
        peers=tuple(c.name for c in CONTESTANTS if c.counts and c.name in pythons),
        missing=missing,
        rows=tuple(rows),
    )


def _headed(progress: Callable[[str], None], head: str, text: str) -> None:
    progress(head + text)


def _present(terms: Terms) -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of each contestant to be measured; and what to do about peers that are not."""
    pythons, missing = {}, {}
    for contestant in CONTESTANTS:
        if not terms.takes(contestant):
            if contestant.counts:
                missing[contestant.name] = "left out by --peers"
            continue
        python = environments.python(contestant.environment, contestant.modules)
        if python is not None:
            pythons[contestant.name] = python
        elif contestant.counts:
            missing[contestant.name] = f"tvm-sepconv bench --setup {contestant.environment}"
    return pythons, missing


def _row(
    subject: Subject,
    terms: Terms,
    contestants: Mapping[str, Worker],
    measured: limits.Limits,
    progress: Callable[[str], None],
) -> tuple[Row, float]:
    """A subject's row, and the best that the peak loop reached meanwhile, in GFLOP/s."""
    progress("computing the reference")
    case = Case.of_subject(subject, terms.target)
    caches = measured.cache_bytes
    copies = _copies(case, max(caches.values())) if terms.cold else 1
    outcome = contest.hold(contestants, case, copies, progress)
    if OURS in outcome.failures:
        raise RuntimeError(f"{subject.id}: {OURS}: {outcome.failures[OURS]}")
    progress("the kernel alone")
    kernel, peak = contest.kernel_alone(contestants[OURS], terms.isa)
    config = subject.config
    shape = f"{subject.batch}×{subject.steps} {subject.sizes}"
    row = Row(
        id=subject.id,
        shape=shape,
        flops=config.flops(subject.batch, subject.steps, subject.channels),
        whole_call=outcome.whole_call,
        forms={name: form for name, form in outcome.forms.items() if name != OURS},
        failures=outcome.failures,
        kernel=kernel,
        traffic=_traffic(subject, terms, caches),
    )
    return row, limits.Peak(terms.isa).flops / peak.best_us / 1e3


def _copies(case: Case, cache_bytes: int) -> int:
    """How many inputs and outputs together exceed the largest cache, so many times."""
    size = case.x.nbytes + case.expected.size * case.x.itemsize
    return COLD_CACHES * cache_bytes // size + 2


def _traffic(subject: Subject, terms: Terms, caches: Mapping[str, int]) -> roofline.Traffic:
    config = subject.config
    kernel = config.kernel_config(subject.channels)
    target = jit.compiler("tvm_sepconv.compiler.targets").cpu(terms.target)
    long = jit.compiler("tvm_sepconv.compiler.build").variants(kernel, target)[0]
    return roofline.traffic(
        kernel, long.to_dict()["decisions"], target.lanes(kernel.accumulation_dtype),
        subject.batch, subject.steps, config.out_steps(subject.steps), caches, terms.cold,
    )  # fmt: skip


def _versions(worker: Worker) -> dict[str, str]:
    try:
        return worker.ask("versions")
    except ContestantError:  # it died in the last row, and why stands there
        return {}


def _with_peak(measured: limits.Limits, isa: str, gflops: float) -> limits.Limits:
    best = max(gflops, measured.peak_gflops[isa])
    return dataclasses.replace(measured, peak_gflops={**measured.peak_gflops, isa: best})
