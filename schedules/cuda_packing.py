"""How every CUDA form wants its weights; plain Python."""

from __future__ import annotations

from tvm_sepconv.config import KernelConfig

LANES = 32
"""Threads of a warp; neighbouring filters of one channel lie together in panels of so many."""

CHANNELS = 16
"""Channels are filled up to a multiple of this: a chunk of them never needs a predicate."""

MAX_STEP_TILE = 256
"""No schedule may tile the steps coarser; the stages before the output are so much longer."""


def padded(extent: int, multiple: int) -> int:
    """`extent` rounded up to a multiple."""
    return -(-extent // multiple) * multiple


def packed_shapes(config: KernelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed weights.

    ``depthwise (kernel, m, channels')``, ``pointwise (filters'/LANES, m*channels', LANES)`` and
    ``bias (filters',)``; primes are rounded up to whole vectors and filled with zeros.
    """
    channels = padded(config.channels, CHANNELS)
    panels = padded(config.filters, LANES) // LANES
    multiplier = config.depth_multiplier
    return {
        "depthwise": (config.kernel_size, multiplier, channels),
        "pointwise": (panels, multiplier * channels, LANES),
        "bias": (panels * LANES,),
    }
