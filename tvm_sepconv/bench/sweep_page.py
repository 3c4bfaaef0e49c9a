"""A sweep as one HTML file: rates against channels, and the shapes that fall behind by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.document import cells_table, document
from tvm_sepconv.bench.drawing import COLOUR
from tvm_sepconv.bench.sweep import TARGET_RATE, Point, Sweep
from tvm_sepconv.bench.table import us

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 10  # shapes that are named

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
        _picture(sweep, lambda point: point.gflops, None, "GFLOP/s"),
        "<h2>Rate over that of the next regular shape</h2>",
        '<p class="soft">The next regular shape has channels and filters rounded up to whole '
        f"vectors of {sweep.lanes}. The line is at {target:.0f} %: {len(behind)} of "
        f"{len(sweep.asked)} shapes lie below it. In the regular shape's time, a shape that fills "
        "a tenth of its vectors has a tenth of its rate.</p>",
        _picture(sweep, sweep.relative_rate, TARGET_RATE, "Share of the regular shape's rate"),
        _worst(sweep, sweep.relative_rate),
        "<h2>Speed over that of the next regular shape</h2>",
        '<p class="soft">Its time over theirs. Below the line, at 1, padding by hand would be '
        f"faster: {len(slower)} of {len(sweep.asked)} shapes.</p>",
        _picture(sweep, sweep.relative_speed, 1.0, "The regular shape's time over its own"),
        _worst(sweep, sweep.relative_speed),
    ]
    return document("tvm_sepconv sweep", parts)


def _picture(sweep: Sweep, measure: Measure, level: float | None, title: str) -> str:
    return drawing.picture(partial(panels, sweep, measure, level, title), title.split()[-1], title)


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


def panels(sweep: Sweep, measure: Measure, level: float | None, title: str) -> Figure:
    """A panel for each multiplier and strides, with the same axes; a line for each filters."""
    grid = sweep.grid
    rows, columns = len(grid.depth_multipliers), len(grid.strides)
    made = drawing.figure(1.0 + 2.0 * rows, title, sweep.where)
    areas = drawing.axes(made, rows, columns, sharex=True, sharey=True)
    cells = itertools.product(grid.depth_multipliers, grid.strides)
    for area, (multiplier, strides) in zip(areas, cells, strict=True):
        area.set_title(f"multiplier {multiplier}, strides {strides}")
        for number, filters in enumerate(grid.filters):
            points = [p for p in sweep.asked if p.shape[1:] == (filters, multiplier, strides)]
            channels, values = [p.channels for p in points], [measure(p) for p in points]
            area.plot(channels, values, color=COLOUR[f"c{number % 5}"], linewidth=1.3,
                      label=f"{filters} filter" + "s" * (filters != 1))  # fmt: skip
        for whole in range(sweep.lanes, max(grid.channels) + 1, sweep.lanes):
            area.axvline(whole, color=COLOUR["soft"], linewidth=0.7, zorder=1.5)
        if level is not None:
            area.axhline(level, color=COLOUR["lost"], linestyle=(0, (6, 4)), linewidth=1)
        area.set_xticks(sorted({grid.channels[0], *range(8, max(grid.channels) + 1, 8)}))
    areas[0].set_ylim(0, 1.06 * max([level or 0.0, *map(measure, sweep.asked)]))
    made.supxlabel("channels; whole vectors of them at the darker lines", size=8.5,
                   color=COLOUR["soft"])  # fmt: skip
    handles, labels = areas[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="upper right", ncols=5, frameon=False, fontsize=8)
    return made


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
