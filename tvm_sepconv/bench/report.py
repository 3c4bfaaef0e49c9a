"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tvm_sepconv import targets
from tvm_sepconv.bench.timing import Samples

OURS = "tvm_sepconv"
DISTURBING = 0.1  # processors that others keep busy; from there on figures are worth less

_LABEL, _CELL, _VERDICT = 34, 29, 14  # widths of the table's columns, in characters


@dataclass(frozen=True)
class Row:
    """One workload, measured.

    Parameters
    ----------
    shape
        Batch, input steps and the layer, in a few characters.
    flops
        Floating-point operations of a call, a multiply-add being two.
    whole_call
        NumPy in to NumPy out, by name: `OURS`, and the peers.
    kernel
        Our kernel alone, on one thread, into an output that is used again.
    forms
        The form of each peer that was timed, the fastest it has.
    """

    id: str
    shape: str
    flops: int
    whole_call: dict[str, Samples]
    kernel: Samples
    forms: dict[str, str]

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours, more than 1 if we are faster; None without peers."""
        times = [s.median_us for name, s in self.whole_call.items() if name != OURS]
        return min(times) / self.whole_call[OURS].median_us if times else None

    @property
    def kernel_gflops(self) -> float:
        """Our kernel's speed on one thread, in GFLOP/s."""
        return self.flops / self.kernel.median_us / 1e3


@dataclass(frozen=True)
class Report:
    """A run: its rows, and all that a reader must know to judge or repeat them.

    Parameters
    ----------
    where
        Machine, threads and date.
    others_processors
        How many processors other programs kept busy meanwhile.
    peak_gflops
        One core's, the best of the whole run.
    missing
        Packages of peers that were not there: then the comparison is incomplete.
    """

    command: str
    where: str
    threads: int
    target: str
    data_format: str
    others_processors: float
    versions: dict[str, str]
    peak_gflops: float
    missing: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def losses(self) -> list[str]:
        """The ids of the rows in which a peer is faster."""
        return [row.id for row in self.rows if row.ratio is not None and row.ratio < 1]

    @property
    def geometric_mean(self) -> float | None:
        """Of the rows' ratios; None where a peer is missing, since it might be the best one."""
        ratios = [row.ratio for row in self.rows if row.ratio is not None]
        return statistics.geometric_mean(ratios) if ratios and not self.missing else None

    def share_of_peak(self, row: Row) -> float:
        """The kernel's speed over the core's peak in this run."""
        return row.kernel_gflops / self.peak_gflops

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        plain = {name: value for name, value in vars(self).items() if name != "rows"}
        summary = {"geometric_mean": self.geometric_mean, "losses": self.losses}
        return {**plain, **summary, "rows": [self._row_dict(row) for row in self.rows]}

    def _row_dict(self, row: Row) -> dict[str, Any]:
        whole_call = {name: samples._asdict() for name, samples in row.whole_call.items()}
        return {
            "id": row.id,
            "shape": row.shape,
            "flops": row.flops,
            "whole_call": whole_call,
            "ratio": row.ratio,
            "kernel": row.kernel._asdict(),
            "kernel_gflops": row.kernel_gflops,
            "share_of_peak": self.share_of_peak(row),
            "forms": row.forms,
        }

    def text(self) -> str:
        """Return the table, its heading and its summary."""
        return "\n".join([*self._heading(), *self._table(), *self._summary(), ""])

    def _heading(self) -> list[str]:
        lines = [f"Whole call, NumPy in to NumPy out, float32 {self.data_format}: {self.where}"]
        lines += [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"Peak of one core, {self.target}: {self.peak_gflops:.1f} GFLOP/s"]
        if self.target != targets.runnable()[0]:
            lines += [f"Ours is held to {self.target}; others use all that the machine has"]
        if self.others_processors > DISTURBING:
            busy = f"{self.others_processors:.1f}"
            lines += [f"DISTURBED: other programs kept {busy} processors busy meanwhile"]
        if self.missing:
            names = " and ".join(self.missing)
            lines = [
                f"INCOMPLETE: {names} not installed (pip install 'tvm-sepconv[bench]'), so nothing "
                "to compare with",
                *lines,
            ]
        return [*lines, ""]

    def _table(self) -> Iterable[str]:
        peers = list(dict.fromkeys(n for row in self.rows for n in row.whole_call if n != OURS))
        names = "".join(f"{name:>{_CELL}}" for name in [OURS, *peers])
        units = f"{'µs':>10}{'p10–p90':>{_CELL - 10}}" * (1 + len(peers))
        yield f"{'':{_LABEL}}{names}{'':{_VERDICT * bool(peers)}}{'kernel alone, 1 thread':>29}"
        ratio = f"{'ratio':>8}{'':{_VERDICT - 8}}" if peers else ""
        yield f"{'':{_LABEL}}{units}{ratio}{'µs':>11}{'GFLOP/s':>9}{'of peak':>9}"
        for row in self.rows:
            label = f"{row.id:<11}{row.shape}"
            calls = "".join(_cell(row.whole_call[name]) for name in [OURS, *peers])
            alone = f"{row.kernel.median_us:11.1f}{row.kernel_gflops:9.1f}"
            share = f"{100 * self.share_of_peak(row):7.1f} %"
            yield f"{label:{_LABEL}}{calls}{_verdict(row.ratio)}{alone}{share}"

    def _summary(self) -> Iterable[str]:
        forms: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for peer, form in row.forms.items():
                forms.setdefault((peer, form), []).append(row.id)
        if forms:
            yield ""
        for (peer, form), ids in forms.items():
            yield f"{peer}, fastest as {form}: {', '.join(ids)}"
        if self.geometric_mean is None:
            return
        yield (
            f"{len(self.rows)} rows: the geometric mean of the ratios to the best peer is "
            f"{self.geometric_mean:.2f}×; {len(self.rows) - len(self.losses)} won, "
            f"{len(self.losses)} lost{': ' if self.losses else ''}{', '.join(self.losses)}"
        )


def _cell(samples: Samples) -> str:
    spread = f"{samples.p10_us:.1f}–{samples.p90_us:.1f}"
    return f"{samples.median_us:10.1f}{spread:>{_CELL - 10}}"


def _verdict(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:8.2f}× {'won' if ratio >= 1 else 'LOST':{_VERDICT - 10}}"
