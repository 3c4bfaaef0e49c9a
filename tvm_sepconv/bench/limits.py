"""What one core of this machine can do: multiply-adds, and reading from each level of its memory.

A byte written counts as a byte read in the bounds made from this: plain stores, and copies with
both their bytes, ran at the rate of reads at every level beyond the first (2-core EPYC, Zen 4,
2026-11-22: L2 110, L3 95, DRAM 33 GB/s, within a tenth for all three).
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import jit, targets
from tvm_sepconv.bench.timing import Samples, interleave

LEVELS = ("L1", "L2", "L3", "DRAM")
CHAINS = 12  # of peak.c
ROUNDS = 400_000  # somewhat under a millisecond: a run long enough for the call not to count
BUDGET_SECS = 0.8  # for the peaks of all instruction sets, and again for all levels

# The suffix of the functions of peak.c and bandwidth.c, and float32 lanes.
_FUNCTIONS = {
    "x86_64-sse42": ("sse42", 4),
    "x86_64-avx2": ("avx2", 8),
    "x86_64-avx512": ("avx512", 16),
    "aarch64-neon": ("neon", 4),
    "aarch64-fp16": ("neon", 4),
}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_TYPICAL = {"L1": 32 << 10, "L2": 512 << 10}  # where neither Linux nor the C library knows
_READ_BYTES = 8 << 20  # a run reads at least that much: long beside its call
_SMALLEST_DRAM, _LARGEST_DRAM = 64 << 20, 512 << 20
_UNROLLED = 8  # of bandwidth.c


@dataclass(frozen=True)
class Limits:
    """One core's limits, each the best of many runs.

    Parameters
    ----------
    peak_gflops
        By instruction set: its widest multiply-adds; for SSE4.2 multiplications and additions.
    bandwidth
        GB/s read from "L1", "L2", "L3" (if there is one) and "DRAM".
    cache_bytes
        Of the same caches, an instruction cache not counted; the third may be shared by cores.
    steadiness
        The smallest share that a median was of its best: 1 on a machine that nothing disturbs.
    """

    peak_gflops: dict[str, float]
    bandwidth: dict[str, float]
    cache_bytes: dict[str, int]
    steadiness: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Limits:
        """Undo `to_dict`."""
        return cls(**plain)


class Peak:
    """The loop that measures a core's peak with `isa`; `flops` are those of one `run`.

    Raises
    ------
    RuntimeError
        If no C compiler is there.
    """

    def __init__(self, isa: str) -> None:
        suffix, self.lanes = _FUNCTIONS[isa]
        self.flops = 2 * CHAINS * self.lanes * ROUNDS
        self._function = getattr(_library(), f"peak_{suffix}")
        pointer = ctypes.POINTER(ctypes.c_float)
        self._function.argtypes = (ctypes.c_int64, ctypes.c_float, ctypes.c_float, pointer)
        self._function.restype = None
        self._out = np.zeros(self.lanes, np.float32)
        self._pointer = self._out.ctypes.data_as(pointer)

    def run(self, rounds: int = ROUNDS) -> npt.NDArray[np.float32]:
        """Do the loop once; returns the sum of its chains, a lane each."""
        # Neither too large nor too small for the fast path, however long it runs: it tends to 2.
        self._function(rounds, 0.75, 0.5, self._pointer)
        return self._out


class Read:
    """The loop that reads one buffer over and over; `bytes` are those of one `run`.

    Parameters
    ----------
    buffer_bytes
        Rounded up to whole rounds of the loop; it stays in the caches that it fits.

    Raises
    ------
    RuntimeError
        If no C compiler is there.
    """

    def __init__(self, isa: str, buffer_bytes: int) -> None:
        suffix, lanes = _FUNCTIONS[isa]
        self._vectors = -(-buffer_bytes // (4 * lanes * _UNROLLED)) * _UNROLLED
        size = 4 * lanes * self._vectors
        self.passes = -(-_READ_BYTES // size)
        self.bytes = self.passes * size
        raw = np.zeros(size + 64, np.uint8)  # zeros have no memory of their own until written
        self._data = raw[-raw.ctypes.data % 64 :][:size].view(np.uint32)
        self._data[:] = 1
        self._out = np.zeros(lanes, np.uint32)
        self._function = getattr(_library(), f"read_{suffix}")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = (number, pointer, number, pointer)
        self._function.restype = None
        self._addresses = self._data.ctypes.data, self._out.ctypes.data

    def run(self) -> npt.NDArray[np.uint32]:
        """Do the loop once; returns the sums, a lane each."""
        data, out = self._addresses
        self._function(self.passes, data, self._vectors, out)
        return self._out


def measure() -> Limits:
    """Measure this machine, in some two seconds.

    Raises
    ------
    RuntimeError
        If no C compiler is there, or there is no instruction set here that we know.
    """
    if not (isas := targets.runnable()):
        raise RuntimeError(
            f"This machine ({targets.machine()}) has none of the instruction sets "
            f"{sorted(targets.FEATURES)}: there is nothing to measure"
        )
    caches = cache_bytes()
    peaks = {isa: Peak(isa) for isa in isas}
    reads = {level: Read(isas[0], size) for level, size in buffer_bytes(caches).items()}
    of_peaks = _interleave({isa: peak.run for isa, peak in peaks.items()})
    of_reads = _interleave({level: read.run for level, read in reads.items()})
    samples = [*of_peaks.values(), *of_reads.values()]
    return Limits(
        peak_gflops={isa: peaks[isa].flops / s.best_us / 1e3 for isa, s in of_peaks.items()},
        bandwidth={level: reads[level].bytes / s.best_us / 1e3 for level, s in of_reads.items()},
        cache_bytes=caches,
        steadiness=min(s.best_us / s.median_us for s in samples),
    )


def _interleave(calls: Mapping[str, Callable[[], object]]) -> dict[str, Samples]:
    return interleave(calls, BUDGET_SECS)


def cache_bytes(folder: Path = _CACHES) -> dict[str, int]:
    """Sizes of this machine's data caches: as Linux says, else the C library, else typical ones."""
    return _linux_caches(folder) or _libc_caches() or dict(_TYPICAL)


