"""CUDA C of a layer's kernel, and how to launch it; needs no GPU, driver or nvcc."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tvm
from tvm.s_tir import Schedule

from tvm_sepconv.compiler import compute
from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.config import KernelConfig

KERNEL_NAME = "sepconv1d_kernel"
MAX_BATCH = 65535  # CUDA's limit of a grid's z

_SOURCE_ONLY = "TVM_COMPILE_FORCE_FALLBACK"
_environment = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """How many threads a kernel takes: ``block`` is (x, y, z), as is what `grid` returns."""

    block: tuple[int, int, int]
    step_tile: int
    filter_tiles: int

    def grid(self, batch: int, out_steps: int) -> tuple[int, int, int]:
        """Return the blocks of one call.

        Raises
        ------
        ValueError
            If there is nothing to compute, which CUDA refuses to launch, or `batch` is over
            `MAX_BATCH`: call the kernel for parts of it.
        """
        if out_steps < 1 or not 1 <= batch <= MAX_BATCH:
            raise ValueError(
                f"One launch takes a `batch` of 1 to {MAX_BATCH} and 1 `out_steps` or more; split "
                f"a larger batch, skip an empty one. Received: batch={batch}, out_steps={out_steps}"
            )
        return (-(-out_steps // self.step_tile), self.filter_tiles, batch)


def launch(config: KernelConfig, tiling: cuda.Tiling | None = None) -> Launch:
    """Return the launch geometry of the kernel that `emit_source` writes for the same arguments."""
    tiling = tiling or cuda.default_tiling(config)
    return Launch(
        block=(cuda.LANES, tiling.warps, 1),
        step_tile=tiling.step_tile,
        filter_tiles=-(-config.filters // tiling.filter_tile),
    )


def emit_source(
    config: KernelConfig, tiling: cuda.Tiling | None = None, arch: str = "sm_80"
) -> str:
    """Write the layer as CUDA C with one kernel, `KERNEL_NAME`.

    Parameters
    ----------
    tiling
        None is `cuda.default_tiling(config)`.
    arch
        What the code generator may assume; nvcc is told the architectures on its own.

    Returns
    -------
    str
        A translation unit. The kernel takes the buffers of ``compute.sepconv1d(config, LANES)`` as
        ``<name>_ptr`` and ``left``, the symbolic sizes and strides as ints, ordered by its own
        signature. Indices are 32-bit: no array may reach 2³¹ elements.

    Raises
    ------
    ValueError
        If a dtype is not float32, or the tiling takes more than `cuda.SHARED_BYTES`.
    """
    # float64: TVM 0.27 writes double constants into CUDA C with 15 decimals, 2⁻⁵¹² as 0.
    if (config.dtype, config.accumulation_dtype) != ("float32", "float32"):
        raise ValueError(
            "The CUDA schedule computes in float32 only; cast input and weights to it. Received: "
            f"dtype={config.dtype}, accumulation_dtype={config.accumulation_dtype}"
        )
    tiling = tiling or cuda.default_tiling(config)
    if (size := cuda.shared_bytes(config, tiling)) > cuda.SHARED_BYTES:
        raise ValueError(
            f"A block may take {cuda.SHARED_BYTES} bytes of shared memory; lower `step_tile` or "
            f"`channel_tile`, or set `stage_input` to False. Received: {size} bytes of {tiling}"
        )
    vectors = tiling.step_tile // cuda.LANES
    schedule = Schedule(compute.sepconv1d(config, cuda.LANES, ragged=vectors))
    function = cuda.fuse(schedule, config, tiling).mod["main"]
    name = KERNEL_NAME.removesuffix("_kernel")  # TVM adds it to the device part
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    # Without the scope TVM asks the present GPU, if any, for its architecture.
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    with _source_only(), target:
        executable = tvm.compile(module, target=target)
    (device,) = executable.mod.imports
    return str(device.inspect_source("cuda"))


@contextmanager
def _source_only() -> Iterator[None]:
    """Keep TVM from looking for nvcc, NVRTC and a driver: the device module stays CUDA C."""
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
