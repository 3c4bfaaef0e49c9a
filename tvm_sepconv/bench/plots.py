"""A report's two pictures: the roofline, and everybody's time beside ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tvm_sepconv.bench import svg
from tvm_sepconv.bench.report import BESIDE, OURS, Report, Row
from tvm_sepconv.bench.svg import Axis, Box, Line, Point

WIDTH = 1000.0
CLOSE, CROWD = 0.6, 5  # share of peak, and rows: from there on they need a picture of their own
_SAME = 1.04  # limits within this of each other share a label
_ROW = 25.0  # height of a row of the bars
_BARS_LEFT, _BARS_RIGHT = 262.0, WIDTH - 190
MOST = 32.0  # times ours; what took longer stands at the edge


def ticks(axis: Axis) -> list[float]:
    """Round values in an axis's range: some of each decade, or evenly spaced ones within one."""
    if axis.log and axis.high > 8 * axis.low:
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        values = (digit * 10.0**power for power in powers for digit in _digits(axis))
        return [value for value in values if axis.low <= value <= axis.high]
    rough = (axis.high - axis.low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step * (1 + 1e-9))
    return [step * number for number in range(first, last + 1)]


def _digits(axis: Axis) -> tuple[float, ...]:
    """What of a decade gets a tick: more of it where there are few decades."""
    return (1, 2, 5) if axis.high > 30 * axis.low else (1, 1.5, 2, 3, 4, 5, 7)


def roofline(report: Report) -> str:
    """Our kernels under the machine's limits: operations a byte, and operations a second.

    Bytes are those of the level of memory that comes nearest to holding the row; the mark has that
    level's colour, and is a diamond if it is this level that holds the row, not the multiply-adds.
    Where many rows come close to the peak, a second picture has these alone.
    """
    close = [row for row in report.rows if row.kernel_gflops >= CLOSE * report.peak_gflops]
    close = close if len(close) >= CROWD else []
    places = [_place(report, row) for row in report.rows]
    peak = max(report.limits.peak_gflops.values())
    xs, ys = [p[0] for p in places], [p[1] for p in places]
    area = Box(62, 16, WIDTH - 16, 470)
    x = Axis(min(xs) / 3, max(*xs, 4) * 2, area.left, area.right, log=True)
    y = Axis(min(*ys, peak / 8) / 1.6, peak * 1.35, area.bottom, area.top, log=True)
    result = _panel(report, [row for row in report.rows if row not in close], close, x, y, area)
    if not close:
        return result
    xs, ys = ([_place(report, row)[axis] for row in close] for axis in (0, 1))
    area = Box(62, 16, WIDTH - 16, 530)
    x = Axis(min(xs) / 1.5, max(xs) * 1.3, area.left, area.right, log=True)
    highest = max(*ys, report.peak_gflops) * 1.04
    y = Axis(min(ys) / 1.04, highest, area.bottom, area.top, log=True)
    return f"{result}\n{_panel(report, close, [], x, y, area)}"


def _place(report: Report, row: Row) -> tuple[float, float]:
    """Operations a byte and GFLOP/s."""
    return row.flops / row.traffic.bytes[report.memory_bound(row).level], row.kernel_gflops


def _panel(
    report: Report, rows: Sequence[Row], unnamed: Sequence[Row], x: Axis, y: Axis, area: Box
) -> str:
    """One roofline, with a label for each of `rows` and none for those that follow elsewhere."""
    everyone = [*rows, *unnamed]
    places = [_place(report, row) for row in everyone]
    marks = [Point(x.at(intensity), y.at(gflops)) for intensity, gflops in places]
    roofs = list(_roofs(report.limits.peak_gflops, report.limits.bandwidth, x, y))
    boxes = [box for _, _, box in roofs if box is not None]
    parts = [*_grid(x, y, area), *(part for part, _, _ in roofs)]
    named = [(at, row.id) for at, row in zip(marks, rows, strict=False)]
    if unnamed:
        hidden = marks[len(rows) :]
        frame = _frame(hidden, y.at(report.peak_gflops))
        boxes.append(frame)
        parts.append(svg.rectangle(frame, "frame"))
        named.append((Point(frame.right - 5, frame.bottom - 5), f"{len(unnamed)} layers: below"))
    labels = svg.place(named, area, boxes, [one for _, one, _ in roofs])
    for (at, _), label in zip(named, labels, strict=True):
        parts.append(svg.line(at, label.nearest(at), "leader"))
    for row, at in zip(everyone, marks, strict=True):
        shape = "circle" if report.bound(row).level == "FMA" else "diamond"
        kind = f"mark {report.memory_bound(row).level}"
        parts.append(svg.mark(at, shape, kind, _tip(report, row)))
    for (_, words), label in zip(named, labels, strict=True):
        parts.append(svg.text(Point(label.left + 2, label.bottom - 4), words, kind="name"))
    title = "Roofline: GFLOP/s of our kernels by operations a byte"
    return svg.picture(WIDTH, area.bottom + 46, parts, title)


