"""Scheduled CUDA kernels as CUDA C, on the emulator and through nvcc; arrays that show errors."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_counts
import cuda_emulator
import numpy as np
import pytest
import tvm
from tvm_sepconv.compiler.schedules import (
    cuda,
    cuda_packing,
    cuda_tensor_cores,
    cuda_two_kernels,
)

from tvm_sepconv import reference
from tvm_sepconv.config import KernelConfig, SepConvConfig

LAYOUTS = ("channels_last", "channels_first")
ALIGNMENTS = ("aligned", "scalar")


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows in which every two levels of every two factors meet, chosen greedily."""
    rows = list(itertools.product(*factors))
    pairs = [set(itertools.combinations(enumerate(row), 2)) for row in rows]
    missing: set[Any] = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.append(rows[best])
        missing -= pairs[best]
    return chosen


def emit(config: KernelConfig, tiling: cuda.Tiling, aligned: bool) -> dict[str, str]:
    """The form's kernels, each as a translation unit of its own, as in a library."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
    options = {"tirx.use_async_copy": True}
    sources = {}
    for name, function in cuda.functions(config, tiling, aligned).items():
        module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
            with target, tvm.transform.PassContext(opt_level=3, config=options):
                executable = tvm.compile(module, target=target)
        (device,) = executable.mod.imports
        text = cuda.without_branches(str(device.inspect_source("cuda")))
        functions = cuda_tensor_cores.DEVICE_SOURCE.read_text() if "sepconv_" in text else ""
        sources[name] = functions + cuda.launch_bounds(text, f"{name}_kernel", tiling)
    return sources


@dataclass(frozen=True)
class Usage:
    """What nvcc says of a kernel, and the PTX it makes of it first."""

    registers: int
    spills: str
    ptx: str


NO_SPILLS = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def usage(source: str, arch: str, folder: Path) -> Usage:
    """Compile for an architecture; skips without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or subprocess.run([nvcc, "--version"], capture_output=True).returncode:
        pytest.skip("needs a working nvcc")
    (folder / "kernel.cu").write_text(source)
    command = [nvcc, "-std=c++17", f"-arch={arch}", "-cubin", "-keep", "-Xptxas=-v", "kernel.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cuda_counts.add("compiled")
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    (spills,) = re.findall(r"\d+ bytes stack frame.*", done.stderr)
    return Usage(int(registers), spills, (folder / "kernel.ptx").read_text())


def framed(array: np.ndarray) -> np.ndarray:
    """The same values between NaNs, which whoever reads past an end drags into the answer."""
    frame = np.full(array.size + 4096, np.nan, array.dtype)
    skip = 2048 - frame.ctypes.data % 256 // array.itemsize
    frame[skip : skip + array.size] = array.ravel()
    return frame[skip : skip + array.size].reshape(array.shape)


def inset(shape: tuple[int, ...], aligned: bool) -> tuple[np.ndarray, np.ndarray]:
    """An array of NaN and a view of `shape` in it, 16-byte aligned in all rows or in none."""
    row = -(-shape[2] // 4) * 4 + 4 if aligned else shape[2] // 4 * 4 + 7
    base = framed(np.full((shape[0] + 1, shape[1] + 2, row), np.nan, "float32"))
    start = 4 if aligned else 1
    return base, base[1:, 1:-1, start : start + shape[2]]


def pack(
    layer: SepConvConfig, depthwise: np.ndarray, pointwise: np.ndarray, bias: np.ndarray | None
) -> dict[str, np.ndarray]:
    """From Keras's layout to the kernel's, element by element."""
    _, channels, multiplier = depthwise.shape
    filters, lanes = pointwise.shape[2], cuda_packing.LANES
    shapes = cuda_packing.packed_shapes(layer.kernel_config(channels))
    arrays = {f"{name}_kernel_ptr": np.zeros(shapes[name], "float32") for name in shapes}
    arrays["bias_ptr"] = arrays.pop("bias_kernel_ptr")
    lined = shapes["depthwise"][2]
    for c, m in np.ndindex(channels, multiplier):
        arrays["depthwise_kernel_ptr"][:, m, c] = depthwise[:, c, m]
        row = pointwise[0, c * multiplier + m]
        for f in range(filters):
            arrays["pointwise_kernel_ptr"][f // lanes, m * lined + c, f % lanes] = row[f]
    arrays["bias_ptr"][:filters] = 0 if bias is None else bias
    return {name: framed(array) for name, array in arrays.items()}


class Layer:
    """A layer's kernels on the emulator, its weights, and its reference."""

    def __init__(
        self, layer: SepConvConfig, channels: int, tiling: cuda.Tiling, aligned: bool, folder: Path,
        sources: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if shutil.which("g++") is None:
            pytest.skip("the CUDA emulator needs g++")
        self.layer, self.channels, self.tiling, self.aligned = layer, channels, tiling, aligned
        self.config = layer.kernel_config(channels)
        self.time = 2 if layer.data_format == "channels_first" else 1
        self.rng = np.random.default_rng(0)
        depthwise = self._normal(*layer.depthwise_shape(channels))
        pointwise = self._normal(*layer.pointwise_shape(channels))
        bias = self._normal(layer.filters) if layer.use_bias else None
        self.weights = depthwise, pointwise, bias
        self.packed = pack(layer, *self.weights)
        self.kernels = []
        for name, source in (sources or emit(self.config, tiling, aligned)).items():
            (folder / name).mkdir(parents=True)
            self.kernels.append(cuda_emulator.Kernel(source, folder / name))

    def _normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype("float32")

    def input(self, batch: int, steps: int) -> np.ndarray:
        shape = [batch, self.channels, self.channels]
        shape[self.time] = steps
        return self._normal(*shape)

    def __call__(self, x: np.ndarray, left: int, out_steps: int, order: int) -> np.ndarray:
        """Run the kernels on arrays that are not compact, and aligned or not as the variant is."""
        _, inside = inset(x.shape, self.aligned)
        inside[...] = x
        shape = [len(x), self.layer.filters, self.layer.filters]
        shape[self.time] = out_steps
        around, output = inset(tuple(shape), self.aligned)
        (x_batch, x_row, _), (y_batch, y_row, _) = (
            [stride // x.itemsize for stride in view.strides] for view in (inside, output)
        )
        sizes = dict(
            batch=len(x), steps=x.shape[self.time], out_steps=out_steps, left=left,
            x_batch=x_batch, x_row=x_row, y_batch=y_batch, y_row=y_row,
        )  # fmt: skip
        arguments = {**self.packed, **sizes, "x_ptr": inside, "output_ptr": output}
        shared = cuda.shared_bytes(self.config, self.tiling)
        rows = self.packed["pointwise_kernel_ptr"].shape[1]
        between = np.full((len(x), rows, out_steps), np.nan, "float32")
        arguments["intermediate_ptr"] = framed(between)
        for kernel, (grid, warps) in zip(self.kernels, self._grids(x, out_steps), strict=True):
            block = (cuda_packing.LANES, warps, 1)
            kernel.launch(grid, block, arguments, order, shared)
        answer = output.copy()
        output[...] = np.nan
        assert np.isnan(around).all(), "wrote outside the output"
        return answer

    def _grids(self, x: np.ndarray, out_steps: int) -> list[tuple[tuple[int, int, int], int]]:
        tiling = self.tiling
        tiles = -(-out_steps // tiling.step_tile)
        filters = -(-self.layer.filters // tiling.filter_tile)
        grids = [((tiles, filters, len(x)), tiling.warps)]
        if len(self.kernels) == 2:
            channels = cuda_two_kernels.depthwise_channels(self.config)
            groups = self.packed["pointwise_kernel_ptr"].shape[1] // channels
            warps = tiling.step_tile // tiling.run * channels // cuda_packing.LANES
            grids.insert(0, ((tiles, groups, len(x)), warps))
        return grids

    def check(self, answer: np.ndarray, x: np.ndarray, layer: SepConvConfig | None = None) -> None:
        expected = reference.separable_conv1d(x, *self.weights, layer or self.layer)
        terms = self.layer.kernel_size + self.channels * self.layer.depth_multiplier
        scale = reference.magnitude(x, *self.weights, layer or self.layer)
        eps = np.finfo("float32").eps
        # No activation here is steeper than 1.13 (gelu), nor further off than 4 ulp of its own.
        allowed = 1.13 * 4 * eps * np.sqrt(terms) * scale + 4 * eps * np.abs(expected)
        within = tuple(map(slice, answer.shape))  # fewer steps than the input has were asked for
        assert answer.size
        assert (np.abs(answer - expected[within]) <= allowed[within]).all()
