"""The source of a CUDA library: kernels and their launches from TVM, and our own host code.

TVM is asked for CUDA C++ alone, kernels and the functions that launch them, and never runs nvcc
itself, which it would with fast math. What switches that is global to the process: it is set for
as long as TVM writes, one thread at a time.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.backend.cuda import export_cuda_host

from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.compiler.schedules.cuda_packing import packed_shapes
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.options import BuildOptions

INTERMEDIATE = "intermediate"  # what one kernel of a variant leaves to the next
_SOURCE_ONLY = "TVM_COMPILE_FORCE_FALLBACK"
_environment = threading.Lock()
_CODES = {"float16": "{kDLFloat, 16, 1}", "bfloat16": "{kDLBfloat, 16, 1}",
          "float32": "{kDLFloat, 32, 1}"}  # fmt: skip
_ARGUMENTS = {
    "x": "c.x",
    "depthwise_kernel": "c.depthwise",
    "pointwise_kernel": "c.pointwise",
    "bias": "c.bias",
    "left": "c.left",
    "output": "c.out",
    INTERMEDIATE: INTERMEDIATE,
}


@dataclass(frozen=True)
class Form:
    """The kernels of one tiling for aligned or for any tensors, called one after another."""

    name: str
    functions: Mapping[str, tirx.PrimFunc]  # by the names they get


def assemble(
    config: KernelConfig,
    target: CudaTarget,
    tilings: Mapping[str, Sequence[Any]],
    options: BuildOptions,
    description: str,
) -> str:
    """Write the translation unit of a library.

    Parameters
    ----------
    tilings
        By architecture, oldest first: the tilings of its variants, largest first.
    description
        The JSON object that the library says of itself, but for CUDA's version.
    """
    distinct = list(dict.fromkeys(tiling for group in tilings.values() for tiling in group))
    alignments = (False, True) if cuda.can_align(config) else (False,)
    forms = {
        (tiling, aligned): _form(config, tiling, aligned, f"t{number}{'a' if aligned else 'p'}")
        for number, tiling in enumerate(distinct)
        for aligned in alignments
    }
    kernels = _emit(target, forms.values())
    for (tiling, _), form in forms.items():
        for name in form.functions:
            kernels = cuda.launch_bounds(kernels, f"{name}_kernel", tiling)
        archs = [arch for arch, group in tilings.items() if tiling in group]
        if len(archs) < len(tilings):
            kernels = _only_for(kernels, form, archs)
    device = files("tvm_sepconv") / "compiler" / "cuda_functions.cuh"
    host = files("tvm_sepconv") / "native" / "cuda_host.cuh"
    return "\n".join(
        [
            device.read_text() if "sepconv_" in kernels else "",
            kernels,
            host.read_text(),
            *(_launch(config, form) for form in forms.values()),
            _rows(config, tilings, forms, kernels),
            _layer(config, options, description),
        ]
    )


def _form(config: KernelConfig, tiling: Any, aligned: bool, name: str) -> Form:
    functions = cuda.functions(config, tiling, aligned)
    return Form(name, {f"{name}_{key}": function for key, function in functions.items()})


def _emit(target: CudaTarget, forms: Iterable[Form]) -> str:
    """TVM's CUDA C++ of all functions: the kernels, then what launches them."""
    functions = {
        name: function.with_attr("global_symbol", name)
        for form in forms
        for name, function in form.functions.items()
    }
    # Assertions would repeat, call for call, what our own host code has checked before.
    config = {"tirx.disable_assert": True, "tirx.use_async_copy": True}
    made = target.tvm()
    # Without the scope of the target TVM asks the present GPU, if any, for its architecture.
    with _source_only(), made, tvm.transform.PassContext(opt_level=3, config=config):
        executable = tvm.compile(tvm.IRModule(functions), target=made)
        return str(cuda.without_branches(str(export_cuda_host(executable.mod))))


@contextmanager
def _source_only() -> Iterator[None]:
    """Keep TVM from looking for nvcc, NVRTC and a driver: the device module stays CUDA C++."""
    with _environment:
        before = os.environ.get(_SOURCE_ONLY)
        os.environ[_SOURCE_ONLY] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_SOURCE_ONLY]
            else:
                os.environ[_SOURCE_ONLY] = before


def _only_for(kernels: str, form: Form, archs: Sequence[str]) -> str:
    """Leave the kernels of a form empty for all but some architectures, which may not know them."""
    tests = " || ".join(f"__CUDA_ARCH__ == {arch.removeprefix('sm_')}0" for arch in archs)
    pattern = re.compile(
        rf'(extern "C" __global__ void [^;{{]*?\b{form.name}_\w+\([^;{{]*\) \{{\n)(.*?\n)(\}}\n)',
        re.DOTALL,
    )
    return pattern.sub(
        lambda found: (
            f"{found[1]}#if !defined(__CUDA_ARCH__) || {tests}\n{found[2]}#endif\n{found[3]}"
        ),
        kernels,
    )


