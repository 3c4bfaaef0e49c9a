"""``tvm-sepconv build``."""

from __future__ import annotations

import argparse
from pathlib import Path

from tvm_sepconv import bundle, jit, selection, subjects, targets
from tvm_sepconv.commands import scope
from tvm_sepconv.commands.inspect import origins

HELP = "compile layers' libraries, with the records that tuning made"
DESCRIPTION = (
    "Compile the libraries of layers. Without --output they go to this user's cache, where layers "
    "of the same shape find them. To save a layer with its weights use Python: `layer.save(path)`, "
    "or `tvm_sepconv.save(tvm_sepconv.from_keras(file), path)`."
)
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    selection.add_ids(parser, ",".join(scope.DEFAULT_WORKLOADS))
    scope.add_arguments(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write DIR/<target>/<layer>.so and the runtime "
        "library beside them instead, for C programs and other machines",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    target = scope.target(options.target)
    if target.startswith("cuda"):
        raise ValueError(
            f"Building for CUDA {scope.NO_CUDA}. There are {', '.join(targets.FEATURES)}"
        )
    if options.output is None and target.partition("@")[0] not in targets.runnable():
        raise ValueError(f"This machine cannot run {target}: name a folder for it with --output")
    named = selection.ids(options) or scope.DEFAULT_WORKLOADS
    kernels = scope.kernels(subjects.of_table(named, selection.FORMATS[0]))
    scope.use_logs(options.logs)
    build = jit.compiler("tvm_sepconv.compiler.build")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(target)
    if options.output is not None:
        (options.output / target).mkdir(parents=True, exist_ok=True)
        build.build_runtime(chosen, options.output / target / bundle.RUNTIME)
    for subject, config in kernels:
        variants = build.variants(config, chosen)
        if options.output is None:
            path, _ = jit.library(config, target)
        else:
            path = options.output / target / f"{config.key}.so"
            build.build_library(config, chosen, path, variants)
        print(f"{subject.id}: {origins([v.to_dict() for v in variants])}; {path}", flush=True)
    return 0
