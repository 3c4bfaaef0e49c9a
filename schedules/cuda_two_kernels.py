"""The layer as two kernels on ordinary cores, with the depthwise results in memory between them.

For comparison, and for layers whose fused form would repeat the depthwise stage in many blocks (few
steps, many filters, long taps). It moves 8 bytes an element of the intermediate more: 32 x 1024
steps of 256 channels are 67 MB, 16 us on an H200 where the fused kernel's multiply-adds take 72.
The matrix product is that of `cuda_cores`, and so are the decisions; ``step_tile`` and ``run`` also
tile the first kernel. What goes between lies with the steps contiguous, as the second kernel wants
its operand.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tvm_sepconv.compiler.schedules import cuda_cores
from tvm_sepconv.compiler.schedules.cuda_packing import CHANNELS, padded

from tvm_sepconv.config import KernelConfig

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

FORM = "two_kernels"


class Tiling(cuda_cores.Tiling):  # type: ignore[misc]  # mypy cannot follow package-dir
    """The decisions of both kernels: see `cuda_cores.Tiling`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"form": FORM, **asdict(self)}


def shared_bytes(config: KernelConfig, tiling: Tiling) -> int:
    """Return the shared memory that a block of either kernel takes at most, in bytes."""
    return int(cuda_cores.shared_bytes(config, tiling))


def refusal(config: KernelConfig, allow_tf32: bool, arch: str, tiling: Tiling) -> str | None:
    """Return why `tiling` cannot serve the layer on `arch`, None where it can."""
    if not tiling.stage_input:
        return "the two kernels read their input from shared memory"
    reason: str | None = cuda_cores.refusal(config, allow_tf32, arch, tiling)
    return reason


def depthwise_channels(config: KernelConfig) -> int:
    """Channels of a block of the first kernel."""
    return 32 if padded(config.channels, CHANNELS) % 32 == 0 else 16


def default_tilings(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the fused form's defaults as two kernels; its errors."""
    return candidates(config, allow_tf32, arch)[:2]


def candidates(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the best of the fused form's candidates that serve as two kernels."""
    tilings = (Tiling(**asdict(t)) for t in cuda_cores.candidates(config, allow_tf32, arch))
    return tuple(t for t in tilings if refusal(config, allow_tf32, arch, t) is None)[:8]


def functions(config: KernelConfig, tiling: Tiling, aligned: bool) -> dict[str, PrimFunc]:
    """Return the kernels in the order of their launches: ``depthwise`` and ``pointwise``."""
    # TVM is not needed to read records and to choose.
    from tvm_sepconv.compiler.schedules import cuda_two_kernels_fuse

    kernels: dict[str, PrimFunc] = cuda_two_kernels_fuse.schedule(config, tiling, aligned)
    return kernels
