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
# A core lends 64-bit code its scheduling model; what it has beyond the instruction set is off. The
# little ones load two vectors faster by two instructions than by one.
_BEYOND = {
    "aarch64-neon": ["-lse", "-rdm", "-fullfp16", "-dotprod", "-rcpc", "-v8.1a"],
    "aarch64-fp16": ["-dotprod", "-rcpc"],
}
_LITTLE = ("cortex-a53", "cortex-a55")


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
        found = {**one, **_ARM[self.isa]}
        core = self.name.partition("@")[2]
        if core and self.isa in _BEYOND:
            little = ["+slow-paired-128"] if core in _LITTLE else []
            found |= {"mcpu": core, "mattr": [*found["mattr"], *_BEYOND[self.isa], *little]}
        return found

    def tvm(self) -> TvmTarget:
        """The target TVM compiles for."""
        return TvmTarget(self.description)

    def lanes(self, accumulation_dtype: str) -> int:
        """Elements in one vector register."""
        return int(self.family.UNITS[self.isa].lanes(accumulation_dtype))


@dataclass(frozen=True)
class CudaTarget:
    """A CUDA target: its full name, and what the compiler derives from it."""

    name: str

    @property
    def host(self) -> str:
        """The processor beside the GPU: this machine's unless another is named.

        An sm_87, Jetson Orin, has an ARM processor wherever it is built for.
        """
        isa, _, core = self.name.partition("@")
        return core or ("aarch64" if isa == "cuda-sm_87" else targets.machine())

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures the library has machine code for; it has PTX of the last one."""
        _, _, arch = self.name.partition("@")[0].partition("-")
        if arch:
            return (arch,)
        every = targets.CUDA_ARCHS
        return every if self.host == "aarch64" else tuple(a for a in every if a != "sm_87")

    @property
    def triple(self) -> str:
        """The host's GNU triple."""
        return f"{self.host}-linux-gnu"

    def tvm(self) -> TvmTarget:
        """The target TVM writes CUDA C++ for."""
        # The largest limit there is: which tilings fit an architecture the schedules know better.
        # Nor need TVM know it: before sm_80 it would write integers in the place of bfloat16.
        description = {
            "kind": "cuda",
            "arch": targets.CUDA_ARCHS[-1],
            "max_shared_memory_per_block": 232448,
        }
        return TvmTarget(description, host={"kind": "cuda_host"})


def cpu(name: str) -> CpuTarget:
    """Return the CPU target called `name`; a ValueError names those there are."""
    name = targets.resolve(name)
    if name.startswith("cuda"):
        raise ValueError(
            "The `target` argument takes CPU targets only here. Expected one of "
            f"{sorted(targets.FEATURES)}. Received: target={name}"
        )
    return CpuTarget(name)


def cuda(name: str) -> CudaTarget:
    """Return the CUDA target called `name`; a ValueError names those there are."""
    name = targets.resolve(name)
    if not name.startswith("cuda"):
        raise ValueError(
            "The `target` argument takes CUDA targets only here, such as cuda or cuda-sm_90. "
            f"Received: target={name}"
        )
    return CudaTarget(name)


def of(name: str) -> CpuTarget | CudaTarget:
    """Return the target called `name`; a ValueError names those there are."""
    return cuda(name) if targets.resolve(name).startswith("cuda") else cpu(name)
