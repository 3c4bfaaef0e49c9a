"""Compile a layer's kernels and link them into one shared library for one CPU target."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi.libinfo
from tvm.s_tir import Schedule

from tvm_sepconv.compiler import compute
from tvm_sepconv.compiler.link import Toolchain, toolchain
from tvm_sepconv.compiler.schedules.cpu import Tiling, cost
from tvm_sepconv.compiler.schedules.fused import fuse
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import logs
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.runtime import ABI

RUNTIME_SOURCES = (
    "runtime.c", "layer.c", "pool.c", "ffi.c", "bundle.c", "weights.c", "json.c", "sha256.c",
)  # fmt: skip
_FORMATS = {"float16": (16, 0), "bfloat16": (16, 1), "float32": (32, 0), "float64": (64, 0)}


@dataclass(frozen=True)
class Variant:
    """One kernel of a library, and where its tiling is from.

    ``origin`` is "default", "tuned", or "transferred" from the record of a shape at ``distance``,
    with ", modelled" where nothing was measured; ``record_secs`` is what was.
    """

    tiling: Any
    origin: str = "default"
    record_secs: float | None = None
    distance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "decisions": self.tiling.to_dict(),
            "origin": self.origin,
            "record_secs": self.record_secs,
            "distance": self.distance,
        }


def scheduled(
    config: KernelConfig,
    target: CpuTarget,
    tiling: Tiling,
    interior: bool = False,
    ragged: bool = False,
) -> tvm.tirx.PrimFunc:
    """The layer's compute under the target's schedule with the decisions of `tiling`."""
    unit = target.family.UNITS[target.isa]
    lanes = unit.lanes(config.accumulation_dtype)
    spread = unit.spreads(config)
    sch = Schedule(compute.sepconv1d(config, lanes, interior, ragged, spread))
    return fuse(sch, config, unit, tiling, interior).mod["main"]


def compile_kernels(
    functions: dict[str, tvm.tirx.PrimFunc], target: CpuTarget
) -> tvm.runtime.Module:
    """Compile scheduled functions under their names.

    Argument checks are the runtime's, with messages of ours, so TVM's assertions are left out; with
    them goes the only symbol that a kernel would need from a library of TVM's.
    """
    module = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
        return tvm.compile(module, target=target.tvm()).mod


def variants(config: KernelConfig, target: CpuTarget) -> tuple[Variant, ...]:
    """Choose a library's kernels: the long one by the record that applies, the rest by default."""
    match = logs.lookup(config, target.name)
    logs.announce(config, target.name, match)
    if match is None:
        return tuple(Variant(t) for t in target.family.default_tilings(config, target.isa))
    long = Variant(match.tiling, match.origin, match.secs, match.distance or None)
    return with_long(config, target, long)


def with_long(config: KernelConfig, target: CpuTarget, long: Variant) -> tuple[Variant, ...]:
    """Put `long` in the place of the default's longest variant, before all that are shorter."""
    shorter = target.family.default_tilings(config, target.isa)[1:]
    tile = long.tiling.step_tile
    return (long, *(Variant(t) for t in shorter if t.step_tile < tile))


def build_library(
    config: KernelConfig, target: CpuTarget, output: Path, variants: tuple[Variant, ...]
) -> None:
    """Write the shared library of a layer.

    Parameters
    ----------
    output
        The `.so` to write.
    variants
        Its kernels, longest tile first.

    Raises
    ------
    RuntimeError
        If no linker is there, or a command fails.
    """
    forms = [functions(config, target, v.tiling) for v in variants]
    if config.data_format == "channels_first":
        forms.append(functions(config, target, variants[-1].tiling, ragged=True))
    kernels = compile_kernels(dict(itertools.chain(*(f.items() for f in forms))), target)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "kernels.o")
        kernels.write_to_file(str(compiled))
        link_library(config, target, output, variants, [compiled])


