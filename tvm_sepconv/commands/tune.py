"""``tvm-sepconv tune``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tvm_sepconv import jit, paths, selection, targets
from tvm_sepconv.bench import limits, timing
from tvm_sepconv.commands import display, scope, tune_cuda
from tvm_sepconv.commands.display import Display
from tvm_sepconv.commands.searches import Task, Tuning, interrupts, search
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.subjects import Subject
from tvm_sepconv.tracker import Address

HELP = "search faster kernels on this machine or on boards, and record them"
DESCRIPTION = (
    "Search faster kernels for layers with MetaSchedule. What is found is measured in turns with "
    "the default decisions, and recorded as one line of <target>.jsonl, which the next build of "
    "that layer uses. Ctrl-C stops after the trial that runs and keeps what was found."
)
EPILOG = None
DEFAULT_TRIALS = 32
PEAK_SECS = 0.2
MOST_NAMES = 6  # that are listed
_MODELLED = (
    "There is no board (--rpc) and this is no such machine: candidates are emulated and scored by "
    "modelled cycles, which are no time; long inputs are shortened"
)
SPACES = {"tvm_sepconv": "tvm_sepconv", "auto": "metaschedule"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    selection.add_arguments(parser, ",".join(scope.DEFAULT_WORKLOADS))
    scope.add_target(parser)
    parser.add_argument(
        "--logs", metavar="DIR", help="look for records here first, and write them here"
    )
    _add_search(parser)
    tune_cuda.add_arguments(parser)
    boards = parser.add_argument_group("measuring on boards, their processors or GPUs")
    boards.add_argument("--rpc", metavar="HOST:PORT", help="of TVM's RPC tracker")
    boards.add_argument("--key", metavar="KEY", help="which the boards' servers registered with")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--quiet", action="store_true", help="only the results")
    shown.add_argument(
        "--json", metavar="FILE", help="write a line of JSON for each layer; - is standard output"
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    """Add what says how long a search takes, and where it begins and ends."""
    parser.add_argument(
        "--trials", type=int, default=DEFAULT_TRIALS, metavar="N",
        help="candidates to measure for each layer, the default one included; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help="stop after so long in all; a layer that ends early leaves its time to the others",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the search; default: %(default)s"
    )
    parser.add_argument(
        "--num-threads", type=int, default=1, metavar="N",
        help="threads of a call; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--space", choices=SPACES, default="tvm_sepconv",
        help="auto: MetaSchedule's own rules, to compare with; never recorded",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with searches that stopped")
    parser.add_argument(
        "--replay", type=Path, metavar="PATH",
        help="take times from an earlier search's history.jsonl, or a folder of such, and measure "
        "nothing",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="for what a search leaves behind; default: work/ of a checkout, else in the cache",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    _check(options)
    target = tune_cuda.target(scope.target(options.target), options)
    _check_tunable(target, options.rpc is not None)
    modelled = _is_modelled(target, options)
    kernels = _kernels(options)
    if modelled:
        kernels = [(_shortened(subject, config), config) for subject, config in kernels]
    scope.use_logs(options.logs)
    if options.space == "tvm_sepconv" and options.replay is None:
        # Refused before an hour was spent.
        jit.compiler("tvm_sepconv.compiler.tuning.logs").writable()
    with ExitStack() as stack:
        file = _json_file(options.json, stack)
        stream = sys.stderr if file is sys.stdout else sys.stdout
        settings = _settings(options, target, stack)
        tuning = _tuning(kernels, options, settings["target"].name, modelled)
        received = stack.enter_context(interrupts(tuning.stopping, display.live(stream)))
        if not options.quiet:
            print(_heading(tuning, options, settings["target"].name), file=stream, flush=True)
            if modelled:
                print(_MODELLED, file=stream, flush=True)
        with display.display(tuning, stream, options.quiet) as show:
            for task, (subject, config) in zip(tuning.tasks, kernels, strict=True):
                _tune(task, tuning, subject, config, settings, show)
                if file is not None:
                    facts = _facts(subject, config, options, settings["target"].name)
                    line = json.dumps({**facts, **display.as_json(task, tuning)})
                    print(line, file=file, flush=True)
        if not options.quiet:
            print(display.overview(tuning), file=stream, flush=True)
    return _status(tuning, received)


def _tuning(
    kernels: Sequence[tuple[Subject, KernelConfig]], options: argparse.Namespace, target: str,
    modelled: bool,
) -> Tuning:  # fmt: skip
    """All searches, none of which has begun."""
    peak_flops = None
    if modelled:
        peak_flops = jit.compiler("tvm_sepconv.compiler.tuning.modelled.cycles").PEAK_FLOPS
    elif options.rpc is None and options.replay is None and not target.startswith("cuda"):
        peak_flops = _peak_flops(target, options.num_threads)
    return Tuning(
        [_task(subject, config, options, target) for subject, config in kernels],
        deadline=time.monotonic() + 60 * options.minutes if options.minutes else math.inf,
        peak_flops=peak_flops,
        baseline="default" if options.space == "tvm_sepconv" else "recorded",
        unit="cycles" if modelled else "µs",
    )


def _heading(tuning: Tuning, options: argparse.Namespace, target: str) -> str:
    names = [task.name for task in tuning.tasks]
    what = ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} layers"
    return f"Tuning {what} for {target}, up to {options.trials} trials each"


def _status(tuning: Tuning, received: Sequence[int]) -> int:
    """The command's exit status."""
    if received:
        return 128 + received[0]
    tasks = tuning.tasks
    worked = any(task.worked for task in tasks) and not any(task.broken for task in tasks)
    return 0 if worked else 1


