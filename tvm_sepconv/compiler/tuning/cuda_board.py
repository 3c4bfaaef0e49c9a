"""A board whose GPU is measured, be it a Jetson or a server.

It needs NVIDIA's driver, and its TVM no CUDA: a small native library of ours does there, by the
driver's own functions, what `cuda_measure` does on this machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import tvm_ffi.libinfo

from tvm_sepconv import cuda_runtime, targets
from tvm_sepconv.bench import cuda_graphs
from tvm_sepconv.compiler import nvcc
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import board, cuda_measure
from tvm_sepconv.compiler.tuning.board import Board, CandidateError, Identity
from tvm_sepconv.compiler.tuning.cuda_measure import Launch, Timer
from tvm_sepconv.compiler.tuning.measure import Case, Task


class CudaBoard(Board):
    """See `Board`; of several GPUs its process sees, it is the first one."""

    OTHERS = " (cuda-sm_87 is a Jetson Orin, @aarch64 another GPU beside an ARM processor)"

    @staticmethod
    def native(target: CudaTarget, output: Path) -> None:
        """Write what calls the driver there; it takes a C compiler, and no nvcc."""
        tools = toolchain(target.triple)
        source = files("tvm_sepconv") / "native" / "cuda_board.c"
        include = (Path(tvm_ffi.libinfo.find_include_path()),)
        with tempfile.TemporaryDirectory() as folder, as_file(source) as path:
            made = Path(folder, "board.o")
            tools.object_file(path, made, include)
            tools.shared_library([made], output)

    def identity(self, target: CudaTarget) -> Identity:
        """Its GPU's name; a CandidateError if there is none, or one of another architecture.

        For the target "cuda" it is the one of the GPU.
        """
        capability, driver, _, name = self._description()
        arch = f"sm_{capability}"
        if arch not in target.archs:
            wanted = ", ".join(target.archs)
            choose = f"--target cuda-{arch} or " * (arch in targets.CUDA_ARCHS)
            raise CandidateError(
                f"its GPU, {name}, is an {arch}, and what is built is for {wanted}. Choose "
                f"{choose}another --key"
            )
        if (needed := _needed_driver()) // 1000 > driver // 1000:
            raise CandidateError(
                f"its driver is for {_cuda(driver)}, and what nvcc makes here needs one for "
                f"{_cuda(needed)}. Update the NVIDIA driver there, or name an older toolkit of "
                "this machine with CUDA_HOME"
            )
        found = CudaTarget(f"cuda-{arch}")
        if found.host != target.host:
            found = CudaTarget(f"{found.name}@{target.host}")
        return Identity(cuda_graphs.described(name, driver), found)

    def _description(self) -> tuple[int, int, int, str]:
        """Compute capability, the driver's newest CUDA, bytes of the last cache, name."""
        text = self._text("describe")
        if text is None:
            raise CandidateError(
                f"it has no NVIDIA GPU to use: {self._error()}. Install the driver there, or "
                "choose another --key"
            )
        capability, driver, l2_bytes, name = text.split(" ", 3)
        return int(capability), int(driver), int(l2_bytes), name

    def sample(
        self, data: Task, libraries: Sequence[str], rounds: int, threads: int
    ) -> list[list[float]]:
        """See `Board`; `threads` are of a processor."""
        _, _, l2_bytes, _ = self._description()
        kernels = [
            _Kernel(self, self._sent(library, f"{index}.so"), data)
            for index, library in enumerate(libraries)
        ]
        for case in reversed(data.cases):  # the measured one, which comes first, stays on the board
            operands = self._tensor(case.x), self._tensor(board.nothing(case))
            for kernel in kernels:
                kernel.verify(case, *operands)
        timers = [kernel.timer(*operands, l2_bytes) for kernel in kernels]
        return cuda_measure.alternated([timer.sample for timer in timers], rounds)


class _Kernel:
    """A library with its weights on a board's GPU; what `cuda_measure.Loaded` is on this one's."""

    def __init__(self, on: CudaBoard, path: str, data: Task) -> None:
        ...
