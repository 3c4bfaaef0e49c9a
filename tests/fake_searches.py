"""Searches that were never made: progress and results for what shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tvm_sepconv.commands.searches import Task
from tvm_sepconv.compiler.tuning.search import Progress
from tvm_sepconv.compiler.tuning.tune import Result


def result(
    default_us: float = 200.0, best_us: float = 100.0, path: Path | None = None, **changes: Any
) -> Result:
    """What a search found; a path is that of the log it was recorded in."""
    values = {"noise": 0.012, "decisions": {"step_tile": 96}, "path": path, **changes}
    progress = Progress(of=8, trials=8)
    return Result(progress, Path("history.jsonl"), default_us / 1e6, best_us / 1e6, **values)


def ended(name: str = "QN-B1", found: Result | None = None, **progress: Any) -> Task:
    """A task that is done."""
    task = Task(name, flops=10_000_000, trials=8)
    usual = {"of": 8, "trials": 8, "best_secs": 1e-4, "elapsed_secs": 65.0}
    task.report(Progress(**{**usual, **progress}))
    task.began, task.result = 0.0, found or result(path=Path("x.jsonl"))
    task.end("done")
    task.ended = 65.0
    return task


class FakeTune:
    """Stands in the place of `tune.tune`: eight trials from 200 µs down to 100 µs.

    Parameters
    ----------
    failing
        From this trial on the builds fail.
    each
        Called after every trial, with the layer's name.
    """

    def __init__(
        self,
        path: Path | None,
        failing: float = math.inf,
        each: Callable[[str, int], None] = lambda name, trial: None,
        error: Exception | None = None,
    ) -> None:
        self.path, self.failing, self.each, self.error = path, failing, each, error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, config: Any, **settings: Any) -> Result:
        self.calls.append({"config": config, **settings})
        if self.error is not None:
            raise self.error
        now = Progress(of=settings["trials"])
        while now.trials < now.of and not (now.trials and settings["should_stop"]()):
            now.phase = "measuring"
            settings["report"](now)
            now.trials += 1
            if now.trials >= self.failing:
                now.build_failures += 1
                now.failure = "Traceback:\n  somewhere\nLookupError: no such vector"
            else:
                now.best_secs = 2e-4 - 1e-4 * (now.trials - 1) / (now.of - 1)
                now.default_secs = 2e-4
            settings["report"](now)
            self.each(settings["workload"], now.trials)
        now.phase = "comparing"
        settings["report"](now)
        found = result(best_us=now.best_secs * 1e6, path=self.path)
        return Result(now, *list(vars(found).values())[1:])
