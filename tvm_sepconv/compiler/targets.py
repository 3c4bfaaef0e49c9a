"""Named targets as TVM, its linkers and the schedules want them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tvm.target import Target as TvmTarget

from tvm_sepconv import targets
from tvm_sepconv.compiler.schedules import arm, x86

_X86_LEVELS = {
    "x86_64-sse42": "x86-64-v2",
    "x86_64-avx2": "x86-64-v3",
    "x86_64-avx512": "x86-64-v4",
}
_ARM: dict[str, dict[str, Any]] = {
    "aarch64-neon": {"mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon"]},
    "aarch64-fp16": {
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "generic",
        "mattr": ["+v8.2a", "+neon", "+fullfp16"],
    },
    # mcpu stays generic: naming a v8 core makes LLVM emit v8 instructions, a v7 one drops the FMAs.
    "armv7-neon": {
        "mtriple": "armv7a-linux-gnueabihf",
        "mcpu": "generic",
        "mattr": ["+v7", "+neon", "+vfp4"],
        "mfloat-abi": "hard",
    },
}


@dataclass(frozen=True)
class CpuTarget:
    """A CPU target: its full name, and what the compiler derives from it."""

    name: str

    @property
    def isa(self) -> str:
        """The instruction set, without the core."""
        return self.name.partition("@")[0]

    @property
    def arch(self) -> str:
        """The architecture one runtime library serves, such as "aarch64"."""
        return self.isa.split("-")[0]

    @property
    def triple(self) -> str:
        """The GNU triple for compilers and linkers."""
        return str(self.description["mtriple"]).replace("armv7a", "arm")

    @property
    def family(self) -> ModuleType:
        """The schedule module: units, default tilings, candidates."""
        family: ModuleType = x86 if self.isa in _X86_LEVELS else arm
        return family

    @property
    def description(self) -> dict[str, Any]:
        """TVM's target as a dict; command-line strings are no longer accepted."""
        one = {"kind": "llvm", "num-cores": 1}  # kernels are serial; MetaSchedule wants the number
        if self.isa in _X86_LEVELS:
            return {**one, "mtriple": "x86_64-linux-gnu", "mcpu": _X86_LEVELS[self.isa]}
        return {**one, **_ARM[self.isa]}

    def tvm(self) -> TvmTarget:
        """The target TVM compiles for."""
        return TvmTarget(self.description)

    def lanes(self, accumulation_dtype: str) -> int:
        """Elements in one vector register."""
        return int(self.family.UNITS[self.isa].lanes(accumulation_dtype))


def cpu(name: str) -> CpuTarget:
    """Return the CPU target called `name`; a ValueError names those there are."""
    name = targets.resolve(name)
    if name.startswith("cuda"):
        raise ValueError(
            "The `target` argument takes CPU targets only: building for CUDA is not part of this "
            f"version. Expected one of {sorted(targets.FEATURES)}. Received: target={name}"
        )
    return CpuTarget(name)
