"""Targets by name, and which of them this machine can run; no compiler needed.

A target is ``<isa>`` or ``<isa>@<core>``: one spelling for the command line, library folders and
log files. The core tunes, the instruction set decides where a library runs. For a GPU the isa is
``cuda`` or ``cuda-<arch>``, and what stands behind the @ is the processor beside it.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

# Flags of /proc/cpuinfo that a library of that instruction set needs: x86-64-v2, -v3, -v4, Armv8.0,
# Armv8.2 with half precision. Worst to best within a machine.
FEATURES: dict[str, tuple[str, ...]] = {
    "x86_64-sse42": ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"),
    "x86_64-avx2": ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"),
    "x86_64-avx512": (
        "abm",
        "avx2",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512vl",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "movbe",
    ),
    "armv7-neon": ("neon", "vfpv4"),
    "aarch64-neon": ("asimd", "fp"),
    "aarch64-fp16": ("asimd", "asimdhp", "fp", "fphp"),
}
CORES = ("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "neoverse-n1")
CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
CUDA_HOSTS = ("aarch64", "x86_64")  # the processors beside NVIDIA's GPUs
_SHORT = {"arm": "aarch64-neon@cortex-a76"}
MACHINES = {"arm64": "aarch64", "armv7l": "armv7", "armv8l": "armv7", "amd64": "x86_64"}
_NARROW = {"aarch64": "armv7", "x86_64": "i686"}


def machine() -> str:
    """The architecture part of this machine's target names, such as "x86_64".

    That of this process: a 32-bit one, also under a 64-bit kernel, loads 32-bit libraries.
    """
    name = platform.machine().lower()
    name = MACHINES.get(name, name)
    return _NARROW.get(name, name) if sys.maxsize < 2**32 else name


@functools.cache
def cpu_features() -> frozenset[str]:
    """The CPU flags Linux reports; empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    found = frozenset(
        flag for key, _, flags in lines if key.strip() in ("flags", "Features")
        for flag in flags.split()
    )  # fmt: skip
    # Every core with 64-bit "asimd" has these for 32-bit programs, which may not be told so.
    return found | {"neon", "vfpv4"} if machine() == "armv7" and "asimd" in found else found


def runnable() -> tuple[str, ...]:
    """The instruction sets this machine can run, best first."""
    here, flags = machine(), cpu_features()
    return tuple(
        isa
        for isa, needed in reversed(FEATURES.items())
        if isa.split("-")[0] == here and flags.issuperset(needed)
    )


def missing_features(isa: str) -> tuple[str, ...]:
    """What this machine lacks to run libraries of `isa`: CPU flags, or the architecture."""
    arch = isa.split("-")[0]
    if arch == "cuda":
        return ("an NVIDIA GPU",)
    if arch != machine():
        return (f"the {arch} architecture (this machine is {machine()})",)
    if isa not in FEATURES:
        return ("a newer tvm_sepconv, to which it is no unknown instruction set",)
    return tuple(flag for flag in FEATURES[isa] if flag not in cpu_features())


def resolve(name: str) -> str:
    """Expand a short name and check it: "x86" is this host's best level, "arm" a Cortex-A76.

    Raises
    ------
    ValueError
        If there is no such target, naming those that there are.
    """
    if name == "x86":
        levels = [isa for isa in runnable() if isa.startswith("x86_64")]
        return levels[0] if levels else "x86_64-avx2"
    name = _SHORT.get(name, name)
    isa, _, core = name.partition("@")
    cuda = ("cuda", *(f"cuda-{arch}" for arch in CUDA_ARCHS))
    cores: tuple[str, ...] = CORES if isa.startswith("a") else ()
    if isa in cuda:
        cores = CUDA_HOSTS
    if (isa in cuda or isa in FEATURES) and ("@" not in name or core in cores):
        return name
    raise ValueError(
        f"The `target` argument must be one of {sorted(FEATURES)}, for ARM with "
        f"@{'|'.join(CORES)}, {', '.join(cuda)}, with @{'|'.join(CUDA_HOSTS)} for another "
        f"processor beside the GPU, or the short names x86 and arm. Received: target={name}"
    )


def cuda_code(archs: Sequence[str], ptx: str, capability: int) -> int | None:
    """Say which code of a CUDA library a GPU runs, the best first.

    Parameters
    ----------
    archs, ptx
        What the library has machine code for, and the PTX of one.
    capability
        Of the GPU, such as 90.

    Returns
    -------
    int or None
        0 for its own architecture's, 1 for an older one's of its generation, 2 for what the driver
        compiles of the PTX; None if it runs none.
    """
    numbers = [int(arch.removeprefix("sm_")) for arch in archs]
    if capability in numbers:
        return 0
    # Jetsons and the cards of the same generation do not run each other's.
    on_chip = {72, 87}
    older = [n for n in numbers if n // 10 == capability // 10 and n < capability]
    if capability not in on_chip and any(n not in on_chip for n in older):
        return 1
    return 2 if int(ptx.removeprefix("sm_")) < capability else None


def host_family() -> tuple[str, ...]:
    """Every level of this host's family that it can run, the default of `save`; worst first."""
    return tuple(reversed(runnable()))
