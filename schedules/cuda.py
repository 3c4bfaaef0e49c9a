"""The CUDA family: its forms, and which of them and of their tilings serve a layer; plain Python.

=============== ==================================================================================
form            what
=============== ==================================================================================
cores           one kernel on the ordinary cores, full float32 (`cuda_cores`)
tensor_cores    one kernel on tensor cores: float16, bfloat16, and float32 where TF32 is allowed
                (`cuda_tensor_cores`)
two_kernels     `cores` in two launches, the depthwise results in memory between them
                (`cuda_two_kernels`); for tuning and comparison, never a default
=============== ==================================================================================

A library has up to two variants, for much and for little work; `choose` says which one runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tvm_sepconv.compiler.schedules import cuda_cores, cuda_tensor_cores, cuda_two_kernels
from tvm_sepconv.compiler.schedules.cuda_packing import CHANNELS, LANES, padded

from tvm_sepconv.config import KernelConfig

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

FORMS: dict[str, Any] = {
    "cores": cuda_cores,
    "tensor_cores": cuda_tensor_cores,
    "two_kernels": cuda_two_kernels,
}
"""The forms' modules by the name that records give them."""

_EITHER_OR = re.compile(
    r'" @p (cp\.async\.\w+\.shared\.global \[%0\], \[%1\], %2);\\n"\s*" @!p st\.shared[^"]*"'
)

VARIANTS = ("long", "short")
"""Names of the entries of `default_tilings`, by position."""


class Tiling(Protocol):
    """What the tilings of all forms have."""

    @property
    def step_tile(self) -> int:
        """Output steps of a block."""

    @property
    def filter_tile(self) -> int:
        """Filters of a block."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record, ``form`` among them."""


def form_of(tiling: Tiling) -> Any:
    """Return the module of a tiling's form."""
    return FORMS[tiling.to_dict()["form"]]


def tiling_from_dict(decisions: Mapping[str, Any]) -> Tiling:
    """The tiling a record's decisions describe.

    Raises
    ------
    ValueError
        If the form is unknown, or a decision missing, unknown or of another type.
    """
    form = FORMS.get(decisions.get("form", ""))
    if form is None:
        raise ValueError(
            f"The `form` decision must be one of {sorted(FORMS)}. Received: {dict(decisions)}"
        )
    tiling: Tiling = form.Tiling.from_dict(decisions)
    return tiling


def default_tilings(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the tilings of a layer that nobody has tuned, the one for the most work first.

    Raises
    ------
    ValueError
        If no form computes in the layer's dtype on `arch`.
    """
    tilings: tuple[Tiling, ...] = _form(config, allow_tf32, arch).default_tilings(
        config, allow_tf32, arch
    )
    return tilings


def candidates(
    config: KernelConfig, allow_tf32: bool = False, arch: str = "sm_80"
) -> tuple[Tiling, ...]:
    """Return the tilings that tuning tries, the defaults first; errors as of `default_tilings`."""
    form = _form(config, allow_tf32, arch)
    tilings: tuple[Tiling, ...] = form.candidates(config, allow_tf32, arch)
    if form is cuda_cores:
        tilings += cuda_two_kernels.candidates(config, allow_tf32, arch)
    return tilings


def _form(config: KernelConfig, allow_tf32: bool, arch: str) -> Any:
    half = config.dtype in ("float16", "bfloat16")
    capable = int(arch.removeprefix("sm_")) >= cuda_tensor_cores.TF32_CAPABILITY
    return cuda_tensor_cores if half or (allow_tf32 and capable) else cuda_cores


def refusal(config: KernelConfig, allow_tf32: bool, arch: str, tiling: Tiling) -> str | None:
    """Return why `tiling` cannot serve the layer on `arch`, None where it can."""
    reason: str | None = form_of(tiling).refusal(config, allow_tf32, arch, tiling)
    return reason


def shared_bytes(config: KernelConfig, tiling: Tiling) -> int:
    """Return the shared memory a block takes at most, in bytes."""
    return int(form_of(tiling).shared_bytes(config, tiling))


def functions(config: KernelConfig, tiling: Tiling, aligned: bool) -> dict[str, PrimFunc]:
    """Return the scheduled kernels of one variant by name, in the order of their launches.

    `aligned` is the variant of 16-byte moves: see `can_align`.
    """
    kernels: dict[str, PrimFunc] = form_of(tiling).functions(config, tiling, aligned)
    return kernels


def launch_bounds(source: str, kernel: str, tiling: Tiling) -> str:
    """Write a tiling's blocks of a multiprocessor into its kernel's ``__launch_bounds__``.

    TVM 0.27 knows the threads only, and nvcc may then give them more registers than let so many
    blocks stay.
    """
    blocks = getattr(tiling, "blocks", 1)
    old = f"__launch_bounds__({{}}) {kernel}("
    for threads in range(LANES, 1024 + 1, LANES) if blocks > 1 else ():
        new = f"__launch_bounds__({threads}, {blocks}) {kernel}("
        source = source.replace(old.format(threads), new)
    return source


def without_branches(source: str) -> str:
    """Let conditional asynchronous copies fill in the zeros themselves.

    TVM 0.27 writes each as either a copy or a store of zeros, which nvcc makes a branch.
    """
    filling = r'" .reg .u32 n;\\n"\n    " selp.u32 n, %2, 0, p;\\n"\n    " \1, n;\\n"'
    return _EITHER_OR.sub(filling, source)


def packing(config: KernelConfig, allow_tf32: bool = False) -> dict[str, Any]:
    """Return how a library wants its weights packed, whatever its forms: see `packed_shapes`."""
    half = config.dtype in ("float16", "bfloat16")
    return {
        "lanes": LANES,
        "channels": padded(config.channels, CHANNELS),
        "dtype": config.dtype if half else "float32",
    }


def can_align(config: KernelConfig) -> bool:
    """Whether a variant of 16-byte moves exists.

    It may be called where input, output, and their strides along batch and rows are multiples of
    16 bytes, in channels_first the output steps too.
    """
    vector = 16 // {"float16": 2, "bfloat16": 2}.get(config.dtype, 4)
    if config.data_format == "channels_first":
        return True
    return config.channels % vector == 0 and config.filters % vector == 0


def choose(
    config: KernelConfig,
    tilings: Sequence[Tiling],
    batch: int,
    out_steps: int,
    multiprocessors: int = 132,
) -> int:
    """Return which tiling a library runs: the first that has a block for every multiprocessor."""
    filters = padded(config.filters, LANES)
    for number, tiling in enumerate(tilings):
        blocks = batch * -(-out_steps // tiling.step_tile) * -(-filters // tiling.filter_tile)
        if blocks >= multiprocessors:
            return number
    return len(tilings) - 1
