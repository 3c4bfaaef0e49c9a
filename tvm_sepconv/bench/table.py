"""A report for the terminal: at most 120 columns, losses as visible as wins."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from tvm_sepconv.bench.report import BESIDE, NOT_OF_THE_20, OURS, REQUIRED, Report, Row

DISTURBING = 0.1  # processors that others keep busy; from there on figures are worth less
UNSTEADY = 0.7  # memory shared with other machines gives medians of 0.8 of the best

COLUMNS = 120
_ID = 12  # of a row's name, at most
_WORDS = 160  # of a failure
# Headings of two lines where they are long: eleven columns of times must fit.
_SHORT = {
    OURS: "tvm_ sepconv",
    "torch.compile": "torch. compile",
    "Keras on JAX": "Keras+ JAX",
    "Keras on TensorFlow": "Keras+ TF",
    "MetaSchedule": "Meta- sched.",
}


def text(report: Report) -> str:
    """Return heading, tables and summary; every contestant's median is in it."""
    parts: list[Iterable[str]] = [_heading(report)]
    if report.rows:
        parts += [_against_best(report), _all_times(report)]
    for lines in (absences(report), forms(report)):
        parts.append(short for line in lines for short in _wrapped(line))
    parts.append(_summary(report))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _heading(report: Report) -> Iterable[str]:
    if report.incomplete:
        yield f"INCOMPLETE: not measured: {', '.join(report.incomplete)}. No mean is quoted"
        for name, way in report.incomplete.items():
            yield f"  {name}: {way}"
    kind = "cold inputs" if report.cold else "warm"
    yield f"Whole call, array in to array out, float32 {report.data_format}, {kind}"
    yield report.where
    yield f"$ {report.command}"
    yield from _wrapped(", ".join(f"{name} {v}" for name, v in report.versions.items()))
    yield from _limits(report)
    yield from warnings(report)


def warnings(report: Report) -> Iterable[str]:
    """What makes the figures worth less than others, a line each."""
    if report.target.partition("@")[0] != next(iter(report.limits.peak_gflops)):
        yield f"Ours is held to {report.target}; others use all that the machine has"
    if report.others_processors > DISTURBING:
        busy = f"{report.others_processors:.1f}"
        yield f"DISTURBED: other programs kept {busy} processors busy meanwhile"
    if report.limits.steadiness < UNSTEADY:
        share = 100 * report.limits.steadiness
        yield f"UNSTEADY: a limit's median was {share:.0f} % of its best: it moves during the run"


def _limits(report: Report) -> Iterable[str]:
    limits = report.limits
    peaks = (f"{gflops:.0f} ({isa})" for isa, gflops in limits.peak_gflops.items())
    levels = (f"{level} {gbps:.0f}" for level, gbps in limits.bandwidth.items())
    yield f"One core's multiply-adds, GFLOP/s: {', '.join(peaks)}"
    yield f"One core's reads, GB/s: {', '.join(levels)}"


def _against_best(report: Report) -> Iterable[str]:
    """Ours against the best peer, and the kernel against the machine."""
    width = _id_width(report)
    yield f"{'':{width}}{'whole call, µs':>38}{'':26}{'kernel alone, 1 thread':>25}"
    yield (
        f"{'':{width}}{'ours':>8}{'p10–p90':>16}  {'best peer':22}{'ratio':>7}{'':8}{'µs':>8}"
        f"{'GFLOP/s':>8}{'peak':>6}  {'bound':6} memory/limit"
    )
    for row in report.rows:
        kernel = f"{us(row.kernel.median_us):>8}{row.kernel_gflops:8.1f}"
        share = f"{100 * report.share_of_peak(row):5.0f}%"
        yield f"{_label(row):{width}}{_verdict(row)}{kernel}{share}  {_bound(report, row)}"
    if not all(report.holds(row) for row in report.rows):
        yield "(bound): the nearest limit, which explains less than half of the time"


def _verdict(row: Row) -> str:
    """Return both times and the ratio; 61 characters, whatever is missing."""
    if (ours := row.whole_call.get(OURS)) is None:
        return f"{'—':>8}{'':53}"
    times = f"{us(ours.median_us):>8}{f'{us(ours.p10_us)}–{us(ours.p90_us)}':>16}  "
    if row.best_peer is None or row.ratio is None:
        return f"{times}{'—':35}"
    peer = f"{us(row.whole_call[row.best_peer].median_us)} {_one_line(row.best_peer)}"
    return f"{times}{peer:21}{row.ratio:7.2f}× {'won' if row.ratio >= 1 else 'LOST':6}"


def _one_line(name: str) -> str:
    return {"Keras on TensorFlow": "Keras on TF"}.get(name, name)


