"""A sweep as one HTML file: rates against channels, and the shapes that fall behind by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from html import escape

from tvm_sepconv.bench import svg
from tvm_sepconv.bench.document import cells_table, document
from tvm_sepconv.bench.plots import WIDTH, ticks
from tvm_sepconv.bench.svg import Axis, Box
from tvm_sepconv.bench.svg import Point as Place
from tvm_sepconv.bench.sweep import TARGET_RATE, Point, Sweep
from tvm_sepconv.bench.table import us

WORST = 10  # shapes that are named
_HEIGHT, _MARGIN, _GUTTER = 190.0, 50.0, 30.0  # of a panel, left of it, below it

Measure = Callable[[Point], float]


def html(sweep: Sweep) -> str:
    """Return the page."""
    target = 100 * TARGET_RATE
    behind = [p for p in sweep.asked if sweep.relative_rate(p) < TARGET_RATE]
    slower = [p for p in sweep.asked if sweep.relative_speed(p) < 1]
    parts = [
        "<h1>tvm_sepconv for every number of channels</h1>",
        _facts(sweep),
        "<h2>Rate, GFLOP/s</h2>",
        _panels(sweep, lambda point: point.gflops, None),
        "<h2>Rate over that of the next regular shape</h2>",
        '<p class="soft">The next regular shape has channels and filters rounded up to whole '
        f"vectors of {sweep.lanes}. The line is at {target:.0f} %: {len(behind)} of "
        f"{len(sweep.asked)} shapes lie below it. In the regular shape's time, a shape that fills "
        "a tenth of its vectors has a tenth of its rate.</p>",
        _panels(sweep, sweep.relative_rate, TARGET_RATE),
        _worst(sweep, sweep.relative_rate),
        "<h2>Speed over that of the next regular shape</h2>",
        '<p class="soft">Its time over theirs. Below the line, at 1, padding by hand would be '
        f"faster: {len(slower)} of {len(sweep.asked)} shapes.</p>",
        _panels(sweep, sweep.relative_speed, 1.0),
        _worst(sweep, sweep.relative_speed),
    ]
    return document("tvm_sepconv sweep", parts)


def _facts(sweep: Sweep) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    facts = {
        "Machine": sweep.where,
        "Layers": f"float32, {sweep.data_format}, {sweep.steps} steps, kernel size "
        f"{sweep.kernel_size}, kernel alone, {sweep.target}",
        "One core": f"{sweep.peak_gflops:.1f} GFLOP/s",
        "Others' work": f"{sweep.others_processors:.2f} processors",
        "Versions": versions,
    }
    rows = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()]
    rows.append(f"<dt>Command</dt><dd><code>{escape(sweep.command)}</code></dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _panels(sweep: Sweep, measure: Measure, level: float | None) -> str:
    """A panel for each multiplier and stride, all with the same axes; a line for each filters."""
    grid = sweep.grid
    columns = len(grid.strides)
    width = (WIDTH - _MARGIN * columns) / columns - 8
    highest = 1.06 * max([level or 0.0, *(measure(point) for point in sweep.asked)])
    parts = list(_legend(sweep))
    cells = itertools.product(grid.depth_multipliers, grid.strides)
    for number, (multiplier, strides) in enumerate(cells):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (width + _MARGIN + 8)
        top = 46 + row * (_HEIGHT + 2 * _GUTTER)
        area = Box(left, top, left + width, top + _HEIGHT)
        x = Axis(0, max(grid.channels) + 1, area.left, area.right)
        y = Axis(0, highest, area.bottom, area.top)
        parts += _grid(x, y, area, sweep, level)
        title = f"multiplier {multiplier}, strides {strides}"
        parts.append(svg.text(Place(area.left, area.top - 7), title, kind="name"))
        for series, filters in enumerate(grid.filters):
            points = [p for p in sweep.asked if p.shape[1:] == (filters, multiplier, strides)]
            parts += _series(sweep, points, measure, x, y, series)
    rows = len(grid.depth_multipliers)
    height = 46 + rows * (_HEIGHT + 2 * _GUTTER)
    return svg.picture(WIDTH, height, parts, "By channels, for each multiplier and strides")


def _legend(sweep: Sweep) -> Iterable[str]:
    at = _MARGIN
    for series, filters in enumerate(sweep.grid.filters):
        yield svg.line(Place(at, 10), Place(at + 22, 10), f"series s{series % 5}")
        words = f"{filters} filter" + "s" * (filters != 1)
        yield svg.text(Place(at + 28, 14), words, kind="tick")
        at += 56 + svg.CHARACTER * len(words)


def _grid(x: Axis, y: Axis, area: Box, sweep: Sweep, level: float | None) -> Iterable[str]:
    for value in ticks(y):
        at = y.at(value)
        yield svg.line(Place(area.left, at), Place(area.right, at), "grid")
        yield svg.text(Place(area.left - 6, at + 4), f"{value:g}", "end", "tick")
    channels = sweep.grid.channels
    for value in sorted({channels[0], *range(8, max(channels) + 1, 8)}):
        at = x.at(value)
        regular = value % sweep.lanes == 0
        yield svg.line(
            Place(at, area.top), Place(at, area.bottom), "regular" if regular else "grid"
        )
        yield svg.text(Place(at, area.bottom + 15), f"{value}", "middle", "tick")
    yield svg.text(Place(area.right, area.bottom + 30), "channels", "end", "tick")
    if level is not None:
        yield svg.line(Place(area.left, y.at(level)), Place(area.right, y.at(level)), "limit")


def _series(
    sweep: Sweep, points: list[Point], measure: Measure, x: Axis, y: Axis, series: int
) -> Iterable[str]:
    places = [Place(x.at(point.channels), y.at(measure(point))) for point in points]
    yield svg.polyline(places, f"series s{series % 5}")
    for place, point in zip(places, points, strict=True):
        tip = f"{sweep.name(point)}: {us(point.kernel_us)} µs, {point.gflops:.1f} GFLOP/s"
        yield svg.dot(place, f"p{series % 5}", tip)


def _worst(sweep: Sweep, measure: Measure) -> str:
    head = ["the worst", "share", "µs", "GFLOP/s", "next regular", "µs", "GFLOP/s"]
    rows = []
    for point in sweep.worst(WORST, measure):
        regular = sweep.regular(point)
        rows.append(
            [
                sweep.name(point), f"{100 * measure(point):.0f} %", us(point.kernel_us),
                f"{point.gflops:.1f}", sweep.name(regular), us(regular.kernel_us),
                f"{regular.gflops:.1f}",
            ]
        )  # fmt: skip
    return cells_table(head, ([("", cell) for cell in row] for row in rows), left=(0, 4))
