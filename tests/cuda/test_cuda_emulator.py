"""The emulator of CUDA C itself: it reports what a GPU forbids, and poisons what is not written."""

from __future__ import annotations

import shutil

import cuda_emulator
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("body", "grid", "threads", "message"),
    [
        ("if (threadIdx.x < 16) __syncthreads();", (1, 1, 1), 32, "divergent barrier"),
        (
            "if (threadIdx.x < 16) __syncthreads();\nelse __syncthreads();",
            (1, 1, 1),
            32,
            "divergent",
        ),
        (
            "__shared__ float a[8]; a[threadIdx.x] = 1; y[0] = a[0];",
            (1, 1, 1),
            9,
            "index 8 outside",
        ),
        ("float a[8]; a[threadIdx.x] = 1; y[0] = a[n];", (1, 1, 1), 9, "index 8 outside"),
        (
            "__shared__ float a[12289]; a[n] = 1; __syncthreads(); y[0] = a[n];",
            (1, 1, 1),
            1,
            "49156 bytes",
        ),
        (
            "__shared__ float4 a[2]; ptx_cp_async_legacy_cg_16_4_4(a, n, y, 0);",
            (1, 1, 1),
            1,
            "cp.async of 16 bytes",
        ),
        ("y[0] = 1;", (1, 1, 1), 1025, "1025 threads"),
        ("y[0] = 1;", (1, 65536, 1), 1, "grid of"),
        ("y[0] = 1;", (0, 1, 1), 1, "grid of"),
    ],
)
def test_emulator_reports_what_a_gpu_forbids(body, grid, threads, message, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    source = f'#include <cuda.h>\nextern "C" __global__ void k(float* y, int n) {{\n{body}\n}}'
    kernel = cuda_emulator.Kernel(source, tmp_path)
    with pytest.raises(cuda_emulator.EmulationError, match=message):
        kernel.launch(grid, (threads, 1, 1), {"y": np.zeros(8, "float32"), "n": 3})


def test_emulated_shared_and_local_memory_start_poisoned(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    source = """#include <cuda.h>
    extern "C" __global__ void k(float* y) {
      __shared__ float a[2];
      if (blockIdx.x == 0) a[0] = a[1] = 1;
      y[blockIdx.x] = a[0];
    }"""
    y = np.zeros(2, "float32")
    cuda_emulator.Kernel(source, tmp_path).launch((2, 1, 1), (1, 1, 1), {"y": y})
    assert y[0] == 1
    assert np.isnan(y[1])
