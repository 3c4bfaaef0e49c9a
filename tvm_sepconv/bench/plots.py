"""A report's two pictures: the roofline, and everybody's time beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.drawing import COLOUR
from tvm_sepconv.bench.labels import Box, Line, Point, place
from tvm_sepconv.bench.report import BESIDE, OURS, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

LEVELS = {"L1": "soft", "L2": "c0", "L3": "c1", "DRAM": "c2"}  # colours
CLOSE, CROWD = 0.6, 5  # share of peak, and rows: from there on they need a picture of their own
_SAME = 1.04  # limits within this of each other share a label
ROW_IN = 0.235  # height of a row of the bars
# Of contestants: shapes that differ, and sizes that look the same.
MARKS = (("o", 5), ("s", 4.6), ("D", 4.4), ("^", 5.4), ("v", 5.4), ("P", 5.6), (">", 5.4),
         ("o", 5), ("s", 4.6), ("D", 4.4))  # fmt: skip
MOST = 32.0  # times ours; what took longer stands at the edge


def roofline(report: Report) -> Figure:
    """Our kernels under the machine's limits: operations a byte, and operations a second.

    Bytes are those of the level of memory that comes nearest to holding the row; the mark has that
    level's colour, and is a diamond if it is this level that holds the row, not the multiply-adds.
    Where many rows come close to the peak, a second panel has these alone.
    """
    close = [row for row in report.rows if row.kernel_gflops >= CLOSE * report.peak_gflops]
    close = close if len(close) >= CROWD else []
    others = [row for row in report.rows if row not in close]
    title = "GFLOP/s of our kernels against operations a byte"
    made = drawing.figure(10.6 if close else 5.0, title, report.where)
    areas = drawing.axes(made, 1 + bool(close), 1, height_ratios=[4, 5] if close else None)
    xs, ys = zip(*(_place(report, row) for row in report.rows), strict=True)
    peak = max(report.limits.peak_gflops.values())
    areas[0].set_xlim(min(xs) / 3, max(*xs, 4) * 2)
    areas[0].set_ylim(min(*ys, peak / 8) / 1.6, peak * 1.35)
    if close:
        xs, ys = zip(*(_place(report, row) for row in close), strict=True)
        areas[1].set_xlim(min(xs) / 1.5, max(xs) * 1.3)
        areas[1].set_ylim(min(ys) / 1.04, max(*ys, report.peak_gflops) * 1.04)
    for area in areas:
        drawing.log_axes(area)
        area.set_ylabel("GFLOP/s, one thread")
    areas[-1].set_xlabel("floating-point operations a byte, of the level in the mark's colour")
    made.draw_without_rendering()  # from here on it is known where things are
    _panel(areas[0], report, others, close)
    if close:
        _panel(areas[1], report, close, [])
    return made


def _place(report: Report, row: Row) -> tuple[float, float]:
    """Operations a byte and GFLOP/s."""
    return row.flops / row.traffic.bytes[report.memory_bound(row).level], row.kernel_gflops


def _panel(area: Axes, report: Report, rows: Sequence[Row], unnamed: Sequence[Row]) -> None:
    """One roofline, with a label for each of `rows` and none for those that follow elsewhere."""
    texts, lines = _roofs(area, report)
    for row in (*rows, *unnamed):
        held = report.bound(row).level != "FMA"
        colour = COLOUR[LEVELS[report.memory_bound(row).level]]
        area.plot(*_place(report, row), "D" if held else "o", markersize=5.5 if held else 6.5,
                  color=colour, markeredgecolor=COLOUR["bg"], markeredgewidth=0.8)  # fmt: skip
    named = [(_place(report, row), row.id) for row in rows]
    boxes = [_box(text) for text in texts]
    if unnamed:
        below, frame = _frame(area, [_place(report, row) for row in unnamed])
        named.append((below, f"{len(unnamed)} layers, named below"))
        boxes.append(frame)
    _names(area, named, boxes, lines)


def _names(
    area: Axes,
    named: Sequence[tuple[tuple[float, float], str]],
    boxes: Sequence[Box],
    lines: Sequence[Line],
) -> None:
    """Write names near their places, off everything else."""
    texts = [area.text(*at, words, size=8.5, weight="bold", va="center") for at, words in named]
    sizes = [(box.right - box.left, box.top - box.bottom) for box in map(_box, texts)]
    points = [_pixel(area, at) for at, _ in named]
    frame = Box(*area.get_window_extent().extents)
    to_data = area.transData.inverted()
    labels = place(list(zip(points, sizes, strict=True)), frame, boxes, lines)
    for text, (at, _), point, label in zip(texts, named, points, labels, strict=True):
        x, y = to_data.transform((label.left + 2, (label.bottom + label.top) / 2))
        text.set_position((float(x), float(y)))
        ends = zip(at, to_data.transform(label.nearest(point)), strict=True)
        area.plot(*ends, color=COLOUR["soft"], linewidth=0.6, zorder=1.8)


def _pixel(area: Axes, at: tuple[float, float]) -> Point:
    return Point(*map(float, area.transData.transform(at)))


def _box(text: Text) -> Box:
    return Box(*text.get_window_extent().extents)


def _frame(area: Axes, places: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], Box]:
    """Frame the places; returns where a name may point to, and the frame in pixels."""
    (left, low), (right, high) = ([f(v) for v in zip(*places, strict=True)] for f in (min, max))
    left, low, right, high = left / 1.06, low / 1.06, right * 1.06, high * 1.04
    area.plot([left, right, right, left, left], [low, low, high, high, low],
              color=COLOUR["soft"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.9)  # fmt: skip
    frame = Box(*_pixel(area, (left, low)), *_pixel(area, (right, high)))
    return (math.sqrt(left * right), low / 1.03), frame


def _roofs(area: Axes, report: Report) -> tuple[list[Text], list[Line]]:
    """Draw the limits; returns their labels, and their lines in pixels."""
    peaks, bandwidth = report.limits.peak_gflops, report.limits.bandwidth
    (first, last), low = area.get_xlim(), area.get_ylim()[0]
    texts: list[Text] = []
    ends = []
    for names, gflops in _together(peaks):
        if gflops < low:
            continue
        start = max(gflops / max(bandwidth.values()), first)
        ends.append(((start, gflops), (last, gflops)))
        area.plot([start, last], [gflops, gflops], color=COLOUR["ink"], linewidth=1.6, zorder=1.7)
        words = f"{', '.join(names)}: {gflops:.0f} GFLOP/s"
        texts.append(area.annotate(words, (last, gflops), (-4, 4), textcoords="offset points",
                                   ha="right", size=8))  # fmt: skip
    for number, (level, gbps) in enumerate(bandwidth.items()):
        start, end = max(first, low / gbps), min(max(peaks.values()) / gbps, last)
        if start >= end:
            continue  # all of it outside the picture
        ends.append(((start, start * gbps), (end, end * gbps)))
        colour = COLOUR[LEVELS[level]]
        area.plot([start, end], [start * gbps, end * gbps], color=colour, linewidth=1.6, zorder=1.7)
        # Neighbours' labels stand apart along the lines, where these are close to each other.
        share = 0.05 + 0.22 * (number % 4)
        at = start * (end / start) ** share
        _along(area, (at, at * gbps), (end, end * gbps), f"{level} {gbps:.0f} GB/s", colour)
    return texts, [(_pixel(area, a), _pixel(area, b)) for a, b in ends]


def _along(
    area: Axes, at: tuple[float, float], end: tuple[float, float], words: str, colour: str
) -> None:
    """Write above a line, turned as it is, if enough of it is in the picture."""
    start, stop = _pixel(area, at), _pixel(area, end)
    angle = math.degrees(math.atan2(stop.y - start.y, stop.x - start.x))
    text = area.annotate(words, at, (-3, 3), textcoords="offset points", color=colour, size=8,
                         rotation=angle, rotation_mode="anchor", va="bottom")  # fmt: skip
    box = _box(text)
    if math.dist(start, stop) < math.hypot(box.right - box.left, box.top - box.bottom):
        text.remove()


def _together(peaks: Mapping[str, float]) -> list[tuple[list[str], float]]:
    """Instruction sets with nearly the same peak, highest first."""
    groups: list[tuple[list[str], float]] = []
    for name, gflops in sorted(peaks.items(), key=lambda item: -item[1]):
        if groups and groups[-1][1] <= gflops * _SAME:
            groups[-1][0].append(name)
        else:
            groups.append(([name], gflops))
    return groups


def bars(report: Report) -> Figure:
    """Everybody's whole calls over ours, a line a row: right of 1 ours is faster, left it lost."""
    rows = [row for row in report.rows if OURS in row.whole_call]
    made = drawing.figure(1.35 + ROW_IN * len(rows), "Times of whole calls over ours", report.where)
    (area,) = drawing.axes(made, 1, 1)
    striped(area, len(rows))
    name_rows(area, [(row.id, row.shape) for row in rows])
    whole_calls(area, dict(enumerate(rows)), report)
    return made


