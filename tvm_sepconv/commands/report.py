"""``tvm-sepconv report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from tvm_sepconv import jit, paths, targets
from tvm_sepconv.commands import scope

HELP = "make a page and pictures of what tuning found"
DESCRIPTION = (
    "Draw what tuning found as a self-contained page, index.html, and each of its pictures as PNG: "
    "the best time against the candidates measured, the time of each layer tuned, transferred and "
    "default beside other people's frameworks, and which decisions win."
)
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where page and pictures go"
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="where searches left their histories"
    )
    parser.add_argument("--logs", metavar="DIR", help="look for records here first")
    parser.add_argument(
        "--bench", type=Path, nargs="+", default=[], metavar="FILE",
        help="what bench --json wrote, for the peers' times",
    )  # fmt: skip
    parser.add_argument("--target", metavar="T", help="only this one; default: all there are")
    parser.add_argument(
        "--measure", action="store_true",
        help="first measure each recorded layer's libraries on this machine, in alternation: with "
        "default decisions, with the nearest other record's, and with its own",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 if there was nothing to draw."""
    from tvm_sepconv.report import found, page

    paths.new_folder("--output", options.output)
    for file in options.bench:
        paths.file("--bench", file)
    scope.read_logs(options.logs)
    target = scope.target(options.target) if options.target is not None else None
    work_dir = options.work_dir or scope.work_dir()
    if options.measure:
        _measure(work_dir, target)
    everything = found.read(work_dir, options.bench, target)
    counts = {"searches": everything.searches, "records": everything.records,
              "bench reports": everything.benches}  # fmt: skip
    print("Found", ", ".join(f"{len(items)} {words}" for words, items in counts.items()))
    for words in everything.missing:
        print(f"Not in the report: {words}")
    if not everything.targets:
        return 1
    for path in page.write(everything, options.output):
        print(path)
    return 0


def _measure(work_dir: Path, target: str | None) -> None:
    from tvm_sepconv.report import found

    transfer = jit.compiler("tvm_sepconv.compiler.tuning.transfer")
    records = found.records(target)
    for number, record in enumerate(records, 1):
        name = f"{found.name(record.config)} for {record.target}"
        if lacking := targets.missing_features(record.target.partition("@")[0]):
            print(f"{name}: not measured, this machine lacks {', '.join(lacking)}", flush=True)
            continue
        print(f"{name}: measuring, {number} of {len(records)}", flush=True)
        try:
            transfer.measure_record(record, found.times_path(work_dir, record))
        except (RuntimeError, ValueError) as error:  # the others' may go well
            print(f"{name}: not measured. {error}", flush=True)
