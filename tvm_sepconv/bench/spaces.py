"""Our design space beside MetaSchedule's own: the best times after so many trials.

Both are searched on the same input with the same number of threads and the same builder, and every
candidate's output is compared with the reference before it is timed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sepconv import jit
from tvm_sepconv.bench import machine
from tvm_sepconv.subjects import Subject

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.search import Progress

# Long and short kernels, many and few steps, a dilation of 128: what layers differ in most.
LAYERS = ("QN-B1", "QN-C2", "CN-21", "MB-1", "ET-enc", "CT-d128")
COUNTS = "16,32,64"
OURS, THEIRS = "tvm_sepconv", "metaschedule"
FORMAT = 1  # of the JSON; others are refused


@dataclass(frozen=True)
class Row:
    """A layer's two searches.

    Parameters
    ----------
    best_secs
        By space, for each count of trials the least median so far; None if all had failed.
    failed, search_secs
        By space: the trials that failed, and how long the search took.
    """

    layer: str
    shape: str
    best_secs: Mapping[str, Sequence[float | None]]
    failed: Mapping[str, int]
    search_secs: Mapping[str, float]

    @property
    def ratios(self) -> list[float]:
        """How many times as long MetaSchedule's own kernels take, for each count; NaN if none."""
        pairs = zip(self.best_secs[THEIRS], self.best_secs[OURS], strict=True)
        return [theirs / ours if theirs and ours else math.nan for theirs, ours in pairs]


@dataclass(frozen=True)
class Spaces:
    """Searches of both spaces for several layers, up to the last of `counts` trials."""

    command: str
    where: str
    target: str
    threads: int
    counts: tuple[int, ...]
    versions: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def geometric_mean(self) -> float:
        """Of the ratios after the last count; NaN if a layer has none."""
        logs = [math.log(row.ratios[-1]) for row in self.rows]
        return math.exp(sum(logs) / len(logs))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"spaces_format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Spaces:
        """Undo `to_dict`.

        Raises
        ------
        ValueError
            If it is of another format.
        """
        values = dict(plain)
        if (found := values.pop("spaces_format", None)) != FORMAT:
            raise ValueError(
                f"The comparison of spaces must be of format {FORMAT}, which this version writes. "
                f"Received: {found}"
            )
        values["rows"] = tuple(Row(**row) for row in values["rows"])
        return cls(**{**values, "counts": tuple(values["counts"])})

    def text(self) -> str:
        """Return the table that people see."""
        counts = [str(count) for count in self.counts]
        names = [f"{row.layer} {row.shape}" for row in self.rows]
        width = max(map(len, names))
        lines = [
            "The best kernels of our space and of MetaSchedule's own after so many trials, in µs;",
            f"{self.target}; {self.where}",
            f"$ {self.command}",
            "",
            " " * width + "".join(f"{h:>{9 * len(counts)}}" for h in ("ours", "its own", "ratio")),
            " " * width + "".join(f"{count:>9}" for count in 3 * counts),
        ]  # fmt: skip
        for name, row in zip(names, self.rows, strict=True):
            cells = [_us(secs) for space in (OURS, THEIRS) for secs in row.best_secs[space]]
            cells += ["–" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in row.ratios]
            lines.append(f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells))
        return "\n".join([*lines, "", *self._conclusion(), ""])

    def _conclusion(self) -> Iterable[str]:
        mean = self.geometric_mean
        if math.isnan(mean):
            yield "No mean: for some layers nothing was found."
        else:
            yield (
                f"After {self.counts[-1]} trials MetaSchedule's own kernels take {mean:.2f} times "
                "as long as ours, in the geometric mean."
            )
        for space, name in ((OURS, "Ours"), (THEIRS, "MetaSchedule's own")):
            minutes = sum(row.search_secs[space] for row in self.rows) / 60
            failed = sum(row.failed[space] for row in self.rows)
            yield f"{name}: {minutes:.1f} minutes of searching, {failed} trials failed."


def _us(secs: float | None) -> str:
    return "–" if secs is None else f"{secs * 1e6:.1f}"


def measure_spaces(
    subjects: Sequence[Subject],
    target: str,
    threads: int,
    counts: Sequence[int],
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> Spaces:
    """Search both spaces for each layer, up to the last of `counts`; nothing is recorded.

    Parameters
    ----------
    target
        An instruction set of this machine, such as "x86_64-avx512".
    counts
        Of trials, rising.
    progress
        Is told what is being done; at the end an empty text.

    Raises
    ------
    RuntimeError
        If the compiler is not installed, or the default kernel cannot be built.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="tvm_sepconv_spaces_") as folder:
        for number, subject in enumerate(subjects):
            head = f"{number + 1} of {len(subjects)}, {subject.id}"
            work_dir = Path(folder, str(number))
            rows.append(_row(subject, target, threads, counts, work_dir, head, progress))
    progress("")
    return Spaces(
        command=command, where=machine.where(threads), target=target, threads=threads,
        counts=tuple(counts), rows=tuple(rows),
        versions=machine.versions(("numpy", "apache-tvm", "xgboost", "xgboost-cpu")),
    )  # fmt: skip


def _row(
    subject: Subject, target: str, threads: int, counts: Sequence[int], work_dir: Path, head: str,
    progress: Callable[[str], None],
) -> Row:  # fmt: skip
    tune = jit.compiler("tvm_sepconv.compiler.tuning.tune").tune
    history = jit.compiler("tvm_sepconv.compiler.tuning.history")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(target)
    config = subject.config.kernel_config(subject.channels)
    best: dict[str, list[float | None]] = {}
    failed, secs = {}, {}
    for space, words in ((OURS, "our space"), (THEIRS, "MetaSchedule's own space")):
        progress(f"{head}: {words}")

        def tell(now: Progress, words: str = words) -> None:
            progress(f"{head}: {words}, {now.trials} of {now.of} trials")

        folder = work_dir / space
        tune(
            config, chosen, subject.batch, subject.steps, trials=counts[-1], work_dir=folder,
            report=tell, workload=subject.id, threads=threads, space=space, record=False,
        )  # fmt: skip
        (path,) = folder.rglob(history.NAME)
        found = history.read_history(path)
        times = history.best_at(path, counts)
        # A small space is searched to its end before the last count: nothing better would come.
        last = min((t.median_secs for t in found.trials), default=math.inf)
        values = [times.get(count, last) for count in counts]
        best[space] = [value if math.isfinite(value) else None for value in values]
        failed[space] = sum(trial.error is not None for trial in found.trials)
        secs[space] = found.elapsed_secs
    return Row(subject.id, subject.sizes, best, failed, secs)
