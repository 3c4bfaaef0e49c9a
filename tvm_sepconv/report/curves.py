"""Search curves: the best time so far against the number of candidates measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.drawing import COLOUR
from tvm_sepconv.bench.table import us
from tvm_sepconv.report.found import METASCHEDULE, OURS, Search, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
CLOSE = 1.03  # times the best: what a search should reach soon
MOST = 6.0  # times the best; what took longer is outside the picture
LINES = {OURS: ("ours", COLOUR["c0"]), METASCHEDULE: ("MetaSchedule", COLOUR["c1"])}
READING = (
    "Line: the best median so far; band: p10–p90 of its samples; dot: a candidate; ×: one that "
    "failed; diamond: the best measured again in alternation with the default, with the "
    f"interquartile range. What took more than {MOST:g} times the best is above the picture."
)
_GAP = 0.085  # of a panel's height, between the labels of lines

Group = Sequence[Search]


def groups(searches: Iterable[Search]) -> list[list[Search]]:
    """Searches by what was searched for: a panel each."""
    result: dict[object, list[Search]] = {}
    for one in searches:
        key = one.config, one.target, one.batch, one.steps, one.threads, one.modelled
        result.setdefault(key, []).append(one)
    return list(result.values())


def figure(searches: Sequence[Search], facts: str) -> Figure:
    """A panel for each kernel, a line for each search of it."""
    panels = groups(searches)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    made = drawing.figure(0.85 + 2.35 * rows, "Best time against candidates measured", facts)
    areas = drawing.axes(made, rows, columns)
    for area, panel in zip(areas, panels, strict=False):
        _panel(area, panel)
    for area in areas[len(panels) :]:
        area.remove()
    made.supxlabel("candidates measured", size=8.5, color=COLOUR["soft"])
    units = {"modelled cycles" if one.modelled else "µs" for one in searches}
    words = f"{' or '.join(sorted(units))} a call (logarithmic)"
    made.supylabel(words, size=8.5, color=COLOUR["soft"])
    return made


def _panel(area: Axes, group: Group) -> None:
    one = group[0]
    modelled = " (modelled)" * one.modelled
    area.set_title(f"{name(one.config)}, {one.batch}×{one.steps}{modelled}", pad=4)
    last = max([2, *(trial.trial for search in group for trial in search.trials)])
    low, high = _range(group)
    area.set(yscale="log", ylim=(low, high), xlim=(0, 1.02 * last))
    labels = [_line(area, search, last) for search in group if search.best]
    if (default := _default_secs(group)) is not None:
        area.axhline(1e6 * default, color=COLOUR["soft"], linestyle=(0, (4, 2)), linewidth=1)
        labels.append((1e6 * default, f"default {us(1e6 * default)}", COLOUR["soft"]))
    _label(area, labels)
    marks = drawing.ticks(low, high, log=True)
    area.set_yticks(marks, [f"{value:g}" for value in marks])
    area.minorticks_off()
    area.set_xticks([n for n in drawing.ticks(0, last, log=False) if n == int(n)])


def _default_secs(group: Group) -> float | None:
    return next((s.default_secs for s in group if s.default_secs is not None), None)


def _range(group: Group) -> tuple[float, float]:
    """The µs from the least to the slowest of the best so far, within `MOST`, with some room."""
    times = [1e6 * trial.median_secs for search in group for trial in search.best]
    times += [1e6 * secs for secs in [_default_secs(group)] if secs is not None]
    low, high = (min(times), max(times)) if times else (1.0, 2.0)
    high = min(high, MOST * low)
    room = max((high / low) ** 0.12, 1.03)
    return low / room**1.6, high * room


def _line(area: Axes, search: Search, last: int) -> tuple[float, str, str]:
    """Draw a search; returns its label: where, what, and the colour."""
    who, colour = LINES.get(search.space, (search.space, COLOUR["c2"]))
    measured = [trial for trial in search.trials if trial.secs]
    failed = [trial.trial for trial in search.trials if not trial.secs]
    area.plot([t.trial for t in measured], [1e6 * t.median_secs for t in measured], "o",
              color=colour, markersize=2.4, alpha=0.45, markeredgewidth=0)  # fmt: skip
    area.plot(failed, [0.03] * len(failed), "x", color=colour, markersize=3.5, alpha=0.8,
              markeredgewidth=0.9, transform=area.get_xaxis_transform())  # fmt: skip
    best = search.best
    end = search.trials[-1].trial
    at = [*(trial.trial for trial in best), end]
    bands = [1e6 * np.percentile(trial.secs or [], [10, 50, 90]) for trial in best]
    low, middle, high = np.array([*bands, bands[-1]]).T
    area.fill_between(at, low, high, step="post", color=colour, alpha=0.18, linewidth=0)
    area.step(at, middle, where="post", color=colour)
    level = float(middle[-1])
    if search.final is not None:
        level, noise = 1e6 * float(search.final["best_secs"]), float(search.final["noise"])
        area.errorbar([end], [level], level * noise / 2, color=colour, marker="D", markersize=4.5,
                      markeredgecolor=COLOUR["bg"], markeredgewidth=0.7, elinewidth=1.3,
                      clip_on=False, zorder=4)  # fmt: skip
    elif end < last:
        area.plot([end], [level], "|", color=colour)
    return level, f"{who} {us(level)}", colour


def _label(area: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write labels at their lines' ends, moved apart where these are close."""
    low, high = np.log(area.get_ylim())
    labels = sorted(labels)
    levels = [(math.log(level) - low) / (high - low) for level, _, _ in labels]
    for (_, words, colour), at in zip(labels, _apart(levels), strict=True):
        area.text(1.02, at, words, transform=area.transAxes, color=colour, size=7.5,
                  weight="bold", va="center")  # fmt: skip


