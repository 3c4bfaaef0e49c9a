"""A report as one HTML file: nothing is loaded from elsewhere, light and dark, losses like wins."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape

from tvm_sepconv.bench import drawing, plots, table
from tvm_sepconv.bench.document import cells_table, document
from tvm_sepconv.bench.report import BESIDE, NOT_OF_THE_20, OURS, Report, Row


def html(report: Report) -> str:
    """Return the page: what was measured where, the pictures, and all figures in tables."""
    parts = ["<h1>tvm_sepconv beside its peers and the machine's limits</h1>", *_alarms(report)]
    parts += [_figures(report), _facts(report)]
    if any(OURS in row.whole_call and len(row.whole_call) > 1 for row in report.rows):
        parts += [
            "<h2>Everybody's time over ours</h2>",
            '<p class="soft">Whole calls, array in to array out, medians. The bar ends at the best '
            "peer: right of 1 ours is faster, left of it ours LOST. Marks at the right edge took "
            f"more than {plots.MOST:g} times as long.</p>",
            drawing.picture(partial(plots.bars, report), "bars", "Times of whole calls over ours"),
        ]
    if report.rows:
        parts += [
            "<h2>Our kernels under the roofs of one core</h2>",
            '<p class="soft">Kernel alone, one thread. A mark has the colour of the memory level '
            "that comes nearest to holding it; a diamond is held by it, a circle by the "
            "multiply-adds.</p>",
            drawing.picture(partial(plots.roofline, report), "roofline", "Rooflines"),
            "<h2>Kernel alone, one thread</h2>",
            '<p class="soft">Held by: the limit that takes longest, and the time it takes; in '
            "brackets where it explains less than half of the kernel's.</p>",
            _kernels(report),
            "<h2>Whole calls, median µs</h2>",
            _whole_calls(report),
        ]
    return document("tvm_sepconv benchmark", [*parts, *_notes(report)])


def _alarms(report: Report) -> Iterable[str]:
    """What a reader must know first."""
    if report.incomplete:
        ways = "".join(
            f"<br>{escape(name)}: {escape(way)}" for name, way in report.incomplete.items()
        )
        yield f'<p class="alarm"><b>INCOMPLETE.</b> No mean is quoted. Not measured:{ways}</p>'
    for words in table.warnings(report):
        yield f'<p class="alarm">{escape(words)}</p>'


def _figures(report: Report) -> str:
    """The few numbers that sum it up."""
    cells = []
    if (mean := report.geometric_mean_of_the_20) is not None:
        without = " and ".join(NOT_OF_THE_20)
        cells.append(("", f"{mean:.2f}×", f"over the best peer, geometric mean without {without}"))
    if (mean := report.geometric_mean) is not None:
        count = len(report.rows)
        cells.append(
            ("", f"{mean:.2f}×", f"over the best peer, geometric mean of all {count} rows")
        )
    compared = sum(row.ratio is not None for row in report.rows)
    if compared:
        lost = len(report.losses)
        names = f": {', '.join(report.losses)}" if lost else ""
        cells.append(("", str(compared - lost), "rows won"))
        cells.append(("loss" * bool(lost), str(lost), f"rows LOST{names}"))
    if report.rows:
        share = 100 * statistics.median(report.share_of_peak(row) for row in report.rows)
        cells.append(("", f"{share:.0f} %", "of peak, the kernels' median"))
    divs = (
        f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for kind, value, words in cells
    )
    return f'<div class="figures">{"".join(divs)}</div>'


def _facts(report: Report) -> str:
    limits = report.limits
    peaks = (f"{isa} {gflops:.1f}" for isa, gflops in limits.peak_gflops.items())
    levels = (f"{level} {gbps:.0f}" for level, gbps in limits.bandwidth.items())
    caches = (f"{level} {size >> 10:,} KiB" for level, size in limits.cache_bytes.items())
    state = "cold inputs, from memory" if report.cold else "warm"
    facts = {
        "Machine": report.where,
        "Threads of a whole call": str(report.threads),
        "Layers": f"float32, {report.data_format}, {state}; ours compiled for {report.target}",
        "One core, GFLOP/s": ", ".join(peaks),
        "One core reads, GB/s": ", ".join(levels),
        "Caches": ", ".join(caches),
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    rows = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()]
    rows.append(f"<dt>Command</dt><dd><code>{escape(report.command)}</code></dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _kernels(report: Report) -> str:
    head = ["layer", "", "µs", "p10–p90", "GFLOP/s", "of peak", "held by", "nearest memory",
            "moved, MB", "working set, MB"]  # fmt: skip
    return cells_table(head, (_kernel_cells(report, row) for row in report.rows), left=(0, 1))


def _kernel_cells(report: Report, row: Row) -> list[tuple[str, str]]:
    memory, bound = report.memory_bound(row), report.bound(row)
    size = row.traffic.bytes[memory.level]
    cells = [
        row.id,
        row.shape,
        table.us(row.kernel.median_us),
        f"{table.us(row.kernel.p10_us)}–{table.us(row.kernel.p90_us)}",
        f"{row.kernel_gflops:.1f}",
        f"{100 * report.share_of_peak(row):.0f} %",
        f"{table.held_by(report, row)}, ≥ {table.us(bound.time_us)} µs",
        f"{memory.level} {size / row.kernel.median_us / 1e3:.0f} of {memory.gbps:.0f} GB/s",
        f"{size / 1e6:.3g}",
        f"{row.traffic.working_set_bytes / 1e6:.3g}",
    ]
    return [("", cell) for cell in cells]


def _whole_calls(report: Report) -> str:
    shown = [n for n in (*report.peers, *BESIDE) if any(n in r.whole_call for r in report.rows)]
    heads = [f"{name} (no peer)" if name in BESIDE else name for name in shown]
    head = ["layer", "", "ours", "p10–p90", "ratio", "", *heads]
    return cells_table(head, (_whole_call_cells(row, shown) for row in report.rows), left=(0, 1, 5))


def _whole_call_cells(row: Row, shown: Sequence[str]) -> list[tuple[str, str]]:
    cells = [("", row.id), ("", row.shape)]
    if (ours := row.whole_call.get(OURS)) is None:
        cells += [("lost", "—"), ("", "")]
    else:
        cells += [("", table.us(ours.median_us))]
        cells += [("", f"{table.us(ours.p10_us)}–{table.us(ours.p90_us)}")]
    if row.ratio is None:
        cells += [("", "—"), ("", "")]
    else:
        kind, word = ("won", "won") if row.ratio >= 1 else ("lost", "LOST")
        cells += [(kind, f"{row.ratio:.2f}×"), (kind, word)]
    for name in shown:
        time = table.us(row.whole_call[name].median_us) if name in row.whole_call else "—"
        cells.append(("best" if name == row.best_peer else "", time))
    return cells


def _notes(report: Report) -> Iterable[str]:
    """Who failed, and in which form everybody was measured."""
    for title, lines in (
        ("Not measured", table.absences(report)),
        ("Forms", table.forms(report)),
    ):
        if lines := list(lines):
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            yield f'<h2>{title}</h2><ul class="soft">{items}</ul>'
