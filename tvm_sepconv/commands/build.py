"""``tvm-sepconv build``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv import bundle, jit, paths, selection, subjects, targets
from tvm_sepconv.commands import build_model, scope
from tvm_sepconv.commands.inspect import origins
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.options import BuildOptions

Build = Callable[[KernelConfig], tuple[Sequence[dict[str, Any]], Path]]
"""Builds a kernel's library; returns its variants and where it is."""

HELP = "compile a model into a bundle, or layers' libraries, with the records of tuning"
DESCRIPTION = (
    "Compile a trained model's separable layers into a bundle to copy to devices, as "
    "`tvm_sepconv.save` does in Python; or the libraries of published layers: without --output "
    "they go to this user's cache, where layers of the same shape find them. For CUDA nvcc is "
    "needed, but no GPU: the target cuda is one library for all architectures."
)
EPILOG = (
    "For example: tvm-sepconv build --keras net.keras --fold --output net.sepconv --target "
    "aarch64-neon,x86_64-avx2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    selection.add_ids(parser, ",".join(scope.DEFAULT_WORKLOADS))
    scope.add_target(parser)
    parser.add_argument("--logs", metavar="DIR", help="look for records here first")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a model's bundle; or write "
        "DIR/<target>/<layer>.so and the runtime library beside them, for C programs and other "
        "machines",
    )  # fmt: skip
    parser.add_argument(
        "--allow-tf32", action="store_true", help="for CUDA: round float32 products to TF32, which "
        "tensor cores multiply several times faster",
    )  # fmt: skip
    parser.add_argument(
        "--fast-math", action="store_true", help="for CUDA: nvcc's quick, less accurate functions",
    )  # fmt: skip
    build_model.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if selection.given(options, build_model.MODELS):
        return build_model.run(options)
    if unfit := selection.given(options, ("fold", "with_c")):
        raise ValueError(f"`{unfit[0]}` needs --keras or --onnx too, a model's file")
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