def _apart(levels: Sequence[float]) -> list[float]:
    """Rising numbers near the given ones, `_GAP` apart at least: of a crowd, its middle stays."""
    crowds: list[list[float]] = []
    for level in levels:
        crowds.append([level])
        while len(crowds) > 1 and _ends(crowds[-2])[1] + _GAP > _ends(crowds[-1])[0]:
            last = crowds.pop()
            crowds[-1] += last
    return [_ends(crowd)[0] + _GAP * number for crowd in crowds for number in range(len(crowd))]


def _ends(crowd: Sequence[float]) -> tuple[float, float]:
    middle, half = sum(crowd) / len(crowd), _GAP * (len(crowd) - 1) / 2
    return middle - half, middle + half


HEAD = ("layer", "input", "space", "candidates", "failed", "default, µs", "best, µs", "again, µs",
        "noise", "gain", "within 3 % after", "in all")  # fmt: skip


def table(searches: Sequence[Search]) -> list[list[str]]:
    """A row of words for each search, below `HEAD`."""
    result = []
    for group in groups(searches):
        known, default_secs = min(search.best_secs for search in group), _default_secs(group)
        result += [_cells(search, known, default_secs) for search in group]
    return result


def _cells(search: Search, known: float, default_secs: float | None) -> list[str]:
    near = search.first_within(CLOSE * known)
    again = gain = noise = "—"
    if search.final is not None:
        best = float(search.final["best_secs"])
        again, noise = _time(search, best), f"{100 * float(search.final['noise']):.1f} %"
        gain = gain if default_secs is None else f"{default_secs / best:.2f}×"
    return [
        name(search.config), f"{search.batch}×{search.steps}", search.space,
        f"{len(search.trials)} of {search.asked}", str(search.failures),
        "—" if default_secs is None else _time(search, default_secs),
        _time(search, search.best_secs) if search.best else "—", again, noise, gain,
        "never" if near is None else f"{near.trial}, {near.elapsed_secs:.0f} s",
        f"{search.trials[-1].elapsed_secs:.0f} s" if search.trials else "—",
    ]  # fmt: skip


def _time(search: Search, secs: float) -> str:
    """In µs, or the cycles that stand in their place."""
    return us(1e6 * secs) + " modelled cycles" * search.modelled
