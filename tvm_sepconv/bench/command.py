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

from tvm_sepconv import paths
from tvm_sepconv import selection as layers
from tvm_sepconv.bench import (
    calls,
    environments,
    machine,
    measure,
    page,
    selection,
    spaces,
    sweep,
    sweep_page,
    table,
)
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import CONTESTANTS
from tvm_sepconv.bench.report import OURS, Report
from tvm_sepconv.bench.spaces import Spaces
from tvm_sepconv.bench.sweep import Sweep
from tvm_sepconv.subjects import Subject

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.search import Progress

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
    layers.add_arguments(parser, "all")
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--threads", default="1", metavar="N", help="everybody's; 1,2 makes two reports"
    )
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
    how.add_argument(
        "--calls", action="store_true",
        help="measure instead our own calls alone: what Python adds to a kernel, and how much "
        "faster --threads N are than one",
    )  # fmt: skip
    how.add_argument(
        "--spaces", nargs="?", const=spaces.COUNTS, metavar="TRIALS",
        help="measure instead what our design space and MetaSchedule's own find in so many trials; "
        f"without a number {spaces.COUNTS}; 20 minutes for the layers without IDS, "
        + ", ".join(spaces.LAYERS),
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
        elif options.spaces is not None:
            _compare_spaces(options, target)
        elif options.calls:
            _measure_calls(options, target)
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


def _compare_spaces(options: argparse.Namespace, target: str) -> None:
    subjects = selection.chosen_subjects(options, spaces.LAYERS)
    counts = selection.trial_counts(options.spaces)
    threads = selection.thread_count("--spaces", options.threads)
    found = spaces.measure_spaces(subjects, target, threads, counts, _command(), _progress)
    _show(found, options.json, None)


def _measure_calls(options: argparse.Namespace, target: str) -> None:
    subjects = selection.chosen_subjects(options)
    threads = selection.thread_count("--calls", options.threads)
    rows = calls.measure(subjects, target, threads, _progress)
    print(f"{machine.where(threads)}\n$ {_command()}\n\n{calls.summary(rows, threads)}")


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


def _show(result: Report | Sweep | Spaces, json_file: Path | None, html_file: Path | None) -> None:
    print(table.text(result) if isinstance(result, Report) else result.text(), end="", flush=True)
    if json_file is not None:
        text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if html_file is not None:
        if isinstance(result, Spaces):
            raise ValueError("`--html` has no page for --spaces: its figures go to --json")
        made = sweep_page.html(result) if isinstance(result, Sweep) else page.html(result)
        html_file.write_text(made, encoding="utf-8")


def _numbered(path: Path | None, threads: int) -> Path | None:
    return None if path is None else path.with_stem(f"{path.stem}-{threads}")


def _read(path: Path) -> Report | Sweep | Spaces:
    paths.file("--from", path)
    kinds: dict[str, type[Report | Sweep | Spaces]] = {
        "spaces_format": Spaces, "sweep_format": Sweep, "format": Report,
    }  # fmt: skip
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        kind = next((kind for key, kind in kinds.items() if key in plain), Report)
        return kind.from_dict(plain)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        words = error if isinstance(error, ValueError) else f"it has other fields ({error!r})"
        raise ValueError(f"`--from` must name what --json wrote. {path}: {words}") from error


def _command() -> str:
    return shlex.join(["tvm-sepconv", *sys.argv[1:]])


def _progress(text: str) -> None:
    """Show what is being done; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    elif text.endswith("the reference"):  # a line a row is enough for a log
        print(text.partition(":")[0], file=sys.stderr, flush=True)
    elif text.endswith(" space"):  # … and one a search, which takes minutes
        print(text, file=sys.stderr, flush=True)
