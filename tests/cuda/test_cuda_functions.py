"""The device functions' emulation: complete, and strict about what a GPU forbids."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_kernels
from tvm_sepconv.compiler.schedules import cuda_tensor_cores as form


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sepconv_matrices(r, 0, buffer, 8);", "sepconv_matrices: byte 8 .* not aligned to 16"),
        ("sepconv_matrices(r, 0, buffer, 1024);", r"bytes 1024 to 1040 of 1024 of shared memory"),
        ("sepconv_copy_async_16(buffer, 0, y + 1, true);", "the source is not aligned to 16"),
        ("sepconv_copy_async_4(buffer, 0, y, 5);", "5 bytes of 4"),
        ("sepconv_copy_async_4(buffer, 0, y, 4); sepconv_read<half, 2>(f, 0, buffer, 0);",
         "sepconv_at: byte 0 .* waits for an asynchronous copy"),
        ("sepconv_copy_async_4(buffer, 0, y, 4); sepconv_leave<half, 1>(buffer, 2, f, 0);",
         "sepconv_at: byte 2 .* waits for an asynchronous copy"),
        ("sepconv_copy_async_4(buffer, 4 * threadIdx.x, y, 4);", "thread 0 never waits for its"),
        ("if (threadIdx.x < 9) sepconv_matrices(r, 0, buffer, 0);", "divergent warp .* 9 at a b"),
        ("if (threadIdx.x < 9) sepconv_matrices(r, 0, buffer, 0);\n"
         "else sepconv_multiply<half>(f, 0, r, 0, r, 0);", "matrices, 9 at sepconv_mma"),
        ("sepconv_mma<half, 2>(f, r, r);", "sepconv_mma: no such instruction before sm_80"),
        ("sepconv_put_pair<float>(y + 1, 0, 0);", "sepconv_as: .* not aligned to 8"),
        ("sepconv_weights<2>(f, y + 1, 0);", "sepconv_as: .* not aligned to 8"),
    ],
)  # fmt: skip
def test_emulator_reports_what_a_gpu_forbids(body, message, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    source = f"""#include <cuda.h>
    {form.DEVICE_SOURCE.read_text()}
    typedef unsigned char uchar;
    extern "C" __global__ void k(float* y) {{
      extern __shared__ __align__(16) uchar buffer[];
      unsigned r[4] = {{}}; float f[4] = {{}};
      {body}
    }}"""
    kernel = cuda_emulator.Kernel(source, tmp_path, old="before sm_80" in message)
    y = cuda_kernels.framed(np.zeros(8, "float32"))
    with pytest.raises(cuda_emulator.EmulationError, match=message):
        kernel.launch((1, 1, 1), (32, 1, 1), {"y": y}, 0, 1024)


def test_emulator_has_the_machine_and_nothing_else():
    emulated = Path(cuda_emulator.__file__).with_name("cuda_functions.h").read_text()
    _, machine, rest = re.split(
        "#(?:ifndef|endif  //) SEPCONV_EMULATED", form.DEVICE_SOURCE.read_text()
    )
    called = r"\b(sepconv_\w+)\("
    assert set(re.findall(called, machine)) == set(re.findall(called, emulated))
    assert "asm" not in rest
