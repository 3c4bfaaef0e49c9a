"""What was measured: rows, and all that a reader must know to judge or repeat them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm_sepconv.bench import roofline
from tvm_sepconv.bench.limits import Limits
from tvm_sepconv.bench.roofline import Bound, Traffic
from tvm_sepconv.bench.timing import Samples
from tvm_sepconv.workloads import workloads

OURS = "tvm_sepconv"
# Frameworks without which a comparison is not one: any of them may be the best peer of a row.
REQUIRED = ("PyTorch", "torch.compile", "ONNX Runtime", "OpenVINO", "LiteRT")
# Nobody else's framework: shown beside the peers, never counted.
BESIDE = ("two kernels", "dense Conv1D", "MetaSchedule")
# Of the workload table, too small and too large to count: the others are "the 20".
NOT_OF_THE_20 = ("SEED", "QN-B1-b16")
FORMAT = 1  # of the JSON; others are refused


@dataclass(frozen=True)
class Row:
    """One layer, measured.

    Parameters
    ----------
    shape
        Batch, input steps and the layer, in a few characters.
    flops
        Floating-point operations of a call, a multiply-add being two.
    whole_call
        Array in to array out, by contestant: `OURS`, peers, and those of `BESIDE`. Who was not
        measured, or was wrong, is not there.
    forms
        The form of each that was timed, the fastest it has.
    failures
        Why a contestant has no time here, in its words.
    kernel
        Our kernel alone, on one thread, into an output that is used again.
    traffic
        What the kernel has to move.
    """

    id: str
    shape: str
    flops: int
    whole_call: dict[str, Samples]
    forms: dict[str, str]
    failures: dict[str, str]
    kernel: Samples
    traffic: Traffic

    @property
    def best_peer(self) -> str | None:
        """The fastest of other people's frameworks; None if there is none."""
        peers = [name for name in self.whole_call if name != OURS and name not in BESIDE]
        return min(peers, key=lambda name: self.whole_call[name].median_us, default=None)

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours, more than 1 if we are faster; None without both."""
        if self.best_peer is None or OURS not in self.whole_call:
            return None
        return self.ratio_to(self.best_peer)

    def ratio_to(self, name: str) -> float:
        """A contestant's time over ours."""
        return self.whole_call[name].median_us / self.whole_call[OURS].median_us

    @property
    def kernel_gflops(self) -> float:
        """Our kernel's speed on one thread, in GFLOP/s."""
        return self.flops / self.kernel.median_us / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, JSON-able."""
        plain = {**vars(self), "kernel": self.kernel._asdict(), "traffic": self.traffic.to_dict()}
        plain["whole_call"] = {name: s._asdict() for name, s in self.whole_call.items()}
        return {**plain, "ratio": self.ratio, "best_peer": self.best_peer}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Row:
        """Undo `to_dict`."""
        kept = {name: plain[name] for name in ("id", "shape", "flops", "forms", "failures")}
        return cls(
            **kept,
            whole_call={name: Samples(**s) for name, s in plain["whole_call"].items()},
            kernel=Samples(**plain["kernel"]),
            traffic=Traffic.from_dict(plain["traffic"]),
        )


@dataclass(frozen=True)
class Report:
    """A run.

    Parameters
    ----------
    where
        Machine, threads and date.
    target
        The instruction set that our kernels were compiled for.
    cold
        Whether inputs came from memory, not from caches.
    others_processors
        How many processors other programs kept busy meanwhile.
    limits
        Of one core, measured in the same run.
    peers
        The names that count, in the order to show them.
    missing
        What to install, for each peer that was not there.
    """

    command: str
    where: str
    threads: int
    target: str
    data_format: str
    cold: bool
    others_processors: float
    versions: dict[str, str]
    limits: Limits
    peers: tuple[str, ...]
    missing: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def incomplete(self) -> dict[str, str]:
        """Why each of the `REQUIRED` peers that has no time in any row has none."""
        present = {name for row in self.rows for name in row.whole_call}
        return {
            name: self.missing.get(name, "no time in any row")
            for name in REQUIRED
            if name not in present
        }

    @property
    def losses(self) -> list[str]:
        """The ids of the rows in which a peer is faster."""
        return [row.id for row in self.rows if row.ratio is not None and row.ratio < 1]

    @property
    def geometric_mean(self) -> float | None:
        """Of all rows' ratios; None where a required peer is missing: it might be the best one."""
        return self._mean(self.rows)

    @property
    def geometric_mean_of_the_20(self) -> float | None:
        """The same of the workload table without `NOT_OF_THE_20`; None if one of them is absent."""
        ids = [name for name in workloads() if name not in NOT_OF_THE_20]
        rows = [row for row in self.rows if row.id in ids]
        return self._mean(rows) if len(rows) == len(ids) else None

    def _mean(self, rows: Iterable[Row]) -> float | None:
        ratios = [row.ratio for row in rows]
        known = [ratio for ratio in ratios if ratio is not None]
        if self.incomplete or not known or len(known) < len(ratios):
            return None
        return statistics.geometric_mean(known)

    @property
    def peak_gflops(self) -> float:
        """One core's peak with our kernels' instruction set."""
        return self.limits.peak_gflops[self._isa]

    @property
    def _isa(self) -> str:
        return self.target.partition("@")[0]

    def share_of_peak(self, row: Row) -> float:
        """The kernel's speed over the core's peak in this run."""
        return row.kernel_gflops / self.peak_gflops

    def bound(self, row: Row) -> Bound:
        """The limit of this machine that holds the row's kernel."""
        return roofline.bound(row.traffic, row.flops, self.limits, self._isa)

    def holds(self, row: Row) -> bool:
        """Whether that limit explains at least half of the kernel's time; else it is overhead."""
        return 2 * self.bound(row).time_us >= row.kernel.median_us

    def memory_bound(self, row: Row) -> Bound:
        """The level of memory that comes nearest to holding it."""
        return roofline.memory_bound(row.traffic, self.limits)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able, and what follows from it."""
        derived = {
            "geometric_mean": self.geometric_mean,
            "geometric_mean_of_the_20": self.geometric_mean_of_the_20,
            "losses": self.losses,
            "incomplete": self.incomplete,
        }
        return {
            "format": FORMAT,
            **vars(self),
            "limits": self.limits.to_dict(),
            "peers": list(self.peers),
            **derived,
            "rows": [self._row_dict(row) for row in self.rows],
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        return {
            **row.to_dict(),
            "kernel_gflops": row.kernel_gflops,
            "share_of_peak": self.share_of_peak(row),
            "bound": vars(self.bound(row)),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """Undo `to_dict`; what follows from the rest is computed anew.

        Raises
        ------
        ValueError
            If it is no report, or one of another version.
        """
        names = cls.__dataclass_fields__
        if plain.get("format") != FORMAT or not names.keys() <= plain.keys():
            raise ValueError(
                f"A report must be what `tvm-sepconv bench --json` of this version wrote, format "
                f"{FORMAT}. Received: format={plain.get('format')!r}. Measure again"
            )
        fields = {name: plain[name] for name in names}
        fields["limits"] = Limits.from_dict(plain["limits"])
        fields["peers"] = tuple(plain["peers"])
        fields["rows"] = tuple(Row.from_dict(row) for row in plain["rows"])
        return cls(**fields)
