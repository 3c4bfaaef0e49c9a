"""The machine code of the tensor-core form: its instructions, its limits, no spills."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from cuda_kernels import ALIGNMENTS, LAYOUTS, NO_SPILLS, emit, pairwise, usage
from tvm_sepconv.compiler.schedules import cuda_tensor_cores as form

from tvm_sepconv.config import KernelConfig

INSTRUCTIONS = {
    "float16": "m16n8k16.row.col.f32.f16.f16.f32",
    "bfloat16": "m16n8k16.row.col.f32.bf16.bf16.f32",
    "float32": "m16n8k8.row.col.f32.tf32.tf32.f32",
}
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227}


def default_compiled(
    dtype: str, layout: str, moves: str, arch: str, folder: Path
) -> tuple[form.Tiling, str]:
    """The default for much work, compiled without spills and within the limits, and its PTX."""
    config = KernelConfig(
        channels=256, filters=256, kernel_size=33, activation="relu", dtype=dtype,
        data_format=layout,
    )  # fmt: skip
    tiling = form.default_tilings(config, True, arch)[0]
    assert form.shared_bytes(config, tiling) <= SHARED_KIB[arch] * 1024
    (source,) = emit(config, tiling, moves == "aligned").values()
    used = usage(source, arch, folder)
    assert used.spills == NO_SPILLS
    assert used.registers <= 128, "two blocks no longer fit a multiprocessor"
    assert "ldmatrix.sync.aligned.m8n8.x4.shared" in used.ptx
    return tiling, used.ptx


@pytest.mark.parametrize(
    ("dtype", "layout", "moves", "arch"),
    [
        (*case, arch)
        for case, arch in zip(
            pairwise(list(INSTRUCTIONS), LAYOUTS, ALIGNMENTS),
            itertools.cycle(["sm_80", "sm_86", "sm_90"]),
        )
    ],
)
def test_default_is_tensor_core_code_without_spills(dtype, layout, moves, arch, tmp_path):
    tiling, ptx = default_compiled(dtype, layout, moves, arch, tmp_path)
    # Of a warp's 32 × 64 outputs or 64 × 32, 16 instructions for each 32 bytes of channels.
    size = 4 if dtype == "float32" else 2
    instructions = 16 * tiling.channel_tile * size // 32
    assert ptx.count("mma.sync.aligned") == instructions
    assert ptx.count(f"mma.sync.aligned.{INSTRUCTIONS[dtype]}") == instructions
    assert ("cvt.rna.tf32.f32" in ptx) == (dtype == "float32")
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize(
    ("dtype", "layout", "moves"),
    [("float16", "channels_last", "aligned"), ("float16", "channels_first", "scalar"),
     ("bfloat16", "channels_first", "aligned")],
)  # fmt: skip
def test_default_without_spills_where_copies_are_synchronous(dtype, layout, moves, tmp_path):
    tiling, ptx = default_compiled(dtype, layout, moves, "sm_75", tmp_path)
    pairs = 16 * tiling.channel_tile * 2 // 32 if dtype == "float16" else 0
    assert ptx.count("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32") == 2 * pairs
    assert ptx.count("mma.sync") == 2 * pairs
    assert ("shfl.sync.idx" in ptx) == (dtype == "bfloat16")
    assert "cp.async" not in ptx
