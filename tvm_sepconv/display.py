"""How a search is shown: a live line a layer in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_sepconv.compiler.search import Progress
    from tvm_sepconv.compiler.tune import Result

LINE_EVERY = 8  # trials, where nobody watches

Reporter = Callable[["Progress"], None]


@contextmanager
def display() -> Iterator[Callable[[str], Reporter]]:
    """Give what makes the reporter of one layer's search, by the layer's name."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        with _live() as show:
            yield show
    else:
        yield _lines


def _lines(name: str) -> Reporter:
    def report(now: Progress) -> None:
        if now.trials % LINE_EVERY == 0 or now.trials == now.of:
            print(f"{name}: {now.trials}/{now.of} trials, {_state(now)}", flush=True)

    return report


@contextmanager
def _live() -> Iterator[Callable[[str], Reporter]]:
    from rich import progress as rich

    columns: list[Any] = [rich.TextColumn("{task.description}"), rich.BarColumn()]
    columns += [rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[state]}")]
    columns += [rich.TimeElapsedColumn(), rich.TimeRemainingColumn()]
    with rich.Progress(*columns) as bars:

        def show(name: str) -> Reporter:
            bar = bars.add_task(name, total=None, state="building")

            def report(now: Progress) -> None:
                bars.update(bar, total=now.of, completed=now.trials, state=_state(now))

            return report

        yield show


def _state(now: Progress) -> str:
    failed = now.build_failures + now.run_failures
    best, default = (f"{secs * 1e6:.1f}" for secs in (now.best_secs, now.default_secs))
    return f"best {best} µs (default {default}), {failed} failed"


def summary(result: Result) -> str:
    """Say in one line what a search found, what failed, and where the record went."""
    record, progress = result.record, result.progress
    failed = f"{progress.build_failures} builds and {progress.run_failures} runs failed"
    if progress.failure:
        failed += f" (the first: {progress.failure.strip().splitlines()[-1]})"
    if result.path is None:
        return f"nothing but the default was measured; nothing recorded; {failed}"
    default, best = record.default_secs * 1e6, record.median_secs * 1e6
    gain = f"{default / best:.2f}x" if best < default else "the default stays the best"
    return (
        f"default {default:.1f} µs, best {best:.1f} µs ({gain}), measured in turns, noise "
        f"{record.noise:.0%}; {record.trials} trials, {failed}; recorded in {result.path}"
    )