def functions(
    config: KernelConfig, target: CpuTarget, tiling: Tiling, ragged: bool = False
) -> dict[str, tvm.tirx.PrimFunc]:
    """The kernels of a variant by name; or the one for less than a vector, in channels_first."""
    if ragged:
        return {"ragged": scheduled(config, target, tiling, ragged=True)}
    found = {f"steps{tiling.step_tile}": scheduled(config, target, tiling)}
    if tiling.in_place:
        found[f"interior{tiling.step_tile}"] = scheduled(config, target, tiling, interior=True)
    return found


def link_library(
    config: KernelConfig,
    target: CpuTarget,
    output: Path,
    variants: tuple[Variant, ...],
    objects: Sequence[Path],
) -> None:
    """Write the shared library of compiled kernels, and of what describes them to the runtime.

    Raises
    ------
    RuntimeError
        If no linker is there, or a command fails.
    """
    tools = toolchain(target.triple)
    with tempfile.TemporaryDirectory() as folder, as_file(_native()) as native:
        source, described = Path(folder, "library.c"), Path(folder, "library.o")
        source.write_text(_description(config, target, variants))
        tools.object_file(source, described, (native, _ffi_include()))
        tools.shared_library([*objects, described], output)


def build_runtime(target: CpuTarget, output: Path) -> None:
    """Write the runtime library that serves every library of the target's architecture."""
    new = output.with_name(f".{output.name}.new")  # a running program may have the old one mapped
    new.write_bytes(_runtime(toolchain(target.triple)))
    new.replace(output)


@functools.cache
def _runtime(tools: Toolchain) -> bytes:
    with tempfile.TemporaryDirectory() as folder, as_file(_native()) as native:
        objects = [Path(folder, source).with_suffix(".o") for source in RUNTIME_SOURCES]
        for source, result in zip(RUNTIME_SOURCES, objects, strict=True):
            tools.object_file(native / source, result, (_ffi_include(),))
        library = Path(folder, "runtime.so")
        tools.shared_library(objects, library)
        return library.read_bytes()


def _native() -> Any:
    return files("tvm_sepconv") / "native"


def _ffi_include() -> Path:
    return Path(tvm_ffi.libinfo.find_include_path())


def _description(config: KernelConfig, target: CpuTarget, variants: tuple[Variant, ...]) -> str:
    """The C file that makes a library describe itself to the runtime."""
    bits, bfloat = _FORMATS[config.dtype]
    lanes = target.lanes(config.accumulation_dtype)
    fields = {
        "abi": ABI,
        "channels": config.channels,
        "filters": config.filters,
        "kernel_size": config.kernel_size,
        "strides": config.strides,
        "dilation_rate": config.dilation_rate,
        "depth_multiplier": config.depth_multiplier,
        "channels_first": int(config.data_format == "channels_first"),
        "use_bias": int(config.use_bias),
        "float_bits": bits,
        "bfloat": bfloat,
        "accumulator_bits": _FORMATS[config.accumulation_dtype][0],
        "lanes": lanes,
        "variant_count": len(variants),
        "variants": "variants",
    }
    kernels, rows = [], []
    for tiling in (v.tiling for v in variants):
        names = [_symbol(f"steps{tiling.step_tile}")]
        if tiling.in_place:
            names.append(_symbol(f"interior{tiling.step_tile}"))
        kernels += names
        functions = ", ".join([*names, "NULL"][:2])
        rows.append(f"{{{tiling.step_tile}, {cost(config, lanes, tiling)!r}, {functions}}}")
    if config.data_format == "channels_first":
        kernels.append(_symbol("ragged"))
        fields["ragged"] = kernels[-1]
    declared = "".join(f"int {k}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);\n" for k in kernels)
    values = ", ".join(f".{name} = {value}" for name, value in fields.items())
    return (
        f'#include "library.h"\n{declared}'
        f"static const tvm_sepconv_variant variants[] = {{{', '.join(rows)}}};\n"
        f"extern const tvm_sepconv_library tvm_sepconv_description;\n"
        f"const tvm_sepconv_library tvm_sepconv_description = {{{values}}};\n"
    )


def _symbol(kernel: str) -> str:
    """The name that TVM gives a kernel in the object file."""
    return f"__tvm_ffi_{kernel}"
