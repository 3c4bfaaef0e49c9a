"""The report as one HTML file, and its pictures as PNG."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.document import cells_table, document
from tvm_sepconv.report import curves, decisions, times
from tvm_sepconv.report.found import METASCHEDULE, OURS, Found

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tvm_sepconv.compiler.tuning.logs import Record
    from tvm_sepconv.report.found import Search, Times

PAGE = "index.html"


@dataclass(frozen=True)
class Part:
    """A picture with how to read it, and its numbers.

    Parameters
    ----------
    name
        Of the PNG; another one for each part of a page.
    left
        The table's columns of words.
    """

    name: str
    title: str
    reading: str
    draw: Callable[[], Figure]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int]


def write(found: Found, output: Path) -> list[Path]:
    """Write the page, and a PNG for each picture, into a folder; returns their paths.

    Raises
    ------
    OSError
        If they cannot be written.
    RuntimeError
        If matplotlib is not installed.
    """
    paths = [output / PAGE]
    body = ["<h1>tvm_sepconv: what tuning found</h1>", *_missing(found)]
    with drawing.style():
        output.mkdir(parents=True, exist_ok=True)
        for target in found.targets:
            body += [f"<h1>{escape(target)}</h1>", _figures(found, target)]
            for part in parts(found, target):
                made = part.draw()
                paths.append(output / f"{part.name}.png")
                drawing.png(made, paths[-1])
                cells = ([("", word) for word in row] for row in part.rows)
                body += [
                    f"<h2>{escape(part.title)}</h2>",
                    f'<p class="soft">{escape(part.reading)}</p>',
                    drawing.svg(made, part.name, f"{part.title}, {target}"),
                    cells_table(part.head, cells, part.left),
                ]
    paths[0].write_text(document("tvm_sepconv tuning report", body), encoding="utf-8")
    return paths


def _missing(found: Found) -> Iterator[str]:
    if found.missing:
        items = "".join(f"<li>{escape(words)}</li>" for words in found.missing)
        yield f'<div class="alarm"><b>Not in this report</b><ul>{items}</ul></div>'


def parts(found: Found, target: str) -> Iterator[Part]:
    """Give a target's pictures, those of which there is something to show."""
    searches = [one for one in found.searches if one.target == target and one.trials]
    records = [one for one in found.records if one.target == target]
    benches = [one for one in found.benches if one.target == target]
    place = re.sub(r"[^\w@.-]", "_", target)
    again = [found.times[one.key] for one in records if one.key in found.times]
    facts = _facts(target, [*searches, *records], again)
    if searches:
        yield Part(
            f"search-{place}", "Search curves", curves.READING,
            partial(curves.figure, searches, facts), curves.HEAD, curves.table(searches), (0, 1, 2),
        )  # fmt: skip
    shown = benches if benches or not records else [None]
    for number, bench in enumerate(shown):
        lines = times.lines(found, target, bench)
        more = f"-{number + 1}" * (len(shown) > 1)
        reading = [times.READING] * bool(records) + [times.PEERS] * (bench is not None)
        where = f"{facts}\nPeers: {bench.where}" if bench is not None and records else facts
        where = bench.where if bench is not None and not records else where
        yield Part(
            f"times-{place}{more}", "Time by layer", " ".join(reading),
            partial(times.figure, lines, bench, where), times.HEAD, times.table(lines),
            (0, 1, 7, 9, 11),
        )  # fmt: skip
    if counted := decisions.counts(searches, records):
        yield Part(
            f"decisions-{place}", "Decisions", decisions.READING,
            partial(decisions.figure, counted, facts), ("decision", "value", *decisions.KINDS),
            decisions.table(counted), (0, 1),
        )  # fmt: skip


def _facts(target: str, items: Sequence[Search | Record], again: Sequence[Times]) -> str:
    """Where searches, records and times are from, each thing once."""
    threads = sorted({item.threads for item in items})
    dates = sorted({item.date[:10] for item in (*items, *again)})
    words = [
        *sorted({item.machine for item in (*items, *again)}),
        target,
        f"{' and '.join(map(str, threads))} thread" + "s" * (threads != [1]),
        " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        *(f"TVM {version}" for version in sorted({item.tvm for item in items})),
    ]
    return "; ".join(words)


def _figures(found: Found, target: str) -> str:
    """The few numbers that sum it up."""
    cells = []
    lines = [line for line in times.lines(found, target, None) if line.record is not None]
    for kind in ("tuned", "transferred"):
        gains = [1 / ratio.median for line in lines if (ratio := line.ratio(kind)) is not None]
        if gains:
            words = f"{kind} over default, geometric mean of {len(gains)}, {_range(gains)}"
            cells.append((f"{statistics.geometric_mean(gains):.2f}×", words))
    groups = curves.groups(s for s in found.searches if s.target == target)
    if leads := [lead for group in groups for lead in _lead(group)]:
        words = (
            "our space over MetaSchedule's own after as many candidates, geometric mean of "
            f"{len(leads)}, {_range(leads)}"
        )
        cells.append((f"{statistics.geometric_mean(leads):.2f}×", words))
    divs = (f"<div><b>{value}</b><span>{escape(words)}</span></div>" for value, words in cells)
    return f'<div class="figures">{"".join(divs)}</div>' if cells else ""


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _lead(group: Iterable[Search]) -> Iterator[float]:
    """The best of MetaSchedule's space over ours, both after as many candidates."""
    group = list(group)
    both = [max((s for s in group if s.space == name), key=lambda s: len(s.trials), default=None)
            for name in (OURS, METASCHEDULE)]  # fmt: skip
    ours, theirs = both
    if ours is not None and theirs is not None:
        count = min(len(ours.trials), len(theirs.trials))
        bests = [[t for t in search.best if t.trial <= count] for search in (ours, theirs)]
        if all(bests):
            yield bests[1][-1].median_secs / bests[0][-1].median_secs
