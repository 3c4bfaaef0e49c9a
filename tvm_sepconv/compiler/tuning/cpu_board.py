"""A board whose processor is measured.

Its process calls the candidate through the runtime library, as a device does, and TVM's time
evaluator takes the time there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv import targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import board
from tvm_sepconv.compiler.tuning.board import Board, CandidateError, Identity
from tvm_sepconv.compiler.tuning.measure import SAMPLE_SECS, Case, Task

_SAME = 1  # the padding of every task
_SIGALRM = -14
# Arm's part numbers in /proc/cpuinfo, of the cores that targets name.
_PARTS = {
    "0xd03": "cortex-a53",
    "0xd05": "cortex-a55",
    "0xd08": "cortex-a72",
    "0xd0b": "cortex-a76",
    "0xd0c": "neoverse-n1",
}


class CpuBoard(Board):
    """See `Board`; its native library is the runtime library."""

    @staticmethod
    def native(target: CpuTarget, output: Path) -> None:
        """Write the runtime library."""
        build.build_runtime(target, output)

    def identity(self, target: CpuTarget) -> Identity:
        """Its name and processors; a CandidateError if they are other than the target's."""
        lines = (line.partition(":") for line in self._file("/proc/cpuinfo").splitlines())
        fields = [(key.strip(), text.strip()) for key, _, text in lines]
        flags = {f for key, text in fields if key in ("flags", "Features") for f in text.split()}
        if lacking := sorted(set(targets.FEATURES[target.isa]) - flags):
            raise CandidateError(
                f"its processor lacks {', '.join(lacking)}, which {target.name} uses. Choose "
                "another --target or --key"
            )
        cores = {_PARTS.get(text, "") for key, text in fields if key == "CPU part"}
        core = target.name.partition("@")[2]
        if core and cores and not cores & {core, ""}:
            raise CandidateError(
                f"its cores are {', '.join(sorted(cores))}, and what is measured there would be "
                f"recorded for {target.name}. Choose another --target or --key"
            )
        model = self._file("/proc/device-tree/model").strip("\0\n ")
        names = [model, *(text for key, text in fields if key == "model name"), target.name]
        count = sum(key == "processor" for key, _ in fields)
        return Identity(f"{next(filter(None, names))}, {count} processors", target)

    def sample(
        self, data: Task, libraries: Sequence[str], rounds: int, threads: int
    ) -> list[list[float]]:
        """See `Board`."""
        self._native["set_num_threads"](threads)
        wide = data.kernel.accumulation_dtype
        weights = [None if a is None else self._tensor(a.astype(wide)) for a in data.weights]
        layers = [
            self._layer(f"{index}.so", library, weights) for index, library in enumerate(libraries)
        ]
        for case in reversed(data.cases):  # the measured one, which comes first, stays on the board
            operands = self._tensor(case.x), self._tensor(board.nothing(case))
            for layer in layers:
                self._verify(layer, *operands, case)
        timers = [self._timer(layer, *operands) for layer in layers]
        samples: list[list[float]] = [[] for _ in layers]
        for _ in range(rounds):
            for timer, times in zip(timers, samples, strict=True):
                times.append(timer())
        return samples

    def _layer(self, name: str, library: str, weights: Sequence[Any]) -> int:
        layer: int = self._native["create"](self._sent(library, name), *weights, _SAME, 0, 0)
        if not layer:
            raise self._error()
        return layer

    def _verify(self, layer: int, x: Any, y: Any, case: Case) -> None:
        status = self._native["try_run"](layer, x, y, board.CALL_LIMIT_SECS)
        if status == _SIGALRM:
            raise CandidateError(f"no result after {board.CALL_LIMIT_SECS} s")
        if status < 0:
            raise CandidateError(f"the call crashes: signal {-status}")
        y.copyfrom(board.nothing(case))
        status = status or self._native["run"](layer, x, y)
        if status:
            raise CandidateError(f"the call fails with status {status} of the runtime library")
        board.check(case, y)

    def _timer(self, layer: int, x: Any, y: Any) -> Callable[[], float]:
        """What takes one sample: a call that is not timed, and so many that are."""

        def seconds(calls: int) -> float:
            evaluator = self._native.time_evaluator("run", self._cpu, number=calls)
            return float(evaluator(layer, x, y).mean)

        calls = max(1, round(SAMPLE_SECS / max(seconds(3), 1e-9)))
        return lambda: seconds(calls)

    def _file(self, path: str) -> str:
        """The beginning of a text file, "" if it cannot be read."""
        return self._text("read_file", path) or ""
