"""How searches are shown: a live table in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from tvm_sepconv.commands.searches import Task, Tuning

LINE_EVERY = 8  # trials, where nobody watches
REASON_LINES = 12  # of an error that ended everything


class Display(Protocol):
    """Where searches are shown."""

    def update(self, task: Task) -> None:
        """Show a task that began or went on."""

    def end(self, task: Task) -> None:
        """Show a task that is over."""

    def say(self, text: str) -> None:
        """Show a line."""


@contextmanager
def display(tuning: Tuning, stream: TextIO, quiet: bool = False) -> Iterator[Display]:
    """Give what shows the searches on `stream`; `quiet` leaves nothing but their results."""
    if quiet or not live(stream):
        yield Lines(tuning, stream, quiet)
        return
    from tvm_sepconv.commands.live_table import LiveTable

    with LiveTable(tuning, stream) as table:
        yield table


def live(stream: TextIO) -> bool:
    """Whether a table can be drawn again and again."""
    able = stream.isatty() and os.environ.get("TERM") != "dumb"
    return able and importlib.util.find_spec("rich") is not None


class Lines:
    """A line every few trials, one for the first failure, and one for the result."""

    def __init__(self, tuning: Tuning, stream: TextIO, quiet: bool) -> None:
        self.tuning, self.stream, self.quiet = tuning, stream, quiet
        self._shown: dict[str, int] = {}
        self._failures: set[str] = set()

    def update(self, task: Task) -> None:
        """Show a task that began or went on."""
        now = task.progress
        if self.quiet or now is None:
            return
        if now.failure and now.failure not in self._failures:
            self._failures.add(now.failure)
            self.say(f"{task.name}: {first_failure(now.failure)}")
        due = now.trials % LINE_EVERY == 0 or now.trials == now.of
        if due and now.trials != self._shown.get(task.name, 0):
            self._shown[task.name] = now.trials
            best, default = microseconds(task.best_secs), microseconds(task.default_secs)
            left = clock(self.tuning.secs_left())
            self.say(
                f"{task.name}: {now.trials}/{now.of} trials, best {best} {self.tuning.unit} "
                f"({self.tuning.baseline} {default}), "
                f"{sum(task.failures[:2])} failed, {left} left in all"
            )

    def end(self, task: Task) -> None:
        """Show a task that is over."""
        self.say(f"{task.name}: {summary(task, self.tuning)}")

    def say(self, text: str) -> None:
        """Show a line."""
        print(text, file=self.stream, flush=True)


def first_failure(text: str) -> str:
    """Return what is said of the first failure: the last line of a traceback is its reason."""
    return f"the first failure: {_last_lines(text, 1)}"


def _last_lines(text: str, count: int) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n    ".join(lines[-count:]).strip()


def summary(task: Task, tuning: Tuning) -> str:
    """Say what a search found, what failed, and where the record went; in one line if all is well.

    A search that found nothing because everything failed says so in capitals, with the first error.
    """
    found = task.result
    if task.state == "failed":
        return f"FAILED, nothing recorded:\n    {_last_lines(task.reason, REASON_LINES)}"
    if found is None:
        return f"{task.state}. {task.reason}" if task.reason else task.state
    failed = "{} builds and {} runs failed, {} rejected".format(*task.failures)
    failure = task.progress.failure if task.progress else ""
    if task.unusable:
        return (
            f"ALL {sum(task.failures[:2])} CANDIDATES BESIDES THE DEFAULT FAILED, nothing "
            f"recorded: {failed}. The first error:\n    {_last_lines(failure, REASON_LINES)}"
        )
    failed += f" (the first: {_last_lines(failure, 1)})" if failure else ""
    parts = [f"best {microseconds(task.best_secs)} {tuning.unit}{gain(task, tuning)}"]
    if not math.isnan(task.default_secs):
        parts.insert(0, f"{tuning.baseline} {microseconds(task.default_secs)} {tuning.unit}")
    if share := tuning.share_of_peak(task):
        parts.append(f"{share:.0%} of peak")
    turns = f"measured in turns, noise {found.noise:.0%}"
    turns = turns if tuning.unit == "µs" else "modelled"
    parts.append("measured once" if math.isnan(found.noise) else turns)
    where = f"recorded in {short(found.path)}" if found.path else "not recorded"
    return f"{', '.join(parts)}; {task.done} trials, {failed}; {where}"


def gain(task: Task, tuning: Tuning) -> str:
    """Return in brackets what the search gained; nothing if nobody knows."""
    if math.isnan(task.gain):
        return ""
    if tuning.baseline == "default" and task.gain <= 1:
        return " (the default stays the best)"
    return f" ({task.gain:.2f}×)"


def overview(tuning: Tuning) -> str:
    """Say what all searches came to, where the records are, and how a stopped one goes on."""
    tasks = tuning.tasks
    done = [task for task in tasks if task.worked]
    parts = [f"{len(done)} of {len(tasks)} layers tuned in {clock(tuning.elapsed_secs)}"]
    if logs := [math.log(task.gain) for task in done if not math.isnan(task.gain)]:
        mean = math.exp(sum(logs) / len(logs))
        parts.append(f"{mean:.2f}× the {tuning.baseline} kernels' speed in the geometric mean")
    parts += [
        f"{count} {words}"
        for count, words in (
            (sum(task.broken for task in tasks), "FAILED, see above"),
            (sum(task.state == "skipped" for task in tasks), "skipped"),
            (sum(task.state == "not started" for task in tasks), "not started"),
        )
        if count
    ]
    paths = dict.fromkeys(task.result.path for task in done if task.result and task.result.path)
    lines = ["; ".join(parts), *(f"Recorded in {short(path)}" for path in paths)]
    if tuning.stopping.is_set():
        lines.append("Stopped early: the same command with --resume goes on from there")
    return "\n".join(lines)


def short(path: Path) -> Path:
    """Return the path from here, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def microseconds(secs: float) -> str:
    """Return µs, as many digits as mean something; a dash if there are none yet."""
    if not math.isfinite(secs):
        return "–"
    us = secs * 1e6
    return f"{us:.{2 if us < 10 else 1 if us < 10_000 else 0}f}"


def clock(secs: float | None) -> str:
    """Return minutes and seconds, with hours where there are some; a dash for None."""
    if secs is None or not math.isfinite(secs):
        return "–"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def as_json(task: Task, tuning: Tuning) -> dict[str, Any]:
    """Return what a script may want to know of a task, JSON-able."""
    now, found = task.progress, task.result
    build, run, rejected = task.failures
    return {
        "layer": task.name,
        "state": task.state,
        "reason": task.reason or None,
        "trials": task.done,
        "trials_asked": task.trials,
        **_costs(task, tuning),
        "noise": _number(found.noise) if found else None,
        "share_of_peak": tuning.share_of_peak(task),
        "flops": task.flops,
        "decisions": dict(found.decisions) if found and found.decisions else None,
        "recorded": str(found.path) if found and found.path else None,
        "build_failures": build,
        "run_failures": run,
        "rejected": rejected,
        "first_failure": (now.failure or None) if now else None,
        "elapsed_secs": _number(task.elapsed_secs),
    }


def _costs(task: Task, tuning: Tuning) -> dict[str, float | None]:
    """The seconds of the baseline and of the best; the cycles where those are modelled."""
    both = {tuning.baseline: _number(task.default_secs), "best": _number(task.best_secs)}
    if tuning.unit == "µs":
        return {f"{name}_secs": secs for name, secs in both.items()}
    return {f"{n}_cycles": None if secs is None else round(secs * 1e6) for n, secs in both.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
