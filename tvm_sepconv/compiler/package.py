"""Write a bundle: compile every layer for every target, gather weights and a self-test."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import bundle, reference, runtime, targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import CpuTarget, CudaTarget, of
from tvm_sepconv.config import KernelConfig, SepConvConfig
from tvm_sepconv.options import BuildOptions

Weights = Mapping[str, Any]


def write_bundle(
    layers: Mapping[str, tuple[SepConvConfig, Weights]],
    path: str | Path,
    target_names: Sequence[str] | None = None,
    options: BuildOptions | None = None,
) -> None:
    """Write the bundle of `layers` to the folder `path`, all of it or nothing.

    Parameters
    ----------
    layers
        Configuration and weights (``depthwise_kernel``, ``pointwise_kernel``, ``bias``) by name.
    target_names
        None for every level of this host's family.
    options
        How to compile; the targets stand in `target_names`.

    Raises
    ------
    ValueError
        For an unknown target, or none, and for a layer that CUDA has no kernel for.
    RuntimeError
        If a linker or nvcc is missing.
    FileExistsError
        If `path` exists and is not a bundle.
    """
    path = Path(path).resolve()  # a link to a bundle stays; what it points to is replaced
    if path.exists() and not bundle.is_bundle(path):
        raise FileExistsError(
            f"The `path` argument must name a new folder or a bundle to replace. Received: {path}"
        )
    if not layers:
        raise ValueError("The `layers` argument must have at least one layer. Received: none")
    names = [target_names] if isinstance(target_names, str) else target_names
    chosen = [of(name) for name in (targets.host_family() if names is None else names)]
    chosen = list(dict.fromkeys(chosen))  # "x86" may be one that is named as well
    if not chosen:
        raise ValueError(f"Expected at least one target in `targets`. Received: {target_names}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        work = Path(folder, "bundle")
        work.mkdir()
        _fill(work, layers, chosen, options or BuildOptions())
        _swap(work, path, Path(folder, "replaced"))


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put `new` at `path`, moving what is there to `old`; one of them always ends up there."""
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def _fill(
    work: Path,
    layers: Mapping[str, tuple[SepConvConfig, Weights]],
    chosen: Sequence[CpuTarget | CudaTarget],
    options: BuildOptions,
) -> None:
    kernels = {
        name: config.kernel_config(weights["depthwise_kernel"].shape[1])
        for name, (config, weights) in layers.items()
    }
    manifest = {
        "producer": {
            "tvm_sepconv": importlib.metadata.version("tvm-sepconv"),
            "tvm": importlib.metadata.version("apache-tvm"),
        },
        "layers": {
            name: {"config": config.to_dict(), "library": kernels[name].key}
            for name, (config, _) in layers.items()
        },
        "libraries": _libraries(work, dict.fromkeys(kernels.values()), chosen, options),
        "runtimes": _runtimes(work, [t for t in chosen if isinstance(t, CpuTarget)]),
        "files": _tensors(work, layers),
    }
    (work / bundle.MANIFEST).write_text(bundle.manifest_text(manifest))


def _libraries(
    work: Path,
    kernels: Mapping[KernelConfig, None],
    chosen: Sequence[CpuTarget | CudaTarget],
    options: BuildOptions,
) -> dict[str, dict[str, Any]]:
    jobs = [(target, config) for target in chosen for config in kernels]
    result: dict[str, dict[str, Any]] = {target.name: {} for target in chosen}
    for target, config in jobs:
        on_gpu = isinstance(target, CudaTarget)
        name = f"lib/{target.name}/{config.key}{options.suffix if on_gpu else ''}.so"
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(target, CudaTarget):
            described = _cuda_library(work / name, config, target, options)
        else:
            described = _cpu_library(work / name, config, target)
        result[target.name][config.key] = {
            "path": name,
            "sha256": bundle.sha256(work / name),
            "intermediate_dtype": config.accumulation_dtype,
            **described,
        }
    return result


def _cpu_library(path: Path, config: KernelConfig, target: CpuTarget) -> dict[str, Any]:
    variants = build.variants(config, target)
    build.build_library(config, target, path, variants)
    return {
        "kernel": config.to_dict(),
        "cpu_features": list(targets.FEATURES[target.isa]),
        "packing": {"lanes": target.lanes(config.accumulation_dtype)},
        "variants": [variant.to_dict() for variant in variants],
    }


def _cuda_library(
    path: Path, config: KernelConfig, target: CudaTarget, options: BuildOptions
) -> dict[str, Any]:
    from tvm_sepconv.compiler import cuda, nvcc  # which most bundles do without

    variants = cuda.variants(config, target, options)
    cuda.build_library(config, target, path, variants, options)
    described = cuda.describe(config, target, variants, options)
    return {"cuda": nvcc.find().runtime_version, **described}


def _runtimes(work: Path, chosen: Sequence[CpuTarget]) -> dict[str, dict[str, Any]]:
    result = {}
    for target in {t.arch: t for t in chosen}.values():
        name = f"lib/{target.arch}/{bundle.RUNTIME}"
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        build.build_runtime(target, work / name)
        result[target.arch] = {
            "path": name,
            "sha256": bundle.sha256(work / name),
            "abi": runtime.ABI,
        }
    return result


def _tensors(
    work: Path, layers: Mapping[str, tuple[SepConvConfig, Weights]]
) -> dict[str, dict[str, str]]:
    weights = {
        f"{name}/{key}": np.asarray(value)
        for name, (_, tensors) in layers.items()
        for key, value in tensors.items()
    }
    tests = {}
    for name, (config, tensors) in layers.items():
        tests[f"{name}/input"], tests[f"{name}/output"] = _example(config, tensors)
    result = {}
    for file, content in ((bundle.WEIGHTS, weights), (bundle.SELFTEST, tests)):
        (work / file).write_bytes(bundle.tensor_bytes(content))
        os.chmod(work / file, 0o644)
        result[file] = {"path": file, "sha256": bundle.sha256(work / file)}
    return result


def _example(config: SepConvConfig, weights: Weights) -> tuple[Any, Any]:
    """A small input (two samples, a ragged number of steps) and what the reference makes of it."""
    channels = weights["depthwise_kernel"].shape[1]
    steps = config.effective_kernel + 4 * config.strides + 1
    while config.out_steps(steps) % 2:  # glu halves the steps of a channels_first layer
        steps += 1
    shape = (2, steps, channels) if config.channel_axis == -1 else (2, channels, steps)
    x = np.random.default_rng(0).standard_normal(shape).astype(config.compute_dtype)
    y = reference.separable_conv1d(
        x, weights["depthwise_kernel"], weights["pointwise_kernel"], weights.get("bias"), config
    )
    return x, y.astype(config.compute_dtype)