def _kernels(options: argparse.Namespace) -> list[tuple[Subject, KernelConfig]]:
    """The layers that were asked for; what is replayed must have them."""
    chosen = selection.chosen(options, scope.DEFAULT_WORKLOADS)
    kernels = scope.kernels(tune_cuda.subject(layer, options.precision) for layer in chosen)
    replay: Path | None = options.replay
    if replay is not None and not replay.is_dir() and len(kernels) > 1:
        raise ValueError(
            "`--replay` of a file is one layer's: name one layer, or a folder. "
            f"Received: {', '.join(subject.id for subject, _ in kernels)}"
        )
    if replay is not None and not replay.exists():
        raise ValueError(
            "`--replay` must be a search's history.jsonl, or a --work-dir with such. There is none "
            f"called {replay}"
        )
    return kernels


def _tune(
    task: Task, tuning: Tuning, subject: Subject, config: KernelConfig, settings: dict[str, Any],
    show: Display,
) -> None:  # fmt: skip
    tune = jit.compiler("tvm_sepconv.compiler.tuning.tune").tune
    about = {"batch": subject.batch, "steps": subject.steps, "workload": subject.id}
    search(task, tuning, show.update, partial(tune, config, **about, **settings))
    show.end(task)


def _check(options: argparse.Namespace) -> None:
    if options.trials < 2:
        raise ValueError(
            "`--trials` must be at least 2: the first one measures the default. "
            f"Received: {options.trials}"
        )
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"`--minutes` must be positive. Received: {options.minutes}")
    most = len(os.sched_getaffinity(0))
    threads = options.num_threads
    if threads < 1 or (options.rpc is None and threads > most):
        raise ValueError(f"`--num-threads` must be of 1 to {most} here. Received: {threads}")
    if options.replay is not None:
        measuring = selection.given(options, ("rpc", "resume"))
        selection.refuse("`--replay` measures nothing and begins anew", measuring)
    if options.space != "tvm_sepconv":
        others = selection.given(options, ("rpc", "resume", "replay", "logs"))
        selection.refuse("`--space auto` is measured here and never recorded", others)
    if (options.rpc is None) != (options.key is None):
        given, needed = ("key", "rpc") if options.rpc is None else ("rpc", "key")
        raise ValueError(f"`--{given}` needs --{needed} too: a tracker's address, and a key it has")
    if options.json not in (None, "-"):
        paths.new_file("--json", Path(options.json))


def _check_tunable(target: str, boards: bool) -> None:
    instead = f"tune for this machine's processor: --target {(*targets.runnable(), 'x86')[0]}"
    on_gpu = target.startswith("cuda")
    lacking = () if on_gpu else targets.missing_features(target.partition("@")[0])
    if lacking and not boards and not target.startswith("aarch64"):
        raise ValueError(
            f"Tuning for {target} measures kernels, and this machine lacks {', '.join(lacking)}. "
            "Run it on such a machine, let such machines measure with --rpc HOST:PORT --key KEY, "
            f"or {instead}"
        )
    jit.need_compiler()
    needed = (*["xgboost"] * (not on_gpu), "cloudpickle", "psutil", *["tornado"] * boards)
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"Tuning needs {', '.join(absent)}: pip install 'tvm-sepconv[compiler,tune]'"
        )


