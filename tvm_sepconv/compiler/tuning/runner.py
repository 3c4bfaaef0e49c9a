"""Where candidates are measured: in a process of this machine, or wherever a `Runner` takes them.

A wrong candidate may take the process down with it, or never return.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from tvm.support.popen_pool import PopenWorker

from tvm_sepconv.bench.machine import cpu_name
from tvm_sepconv.compiler.tuning import measure

RUN_LIMIT_SECS = 20.0  # for a library, beside the time that its calls may take
FIRST_LIMIT_SECS = 120.0  # as long as nobody knows how long a call takes
_SLOWEST = 10  # times the fastest kernel so far


class Runner(Protocol):
    """A place to measure; `boards.Boards` is one, too."""

    @property
    def workers(self) -> int:
        """How many threads may call `measure` at once and not wait for each other."""

    @property
    def machine(self) -> str:
        """Its name."""

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        """Verify libraries, then time them in alternation.

        Parameters
        ----------
        task
            What `measure.write_task` wrote.

        Returns
        -------
        list
            For each library, `rounds` samples of the seconds of one call.

        Raises
        ------
        RuntimeError
            If a library is wrong, ends the process or hangs.
        RunnerError
            If nothing can be measured there any more.
        """


def here(runtime: Path, threads: int = 1) -> Local:
    """Measure our libraries on this machine.

    Parameters
    ----------
    threads
        That one call may use.
    """
    return Local(partial(measure.sample, runtime=str(runtime), threads=threads))


def machine() -> str:
    """The name of this one, for records."""
    return f"{cpu_name()}, {os.cpu_count()} processors"


def apart(workers: int) -> ThreadPoolExecutor:
    """Threads whose processes get no signal from outside.

    Processes inherit the mask of the thread that starts them: what a terminal or `timeout` sends to
    all reaches none but the search, which can keep what was found.
    """
    mask = (signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    return ThreadPoolExecutor(workers, "tvm_sepconv", signal.pthread_sigmask, mask)


class Local:
    """A process of this machine; it starts with the first measurement, and anew if it ends.

    Parameters
    ----------
    sample
        What it calls, with the task's path, the libraries and the number of rounds.
    """

    workers = 1

    def __init__(self, sample: Callable[[str, list[str], int], list[list[float]]]) -> None:
        self._function = sample
        self.machine = machine()
        self._worker = PopenWorker()
        self._fastest_secs: float | None = None

    def close(self) -> None:
        """End the process."""
        self._worker.kill()

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        """See `Runner`."""
        limit_secs = self._limit_secs(rounds * len(libraries))
        try:
            try:
                result = self._sample(task, libraries, rounds, limit_secs)
            except ChildProcessError:  # perhaps somebody else ended it: a bad library does so again
                result = self._sample(task, libraries, rounds, limit_secs)
        except TimeoutError as error:
            raise RuntimeError(f"No result after {limit_secs:.0f} s") from error
        except ChildProcessError as error:
            raise RuntimeError("The measuring process died, twice") from error
        except Exception as error:  # of any kind: it is the candidate's
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        fastest = min(min(samples) for samples in result)
        self._fastest_secs = min(fastest, self._fastest_secs or fastest)
        return result

    def _sample(
        self, task: Path, libraries: Sequence[str], rounds: int, limit_secs: float
    ) -> list[list[float]]:
        self._worker.send(self._function, (str(task), list(libraries), rounds), None, limit_secs)
        result: list[list[float]] = self._worker.recv()
        return result

    def _limit_secs(self, samples: int) -> float:
        if self._fastest_secs is None:
            return FIRST_LIMIT_SECS
        sample_secs = max(self._fastest_secs, measure.SAMPLE_SECS)
        return RUN_LIMIT_SECS + 2 * samples * _SLOWEST * sample_secs