def _frame(marks: Sequence[Point], roof: float) -> Box:
    """The box about marks, below a roof."""
    xs, ys = [p.x for p in marks], [p.y for p in marks]
    return Box(min(xs) - 9, max(min(ys) - 9, roof + 2), max(xs) + 9, max(ys) + 9)


def _tip(report: Report, row: Row) -> str:
    memory = report.memory_bound(row)
    moved = row.traffic.bytes[memory.level] / row.kernel.median_us / 1e3
    return (
        f"{row.id}, {row.shape}: {row.kernel_gflops:.1f} GFLOP/s, "
        f"{100 * report.share_of_peak(row):.0f} % of peak; {memory.level} {moved:.0f} of "
        f"{memory.gbps:.0f} GB/s; held by {report.bound(row).level}"
    )


def _grid(x: Axis, y: Axis, area: Box) -> Iterable[str]:
    for value in ticks(x):
        at = x.at(value)
        yield svg.line(Point(at, area.top), Point(at, area.bottom), "grid")
        yield svg.text(Point(at, area.bottom + 16), f"{value:g}", "middle", "tick")
    for value in ticks(y):
        at = y.at(value)
        yield svg.line(Point(area.left, at), Point(area.right, at), "grid")
        yield svg.text(Point(area.left - 6, at + 4), f"{value:g}", "end", "tick")
    middle = Point((area.left + area.right) / 2, area.bottom + 36)
    words = "floating-point operations a byte, of the level in the mark's colour"
    yield svg.text(middle, words, "middle", "axis")
    left = Point(14, (area.top + area.bottom) / 2)
    yield (
        f'<g transform="rotate(-90 {left.x:.0f} {left.y:.0f})">'
        f"{svg.text(left, 'GFLOP/s, one thread', 'middle', 'axis')}</g>"
    )


def _roofs(
    peaks: Mapping[str, float], bandwidth: Mapping[str, float], x: Axis, y: Axis
) -> Iterable[tuple[str, Line, Box | None]]:
    """Each roof as drawn, its line, and the box of its label if that is not along the line."""
    highest = max(peaks.values())
    for names, gflops in _together(peaks):
        if gflops < y.low:
            continue
        start = Point(x.at(max(gflops / max(bandwidth.values()), x.low)), y.at(gflops))
        end = Point(x.end, start.y)
        at = Point(x.end - 4, start.y - 6)
        words = f"{', '.join(names)}: {gflops:.0f} GFLOP/s"
        drawn = svg.line(start, end, "roof FMA") + svg.text(at, words, "end", "label FMA")
        yield drawn, (start, end), svg.text_box(at, words, "end")
    for number, (level, gbps) in enumerate(bandwidth.items()):
        first, last = max(x.low, y.low / gbps), min(highest / gbps, x.high)
        if first >= last:
            continue  # all of it outside the picture
        start, end = (Point(x.at(v), y.at(v * gbps)) for v in (first, last))
        angle = math.degrees(math.atan2(end.y - start.y, end.x - start.x))
        # Neighbours' labels stand apart along the lines, where these are close to each other.
        share = 0.05 + 0.22 * (number % 4)
        at = Point(start.x + share * (end.x - start.x), start.y + share * (end.y - start.y))
        words = f"{level} {gbps:.0f} GB/s"
        if math.dist(at, end) < svg.CHARACTER * len(words):
            words = ""  # too little of the line is in the picture
        words = svg.text(Point(at.x, at.y - 5), words, kind=f"label {level}")
        turned = f'<g transform="rotate({angle:.1f} {at.x:.1f} {at.y:.1f})">{words}</g>'
        yield svg.line(start, end, f"roof {level}") + turned, (start, end), None