def _launch(config: KernelConfig, form: Form) -> str:
    """The C++ function that calls a form's functions, and the one that says what lies between."""
    shape, dtype = _intermediate(config, form)
    lines = [f"static void {form.name}(const sepconv::Call& c) {{"]
    if dtype:
        axes = ", ".join(_axis(config, axis, "c.out.shape[0]", None) for axis in shape)
        lines += [
            f"  int64_t shape[] = {{{axes}}};",
            f"  DLTensor {INTERMEDIATE} = {{c.workspace, c.x.device, {len(shape)}, "
            f"{_CODES[dtype]}, shape, nullptr, 0}};",
        ]
    for name, function in form.functions.items():
        arguments = [_ARGUMENTS[_name(parameter)] for parameter in function.params]
        listed = ", ".join(f"sepconv::argument({argument})" for argument in arguments)
        lines.append(f"  TVMFFIAny {name}[] = {{{listed}}};")
        lines.append(f"  sepconv::launch(__tvm_ffi_{name}, {name}, {len(arguments)});")
    sizes = [_axis(config, axis, "batch", "out_steps") for axis in shape]
    total = " * ".join([*sizes, str(int(tvm.DataType(dtype).bits) // 8)]) if dtype else "0"
    lines += [
        "}",
        f"static int64_t {form.name}_bytes(int64_t batch, int64_t out_steps) {{ return {total}; }}",
    ]
    return "\n".join(lines)


def _name(parameter: tirx.Var) -> str:
    return str(parameter.name).removesuffix("_handle")


def _intermediate(config: KernelConfig, form: Form) -> tuple[Sequence[Any], str]:
    """Shape and dtype of what a form's functions leave to each other; () and "" if nothing."""
    for function in form.functions.values():
        for parameter in function.params:
            if _name(parameter) == INTERMEDIATE:
                return list(parameter.shape), str(parameter.dtype)
    return (), ""


def _axis(config: KernelConfig, axis: Any, batch: str, out_steps: str | None) -> str:
    """An axis of the intermediate in C++: a constant or a symbolic size of the call."""
    if isinstance(axis, tirx.IntImm):
        return str(int(axis))
    time = 1 if config.data_format == "channels_last" else 2
    return {"batch": batch, "out_steps": out_steps or f"c.out.shape[{time}]"}[str(axis.name)]


def _rows(
    config: KernelConfig,
    tilings: Mapping[str, Sequence[Any]],
    forms: Mapping[tuple[Any, bool], Form],
    kernels: str,
) -> str:
    """Each architecture's variants and kernels, as the host code's tables."""
    defined = re.findall(
        r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\([^;{]*\) \{\n", kernels
    )
    lines, rows = [], []
    for arch, group in tilings.items():
        number = arch.removeprefix("sm_")
        variants, names = [], []
        for tiling in group:
            plain = forms[tiling, False]
            aligned = forms.get((tiling, True), plain)
            variants.append(
                f"{{{tiling.step_tile}, {_filter_blocks(plain)}, {plain.name}, {aligned.name}, "
                f"{plain.name}_bytes}}"
            )
            names += [k for form in {plain.name: plain, aligned.name: aligned} for k in defined
                      if k.startswith(f"{form}_")]  # fmt: skip
        listed = ", ".join(f"reinterpret_cast<const void*>(&{name})" for name in names)
        lines += [
            f"static const sepconv::Variant variants_{number}[] = {{{', '.join(variants)}}};",
            f"static const void* const kernels_{number}[] = {{{listed}}};",
        ]
        rows.append(
            f"{{{number}, variants_{number}, {len(group)}, kernels_{number}, {len(names)}}}"
        )
    lines += [
        f"static const sepconv::Row all_rows[] = {{{', '.join(rows)}}};",
        f"sepconv::Rows sepconv::rows() {{ return {{all_rows, {len(rows)}}}; }}",
    ]
    return "\n".join(lines)


def _filter_blocks(form: Form) -> int:
    """How many blocks share the filters of a step tile: the last function's grid along y."""
    *_, function = form.functions.values()
    extents = [1]

    def visit(loop: tirx.For) -> None:
        binding = loop.thread_binding
        if binding is not None and binding.thread_tag == "blockIdx.y":
            extents.append(int(loop.extent))

    tvm_ffi.structural_walk(function, (tirx.For, visit))
    return max(extents)


def _layer(config: KernelConfig, options: BuildOptions, description: str) -> str:
    """The layer's sizes, as the host code checks arguments against them."""
    packing, shapes = cuda.packing(config, options.allow_tf32), packed_shapes(config)
    sizes = {name: ", ".join(map(str, shape)) for name, shape in shapes.items()}
    flags = (config.data_format == "channels_first", config.use_bias, cuda.can_align(config))
    booleans = ", ".join(str(flag).lower() for flag in flags)
    return (
        "#define SEPCONV_TEXT(number) #number\n"
        "#define SEPCONV_NUMBER(number) SEPCONV_TEXT(number)\n"
        "const sepconv::Layer& sepconv::layer() {\n"
        "  static const Layer made = {\n"
        f'      "{{\\"cuda\\": " SEPCONV_NUMBER(CUDART_VERSION) R"json(, {description[1:]})json",\n'
        f"      {_CODES[config.dtype]}, {_CODES[packing['dtype']]},\n"
        f"      {config.channels}, {config.filters}, {config.strides}, {config.effective_kernel},\n"
        f"      {{{sizes['depthwise']}}}, {{{sizes['pointwise']}}}, {{{sizes['bias']}}},\n"
        f"      {booleans}}};\n"
        "  return made;\n}\n"
    )
