"""A `Runner` that needs no board: candidates are emulated, and their core's cycles modelled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import measure
from tvm_sepconv.compiler.tuning.modelled.cycles import Model, model_of
from tvm_sepconv.compiler.tuning.modelled.emulation import Emulator
from tvm_sepconv.compiler.tuning.records import MODEL_HZ


class Modelled:
    """Scores libraries for a 64-bit ARM core on any machine.

    Candidates are compared with the reference on the task's first input, those that are compared
    with each other on all of its inputs. "Seconds" are those of a core with a clock of `MODEL_HZ`.

    Raises
    ------
    RuntimeError
        If a program is missing, naming what to install.
    ValueError
        If no model is known for the target.
    """

    def __init__(self, target: CpuTarget) -> None:
        self.core = model_of(target)
        self.workers = len(os.sched_getaffinity(0))
        self._folder = tempfile.TemporaryDirectory()
        try:
            self._emulator = Emulator(target, Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise
        self._model = Model(self._emulator.tools, self.core)
        versions = self._emulator.tools.versions
        self.machine = f"modelled {self.core}, LLVM {versions['llvm']}, QEMU {versions['qemu']}"

    def close(self) -> None:
        """Remove what the emulation needed."""
        self._folder.cleanup()

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        """See `Runner`; the samples of one library are all the same."""
        data = measure.loaded(task)
        cases = len(data.cases) if len(libraries) > 1 else 1
        result = []
        for library in libraries:
            try:
                counts = self._emulator.count(data, Path(library), cases)
            except ValueError as error:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            result.append([round(self._model.cycles(counts)) / MODEL_HZ] * rounds)
        return result
