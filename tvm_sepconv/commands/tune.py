"""``tvm-sepconv tune``."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tvm_sepconv import gpu, jit, targets
from tvm_sepconv.commands import scope
from tvm_sepconv.display import display, summary

HELP = "search faster kernels on this machine and record them"
DESCRIPTION = (
    "Search faster kernels for layers with MetaSchedule, on this machine. Each record is one line "
    "of <target>.jsonl, and the next build of that layer uses it. Ctrl-C stops and keeps what was "
    "found."
)
EPILOG = scope.EPILOG
DEFAULT_TRIALS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    scope.add_arguments(parser)
    parser.add_argument(
        "--trials", type=int, default=DEFAULT_TRIALS, metavar="N",
        help="candidates to measure for each layer, the default one included; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long in all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="scratch; default: work/ of a checkout, else in the cache",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    target = scope.target(options.target)
    _check_tunable(target)
    if options.trials < 2:
        raise ValueError(
            "`--trials` must be at least 2: the first one measures the default. "
            f"Received: {options.trials}"
        )
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"`--minutes` must be positive. Received: {options.minutes}")
    kernels = scope.select(options.workloads)
    scope.use_logs(options.logs)
    tune = jit.compiler("tvm_sepconv.compiler.tune").tune
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(target)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    names = ", ".join(workload.id for workload, _ in kernels)
    print(f"Tuning {names} for {target}, up to {options.trials} trials each", flush=True)
    recorded = 0
    with display() as show, _interrupts() as interrupted:
        for left, (workload, config) in zip(range(len(kernels), 0, -1), kernels, strict=True):
            if interrupted.is_set() or time.monotonic() >= end:
                print(f"{workload.id}: not started", flush=True)
                continue
            stop = time.monotonic() + (end - time.monotonic()) / left
            try:
                result = tune(
                    config, chosen, workload.batch, workload.steps,
                    trials=options.trials, seed=options.seed,
                    work_dir=options.work_dir or _work_dir(), report=show(workload.id),
                    should_stop=lambda stop=stop: interrupted.is_set() or time.monotonic() >= stop,
                )  # fmt: skip
            except ValueError as error:  # its input is too short; the others' may not be
                print(f"{workload.id}: skipped. {error}", flush=True)
                continue
            recorded += result.path is not None
            print(f"{workload.id}: {summary(result)}", flush=True)
    if interrupted.is_set():
        return 128 + signal.SIGINT
    return 0 if recorded else 1


def _check_tunable(target: str) -> None:
    instead = f"tune for this machine's processor: --target {(*targets.runnable(), 'x86')[0]}"
    if target.startswith("cuda"):
        if reason := gpu.missing():
            raise ValueError(
                "Tuning for CUDA measures kernels on an NVIDIA GPU, and this machine has none to "
                f"use: {reason}. Run it on a machine with a GPU and its driver, or {instead}. "
                f"(Beyond that, tuning for CUDA {scope.NO_CUDA}.)"
            )
        raise ValueError(f"Tuning for CUDA {scope.NO_CUDA}. You can {instead}")
    if lacking := targets.missing_features(target.partition("@")[0]):
        raise ValueError(
            f"Tuning for {target} measures kernels on this machine, which lacks "
            f"{', '.join(lacking)}. Run it on such a machine, or {instead}"
        )
    jit.need_compiler()
    needed = ("xgboost", "cloudpickle", "psutil")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"Tuning needs {', '.join(absent)}: pip install 'tvm-sepconv[compiler,tune]'"
        )


def _work_dir() -> Path:
    root: Path | None = jit.compiler("tvm_sepconv.compiler.logs").checkout()
    return (root or jit.cache_root()) / "work"


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Make the first Ctrl-C an event; the second ends the process there and then."""
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("Stopping; once more gives up what was found", flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
