"""Searches for several layers, one after the other: their share of the time, and how they stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from tvm_sepconv import jit

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.search import Progress
    from tvm_sepconv.compiler.tuning.tune import Result

ENDED = ("done", "failed", "skipped", "not started")
_STOPPING = b"Stopping after the trial that runs; once more ends it at once\n"


@dataclass
class Task:
    """One layer's search.

    Parameters
    ----------
    flops
        Of one call.
    trials
        Asked for.
    usual
        Whether it computes in float32, which the machine's peak is measured for.
    recorded_secs
        Of the kernel to compare with, where the search does not measure the default one.
    state
        "waiting", what the search does just now, or one of `ENDED`.
    reason
        Why it failed or was skipped.
    stop
        When its share of the time is over, as `time.monotonic` has it.
    curve
        The best seconds after each trial.
    """

    name: str
    flops: int
    trials: int
    usual: bool = True
    recorded_secs: float = math.nan
    state: str = "waiting"
    reason: str = ""
    progress: Progress | None = None
    result: Result | None = None
    began: float = math.nan
    ended: float = math.nan
    stop: float = math.inf
    curve: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Trials so far."""
        return self.progress.trials if self.progress else 0

    @property
    def failures(self) -> tuple[int, int, int]:
        """Builds and runs that failed, and candidates that were rejected."""
        now = self.progress
        return (now.build_failures, now.run_failures, now.rejected) if now else (0, 0, 0)

    @property
    def default_secs(self) -> float:
        """Of the default decisions: measured in turns at the end, until then by themselves."""
        now = self.result or self.progress
        return now.default_secs if now and now.default_secs > 0 else self.recorded_secs

    @property
    def best_secs(self) -> float:
        """The least so far; at the end of what is kept."""
        now = self.result or self.progress
        return now.best_secs if now else math.nan

    @property
    def gain(self) -> float:
        """How many times as fast the best is as the default; NaN as long as nobody knows."""
        return self.default_secs / self.best_secs

    @property
    def elapsed_secs(self) -> float:
        """Since it began."""
        return (self.ended if self.state in ENDED else time.monotonic()) - self.began

    @property
    def unusable(self) -> bool:
        """Whether nothing but the default could be measured, because all others failed."""
        builds, runs, _ = self.failures
        return self.state == "done" and builds + runs >= max(self.done - 1, 1)

    @property
    def worked(self) -> bool:
        """Whether it found something, if only that the default is the best."""
        return self.state == "done" and not self.unusable

    @property
    def broken(self) -> bool:
        """Whether everything failed."""
        return self.state == "failed" or self.unusable

    def end(self, state: str, reason: str = "") -> None:
        """Note that it is over."""
        self.state, self.reason, self.ended = state, reason, time.monotonic()

    def report(self, now: Progress) -> None:
        """Note what the search says."""
        self.progress, self.state = now, now.phase
        if now.best_secs > 0:
            self.curve += [now.best_secs] * (now.trials - len(self.curve))


@dataclass
class Tuning:
    """All of a command's searches.

    Parameters
    ----------
    deadline
        When all must be over, as `time.monotonic` has it.
    peak_flops
        Multiply-adds' rate with all threads, for float32; None where it is not known.
    stopping
        Whether the user has asked to stop.
    baseline
        What the best is compared with: "default", or "recorded" for MetaSchedule's own space.
    unit
        What times are shown in: "µs", or "cycles" of a modelled core, whose seconds have a million.
    """

    tasks: Sequence[Task]
    deadline: float = math.inf
    peak_flops: float | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    baseline: str = "default"
    unit: str = "µs"
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed_secs(self) -> float:
        """Since the first search began."""
        return time.monotonic() - self.began

    def share_of_peak(self, task: Task) -> float | None:
        """What the best kernel so far reaches; None if it is not known."""
        if self.peak_flops is None or not task.usual or not task.best_secs > 0:
            return None
        return task.flops / task.best_secs / self.peak_flops

    def task_secs_left(self, task: Task) -> float | None:
        """How long a task may take yet; None as long as nobody can know."""
        if task.state in ENDED:
            return 0.0
        # The search's own clock goes on where it was resumed.
        rates = [p.elapsed_secs / p.trials for t in self.tasks if (p := t.progress) and p.trials]
        if (now := task.progress) and now.trials:
            secs = (task.trials - now.trials) * now.elapsed_secs / now.trials
        elif rates:
            secs = task.trials * sum(rates) / len(rates)
        else:
            return None
        return min(secs, max(task.stop - time.monotonic(), 0.0))

    def secs_left(self) -> float | None:
        """How long all may take yet; None as long as nobody can know."""
        left = [self.task_secs_left(task) for task in self.tasks]
        limit = max(self.deadline - time.monotonic(), 0.0)
        if any(secs is None for secs in left):
            return limit if math.isfinite(limit) else None
        return min(sum(secs for secs in left if secs is not None), limit)


def search(
    task: Task,
    tuning: Tuning,
    update: Callable[[Task], None],
    tune: Callable[..., Result],
) -> None:
    """Search for one layer, unless there is no time left for it.

    Parameters
    ----------
    update
        Called whenever there is something new to show.
    tune
        Called with what `tune.tune` takes to report and to be stopped.

    Raises
    ------
    RuntimeError
        TVM's own errors, which are subclasses. Its others, and the system's, are the task's.
    """
    now = time.monotonic()
    if tuning.stopping.is_set() or now >= tuning.deadline:
        task.end("not started")
        return
    waiting = sum(other.state == "waiting" for other in tuning.tasks)
    task.began, task.state = now, "building"
    task.stop = now + (tuning.deadline - now) / waiting

    def report(progress: Progress) -> None:
        task.report(progress)
        update(task)

    update(task)
    lost = jit.compiler("tvm_sepconv.compiler.tuning.measure").RunnerError
    try:
        result = tune(
            report=report,
            should_stop=lambda: tuning.stopping.is_set() or time.monotonic() >= task.stop,
        )
        task.result = result
        task.end("done")
    except ValueError as error:  # its input is too short; the others' may not be
        task.end("skipped", str(error))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, lost):
            raise
        task.end("failed", str(error))
        if isinstance(error, lost):  # nothing can be measured there any more
            tuning.stopping.set()


@contextmanager
def interrupts(stopping: threading.Event, silently: bool) -> Iterator[list[int]]:
    """Make the first Ctrl-C or SIGTERM an event; the next one ends the process there and then.

    Parameters
    ----------
    silently
        Whether somebody else says so.

    Yields
    ------
    list
        The signals that came.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stopping.set()
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        if not silently:
            os.write(2, _STOPPING)  # `print` may be in the middle of a line

    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
