"""One core's peak: float32 multiply-adds in the widest registers of an instruction set."""

from __future__ import annotations

import ctypes
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from tvm_sepconv import jit, targets

CHAINS = 12  # of peak.c
ROUNDS = 400_000  # somewhat under a millisecond: a run long enough for the call not to count

# The function of peak.c for each instruction set, and its float32 lanes.
_KERNELS = {
    "x86_64-sse42": ("peak_sse42", 4),
    "x86_64-avx2": ("peak_avx2", 8),
    "x86_64-avx512": ("peak_avx512", 16),
    "aarch64-neon": ("peak_neon", 4),
    "aarch64-fp16": ("peak_neon", 4),
}


class Peak:
    """The loop that measures it, compiled for `isa`; `flops` are those of one `run`.

    Raises
    ------
    RuntimeError
        If no C compiler is there.
    """

    def __init__(self, isa: str) -> None:
        name, self.lanes = _KERNELS[isa]
        self.flops = 2 * CHAINS * self.lanes * ROUNDS
        link = jit.compiler("tvm_sepconv.compiler.link")
        tools = link.toolchain(f"{targets.machine()}-linux-gnu")
        with (
            tempfile.TemporaryDirectory(prefix="tvm_sepconv_peak_") as folder,
            as_file(files("tvm_sepconv.bench") / "peak.c") as source,
        ):
            tools.object_file(source, Path(folder, "peak.o"))
            tools.shared_library([Path(folder, "peak.o")], Path(folder, "peak.so"))
            library = ctypes.CDLL(str(Path(folder, "peak.so")))  # stays mapped without its file
        self._function = getattr(library, name)
        pointer = ctypes.POINTER(ctypes.c_float)
        self._function.argtypes = (ctypes.c_int64, ctypes.c_float, ctypes.c_float, pointer)
        self._function.restype = None
        self._out = np.zeros(self.lanes, np.float32)
        self._pointer = self._out.ctypes.data_as(pointer)

    def run(self, rounds: int = ROUNDS) -> np.ndarray:
        """Do the loop once; returns the sum of its chains, a lane each."""
        # Neither too large nor too small for the fast path, however long it runs: it tends to 2.
        self._function(rounds, 0.75, 0.5, self._pointer)
        return self._out