def striped(area: Axes, count: int) -> None:
    """Make so many rows, first on top, every other one on a stripe."""
    area.set_ylim(count - 0.5, -0.5)
    area.grid(False, axis="y")
    area.set_yticks([])
    for number in range(0, count, 2):
        area.axhspan(number - 0.5, number + 0.5, color=COLOUR["stripe"], zorder=0, linewidth=0)


def name_rows(area: Axes, names: Sequence[tuple[str, str]]) -> None:
    """Write each row's name, and a note, left of it."""
    gap, letter, bold = 6, 4.9, 5.4  # points: beside the axis, and a character's width
    left = 2 * gap + max(letter * len(note) + bold * len(name) for name, note in names)
    for number, (name, note) in enumerate(names):
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"), "textcoords": "offset points",
            "va": "center", "size": 8,
        }  # fmt: skip
        area.annotate(name, (0, number), (-left, 0), weight="bold", **where)
        area.annotate(note, (0, number), (-gap, 0), ha="right", color=COLOUR["soft"], **where)


def whole_calls(area: Axes, rows: Mapping[int, Row], report: Report, columns: int = 5) -> None:
    """Draw whole calls over ours into rows by their numbers; `columns` are the legend's."""
    shown = [n for n in (*report.peers, *BESIDE) if any(n in r.whole_call for r in rows.values())]
    ratios = [r.ratio_to(n) for r in rows.values() for n in shown if n in r.whole_call]
    ratio_axis(area, min([0.5, *(r / 1.2 for r in ratios)]), MOST * 1.12)
    area.axvline(1, color=COLOUR["ink"], linewidth=1.3, zorder=1.5)
    for number, row in rows.items():
        _verdict(area, number, row)
    for number, name in enumerate(shown):
        times = [(y, r.ratio_to(name)) for y, r in rows.items() if name in r.whole_call]
        mark, size = MARKS[number % len(MARKS)]
        hollow, colour = name in BESIDE, COLOUR[f"c{number % 7}"]
        look: dict[str, Any] = {
            "zorder": 3 - number / 100, "linestyle": "none", "markersize": size,
            "markeredgewidth": 1 if hollow else 0.6,
            "markerfacecolor": COLOUR["bg"] if hollow else colour,
            "markeredgecolor": COLOUR["soft" if hollow else "bg"],
        }  # fmt: skip
        inside = [(y, ratio) for y, ratio in times if ratio <= MOST]
        beyond = [y for y, ratio in times if ratio > MOST]
        words = f"{name} (no peer)" if hollow else name
        area.plot([r for _, r in inside], [y for y, _ in inside], marker=mark, label=words, **look)
        area.plot([MOST] * len(beyond), beyond, marker=">", **{**look, "markersize": 5})
    area.set_xlabel("time of a whole call over ours (logarithmic)")
    legend(area, columns)


