"""ARM: NEON's units and default tilings, in their first, simple form.

The fused CPU schedule as it is, with four float32 lanes. AArch64's 32 registers take the
register tiles of AVX-512, Armv7's 16 those of AVX2 (see x86.py). Lane-wise multiply-add, in-order
cores and half precision are not considered yet.
"""

from __future__ import annotations

from tvm_sepconv.compiler.schedules import cpu
from tvm_sepconv.compiler.schedules.cpu import Tiling, VectorUnit, tilings

from tvm_sepconv.config import KernelConfig

UNITS = {
    "armv7-neon": VectorUnit(bytes=16, registers=16),
    "aarch64-neon": VectorUnit(bytes=16, registers=32),
    "aarch64-fp16": VectorUnit(bytes=16, registers=32),
}


def default_tilings(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the variants of a library, longest tile first."""
    variants: tuple[Tiling, ...] = tilings(config, UNITS[isa])
    return variants


def candidates(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the design space of a library's long variant, the default first."""
    space: tuple[Tiling, ...] = cpu.candidates(config, UNITS[isa])
    return space
