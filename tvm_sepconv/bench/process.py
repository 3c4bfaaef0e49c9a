"""A contestant's process, as its parent sees it: started, asked, ended.

One runs at a time. Each answers only when its threads have come to rest, so nobody is timed while
another one's threads spin: in one process, or side by side, they were seen to cost others a third.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm_sepconv
from tvm_sepconv.bench.child import Child
from tvm_sepconv.bench.contestants import CONTESTANTS, Contestant

START_SECS, ANSWER_SECS = 180.0, 180.0  # how long a process may take before it is ended
MOST_DEATHS = 2  # a contestant that died so often is not started again
WORKER = ("-m", "tvm_sepconv.bench.worker")

# Every framework's own way of being told how many threads to use, before it is imported.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS",
    "TVM_SEPCONV_NUM_THREADS",
)  # fmt: skip


class ContestantError(RuntimeError):
    """A contestant that failed, in one line."""


class Worker(Child):
    """A contestant's process.

    Parameters
    ----------
    python
        Of its environment.
    folder
        Scratch, and what it writes to its standard error stream.
    cpus
        The processors it is bound to.
    path
        A folder to import this package from; None where the Python has it installed.
    """

    failure = ContestantError

    def __init__(
        self,
        contestant: Contestant,
        python: Path,
        folder: Path,
        cpus: Sequence[int],
        path: Path | None,
    ) -> None:
        command = [str(python), *WORKER, contestant.key, ",".join(map(str, cpus))]
        variables = _variables(contestant, len(cpus), path)
        super().__init__(command, variables, folder / f"{contestant.key}.log", folder)
        self.contestant, self.folder, self.threads = contestant, folder, len(cpus)
        self._deaths: list[str] = []

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises
        ------
        ContestantError
            If the contestant says that it failed, died, or did not answer in time.
        """
        if len(self._deaths) >= MOST_DEATHS:
            raise ContestantError(f"given up after: {self._deaths[-1]}")
        try:
            reply = self.exchange(json.dumps({"op": op, **fields}), ANSWER_SECS, START_SECS)
        except ContestantError as error:
            self._deaths.append(f"{op}: {error}")
            raise ContestantError(self._deaths[-1]) from error
        if "error" in reply:
            raise ContestantError(reply["error"])
        return reply


def _variables(contestant: Contestant, threads: int, path: Path | None) -> dict[str, str]:
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    result = {k: v for k, v in os.environ.items() if path is None or k not in unwanted}
    if path is not None:
        result["PYTHONPATH"] = str(path)
    result.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    # A GPU that a framework finds would compute for it.
    return {**result, "CUDA_VISIBLE_DEVICES": "", **contestant.variables}


@contextlib.contextmanager
def workers(pythons: Mapping[str, Path], threads: int) -> Iterator[dict[str, Worker]]:
    """Yield the workers of the contestants that `pythons` has, by name; ends them afterwards.

    Parameters
    ----------
    pythons
        By name of the contestant. One that is not this process's finds the package by its path.
    """
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="tvm_sepconv_bench_"))
        folder = Path(name)
        path = folder / "path"
        path.mkdir()
        (path / "tvm_sepconv").symlink_to(Path(tvm_sepconv.__file__).parent)
        cpus = processors(threads)
        result = {}
        for contestant in CONTESTANTS:
            if contestant.name in pythons:
                python = pythons[contestant.name]
                foreign = None if python == Path(sys.executable) else path
                worker = Worker(contestant, python, folder, cpus, foreign)
                stack.callback(worker.close)
                result[contestant.name] = worker
        yield result


def processors(threads: int) -> list[int]:
    """Return the processors to bind contestants to: of cores of their own while there are such.

    Raises
    ------
    ValueError
        If this process may not use so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(
            f"`--threads` must be at most {len(allowed)}, the processors this process may use. "
            f"Received: {threads}"
        )
    firsts: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            firsts.setdefault(siblings.read_text().strip(), cpu)
        except OSError:
            firsts[str(cpu)] = cpu
    cores = list(firsts.values())
    return (cores + [cpu for cpu in allowed if cpu not in cores])[:threads]
