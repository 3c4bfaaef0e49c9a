"""Tuning on a GPU: a fixed grid of candidates, tried from the most promising one on.

There are a few dozen, and the cost model of a CPU's search would have to learn from as many. What
takes more shared memory or registers than a thread block may have is rejected before it runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tvm

from tvm_sepconv.bench import cuda_graphs
from tvm_sepconv.compiler import cuda as build
from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import builder, cuda_measure
from tvm_sepconv.compiler.tuning.records import TF32
from tvm_sepconv.compiler.tuning.runner import Local
from tvm_sepconv.compiler.tuning.search import BATCH, Search
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.options import BuildOptions

REGISTERS = 65536  # of a thread block, whatever the architecture
REJECTED = "Rejected: "
SPILLED = "registers that do not suffice: some are kept in memory"
TOO_MANY = "more registers than a thread block may have"
_TILING = "tvm_sepconv.tiling"


class Rejected(Exception):
    """A candidate whose library need not run."""


class Grid:
    """The candidates for the variant of a kernel that a call of this size takes.

    Parameters
    ----------
    target
        Of one architecture.
    """

    def __init__(
        self,
        config: KernelConfig,
        target: CudaTarget,
        batch: int,
        out_steps: int,
        allow_tf32: bool = False,
    ) -> None:
        (arch,) = target.archs
        self.config, self.target, self.arch = config, target, arch
        self.allow_tf32 = allow_tf32
        defaults = cuda.default_tilings(config, allow_tf32, arch)
        number = cuda.choose(config, defaults, batch, out_steps)
        self.default = defaults[number]
        self.variant = cuda.VARIANTS[number] + TF32 * allow_tf32
        self.rejections: Counter[str] = Counter()
        self.tilings = self._fitting()

    def _fitting(self) -> tuple[Any, ...]:
        every = [self.default, *cuda.candidates(self.config, self.allow_tf32, self.arch)]
        fitting = []
        for tiling in dict.fromkeys(every):
            if why := cuda.refusal(self.config, self.allow_tf32, self.arch, tiling):
                self.rejections[why] += 1
            else:
                fitting.append(tiling)
        return tuple(fitting)

    def tiling(self, decisions: Mapping[str, Any] | None) -> Any:
        """The candidate that has these decisions; None if none has."""
        try:
            tiling = cuda.tiling_from_dict(decisions or {})
        except ValueError:  # of a schedule with other decisions
            return None
        return tiling if tiling in self.tilings else None

    def neighbours(self, tiling: Any) -> list[Any]:
        """None that would have to come before the others."""
        return []

    def module(self, tiling: Any) -> tvm.IRModule:
        """What the builder gets of a candidate: its decisions; it schedules it itself."""
        return tvm.IRModule({}, attrs={_TILING: json.dumps(tiling.to_dict())})

    def write_task(self, path: Path, batch: int, steps: int) -> None:
        """See `cuda_measure.write_task`."""
        cuda_measure.write_task(path, self.config, batch, steps, self.allow_tf32)


class GridSearch(Search):
    """A `Search` of a `Grid`."""

    space: Any  # a Grid

    def start(self) -> None:
        """Get ready to build."""
        if self.replayed is None:
            place = {"target": self.target.name, "folder": str(self.folder)}
            build_one = partial(
                build_candidate, config=self.space.config, allow_tf32=self.space.allow_tf32, **place
            )
            self._builder = builder.Builder(build_one, self._pool)

    def run(self, first: Sequence[Any], seed: int) -> None:
        """Measure `first`, the default foremost, and then the others in their order."""
        tilings = dict.fromkeys([*self.trials, *first, *self.space.tilings])
        new = [tiling for tiling in tilings if tiling not in self.trials]
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            self._attempt({tiling: self.space.module(tiling) for tiling in some})
            if self._done():
                return

    def _rejected(self, tiling: Any, error: str) -> bool:
        """Count what the builder rejected, the default excepted."""
        if tiling == self.space.default or not error.startswith(REJECTED):
            return False
        # From another process it comes with its traceback, whose last line it is.
        self.space.rejections[error.strip().rpartition(REJECTED)[2]] += 1
        self.progress.rejections = dict(self.space.rejections)
        return True


def build_candidate(
    mod: tvm.IRModule, *, config: KernelConfig, target: str, folder: str, allow_tf32: bool
) -> str:
    """Write a library whose only variant is a candidate; returns its path.

    Raises
    ------
    Rejected
        If it needs more registers than there are.
    """
    tiling = cuda.tiling_from_dict(json.loads(str(mod.attrs[_TILING])))
    path = builder.library(Path(folder), tiling)
    options = BuildOptions(allow_tf32=allow_tf32)
    one = (build.Variant(tiling),)
    kernels = build.build_library(config, CudaTarget(target), path, one, options)
    if why := refusal(kernels.values()):
        path.unlink()
        raise Rejected(why)
    return str(path)


def refusal(kernels: Iterable[build.Resources]) -> str | None:
    """Say why a library is not worth running, by what nvcc says of it; None if it is."""
    for kernel in kernels:
        if kernel.spill_bytes:
            return SPILLED
        if kernel.registers * kernel.threads > REGISTERS:
            return TOO_MANY
    return None


def here() -> Local:
    """Measure on this machine's first GPU, in a process of its own."""
    runner = Local(cuda_measure.sample)
    runner.machine = cuda_graphs.machine()
    return runner