def _bound(report: Report, row: Row) -> str:
    """The limit that holds a row and, of memory's, the nearest: what is moved of what could be."""
    level, memory = held_by(report, row), report.memory_bound(row)
    moved = row.traffic.bytes[memory.level] / row.kernel.median_us / 1e3
    return f"{level:6} {memory.level} {moved:.0f}/{memory.gbps:.0f} GB/s"


def held_by(report: Report, row: Row) -> str:
    """The limit nearest to a kernel, in brackets if it explains less than half of its time."""
    level = report.bound(row).level
    return level if report.holds(row) else f"({level})"


def _all_times(report: Report) -> Iterable[str]:
    """Everybody's medians, in as many blocks as the terminal's width makes of them."""
    present = {name for row in report.rows for name in row.whole_call}
    peers = [name for name in report.peers if name in present]
    beside = [name for name in BESIDE if name in present]
    yield "Medians of whole calls, µs; * is the fastest of ours and the peers"
    if beside:
        yield f"Not peers, shown beside them: {', '.join(beside)}"
    labels = ["", "", *(f"{_label(row):{_id_width(report)}}{row.shape}" for row in report.rows)]
    width = max(map(len, labels))
    columns = [_column(report, name) for name in (OURS, *peers, *beside)]
    while columns:
        block = [labels[i].ljust(width) for i in range(len(labels))]
        while columns and (len(block[0]) + len(columns[0][0]) <= COLUMNS or len(block[0]) == width):
            block = [line + cell for line, cell in zip(block, columns.pop(0), strict=True)]
        yield from (line.rstrip() for line in block)


def _column(report: Report, name: str) -> list[str]:
    """A contestant's heading, two lines, and its time in each row, all of one width."""
    first, _, second = _SHORT.get(name, name).partition(" ")
    cells = [f"{first} ", f"{second} "] if second else ["", f"{first} "]
    for row in report.rows:
        fastest = name == (OURS if (row.ratio or 1) >= 1 else row.best_peer)
        time = us(row.whole_call[name].median_us) if name in row.whole_call else "—"
        cells.append(f" {time}{'*' if fastest and row.ratio else ' '}")
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]


def absences(report: Report) -> Iterable[str]:
    """Who has no time where, equal words together; required peers without any are not among it."""
    for name, way in report.missing.items():
        if name not in report.incomplete:
            yield f"Not measured: {name}: {way}"
    words = _grouped(
        ((name, " ".join(why.split())[:_WORDS]), row.id)
        for row in report.rows
        for name, why in row.failures.items()
    )
    for (name, why), ids in words.items():
        head = "Not measured:" if why.startswith("not tuned") else "FAILED"
        yield f"{head} {name}, {', '.join(ids)}: {why}"


def forms(report: Report) -> Iterable[str]:
    """Everybody's fastest form, the most frequent one without its rows."""
    found = _grouped(
        ((name, form), row.id) for row in report.rows for name, form in row.forms.items()
    )
    for name in dict.fromkeys(name for name, _ in found):
        usual, *others = sorted(
            ((form, ids) for (other, form), ids in found.items() if other == name),
            key=lambda pair: -len(pair[1]),
        )
        rare = "".join(f"; {form}: {', '.join(ids)}" for form, ids in others)
        yield f"{name}, fastest as {usual[0]}{rare}"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _grouped(pairs: Iterable[tuple[tuple[str, str], str]]) -> dict[tuple[str, str], list[str]]:
    result: dict[tuple[str, str], list[str]] = {}
    for key, value in pairs:
        result.setdefault(key, []).append(value)
    return result


def _summary(report: Report) -> Iterable[str]:
    rows = [row for row in report.rows if row.ratio is not None]
    if rows:
        lost = (
            f"LOST {len(report.losses)}: {', '.join(report.losses)}" if report.losses else "lost 0"
        )
        yield f"Against the best peer of each row: won {len(rows) - len(report.losses)}, {lost}"
    partly = [row.id for row in report.rows if any(name in row.failures for name in REQUIRED)]
    if partly and not report.incomplete:
        yield f"Without one of the required peers: {', '.join(partly)}"
    if report.geometric_mean_of_the_20 is not None:
        without = " and ".join(NOT_OF_THE_20)
        mean = report.geometric_mean_of_the_20
        yield f"Geometric mean of the ratios: {mean:.2f}× over the 20 (without {without})"
    if report.geometric_mean is not None:
        mean = report.geometric_mean
        yield f"Geometric mean of the ratios: {mean:.2f}× over all {len(rows)} rows"


def _id_width(report: Report) -> int:
    return max(len(_label(row)) for row in report.rows) + 1


def _label(row: Row) -> str:
    """Its id; names of layers, when they are long, differ in the end more than in the middle."""
    return row.id if len(row.id) <= _ID else f"{row.id[: _ID - 6]}…{row.id[-5:]}"


def us(value: float) -> str:
    """Microseconds with three or four digits that count."""
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"
