"""``tvm-sepconv gpu``: measure everything on a GPU that is at hand for half an hour."""

from __future__ import annotations

import argparse
from pathlib import Path

from tvm_sepconv import jit, targets, workloads

HELP = "prepare measurements without a GPU, make them on one, and report them"
DESCRIPTION = (
    "prepare builds libraries and candidates with nvcc into a folder; no GPU is needed. The folder "
    "is run on a machine with one, where nothing else is: python3 FOLDER. It stops after --minutes "
    "and goes on when it is run again. Then report shows what was found."
)
EPILOG = "`tvm-sepconv logs merge FOLDER/results/records --into tuning_logs` keeps what was tuned."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser(
        "prepare", help="build everything, where nvcc is",
        description="Build libraries and candidates, half an hour of it, into a folder to copy to "
        "the machine with the GPU.",
    )  # fmt: skip
    prepare.add_argument("folder", type=Path, metavar="FOLDER", help="what is there is kept")
    prepare.add_argument(
        "--workloads", metavar="IDS", help="of published layers, or patterns; default: the 20"
    )
    prepare.add_argument(
        "--candidates", type=int, default=8, metavar="N",
        help="for tuning, of each layer that is tuned; default: %(default)s",
    )  # fmt: skip
    prepare.add_argument(
        "--python", default="3.12", metavar="X.Y", help="that is there; default: %(default)s"
    )
    prepare.add_argument(
        "--arch", choices=targets.CUDA_ARCHS, default="sm_90",
        help="of the GPU that is there; default: %(default)s",
    )  # fmt: skip
    run = actions.add_parser(
        "run", help="measure, where the GPU is",
        description="The same as `python3 FOLDER`, which needs no tvm-sepconv there.",
    )  # fmt: skip
    run.add_argument("folder", type=Path, metavar="FOLDER", help="what prepare made")
    run.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        metavar="M",
        help="to stop after; default: %(default)s",
    )
    run.add_argument("--retry", action="store_true", help="do what failed once more")
    report = actions.add_parser("report", help="show what was found")
    report.add_argument("folder", type=Path, metavar="FOLDER", help="after it has run")
    report.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return {"prepare": _prepare, "run": _run, "report": _report}[options.action](options)


def _prepare(options: argparse.Namespace) -> int:
    from tvm_sepconv.commands import scope
    from tvm_sepconv.compiler.gpu_session.prepare import prepare

    if options.candidates < 1:
        raise ValueError(f"`--candidates` must be at least 1. Received: {options.candidates}")
    jit.need_compiler()
    layers = [w.id for w in workloads.select([options.workloads])] if options.workloads else None
    work = scope.work_dir() / "gpu"
    prepare(options.folder, work, layers, options.candidates, options.python, options.arch)
    return 0


def _run(options: argparse.Namespace) -> int:
    from tvm_sepconv.compiler.gpu_session import session

    status = session.run(options.folder, options.minutes, options.retry)
    _show(options.folder)
    return status


def _report(options: argparse.Namespace) -> int:
    from tvm_sepconv.compiler.gpu_session import figures, plan

    if options.html is not None:
        made = plan.Plan.load(options.folder)
        options.html.write_text(figures.html(made, plan.results(options.folder)))
    _show(options.folder)
    return 0


def _show(folder: Path) -> None:
    from tvm_sepconv.compiler.gpu_session import figures, plan

    print(figures.text(plan.Plan.load(folder), plan.results(folder)), end="")
