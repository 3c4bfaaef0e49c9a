"""Time by layer: tuned, transferred and default; and other people's frameworks beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_sepconv.bench import drawing, plots
from tvm_sepconv.bench.drawing import COLOUR
from tvm_sepconv.bench.report import OURS, Report, Row
from tvm_sepconv.bench.table import us
from tvm_sepconv.report.found import Found, Ratio, Times, name, workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tvm_sepconv.compiler.tuning.logs import Record

READING = (
    "Left: a library's time over that of one with default decisions, called in alternation "
    "(logarithmic); left of the line it is faster. Bars: p10–p90 of the alternation's rounds where "
    "transferred was measured too, else the interquartile range. Transferred: with the nearest "
    "other layer's record, as if the layer had none."
)
PEERS = (
    "Right: whole calls, array to array, over ours in the bench's run (logarithmic); the bar ends "
    f"at the best peer. Marks at the right edge took more than {plots.MOST:g} times as long."
)
_MARKS = {"tuned": ("o", "c0"), "transferred": ("D", "c1")}


@dataclass(frozen=True)
class Line:
    """A line of the picture: a record, a row of a bench report, or both of one layer."""

    name: str
    input: str
    record: Record | None
    times: Times | None
    row: Row | None

    @property
    def default_us(self) -> float | None:
        """The library's with default decisions, one call."""
        if self.times is not None:
            return 1e6 * self.times.secs("default")
        return None if self.record is None else 1e6 * self.record.default_secs

    @property
    def modelled(self) -> bool:
        """Whether cycles stand in the place of times."""
        return self.times is None and self.record is not None and self.record.modelled is not None

    def ratio(self, kind: str) -> Ratio | None:
        """The time of "tuned" or "transferred" over the default's."""
        if self.times is not None:
            return self.times.ratio(kind) if kind in self.times.samples else None
        if self.record is None or kind != "tuned":
            return None
        ratio, half = self.record.median_secs / self.record.default_secs, self.record.noise / 2
        return Ratio(ratio, ratio * (1 - half), ratio * (1 + half))


def lines(found: Found, target: str, bench: Report | None) -> list[Line]:
    """One for each of the target's records and for each other row of the bench report."""
    rows = {row.id: row for row in bench.rows} if bench is not None else {}
    result = []
    for record in (one for one in found.records if one.target == target):
        same = bench is not None and bench.data_format == record.config.data_format
        row = rows.pop(workload(record.config), None) if same else None
        threads = f", {record.threads} threads" * (record.threads > 1)
        words = f"{record.batch}×{record.steps}{threads}"
        times = found.times.get(record.key)
        result.append(Line(name(record.config), words, record, times, row))
    for row in rows.values():
        batch_steps, _, layer = row.shape.partition(" ")
        result.append(Line(f"{row.id} {layer}", batch_steps, None, None, row))
    return result


def figure(shown: Sequence[Line], bench: Report | None, facts: str) -> Figure:
    """Two panels with the same rows; without a bench report, or without records, one."""
    recorded = any(line.record is not None for line in shown)
    height = 1.35 + plots.ROW_IN * max(len(shown), 3)
    halves = ["Time over the default's"] * recorded
    halves += ["Whole calls over ours"] * (bench is not None)
    title = "; ".join(halves)
    made = drawing.figure(height, title, facts)
    panels = drawing.axes(
        made,
        1,
        recorded + (bench is not None),
        width_ratios=[2, 3] if recorded and bench is not None else None,
    )
    for area in panels:
        plots.striped(area, len(shown))
    plots.name_rows(panels[0], [(line.name, _note(line)) for line in shown])
    if recorded:
        _ratios(panels[0], shown)
        panels[0].annotate(
            "input, default's time",
            (0, 1),
            (-6, 5),
            "axes fraction",
            "offset points",
            ha="right",
            color=COLOUR["soft"],
            size=8,
        )
    if bench is not None:
        rows = {number: line.row for number, line in enumerate(shown) if line.row is not None}
        plots.whole_calls(panels[-1], rows, bench, 3 if recorded else 5)
    return made


def _note(line: Line) -> str:
    if line.default_us is None:
        return line.input
    return f"{line.input}, {us(line.default_us)} {'modelled cycles' if line.modelled else 'µs'}"


def _ratios(area: Axes, shown: Sequence[Line]) -> None:
    ends = [1.0]
    for kind, (mark, colour) in _MARKS.items():
        known = [(n, r) for n, line in enumerate(shown) if (r := line.ratio(kind)) is not None]
        if not known:
            continue
        at = [ratio.median for _, ratio in known]
        spread = [[r.median - r.p10 for _, r in known], [r.p90 - r.median for _, r in known]]
        shift = 0.16 if kind == "tuned" else -0.16
        area.errorbar(at, [n - shift for n, _ in known], xerr=spread, color=COLOUR[colour],
                      fmt=mark, markersize=4.5, elinewidth=1.2, label=kind,
                      markerfacecolor=COLOUR[colour if kind == "tuned" else "bg"])  # fmt: skip
        ends += [end for _, ratio in known for end in (ratio.p10, ratio.p90)]
    area.axvline(1, color=COLOUR["ink"], linewidth=1.3, zorder=1.5, label="default")
    plots.ratio_axis(area, min(*ends, 0.95) / 1.01, max(*ends, 1.03) * 1.01)
    area.set_xlabel("time over the default's")
    plots.legend(area, 3)


HEAD = ("layer", "input", "default, µs", "tuned, µs", "over default", "transferred, µs",
        "over default", "from", "trials", "measured", "ours, whole call, µs", "best peer",
        "µs", "over ours")  # fmt: skip


def table(shown: Iterable[Line]) -> list[list[str]]:
    """A row of words for each line, below `HEAD`."""
    return [[line.name, line.input, *_library(line), *_whole(line.row)] for line in shown]


def _library(line: Line) -> list[str]:
    record = line.record
    if record is None or line.default_us is None:
        return ["—"] * 8
    unit = " modelled cycles" * line.modelled
    cells = [us(line.default_us) + unit]
    for kind in _MARKS:
        ratio = line.ratio(kind)
        secs = line.times.secs(kind) if line.times and ratio else record.median_secs
        cells += ["—", "—"] if ratio is None else [us(1e6 * secs) + unit, _words(ratio)]
    when = "in its search" if line.times is None else "by --measure"
    when = "not, but modelled" if line.modelled else when
    date = record.date if line.times is None else line.times.date
    source = line.times.source if line.times is not None else ""
    return [*cells, source or "—", str(record.trials), f"{when}, {date[:10]}"]


def _words(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.p10:.3f}–{ratio.p90:.3f})"


def _whole(row: Row | None) -> list[str]:
    if row is None:
        return ["—"] * 4
    ours = us(row.whole_call[OURS].median_us) if OURS in row.whole_call else "—"
    if row.best_peer is None:
        return [ours, "—", "—", "—"]
    best = us(row.whole_call[row.best_peer].median_us)
    ratio = "—" if row.ratio is None else f"{row.ratio:.2f}×"
    return [ours, row.best_peer, best, ratio]
