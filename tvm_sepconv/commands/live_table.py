"""The searches as a table that is drawn anew twice a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from tvm_sepconv.commands.display import clock, first_failure, microseconds, summary
from tvm_sepconv.commands.searches import ENDED, Task, Tuning

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

REFRESH_PER_SECOND = 2  # what draws must not take time from what is measured
WIDE = 100  # columns, from where on there is room for more
CURVE_WIDTH = 14
_OTHER_LINES = 5  # besides the tasks', and what the shell wants
_STYLES = {
    "waiting": "dim", "done": "green", "failed": "bold red", "skipped": "yellow",
    "not started": "yellow",
}  # fmt: skip
_BARS = "▁▂▃▄▅▆▇█"


class LiveTable:
    """A table in a terminal; lines that are said scroll above it."""

    def __init__(self, tuning: Tuning, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.tuning = tuning
        self._over = False
        self._failures: set[str] = set()
        self.console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self.console,
            get_renderable=self._draw,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,  # tracebacks must come through as they are
            redirect_stderr=False,
        )

    def __enter__(self) -> LiveTable:
        self._live.start(refresh=True)
        # A second Ctrl-C ends the process at once: nobody would be left to show the cursor again.
        self.console.show_cursor(True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._over = True
        self._live.stop()

    def update(self, task: Task) -> None:
        """Show a task that began or went on."""
        now = task.progress
        if now and now.failure and now.failure not in self._failures:
            self._failures.add(now.failure)
            self.say(f"{task.name}: {first_failure(now.failure)}")

    def end(self, task: Task) -> None:
        """Show a task that is over."""
        if task.reason or task.unusable:
            self.say(f"{task.name}: {summary(task, self.tuning)}")

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, markup=False)

    def _draw(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        tasks = self.tuning.tasks
        shown = tasks if self._over else window(tasks, self.console.height - _OTHER_LINES)
        below = foot(self.tuning, len(tasks) - len(shown))
        return Group(self._table(shown), *[Text(below, "dim")] * bool(below))

    def _table(self, tasks: Sequence[Task]) -> Table:
        from rich.table import Table

        wide, peaks = self.console.width >= WIDE, self.tuning.peak_flops is not None
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
        names = max([len("layer"), *(len(task.name) for task in self.tuning.tasks)])
        room = self.console.width - (94 if wide else 68)
        table.add_column("layer", no_wrap=True, overflow="ellipsis", max_width=min(names, room))
        table.add_column("state", no_wrap=True, min_width=11 if wide else 9)
        heads = ["trials", f"best {self.tuning.unit}", *["peak"] * peaks, self.tuning.baseline]
        heads += ["gain", "build/run/rej." if wide else "failed", "time", "left"]
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        if wide:
            table.add_column("best so far", no_wrap=True, min_width=CURVE_WIDTH)
        for task in tasks:
            style = _STYLES.get(task.state, "")
            table.add_row(*self._cells(task, wide, peaks), style=style)
        return table

    def _cells(self, task: Task, wide: bool, peaks: bool) -> list[str]:
        share = self.tuning.share_of_peak(task)
        ended = task.state in ENDED
        gain = "=" if task.gain == 1 else f"{task.gain:.2f}×"
        counts = task.failures if wide else (sum(task.failures[:2]),)
        failures = "/".join(map(str, counts)) if any(counts) else "–"
        cells = [task.name, task.state, f"{task.done}/{task.trials}", microseconds(task.best_secs)]
        cells += ["–" if share is None else f"{share:.0%}"] * peaks
        cells += [microseconds(task.default_secs), "–" if math.isnan(task.gain) else gain]
        cells += [failures, clock(task.elapsed_secs)]
        cells += ["" if ended else clock(self.tuning.task_secs_left(task))]
        return [*cells, curve(task)] if wide else cells


def foot(tuning: Tuning, hidden: int) -> str:
    """Return the line below the table."""
    if all(task.state in ENDED for task in tuning.tasks):
        return ""
    parts = [f"and {hidden} more"] * bool(hidden)
    if tuning.stopping.is_set():
        parts.append("stopping after the trial that runs; Ctrl-C again ends it at once")
    else:
        left = tuning.secs_left()
        parts.append("Ctrl-C stops and keeps what was found")
        parts += [] if left is None else [f"{clock(left)} left in all"]
    return " · ".join(parts)


def window(tasks: Sequence[Task], lines: int) -> Sequence[Task]:
    """Return as many tasks as there is room for, the one that goes on among them."""
    first = next((i for i, task in enumerate(tasks) if task.state not in ENDED), 0)
    start = max(min(first - lines // 2, len(tasks) - lines), 0)
    return tasks[start : start + max(lines, 1)]


def curve(task: Task) -> str:
    """Return the best time after each trial so far, as bars, the last trial asked for on the right.

    The lowest bar is the best time, the highest one the first, or a tenth more than the best.
    """
    if not task.curve:
        return ""
    best = task.curve[-1]
    span = max(task.curve[0] - best, best / 10)
    filled = max(round(CURVE_WIDTH * len(task.curve) / task.trials), 1)
    # A bar for some trials shows the last of them, bars for one trial all show it.
    values = [task.curve[-(-(i + 1) * len(task.curve) // filled) - 1] for i in range(filled)]
    return "".join(_BARS[min(int((v - best) / span * 8), 7)] for v in values)
