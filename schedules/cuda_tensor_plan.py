"""The tensor-core form in numbers: the decisions of its tiling, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from tvm_sepconv.compiler.schedules.cuda_packing import CHANNELS, LANES, MAX_STEP_TILE, padded

from tvm_sepconv.config import KernelConfig


@dataclass(frozen=True)
class Tiling:
    """The decisions of the tensor-core form, by name; records store exactly these.

    Parameters
    ----------
    step_tile, filter_tile
        A block's outputs; each warp's part of both is a multiple of 16, and ``filter_tile`` one
        of `LANES`.
    channel_tile
        Channels that pass through shared memory at a time, a multiple of `CHANNELS`.
    step_warps, filter_warps
        How the warps of a block share its outputs.
    run
        Steps of one thread's window in the depthwise stage, 1, 2, 4, 8 or 16.
    buffers
        2 copies a chunk while the one before is computed, 1 before it is.
    stage_input
        Whether the input rows go through shared memory, or every tap reads them where they are.

    Raises
    ------
    ValueError
        If a number breaks its rule.
    """

    step_tile: int
    filter_tile: int
    channel_tile: int
    step_warps: int
    filter_warps: int
    run: int = 8
    buffers: int = 2
    stage_input: bool = True

    def __post_init__(self) -> None:
        steps, filters = 16 * self.step_warps, 16 * self.filter_warps
        for name, ok, rule in (
            ("step_warps", self.step_warps in (1, 2, 4, 8), "1, 2, 4 or 8"),
            ("filter_warps", self.filter_warps in (1, 2, 4, 8, 16) and self.warps <= 16,
             "1, 2, 4, 8 or 16, and at most 16 warps in all"),
            ("step_tile", self.step_tile in range(steps, MAX_STEP_TILE + 1, steps),
             f"a multiple of 16 `step_warps` up to {MAX_STEP_TILE}"),
            ("filter_tile",
             self.filter_tile > 0 and self.filter_tile % math.lcm(LANES, filters) == 0,
             f"a multiple of {LANES} and of 16 `filter_warps`"),
            ("channel_tile", self.channel_tile > 0 and self.channel_tile % CHANNELS == 0,
             f"a multiple of {CHANNELS}"),
            ("run", self.run in (1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"),
            ("buffers", self.buffers in (1, 2), "1 or 2"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(
                    f"The `{name}` decision must be {rule}. Received: {name}={getattr(self, name)}"
                )

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.step_warps * self.filter_warps

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return int(self.step_tile * self.filter_tile // (self.warps * LANES))

    @property
    def blocks(self) -> int:
        """Blocks of a multiprocessor that nvcc must leave registers for: 2 if that is plausible."""
        # Beside the sums: the depthwise window and results, and addresses.
        return 2 if 65536 // (2 * self.warps * LANES) >= self.sums + 4 * self.run + 32 else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"form": "tensor_cores", **asdict(self)}

    @classmethod
    def from_dict(cls, decisions: Mapping[str, Any]) -> Tiling:
        """The tiling a record's decisions describe.

        Raises
        ------
        ValueError
            If a decision is missing, unknown or of another type: the record is of another schedule.
        """
        known = {field.name: type(field.default) for field in fields(cls)}
        if set(decisions) != {"form", *known} or decisions["form"] != "tensor_cores":
            raise ValueError(
                f"The decisions of form 'tensor_cores' are {sorted(known)}. "
                f"Received: {dict(decisions)}"
            )
        values = {name: decisions[name] for name in known}
        for name, value in values.items():
            expected = bool if name == "stage_input" else int
            if type(value) is not expected:
                raise ValueError(
                    f"The `{name}` decision must be of type {expected.__name__}. "
                    f"Received: {name}={value!r}"
                )
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """What a layer and a tiling come to: counts, and where everything lies in shared memory."""

    config: KernelConfig
    tiling: Tiling

    @property
    def _last(self) -> bool:
        return self.config.data_format == "channels_last"

    @property
    def size(self) -> int:
        """Bytes of an element in memory."""
        return 4 if self.config.dtype == "float32" else 2

    @property
    def depth(self) -> int:
        """Channels that one mma.sync takes: 32 bytes."""
        return 32 // self.size

    @property
    def channels(self) -> int:
        """Channels with their padding."""
        return int(padded(self.config.channels, CHANNELS))

    @property
    def filters(self) -> int:
        """Filters with their padding."""
        return int(padded(self.config.filters, LANES))

    @property
    def chunks(self) -> int:
        """Chunks of channels."""
        return -(-self.channels // self.tiling.channel_tile)

    @property
    def m_tiles(self) -> int:
        """A warp's tiles of 16 down the product: steps, in channels_first filters."""
        t = self.tiling
        steps, filters = t.step_tile // t.step_warps, t.filter_tile // t.filter_warps
        return (steps if self._last else filters) // 16

    @property
    def n_tiles(self) -> int:
        """A warp's tiles of 8 along the product."""
        return self.tiling.sums // (4 * self.m_tiles)

    # --- Depthwise ---------------------------------------------------------------------------

    @cached_property
    def sharing(self) -> tuple[int, int, int]:
        """Steps between a thread's steps, residues of the taps, rows between neighbours."""
        c = self.config
        common = math.gcd(c.strides, c.dilation_rate)
        apart = c.dilation_rate // common
        return apart, c.strides // common, c.strides * apart

    @cached_property
    def slides(self) -> bool:
        """Whether rows are shared: where a residue has few taps, or none of a run fits, not."""
        apart, residues, _ = self.sharing
        few = self.config.kernel_size < 2 * residues or residues > 8
        return not few and apart * self.tiling.run <= self.tiling.step_tile

    @property
    def spacing(self) -> int:
        """Steps between two steps of a thread."""
        return self.sharing[0] if self.slides else 1

    @property
    def residues(self) -> int:
        """Residues of the taps; those of one share rows."""
        return self.sharing[1]

    @property
    def row_spacing(self) -> int:
        """Rows between a thread's steps, and between taps of one residue."""
        return self.sharing[2]

    @property
    def runs(self) -> int:
        """Runs that cover a tile; the last may go beyond it."""
        span = self.spacing * self.tiling.run
        return -(-self.tiling.step_tile // span) * self.spacing

    @property
    def long_steps(self) -> int:
        """Steps that the runs cover."""
        return self.runs * self.tiling.run

    @property
    def width(self) -> int:
        """Channels of a thread."""
        return 2 if self._last and self.size == 2 else 1

    # --- Shared memory -----------------------------------------------------------------------

    @property
    def halo(self) -> int:
        """Rows from the first tap to the last."""
        return self.config.effective_kernel - 1

    @property
    def rows(self) -> int:
        """Input rows of a tile."""
        return (self.tiling.step_tile - 1) * self.config.strides + self.halo + 1

    @property
    def input_pitch(self) -> int:
        """Bytes from row to row of the staged input, or from channel to channel."""
        if self._last:
            return self.tiling.channel_tile * self.size
        rows = (self.long_steps - 1) * self.config.strides + self.halo + 2
        # An odd number of words: lanes along the channels then read from different banks.
        return (-(-rows * self.size // 4) | 1) * 4

    @property
    def input_bytes(self) -> int:
        """One buffer of the staged input; rows that only a last run's excess reads are not set."""
        if not self.tiling.stage_input:
            return 0
        rows = (self.long_steps - 1) * self.config.strides + self.halo + 1
        lines = rows if self._last else self.tiling.channel_tile
        return int(padded(lines * self.input_pitch, 128))

    @property
    def middle_pitch(self) -> int:
        """Bytes from step to step of the depthwise results."""
        return self.tiling.channel_tile * self.size + 16

    @property
    def weights_pitch(self) -> int:
        """Bytes from channel to channel of the pointwise weights."""
        return self.tiling.filter_tile * self.size + 8 * self.size

    @property
    def weights_bytes(self) -> int:
        """One buffer of the pointwise weights."""
        return int(padded(self.tiling.channel_tile * self.weights_pitch, 128))

    @property
    def weights_offset(self) -> int:
        """Where the weights begin, behind the depthwise results."""
        return int(padded(self.tiling.step_tile * self.middle_pitch, 128))

    @property
    def input_offset(self) -> int:
        """Where the input begins, behind the weights."""
        return self.weights_offset + self.tiling.buffers * self.weights_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.input_offset + self.tiling.buffers * self.input_bytes
