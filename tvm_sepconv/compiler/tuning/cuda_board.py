"""A board whose GPU is measured, be it a Jetson or a server.

It needs NVIDIA's driver, and its TVM no CUDA: a small native library of ours does there, by the
driver's own functions, what `cuda_measure` does on this machine. A kernel that breaks its process's
use of the GPU costs one session, for every session has a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import tvm_ffi.libinfo

from tvm_sepconv import cuda_runtime, targets
from tvm_sepconv.compiler import nvcc
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import board
from tvm_sepconv.compiler.tuning.board import Board, CandidateError, Identity
from tvm_sepconv.compiler.tuning.cuda_measure import Launch, Timer, alternated, rotated
from tvm_sepconv.compiler.tuning.measure import Case, Task


class CudaBoard(Board):
    """See `Board`; of several GPUs that its process sees it is the first one."""

    others = " (cuda-sm_87 for a Jetson Orin, cuda@aarch64 for a GPU beside another ARM processor)"

    @staticmethod
    def native(target: CudaTarget, output: Path) -> None:
        """Write what calls the driver there; that takes a C compiler, and no nvcc."""
        tools = toolchain(target.triple)
        source = files("tvm_sepconv") / "native" / "cuda_board.c"
        with tempfile.TemporaryDirectory() as folder, as_file(source) as path:
            made = Path(folder, "board.o")
            tools.object_file(path, made, (Path(tvm_ffi.libinfo.find_include_path()),))
            tools.shared_library([made], output)

    def identity(self, target: CudaTarget) -> Identity:
        """Its GPU and the target of that; a CandidateError if `target` means no such GPU."""
        capability, driver, _, name = self._gpu()
        arch = f"sm_{capability}"
        if arch not in target.archs:
            choose = f"--target cuda-{arch} or " * (arch in targets.CUDA_ARCHS)
            raise CandidateError(
                f"its GPU, {name}, is an {arch}, and what is built is for "
                f"{', '.join(target.archs)}. Choose {choose}another --key"
            )
        needed = _needed_driver()
        if driver // 1000 < needed // 1000:
            raise CandidateError(
                f"its driver is for CUDA {_release(driver)}, and what nvcc makes here needs one "
                f"for CUDA {_release(needed)}. Update the NVIDIA driver there, or name an older "
                "toolkit here with CUDA_HOME"
            )
        found = CudaTarget(f"cuda-{arch}")
        if found.host != target.host:
            found = CudaTarget(f"{found.name}@{target.host}")
        return Identity(f"{name}, driver for CUDA {_release(driver)}", found)

    def _gpu(self) -> tuple[int, int, int, str]:
        """Its compute capability, its driver's newest CUDA, bytes of its last cache, its name."""
        text = self._text("gpu")
        if text is None:
            raise CandidateError(
                f"it has no NVIDIA GPU to use ({self._error()}). Install the driver there, or "
                "choose another --key"
            )
        capability, driver, l2_bytes, name = text.split(" ", 3)
        return int(capability), int(driver), int(l2_bytes), name

    def sample(
        self, data: Task, libraries: Sequence[str], rounds: int, threads: int
    ) -> list[list[float]]:
        """See `Board`; `threads` are a processor's."""
        kernels = [self._kernel(f"{n}.so", library, data) for n, library in enumerate(libraries)]
        for case in reversed(data.cases):  # the measured one, which comes first, stays on the board
            x, left, y = operands = self._operands(data, case)
            for kernel in kernels:
                y.copyfrom(board.nothing(case))
                self._ask("run", kernel, x, left, y, float(board.CALL_LIMIT_SECS))
                board.check(case, y)
        copies = rotated(data.x.nbytes + board.nothing(data.cases[0]).nbytes, self._gpu()[2])
        timers = []
        for kernel in kernels:
            self._ask("rotate", kernel, *operands, copies)
            timers.append(Timer([_launch] * copies, _Graphs(self, kernel)))
        return alternated([timer.sample for timer in timers], rounds)

    def _operands(self, data: Task, case: Case) -> tuple[Any, int, Any]:
        """Input, left padding and output."""
        left = data.config.pad_amounts(case.x.shape[_steps_axis(data)])[0]
        return self._tensor(case.x), left, self._tensor(board.nothing(case))

    def _kernel(self, name: str, library: str, data: Task) -> int:
        """A library with the task's weights on the GPU."""
        path = self._sent(library, name)
        text = self._text("description", path)
        if text is None:
            raise self._error()
        weights = cuda_runtime.pack(json.loads(text)["packing"], *data.weights)
        tensors = [None if array is None else self._tensor(array) for array in weights]
        return self._ask("create", path, *tensors, _steps_axis(data))

    def _ask(self, name: str, *arguments: Any) -> int:
        """What a native function returns; a CandidateError if that is less than 0."""
        answer = int(self._native[name](*arguments))
        if answer < 0:
            raise self._error()
        return answer


class _Graphs:
    """A kernel's graphs on a board: what a `Timer` asks, of launches that are made there."""

    def __init__(self, on: CudaBoard, kernel: int) -> None:
        self._on, self._kernel = on, kernel

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """Capture so many."""
        self._on._ask("capture", self._kernel, len(launches))
        return partial(self._on._ask, "replay", self._kernel, float(board.CALL_LIMIT_SECS))

    def seconds(self, action: Launch) -> float:
        """Of the second of two replays."""
        return cast(int, action()) / 1e9


def _launch() -> None:
    """Stand for a launch: the board makes it."""


def _steps_axis(data: Task) -> int:
    return 1 if data.config.channel_axis == -1 else 2


def _needed_driver() -> int:
    """The CUDA that libraries made here need; 0 without nvcc, where none are made."""
    try:
        return nvcc.find().runtime_version
    except RuntimeError:
        return 0


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
