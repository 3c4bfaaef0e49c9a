"""``tvm-sepconv logs``: show, merge and prune what tuning recorded."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sepconv import targets
from tvm_sepconv.commands import scope

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.log_writing import Change
    from tvm_sepconv.compiler.tuning.records import Line, Record

HELP = "show, merge and prune what tuning recorded"
DESCRIPTION = (
    "Work on tuning logs: <target>.jsonl, one line a record, read from the folders of --logs or "
    "TVM_SEPCONV_LOGS, the user's data folder and the package, in this order."
)
EPILOG = None
_SHOW = (
    "List the records in the order they are read, with the reason for each that does not apply: "
    "another one comes before it, or it cannot be used."
)
_MERGE = (
    "Put the records of other logs into one's own. Of two records of one kernel the faster a step "
    "stays if they are of one machine; times of different machines do not compare, and the newer "
    "stays."
)
_PRUNE = (
    "Take out of logs what is never used: damaged lines, records that the schedule cannot follow, "
    "and those of kernels that have a better one. It goes to <target>.jsonl.removed."
)
APPLIES, SHADOWED, SKIPPED = "applies", "shadowed", "skipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser(
        "show", help="list the records in the order they are read", description=_SHOW
    )
    show.add_argument("--target", metavar="T", help="default: all that there are logs of")
    show.add_argument(
        "--workloads", metavar="IDS",
        help="of published layers, or patterns of them or of kernels: QN-*,c64_f128_*",
    )  # fmt: skip
    show.add_argument(
        "--json", action="store_true", help="print a JSON array, an object for each line"
    )
    show.add_argument("--logs", metavar="DIR", help="look for records here first")
    merge = actions.add_parser(
        "merge", help="put the records of other logs into one's own", description=_MERGE
    )
    merge.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="a log or a folder")
    merge.add_argument(
        "--into", required=True, type=Path, metavar="DIR|FILE", help="a folder, or <target>.jsonl"
    )
    prune = actions.add_parser(
        "prune", help="take out of logs what is never used", description=_PRUNE
    )
    prune.add_argument(
        "--older-than", type=float, metavar="DAYS", help="also records that are older than this"
    )
    prune.add_argument("--target", metavar="T", help="default: all that there are logs of")
    prune.add_argument(
        "--logs", metavar="DIR", help="default: the folder that new records are written to"
    )
    for action in (merge, prune):
        action.add_argument("--dry-run", action="store_true", help="only say what would be done")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return {"show": _show, "merge": _merge, "prune": _prune}[options.action](options)


# ---- show --------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from tvm_sepconv.compiler.tuning import logs
    from tvm_sepconv.compiler.tuning.records import lines

    scope.read_logs(options.logs)
    folders = logs.folders()
    rows = [
        (line, *_state(line))
        for path in _logs_of(folders, options.target)
        for line in lines(path)
        if _wanted(line, options.workloads)
    ]
    if options.json:
        print(json.dumps([_plain(*row) for row in rows], indent=1, ensure_ascii=False))
    else:
        _print_table(rows)
        if not rows:
            print(f"No records in {', '.join(map(str, folders))}")
    return 0 if rows else 1


def _logs_of(folders: Sequence[Path], target: str | None) -> list[Path]:
    """The logs there are, a target after the other, in the order they are read."""
    name = targets.resolve(target) if target is not None else "*"
    found = [path for folder in folders for path in sorted(folder.glob(f"{name}.jsonl"))]
    return sorted(dict.fromkeys(found), key=lambda path: path.name)


def _wanted(line: Line, patterns: str | None) -> bool:
    from tvm_sepconv.compiler.tuning.records import workload_id

    if patterns is None or line.record is None:
        return patterns is None
    config = line.record.config
    words = [word.strip() for word in patterns.split(",")]
    return any(fnmatchcase(n, w) for n in (workload_id(config), config.key) for w in words)


def _state(line: Line) -> tuple[str, str]:
    """Whether the line's record is what its kernel is built with, and why not."""
    from tvm_sepconv.compiler.tuning import logs

    if line.record is None or line.problem:
        return SKIPPED, line.problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says the same
        match = logs.lookup(line.record.config, line.record.target)
    assert match is not None  # this line, if no other
    if match.line == line:
        return APPLIES, ""
    return SHADOWED, f"by {match.line.path}, line {match.line.number}"


def _plain(line: Line, state: str, why: str) -> dict[str, Any]:
    from tvm_sepconv.compiler.tuning.records import workload_id

    record = line.record
    return {
        "file": str(line.path),
        "line": line.number,
        "state": state,
        "why": why,
        "workload": (workload_id(record.config) or None) if record else None,
        "record": record.to_dict() if record else None,
    }


