"""Run libraries under emulation: whether they are right, and what they executed."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tvm_sepconv.bundle import RUNTIME
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning.measure import Array, Case, Task
from tvm_sepconv.compiler.tuning.modelled import tools
from tvm_sepconv.compiler.tuning.modelled.cycles import Counts, read_counts

LIMIT_SECS = 300
# The least core of an instruction set: what it lacks ends the program.
CORES = {"aarch64-neon": "cortex-a53", "aarch64-fp16": "cortex-a76", "armv7-neon": "cortex-a7"}


class Emulator:
    """An emulated device for one target, with our runtime and the program that calls libraries.

    Parameters
    ----------
    folder
        For all that it needs; it is the caller's to remove.

    Raises
    ------
    RuntimeError
        If a program is missing, naming what to install.
    """

    def __init__(self, target: CpuTarget, folder: Path) -> None:
        self.tools = tools.tools(target.arch)
        self.folder, self._core = folder.absolute(), CORES[target.isa]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._plugin, self._caller = self.folder / "counter.so", self.folder / "caller"
        build.build_runtime(target, self.folder / RUNTIME)
        tools.build_plugin(self.tools, self._plugin)
        tools.build_caller(self.tools, self.folder / RUNTIME, self._caller)

    def count(self, task: Task, library: Path, cases: int | None = None) -> Counts:
        """Run a library on a task's cases, and count what the first one executes.

        Parameters
        ----------
        cases
            Only the first so many.

        Raises
        ------
        ValueError
            If an answer is wrong.
        RuntimeError
            If the program ends by itself or takes too long.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            place = Path(folder)
            chosen = task.cases[:cases]
            arguments = self._arguments(task, chosen, place)
            self._run([str(library), *arguments], place / "counts")
            for number, case in enumerate(chosen):
                y = np.fromfile(place / f"y{number}", task.kernel.dtype)
                case.check(y.reshape(case.expected.shape))
            (counts,) = read_counts(place / "counts")
        return counts

    def _arguments(self, task: Task, cases: Sequence[Case], place: Path) -> list[str]:
        """The caller's, beside the library; its inputs are written to `place`."""
        words = [_saved(tensor, place / f"w{n}") for n, tensor in enumerate(task.weights)]
        for number, case in enumerate(cases):
            shape = case.x.shape
            batch, steps = shape[0], shape[1 if task.config.channel_axis == -1 else 2]
            words += [str(batch), str(steps), _saved(case.x, place / f"x{number}")]
            words.append(str(place / f"y{number}"))
        return words

    def _run(self, arguments: Sequence[str], counts: Path) -> None:
        # Symbols are looked up at the start, not by the first call, which may be the counted one.
        cpu = ["-cpu", self._core, "-E", "LD_BIND_NOW=1"]
        emulator = [self.tools.emulator, *cpu, "-L", self.tools.sysroot]
        plugin = ["-plugin", f"{self._plugin},out={counts}"]
        command = [*emulator, *plugin, str(self._caller), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"No result after {LIMIT_SECS} s under emulation") from None
        if done.returncode:
            why = f"signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip()
            raise RuntimeError(f"The emulated program ended: {why}")


def _saved(array: Array | None, path: Path) -> str:
    if array is None:
        return "-"
    array.tofile(path)
    return str(path)
