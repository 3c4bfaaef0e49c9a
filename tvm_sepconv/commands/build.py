"""``tvm-sepconv build``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv import bundle, jit, paths, selection, subjects, targets
from tvm_sepconv.commands import scope
from tvm_sepconv.commands.inspect import origins
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.options import BuildOptions

Build = Callable[[KernelConfig], tuple[Sequence[dict[str, Any]], Path]]
"""Builds a kernel's library; returns its variants and where it is."""

HELP = "compile layers' libraries, with the records that tuning made"
DESCRIPTION = (
    "Compile the libraries of layers. Without --output they go to this user's cache, where layers "
    "of the same shape find them. To save a layer with its weights use Python: `layer.save(path)`, "
    "or `tvm_sepconv.save(tvm_sepconv.from_keras(file), path)`. For CUDA nvcc is needed, but no "
    "GPU: the target cuda is one library for all architectures."
)
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    selection.add_ids(parser, ",".join(scope.DEFAULT_WORKLOADS))
    scope.add_target(parser)
    parser.add_argument("--logs", metavar="DIR", help="look for records here first")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write DIR/<target>/<layer>.so and the runtime "
        "library beside them instead, for C programs and other machines",
    )  # fmt: skip
    parser.add_argument(
        "--allow-tf32", action="store_true", help="for CUDA: round float32 products to TF32, which "
        "tensor cores multiply several times faster",
    )  # fmt: skip
    parser.add_argument(
        "--fast-math", action="store_true", help="for CUDA: nvcc's quick, less accurate functions",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    target = scope.target(options.target)
    on_gpu = bundle.is_cuda(target)
    here = on_gpu or target.partition("@")[0] in targets.runnable()
    if options.output is None and not here:
        raise ValueError(f"This machine cannot run {target}: name a folder for it with --output")
    named = selection.ids(options) or scope.DEFAULT_WORKLOADS
    kernels = scope.kernels(subjects.of_table(named, selection.FORMATS[0]))
    scope.read_logs(options.logs)
    folder = options.output and options.output / target
    if folder is not None:
        paths.new_folder("--output", options.output)
        folder.mkdir(parents=True, exist_ok=True)
    arithmetic = BuildOptions(allow_tf32=options.allow_tf32, fast_math=options.fast_math)
    build = _for_gpus(target, arithmetic, folder) if on_gpu else _for_cpus(target, folder)
    for subject, config in kernels:
        variants, path = build(config)
        print(f"{subject.id}: {origins(variants)}; {path}", flush=True)
    return 0


def _for_cpus(target: str, folder: Path | None) -> Build:
    build = jit.compiler("tvm_sepconv.compiler.build")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(target)
    if folder is not None:
        build.build_runtime(chosen, folder / bundle.RUNTIME)

    def one(config: KernelConfig) -> tuple[Sequence[dict[str, Any]], Path]:
        variants = build.variants(config, chosen)
        if folder is None:
            path, _ = jit.library(config, target)
        else:
            path = folder / f"{config.key}.so"
            build.build_library(config, chosen, path, variants)
        return [variant.to_dict() for variant in variants], path

    return one


def _for_gpus(target: str, options: BuildOptions, folder: Path | None) -> Build:
    cuda = jit.compiler("tvm_sepconv.compiler.cuda")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cuda(target)

    def one(config: KernelConfig) -> tuple[Sequence[dict[str, Any]], Path]:
        variants = cuda.variants(config, chosen, options)
        if folder is None:
            path = jit.cuda_library_for(config, target, options)
        else:
            path = folder / f"{config.key}{options.suffix}.so"
            cuda.build_library(config, chosen, path, variants, options)
        return cuda.describe(config, chosen, variants, options)["variants"], path

    return one