def _print_table(rows: Sequence[tuple[Line, str, str]]) -> None:
    titles = ("kernel", "input", "threads", "time", "default", "gain", "noise", "trials", "date")
    table = [_cells(line.record) if line.record else None for line, _, _ in rows]
    widths = [max(map(len, column)) for column in zip(titles, *filter(None, table), strict=True)]
    file = None
    for (line, state, why), cells in zip(rows, table, strict=True):
        if line.path != file:
            file = line.path
            print(f"\n{file}\n  " + "  ".join(_aligned(titles, widths)) + "  machine")
        if cells is None or line.record is None:
            print(f"  line {line.number}: {state}: {why}")
            continue
        note = "" if state == APPLIES else f"\n    line {line.number}: {state}: {why}"
        print("  " + "  ".join(_aligned(cells, widths)) + f"  {line.record.machine}{note}")


def _cells(record: Record) -> tuple[str, ...]:
    from tvm_sepconv.compiler.tuning.records import kernel_name

    return (
        kernel_name(record.config),
        f"{record.batch}×{record.steps}",
        str(record.threads),
        _time(record, record.median_secs),
        _time(record, record.default_secs),
        f"{record.default_secs / record.median_secs:.2f}×",
        f"{record.noise:.1%}",
        str(record.trials),
        record.date[:10],
    )


def _time(record: Record, secs: float) -> str:
    """Of a record; a modelled one has cycles."""
    return f"{secs * 1e6:.1f} µs" if record.modelled is None else f"{secs * 1e6:.0f} cycles"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if number == 0 else cell.rjust(width)


# ---- merge -------------------------------------------------------------------------------------


def _merge(options: argparse.Namespace) -> int:
    from tvm_sepconv.compiler.tuning import log_writing

    into: Path = options.into
    one = into.suffix == ".jsonl"
    found: dict[str, list[Record]] = {}
    for line in _source_lines(options.sources):
        record, why = line.record, _unfit(line, into.stem if one else None)
        if record is None or why:
            print(f"left out: {line.where}: {why}")
        else:
            found.setdefault(record.target, []).append(record)
    changes = []
    for target, records in found.items():
        path = into if one else into / f"{target}.jsonl"
        changes += log_writing.merge(records, path, options.dry_run)
    for change in changes:
        print(_told(change))
    counts = [f"{sum(c.outcome == o for c in changes)} {o}" for o in ("added", "replaced", "kept")]
    print(f"{into}: {', '.join(counts)}{' (not written: --dry-run)' if options.dry_run else ''}")
    return 0 if changes else 1


def _source_lines(sources: Sequence[Path]) -> Iterator[Line]:
    from tvm_sepconv.compiler.tuning.records import lines

    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"There is no log and no folder called {source}")
        for path in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
            yield from lines(path)


def _unfit(line: Line, target: str | None) -> str:
    """Why a line of a source, whatever that is called, is of no use; "" if it is."""
    from tvm_sepconv.compiler.tuning.records import tiling_of

    if line.record is None:
        return line.problem
    if target is not None and line.record.target != target:
        return f"it is of target {line.record.target}"
    try:
        tiling_of(line.record)
    except ValueError as error:
        return str(error)
    return ""


def _told(change: Change) -> str:
    from tvm_sepconv.compiler.tuning.records import kernel_name

    record, other = change.record, change.other
    threads = f", {record.threads} threads" if record.threads != 1 else ""
    text = f"{change.outcome}: {kernel_name(record.config)}, {record.target}{threads}"
    if other is None:
        return f"{text}: {_figure(record)}"
    if other == record:
        return f"{text}: {_figure(record)}, which is the same"
    machine = "the same" if other.machine == record.machine else "another"
    why = f"{'faster' if machine == 'the same' else 'newer'}, of {machine} machine"
    if (other.modelled is None) != (record.modelled is None):
        why = "measured, not modelled"
    if change.outcome == "kept":
        return f"{text}: {_figure(other)}, not {_figure(record)}: {why}"
    return f"{text}: {_figure(other)} by {_figure(record)}: {why}"


def _figure(record: Record) -> str:
    size = f"{record.batch}×{record.steps}"
    what = "µs" if record.modelled is None else "modelled cycles"
    time = f"{record.median_secs * 1e6:.{1 if record.modelled is None else 0}f} {what}"
    return f"{time} ({size}, {record.machine}, {record.date[:10]})"


# ---- prune -------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> int:
    from tvm_sepconv.compiler.tuning import log_writing, logs

    days = options.older_than
    if days is not None and not days >= 0:
        raise ValueError(f"`--older-than` must be a number of days. Received: {days}")
    folder = Path(options.logs) if options.logs is not None else logs.writable()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder called {folder}")
    would = "would be removed" if options.dry_run else "removed"
    removed = 0
    for path in _logs_of([folder], options.target):
        unused = log_writing.prune(path, days, options.dry_run)
        for line in unused:
            print(f"{would}: {line.where}: {line.problem}")
        if unused and not options.dry_run:
            print(f"what was removed is in {path}.removed")
        removed += len(unused)
    print(f"{folder}: {removed} lines {would}")
    return 0
