"""The command ``tvm-sepconv``: tune, build, bench, inspect."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tvm_sepconv import bundle, gpu, jit, targets, workloads
from tvm_sepconv.bench import command as benchmark
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.display import display, summary
from tvm_sepconv.workloads import Workload

# One layer each of the sizes that differ most: many taps, few steps, small.
DEFAULT_WORKLOADS = "QN-B1,CN-21,MB-1"
DEFAULT_TRIALS = 32

_EPILOG = "Layers are named by id in the table of published layers, or by pattern: QN-B1,CN-*"
_NO_CUDA = (
    "is not part of this version yet: of CUDA it has the schedule and the source code it makes"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        The exit status: 2 for what the user can put right, 1 if nothing was found.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError, bundle.BundleError) as error:
        message = str(error)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # TVM's own errors are subclasses: no user's fault
            raise
        message = str(error)
    print(f"tvm-sepconv {options.command}: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tvm-sepconv", description="Compiled separable convolutions.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tune = commands.add_parser(
        "tune",
        help="search faster kernels on this machine and record them",
        description="Search faster kernels for layers with MetaSchedule, on this machine. Each "
        "record is one line of <target>.jsonl, and the next build of that layer uses it. Ctrl-C "
        "stops and keeps what was found.",
        epilog=_EPILOG,
    )
    build = commands.add_parser(
        "build",
        help="compile layers' libraries, with the records that tuning made",
        description="Compile the libraries of layers. Without --output they go to this user's "
        "cache, where layers of the same shape find them. To save a layer with its weights use "
        "Python: `layer.save(path)`, or `tvm_sepconv.save(tvm_sepconv.from_keras(file), path)`.",
        epilog=_EPILOG,
    )
    bench = commands.add_parser("bench", help=benchmark.HELP, description=benchmark.DESCRIPTION)
    inspect = commands.add_parser(
        "inspect",
        help="verify a bundle and show what it holds",
        description="Verify a bundle and show its layers, its targets, and where each kernel's "
        "decisions are from: tuned, transferred from a similar layer's record, or default.",
    )
    for command in (tune, build):
        _add_scope(command)
    _add_search(tune)
    build.add_argument(
        "--output", type=Path, metavar="DIR", help="write DIR/<target>/<layer>.so and the runtime "
        "library beside them instead, for C programs and other machines",
    )  # fmt: skip
    benchmark.add_arguments(bench)
    inspect.add_argument("bundle", type=Path)
    runs = ((tune, _tune), (build, _build), (bench, benchmark.run), (inspect, _inspect))
    for command, run in runs:
        command.set_defaults(run=run)
    return parser


def _add_scope(command: argparse.ArgumentParser) -> None:
    best = "this machine's best"
    command.add_argument(
        "--target", metavar="T", help=f"such as x86 ({best}), x86_64-avx2, arm; default: {best}"
    )
    command.add_argument(
        "--workloads", default=DEFAULT_WORKLOADS, metavar="IDS", help="default: %(default)s"
    )
    command.add_argument(
        "--logs", metavar="DIR", help="look for records here first, and write them here"
    )


def _add_search(tune: argparse.ArgumentParser) -> None:
    tune.add_argument(
        "--trials", type=int, default=DEFAULT_TRIALS, metavar="N",
        help="candidates to measure for each layer, the default one included; default: %(default)s",
    )  # fmt: skip
    tune.add_argument("--minutes", type=float, metavar="M", help="stop after so long in all")
    tune.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    tune.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="scratch; default: work/ of a checkout, else in the cache",
    )  # fmt: skip


def _select(patterns: str) -> list[tuple[Workload, KernelConfig]]:
    """The layers that ids or patterns name, a kernel once."""
    result: dict[KernelConfig, Workload] = {}
    for workload in workloads.select([patterns]):
        config = workload.config().kernel_config(workload.channels)
        if config in result:
            print(f"{workload.id} is left out: it has the kernel of {result[config].id}")
        result.setdefault(config, workload)
    return [(workload, config) for config, workload in result.items()]


def _target(name: str | None) -> str:
    here = targets.runnable()
    if name is None and not here:
        raise ValueError(f"`--target` is needed: there is none for {targets.machine()} machines")
    return targets.resolve(name) if name is not None else here[0]


def _use_logs(folder: str | None) -> None:
    if folder is not None:
        others = os.environ.get("TVM_SEPCONV_LOGS")
        os.environ["TVM_SEPCONV_LOGS"] = os.pathsep.join(filter(None, [folder, others]))


def _tune(options: argparse.Namespace) -> int:
    target = _target(options.target)
    _check_tunable(target)
    if options.trials < 2:
        raise ValueError(
            "`--trials` must be at least 2: the first one measures the default. "
            f"Received: {options.trials}"
        )
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"`--minutes` must be positive. Received: {options.minutes}")
    kernels = _select(options.workloads)
    _use_logs(options.logs)
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
                f"(Beyond that, tuning for CUDA {_NO_CUDA}.)"
            )
        raise ValueError(f"Tuning for CUDA {_NO_CUDA}. You can {instead}")
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


def _build(options: argparse.Namespace) -> int:
    target = _target(options.target)
    if target.startswith("cuda"):
        raise ValueError(f"Building for CUDA {_NO_CUDA}. There are {', '.join(targets.FEATURES)}")
    if options.output is None and target.partition("@")[0] not in targets.runnable():
        raise ValueError(f"This machine cannot run {target}: name a folder for it with --output")
    kernels = _select(options.workloads)
    _use_logs(options.logs)
    build = jit.compiler("tvm_sepconv.compiler.build")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(target)
    if options.output is not None:
        (options.output / target).mkdir(parents=True, exist_ok=True)
        build.build_runtime(chosen, options.output / target / bundle.RUNTIME)
    for workload, config in kernels:
        variants = build.variants(config, chosen)
        if options.output is None:
            path, _ = jit.library(config, target)
        else:
            path = options.output / target / f"{config.key}.so"
            build.build_library(config, chosen, path, variants)
        print(f"{workload.id}: {_origins([v.to_dict() for v in variants])}; {path}", flush=True)
    return 0


def _origins(variants: Sequence[dict[str, Any]]) -> str:
    """Kernels by the steps of their tiles, and where their decisions are from."""
    tiles: dict[str, list[str]] = {}
    for variant in variants:
        origin = variant["origin"]
        if variant.get("distance"):
            origin += f" (distance {variant['distance']:.2g})"
        elif variant["record_secs"]:
            origin += f" ({variant['record_secs'] * 1e6:.1f} µs)"
        tiles.setdefault(origin, []).append(str(variant["decisions"]["step_tile"]))
    return ", ".join(f"tiles of {', '.join(n)} steps {origin}" for origin, n in tiles.items())


def _inspect(options: argparse.Namespace) -> int:
    path: Path = options.bundle
    manifest = bundle.read_manifest(path)
    libraries: dict[str, dict[str, Any]] = manifest["libraries"]
    files = [*manifest["files"].values(), *manifest["runtimes"].values()]
    files += [entry for group in libraries.values() for entry in group.values()]
    for entry in files:
        bundle.verify(path, entry["path"], entry["sha256"])
    made_by = ", ".join(f"{name} {version}" for name, version in manifest["producer"].items())
    print(f"{path}: format {manifest['format_version']}, by {made_by}; {len(files)} files, intact")
    print("\nlayers")
    for name, entry in manifest["layers"].items():
        print(f"  {name}: {entry['library']}")
    able = [t for isa in targets.runnable() for t in libraries if t.partition("@")[0] == isa]
    notes = {**dict.fromkeys(able, " (runs here)"), **dict.fromkeys(able[:1], " (used here)")}
    for target, group in libraries.items():
        print(f"\n{target}{notes.get(target, '')}")
        for key, entry in group.items():
            print(f"  {key}: {_origins(entry['variants'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