def _is_modelled(target: str, options: argparse.Namespace) -> bool:
    """Whether candidates are scored without running on such a core: 64-bit ARM's can be."""
    if not target.startswith("aarch64") or options.rpc is not None:
        return False
    if not targets.missing_features(target.partition("@")[0]):
        return False
    if options.num_threads > 1:
        raise ValueError(
            "Cycles are modelled for one thread: leave `--num-threads` out, or name a board with "
            f"--rpc HOST:PORT --key KEY. Received: {options.num_threads}"
        )
    if options.space != "tvm_sepconv":
        raise ValueError(f"`--space auto` is measured, and this machine cannot run {target}")
    return True


def _shortened(subject: Subject, config: KernelConfig) -> Subject:
    """The layer with an input that does not take long under emulation."""
    score = jit.compiler("tvm_sepconv.compiler.tuning.modelled.score")
    return replace(subject, steps=score.shortened(config, subject.batch, subject.steps))


def _settings(options: argparse.Namespace, target: str, stack: ExitStack) -> dict[str, Any]:
    """What all layers' searches have in common."""
    chosen = jit.compiler("tvm_sepconv.compiler.targets").of(target)
    settings = {
        "target": chosen,
        "trials": options.trials,
        "seed": options.seed,
        "work_dir": options.work_dir or scope.work_dir(),
        "threads": options.num_threads,
        "space": SPACES[options.space],
        "resume": options.resume,
        "replay": options.replay,
        "runner": None,
        "allow_tf32": options.precision == "tf32",
    }
    if options.rpc is not None:
        address = Address.parse(options.rpc)
        if warning := address.warning():
            print(warning, file=sys.stderr)
        boards = jit.compiler("tvm_sepconv.compiler.tuning.boards").Boards
        opened = boards(address, options.key, chosen, options.num_threads)
        settings["runner"] = stack.enter_context(opened)
        settings["target"] = opened.target  # of "cuda" the one of the boards' GPU
    elif _is_modelled(target, options) and options.replay is None:
        modelled = jit.compiler("tvm_sepconv.compiler.tuning.modelled.runner").Modelled
        settings["runner"] = stack.enter_context(closing(modelled(chosen)))
    return settings


def _task(subject: Subject, config: KernelConfig, options: argparse.Namespace, target: str) -> Task:
    flops = config.flops(subject.batch, subject.config.out_steps(subject.steps))
    task = Task(subject.id, flops, options.trials, config.dtype == "float32")
    if options.space != "tvm_sepconv":
        logs = jit.compiler("tvm_sepconv.compiler.tuning.logs")
        match = logs.lookup(config, target, threads=options.num_threads)
        key = (options.num_threads, subject.batch, subject.steps)
        if match and (match.record.threads, match.record.batch, match.record.steps) == key:
            task.recorded_secs = math.nan if match.distance else match.record.median_secs
    return task


def _peak_flops(target: str, threads: int) -> float | None:
    """What so many cores can do, for the share of it; None without a C compiler to measure it."""
    try:
        peak = limits.Peak(target.partition("@")[0])
    except RuntimeError:
        return None
    best_us = timing.interleave({"peak": peak.run}, PEAK_SECS)["peak"].best_us
    return threads * peak.flops / best_us * 1e6


def _json_file(name: str | None, stack: ExitStack) -> TextIO | None:
    if name is None or name == "-":
        return sys.stdout if name else None
    return stack.enter_context(open(name, "w", encoding="utf-8"))


def _facts(
    subject: Subject, config: KernelConfig, options: argparse.Namespace, target: str
) -> dict[str, Any]:
    """What is known of a layer's search before it begins."""
    return {
        "layer": subject.id,
        "target": target,
        "key": config.key,
        "config": config.to_dict(),
        "batch": subject.batch,
        "steps": subject.steps,
        "threads": options.num_threads,
        "space": options.space,
        "seed": options.seed,
    }
