"""``tvm-sepconv bench``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_sepconv.bench import environments, measure, page, selection, sweep, sweep_page, table
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import CONTESTANTS
from tvm_sepconv.bench.report import OURS, Report
from tvm_sepconv.bench.subjects import Subject
from tvm_sepconv.bench.sweep import Sweep

if TYPE_CHECKING:
    from tvm_sepconv.compiler.search import Progress

HELP = "measure layers beside other people's frameworks and the machine's limits"
EPILOG = None
DESCRIPTION = (
    "Measure layers: the published ones by id, one from arguments, or those of a .keras file. "
    "Every framework runs in a process of its own; outputs are compared with the reference before "
    "anything is timed, and calls take turns. Frameworks come from environments of their own, "
    "which --setup makes, or from the running Python."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "workloads", nargs="*", metavar="IDS",
        help="of published layers, or patterns: QN-B1,CN-*; default: all",
    )  # fmt: skip
    own = parser.add_argument_group("a layer of one's own, by Keras's arguments")
    for name in ("filters", "kernel-size", "strides", "dilation-rate", "depth-multiplier"):
        own.add_argument(f"--{name}", type=int, metavar="N")
    own.add_argument("--padding", metavar="P", help="valid, same, or zeros on both sides: 32,0")
    own.add_argument("--activation", metavar="A", help="by its Keras name; default: linear")
    own.add_argument("--channels", type=int, metavar="N", help="of the input")
    saved = parser.add_argument_group("layers of a saved model")
    saved.add_argument("--keras", type=Path, metavar="FILE", help="a .keras file")
    own.add_argument("--steps", type=int, metavar="N", help="of the input; also for --keras")
    own.add_argument("--batch", type=int, metavar="N", help="default: 1; also for --keras")
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--threads", default="1", metavar="N", help="everybody's; 1,2 makes two reports"
    )
    how.add_argument("--data-format", choices=selection.FORMATS, help="default: channels_last")
    how.add_argument("--target", metavar="ISA", help="of ours; default: this machine's best")
    how.add_argument("--cold", action="store_true", help="inputs and outputs from memory")
    keys = ", ".join(c.key for c in CONTESTANTS if c.name != OURS)
    how.add_argument("--peers", metavar="NAMES", help=f"only these, or none: {keys}")
    how.add_argument(
        "--metaschedule", type=int, metavar="TRIALS",
        help="first let MetaSchedule tune TVM's own space for these layers, which takes minutes "
        "for each; results are kept",
    )  # fmt: skip
    how.add_argument(
        "--sweep", action="store_true",
        help="measure instead every number of channels from 1 to 33: is there a cliff?",
    )  # fmt: skip
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("reports and environments")
    files.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    files.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    files.add_argument(
        "--from", type=Path, metavar="FILE", dest="source",
        help="measure nothing: make table and page of an earlier --json",
    )  # fmt: skip
    files.add_argument(
        "--setup", nargs="*", metavar="NAME",
        help="make the frameworks' environments, of these names or all: "
        + ", ".join(environments.ENVIRONMENTS),
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Raises
    ------
    ValueError
        For options that are wrong or contradict each other.
    RuntimeError
        If our layer cannot be compiled or is wrong, or an environment cannot be made.
    """
    selection.check(options)
    if options.setup is not None:
        environments.set_up(options.setup)
        return 0
    if options.source is not None:
        _show(_read(options.source), options.json, options.html)
        return 0
    target = selection.target(options.target)
    try:
        if options.sweep:
            _show(sweep.measure_sweep(target, _command(), _progress), options.json, options.html)
        else:
            _measure(options, target)
    except AssertionError as error:  # an output of ours: nothing is timed that is wrong
        raise RuntimeError(str(error)) from error
    return 0


def _measure(options: argparse.Namespace, target: str) -> None:
    subjects = selection.chosen_subjects(options)
    counts = selection.thread_counts(options.threads)
    keys = selection.contestant_keys(options.peers)
    for threads in counts:
        if options.metaschedule is not None:
            _tune(subjects, target, threads, options.metaschedule)
        terms = measure.Terms(threads, target, options.cold, keys)
        report = measure.measure(subjects, terms, _command(), _progress)
        several = len(counts) > 1
        files = (_numbered(f, threads) if several else f for f in (options.json, options.html))
        _show(report, *files)


def _tune(subjects: Sequence[Subject], target: str, threads: int, trials: int) -> None:
    """Let MetaSchedule search its own space for each subject, for its place in the table."""
    from tvm_sepconv.bench.contestants import metaschedule

    for subject in subjects:
        head = f"{subject.id}: MetaSchedule's own space"
        case = Case.of_subject(subject, target)

        def tell(now: Progress, head: str = head) -> None:
            _progress(f"{head}, {now.trials} of {now.of} candidates")

        with tempfile.TemporaryDirectory(prefix="tvm_sepconv_metaschedule_") as folder:
            metaschedule.tune(case, threads, trials, Path(folder), tell)
    _progress("")


def _show(result: Report | Sweep, json_file: Path | None, html_file: Path | None) -> None:
    print(result.text() if isinstance(result, Sweep) else table.text(result), end="", flush=True)
    if json_file is not None:
        text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if html_file is not None:
        made = sweep_page.html(result) if isinstance(result, Sweep) else page.html(result)
        html_file.write_text(made, encoding="utf-8")


def _numbered(path: Path | None, threads: int) -> Path | None:
    return None if path is None else path.with_stem(f"{path.stem}-{threads}")


def _read(path: Path) -> Report | Sweep:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`--from` must name what --json wrote. {path}: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"`--from` must name what --json wrote. {path} holds no report")
    return Sweep.from_dict(plain) if "sweep_format" in plain else Report.from_dict(plain)


def _command() -> str:
    return shlex.join(["tvm-sepconv", *sys.argv[1:]])


def _progress(text: str) -> None:
    """Show what is being done; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    elif text.endswith("the reference"):  # a line a row is enough for a log
        print(text.partition(":")[0], file=sys.stderr, flush=True)
