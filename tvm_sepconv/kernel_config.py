"""What a compiled kernel depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm_sepconv import activations, arguments

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# A kernel holds the input of a few steps at a time, with all taps, in each thread's scratch, and
# indexes it with 32 bits. Published layers stay below 2 MiB; this is where a call could take a
# machine's memory away.
SCRATCH_LIMIT_BYTES = 2**30
_SCRATCH_STEPS = 32


@dataclass(frozen=True)
class KernelConfig:
    """What a compiled kernel depends on: all but padding, batch and steps, which a call brings.

    Parameters
    ----------
    activation
        A name of `activations.ELEMENTWISE`; the layer applies any other after a "linear" kernel.
    dtype
        Of inputs, weights and outputs.
    accumulation_dtype
        Of the sums: float32, or float64 for float64.
    """

    channels: int
    filters: int
    kernel_size: int
    strides: int = 1
    dilation_rate: int = 1
    depth_multiplier: int = 1
    data_format: str = "channels_last"
    use_bias: bool = True
    activation: str = "linear"
    dtype: str = "float32"
    accumulation_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (
            "channels", "filters", "kernel_size", "strides", "dilation_rate", "depth_multiplier",
        ):  # fmt: skip
            object.__setattr__(self, name, arguments.positive(getattr(self, name), name))
        for name, allowed in (
            ("data_format", ("channels_first", "channels_last")),
            ("activation", tuple(sorted(activations.ELEMENTWISE))),
            ("dtype", tuple(DTYPE_BYTES)),
            ("accumulation_dtype", ("float32", "float64")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Invalid value for argument `{name}`. Expected one of {allowed}. "
                    f"Received {name}={getattr(self, name)}."
                )
        rows = _SCRATCH_STEPS * self.strides + self.effective_kernel
        scratch_bytes = 8 * rows * (self.channels + 64)
        if scratch_bytes > SCRATCH_LIMIT_BYTES:
            raise ValueError(
                "The `strides`, `kernel_size` and `dilation_rate` arguments reach too far for a "
                f"compiled kernel: {rows} steps of {self.channels} channels take {scratch_bytes} "
                f"bytes of scratch memory, at most {SCRATCH_LIMIT_BYTES} are allowed. Received: "
                f"strides={self.strides}, kernel_size={self.kernel_size}, "
                f"dilation_rate={self.dilation_rate}. Subsample the steps or split the channels"
            )

    @property
    def mid_channels(self) -> int:
        """Channels between the depthwise and the pointwise stage."""
        return self.channels * self.depth_multiplier

    @property
    def effective_kernel(self) -> int:
        """Steps from the first to the last tap, both included."""
        return (self.kernel_size - 1) * self.dilation_rate + 1

    @property
    def sizes(self) -> str:
        """Its sizes for people, the usual ones left out: 64→256 k33 s2."""
        words = [f"{self.channels}→{self.filters}", f"k{self.kernel_size}"]
        rare = {"s": self.strides, "d": self.dilation_rate, "m": self.depth_multiplier}
        return " ".join([*words, *(f"{letter}{n}" for letter, n in rare.items() if n > 1)])

    def flops(self, batch: int, out_steps: int) -> int:
        """Return the floating-point operations of one call, a multiply-add being two."""
        return 2 * batch * out_steps * self.mid_channels * (self.kernel_size + self.filters)

    @property
    def key(self) -> str:
        """A readable name that differs for configs that differ."""
        form = "cl" if self.data_format == "channels_last" else "cf"
        bias = "bias" if self.use_bias else "nobias"
        usual = "float64" if self.dtype == "float64" else "float32"
        sums = "" if self.accumulation_dtype == usual else f"_acc{self.accumulation_dtype}"
        return (
            f"c{self.channels}_f{self.filters}_k{self.kernel_size}_s{self.strides}_d{self.dilation_rate}"
            f"_m{self.depth_multiplier}_{form}_{self.activation}_{bias}_{self.dtype}{sums}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> KernelConfig:
        """Undo `to_dict`; an unknown key is a ValueError."""
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := {k: v for k, v in config.items() if k not in names}:
            raise ValueError(f"Unrecognized keyword arguments passed to KernelConfig: {unknown}")
        return cls(**config)
