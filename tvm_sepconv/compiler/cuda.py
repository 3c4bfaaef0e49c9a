"""CUDA libraries: every kernel a layer needs on some architectures, in one shared library.

A library's variants are chosen by architecture first, then by how much work a call has. Neither
building nor writing the source needs a GPU or its driver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler import cuda_library, nvcc
from tvm_sepconv.compiler.build import Variant as Variant
from tvm_sepconv.compiler.nvcc import Resources as Resources
from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import logs
from tvm_sepconv.compiler.tuning.records import TF32
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.options import BuildOptions

Variants = Mapping[str, tuple[Variant, ...]]
"""By architecture, largest tiles first."""


def variants(
    config: KernelConfig, target: CudaTarget, options: BuildOptions
) -> dict[str, tuple[Variant, ...]]:
    """Choose a library's kernels for each architecture: by its records, or the defaults.

    Raises
    ------
    ValueError
        If one of the target's architectures cannot compute the layer.
    """
    found = {}
    for arch in target.archs:
        try:
            tilings = cuda.default_tilings(config, options.allow_tf32, arch)
        except ValueError as error:
            raise ValueError(f"No kernel for {target.name}: {error}") from error
        names = cuda.VARIANTS[: len(tilings)]
        found[arch] = tuple(
            _variant(config, options, arch, name, tiling)
            for name, tiling in zip(names, tilings, strict=True)
        )
    return found


def _variant(
    config: KernelConfig, options: BuildOptions, arch: str, name: str, tiling: Any
) -> Variant:
    name += TF32 * options.allow_tf32
    match = logs.lookup(config, f"cuda-{arch}", variant=name)
    if match is None or cuda.refusal(config, options.allow_tf32, arch, match.tiling):
        return Variant(tiling)
    return Variant(match.tiling, match.origin, match.record.median_secs, match.distance or None)


def describe(
    config: KernelConfig,
    target: CudaTarget,
    variants: Sequence[Variant] | Mapping[str, Sequence[Variant]],
    options: BuildOptions,
) -> dict[str, Any]:
    """What a library says of itself, JSON-able; the version of CUDA's runtime it adds itself."""
    groups = _groups(_by_arch(target, variants))
    forms = {variant.tiling.to_dict()["form"] for group in groups for variant in group}
    return {
        "archs": [arch for archs in groups.values() for arch in archs],
        "ptx": list(_by_arch(target, variants))[-1],
        "host": target.host,
        "packing": cuda.packing(config, options.allow_tf32),
        "kernel": config.to_dict(),
        "options": options.arithmetic,
        "workspace": "two_kernels" in forms,  # what lies between them
        "variants": [
            {"archs": archs, **variant.to_dict()}
            for group, archs in groups.items()
            for variant in group
        ],
    }


def _by_arch(
    target: CudaTarget, variants: Sequence[Variant] | Mapping[str, Sequence[Variant]]
) -> Variants:
    """Variants by architecture, oldest first; the same for all if they are not told apart."""
    if isinstance(variants, Mapping):
        return {arch: tuple(variants[arch]) for arch in target.archs if arch in variants}
    return dict.fromkeys(target.archs, tuple(variants))


def _groups(variants: Variants) -> dict[tuple[Variant, ...], list[str]]:
    """The architectures that have the same variants."""
    groups: dict[tuple[Variant, ...], list[str]] = {}
    for arch, group in variants.items():
        groups.setdefault(group, []).append(arch)
    return groups


def source(
    config: KernelConfig,
    target: CudaTarget,
    variants: Sequence[Variant] | Mapping[str, Sequence[Variant]],
    options: BuildOptions,
) -> str:
    """Write a library's CUDA C++, one translation unit that needs CUDA's and tvm-ffi's headers.

    Parameters
    ----------
    variants
        The kernels, largest tiles first, by architecture or the same for all of the target's.
    """
    description = json.dumps(describe(config, target, variants, options))
    tilings = {
        arch: tuple(variant.tiling for variant in group)
        for arch, group in _by_arch(target, variants).items()
    }
    return cuda_library.assemble(config, target, tilings, options, description)


def build_library(
    config: KernelConfig,
    target: CudaTarget,
    output: Path,
    variants: Sequence[Variant] | Mapping[str, Sequence[Variant]],
    options: BuildOptions,
) -> dict[str, Resources]:
    """Write the shared library of a layer: machine code for all architectures, PTX of the newest.

    Parameters
    ----------
    output
        The `.so` to write.
    variants
        See `source`.

    Returns
    -------
    dict
        What each kernel takes, by "<arch>/<kernel>".

    Raises
    ------
    RuntimeError
        If nvcc or what it needs is missing, or it fails.
    """
    compiler = nvcc.find()  # before the work
    archs = tuple(_by_arch(target, variants))
    text = source(config, target, variants, options)
    return compiler.library(text, output, archs, target.host, options.fast_math)