def _verdict(area: Axes, number: int, row: Row) -> None:
    if row.ratio is None:
        return
    won = row.ratio >= 1
    colour = COLOUR["won" if won else "lost"]
    end = min(row.ratio, MOST)
    area.barh(number, end - 1, 0.66, left=1, color=colour, alpha=0.3 if won else 0.75)
    words = f"{row.ratio:.2f}× {'won' if won else 'LOST'} {row.best_peer}"
    area.text(1.015, number, words, transform=area.get_yaxis_transform(), va="center", size=8,
              weight="bold", color=colour)  # fmt: skip


def ratio_axis(area: Axes, low: float, high: float) -> None:
    """Make a logarithmic axis of ratios, with round values."""
    area.set(xscale="log", xlim=(low, high))
    powers = [2.0**power for power in range(math.ceil(math.log2(low)), int(math.log2(high)) + 1)]
    marks = powers if high > 4 * low else drawing.ticks(low, high, log=True)
    area.set_xticks(marks, [f"{value:.3g}×" for value in marks])
    area.minorticks_off()


def legend(area: Axes, columns: int) -> None:
    """Put the marks' meanings over the rows."""
    area.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns,
                frameon=False, borderpad=0.2, handletextpad=0.3, columnspacing=1.0,
                fontsize=8)  # fmt: skip
