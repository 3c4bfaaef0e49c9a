"""Decisions as histograms: what was tried, what came close to the best, what was recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.drawing import COLOUR
from tvm_sepconv.report.found import OURS, Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tvm_sepconv.compiler.tuning.logs import Record

COLUMNS = 3
CLOSE = 1.05  # times its search's best
# Colours, and how dense they are.
KINDS = {"tried": ("soft", 0.45), "within 5 % of the best": ("c5", 1), "recorded": ("c0", 1)}
READING = (
    "For each decision of the schedule, how the candidates of each kind are spread over its "
    "values, all layers together: those that were tried and ran, those within 5 % of their own "
    "search's best, and the records."
)

Counts = Mapping[str, Mapping[str, Counter[str]]]  # by decision, kind, value


def counts(searches: Iterable[Search], records: Iterable[Record]) -> dict[str, Any]:
    """Count the values of each decision, by kind."""
    result: dict[str, dict[str, Counter[str]]] = {}

    def count(decisions: Mapping[str, Any], kind: str) -> None:
        for decision, value in decisions.items():
            kinds = result.setdefault(decision, {name: Counter() for name in KINDS})
            kinds[kind][words(value)] += 1

    tried, near, recorded = KINDS
    for search in (one for one in searches if one.space == OURS):
        for trial in (one for one in search.trials if one.secs and one.decisions):
            count(trial.decisions or {}, tried)
            if trial.median_secs <= CLOSE * search.best_secs:
                count(trial.decisions or {}, near)
    for record in records:
        count(record.decisions, recorded)
    return result


def words(value: Any) -> str:
    """A decision's value in a few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "×".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def figure(counted: Counts, facts: str) -> Figure:
    """A panel for each decision."""
    columns = min(COLUMNS, len(counted))
    rows = math.ceil(len(counted) / columns)
    made = drawing.figure(1.05 + 2.0 * rows, "Decisions", facts)
    areas = drawing.axes(made, rows, columns)
    for area, (decision, kinds) in zip(areas, counted.items(), strict=False):
        _panel(area, decision, kinds)
    for area in areas[len(counted) :]:
        area.remove()
    handles, labels = areas[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="upper right", ncols=3, frameon=False, fontsize=8)
    made.supylabel("share of the kind, %", size=8.5, color=COLOUR["soft"])
    return made


def values(kinds: Mapping[str, Counter[str]]) -> list[str]:
    """A decision's values, smallest first."""
    return sorted({value for counter in kinds.values() for value in counter}, key=_order)


def _order(value: str) -> tuple[Any, ...]:
    numbers = [int(part) for part in value.split("×") if part.isdigit()]
    return (math.prod(numbers), numbers, value) if numbers else (0, [], value)


def _panel(area: Axes, decision: str, kinds: Mapping[str, Counter[str]]) -> None:
    shown = values(kinds)
    present = [kind for kind, counter in kinds.items() if counter]
    width = 0.8 / len(present)
    for number, kind in enumerate(present):
        total = kinds[kind].total()
        at = [n + width * (number - (len(present) - 1) / 2) for n in range(len(shown))]
        shares = [100 * kinds[kind][value] / total for value in shown]
        colour, alpha = KINDS[kind]
        area.bar(at, shares, width * 0.92, color=COLOUR[colour], alpha=alpha, label=kind)
    area.set_title(decision.replace("_", " "), pad=4)
    area.set_xticks(range(len(shown)), shown)
    area.tick_params("x", length=0)
    area.grid(False, axis="x")
    middle, half = (len(shown) - 1) / 2, max(len(shown), 3) / 2 + 0.1
    area.set_xlim(middle - half, middle + half)


def table(counted: Counts) -> list[list[str]]:
    """A row of words for each value of each decision: how many of each kind."""
    return [
        [decision if number == 0 else "", value, *(str(kinds[kind][value]) for kind in KINDS)]
        for decision, kinds in counted.items()
        for number, value in enumerate(values(kinds))
    ]
