"""x86: instruction sets and default tilings, argued from registers and caches.

For channels_last; `cpu.tilings` derives the variants from these numbers. Accumulators of the
pointwise stage live in registers: rows x vectors of them, beside one vector of weights per column
and the broadcast of one element per row. SSE would have to shuffle for a broadcast, once for every
register tile of filters: there the depthwise stage stores each element as a vector of itself.

======== ========= ===== ===========================================================
ISA      registers lanes register tile (rows x vectors)
======== ========= ===== ===========================================================
SSE4.2   16        4     6 x 2 or 8 x 1: 12 accumulators, 2 weights, 1 spread element, 1 product
AVX2     16        8     6 x 2 or 8 x 1: 12 accumulators, 2 weights, 1 broadcast
AVX-512  32        16    4 x 4, 8 x 3, 8 x 2 or 16 x 1: whichever divides the filters
======== ========= ===== ===========================================================

Of the tiles given, the first whose vectors divide the vectors of filters. Up to 8 channels, or
filters, AVX-512 computes with half vectors (`compute.filled`).
"""

from __future__ import annotations

from tvm_sepconv.compiler.schedules import cpu
from tvm_sepconv.compiler.schedules.cpu import Tiling, VectorUnit, tilings

from tvm_sepconv.config import KernelConfig

UNITS = {
    "x86_64-sse42": VectorUnit(bytes=16, registers=16, broadcasts=False),
    "x86_64-avx2": VectorUnit(bytes=32, registers=16),
    "x86_64-avx512": VectorUnit(bytes=64, registers=32),
}


def default_tilings(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the variants of a library, longest tile first."""
    variants: tuple[Tiling, ...] = tilings(config, UNITS[isa])
    return variants


def candidates(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the design space of a library's long variant, the default first."""
    space: tuple[Tiling, ...] = cpu.candidates(config, UNITS[isa])
    return space