def _together(peaks: Mapping[str, float]) -> list[tuple[list[str], float]]:
    """Instruction sets with nearly the same peak, highest first."""
    groups: list[tuple[list[str], float]] = []
    for name, gflops in sorted(peaks.items(), key=lambda item: -item[1]):
        if groups and groups[-1][1] <= gflops * _SAME:
            groups[-1][0].append(name)
        else:
            groups.append(([name], gflops))
    return groups


def bars(report: Report) -> str:
    """Everybody's whole calls over ours, a line a row: right of 1 ours is faster, left it lost."""
    shown = [n for n in (*report.peers, *BESIDE) if any(n in r.whole_call for r in report.rows)]
    kinds = {name: _kind(number, name) for number, name in enumerate(shown)}
    legend, top = _legend(kinds)
    rows = [row for row in report.rows if OURS in row.whole_call]
    bottom = top + _ROW * len(rows)
    ratios = [row.ratio_to(name) for row in rows for name in shown if name in row.whole_call]
    axis = Axis(min([0.5, *(r / 1.2 for r in ratios)]), MOST * 1.1, _BARS_LEFT, _BARS_RIGHT, True)
    parts = list(legend)
    for number in range(0, len(rows), 2):
        box = Box(0, top + _ROW * number, WIDTH, top + _ROW * (number + 1))
        parts.append(svg.rectangle(box, "stripe"))
    for power in range(math.ceil(math.log2(axis.low)), int(math.log2(MOST)) + 1):
        at = axis.at(2.0**power)
        kind = "one" if power == 0 else "grid"
        parts.append(svg.line(Point(at, top - 4), Point(at, bottom), kind))
        parts.append(svg.text(Point(at, bottom + 15), f"{2.0**power:g}×", "middle", "tick"))
    for number, row in enumerate(rows):
        parts += _bar(row, axis, top + _ROW * number, kinds)
    words = "time of a whole call over ours (logarithmic)"
    middle = Point((_BARS_LEFT + _BARS_RIGHT) / 2, bottom + 35)
    parts.append(svg.text(middle, words, "middle", "axis"))
    return svg.picture(WIDTH, bottom + 44, parts, "Times of whole calls over ours, by layer")


def _kind(number: int, name: str) -> tuple[str, str]:
    """Shape and classes of a contestant's marks: peers in colours, others hollow."""
    shape = svg.SHAPES[number % len(svg.SHAPES)]
    return shape, "peer beside" if name in BESIDE else f"peer p{number % 7}"


def _legend(kinds: Mapping[str, tuple[str, str]]) -> tuple[list[str], float]:
    """The legend, and where the rows may begin below it."""
    parts, at = [], Point(_BARS_LEFT, 14)
    for name, (shape, kind) in kinds.items():
        words = f"{name} (no peer)" if name in BESIDE else name
        width = 30 + svg.CHARACTER * len(words)
        if at.x + width > WIDTH:
            at = Point(_BARS_LEFT, at.y + 18)
        parts.append(svg.mark(Point(at.x + 6, at.y - 4), shape, kind))
        parts.append(svg.text(Point(at.x + 15, at.y), words, kind="tick"))
        at = Point(at.x + width, at.y)
    return parts, at.y + 16


def _bar(row: Row, axis: Axis, top: float, kinds: Mapping[str, tuple[str, str]]) -> Iterable[str]:
    middle = top + _ROW / 2
    yield svg.text(Point(6, middle + 4), row.id, kind="name")
    yield svg.text(Point(_BARS_LEFT - 10, middle + 4), row.shape, "end", "tick")
    if row.ratio is not None and row.best_peer is not None:
        won = row.ratio >= 1
        ends = sorted((axis.at(1), axis.at(min(row.ratio, MOST))))
        kind, verdict = ("won", "won") if won else ("lost", "LOST")
        yield svg.rectangle(Box(ends[0], top + 4, ends[1], top + _ROW - 4), kind)
        words = f"{row.ratio:.2f}× {verdict} {row.best_peer}"
        yield svg.text(Point(_BARS_RIGHT + 12, middle + 4), words, kind=f"verdict {kind}")
    for name, (shape, kind) in reversed(list(kinds.items())):  # the first ones on top
        if name in row.whole_call:
            ratio = row.ratio_to(name)
            tip = f"{row.id}, {name}: {row.whole_call[name].median_us:.4g} µs, {ratio:.2f}× ours"
            beyond = "right" if ratio > MOST else shape
            yield svg.mark(Point(axis.at(min(ratio, MOST)), middle), beyond, kind, tip)