def _linux_caches(folder: Path) -> dict[str, int]:
    sizes = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction" and f"L{level}" in LEVELS:
                sizes[f"L{level}"] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
        except (OSError, ValueError):  # some kernels on ARM leave sizes out
            continue
    return sizes if "L1" in sizes and "L2" in sizes else {}


def _libc_caches() -> dict[str, int]:
    names = {"L1": "LEVEL1_DCACHE_SIZE", "L2": "LEVEL2_CACHE_SIZE", "L3": "LEVEL3_CACHE_SIZE"}
    known = {level: f"SC_{name}" for level, name in names.items()}
    sizes = {level: os.sysconf(name) for level, name in known.items() if name in os.sysconf_names}
    found = {level: size for level, size in sizes.items() if size > 0}
    return found if "L1" in found and "L2" in found else {}


def buffer_bytes(caches: Mapping[str, int]) -> dict[str, int]:
    """How much is read over and over to be served by each level, and by no nearer one.

    Half a cache leaves room for what else is in it. The third level may be shared with others, so a
    quarter; memory is far beyond all of it.
    """
    sizes = {"L1": caches["L1"] // 2, "L2": caches["L2"] // 2}
    if "L3" in caches:
        sizes["L3"] = max(caches["L3"] // 4, 2 * caches["L2"])
    furthest = max(caches.values())
    sizes["DRAM"] = min(max(4 * furthest, _SMALLEST_DRAM), _LARGEST_DRAM)
    return sizes


@functools.cache
def _library() -> ctypes.CDLL:
    link = jit.compiler("tvm_sepconv.compiler.link")
    tools = link.toolchain(f"{targets.machine()}-linux-gnu")
    with tempfile.TemporaryDirectory(prefix="tvm_sepconv_limits_") as folder:
        objects = []
        for name in ("peak", "bandwidth"):
            with as_file(files("tvm_sepconv.bench") / f"{name}.c") as source:
                objects.append(Path(folder, f"{name}.o"))
                tools.object_file(source, objects[-1])
        library = Path(folder, "limits.so")
        tools.shared_library(objects, library)
        return ctypes.CDLL(str(library))  # stays mapped without its file
