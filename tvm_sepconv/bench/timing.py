"""Medians of calls that take turns, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

SAMPLE_NS = 200_000  # a sample repeats short calls to last this long: the clock's own cost vanishes
SAMPLES_A_TURN = 4
MAX_ROUNDS = 25
IDLE_LIMIT_SECS = 0.25
AWAKE_SECS = 0.005  # a thread woken from sleep may share its caller's processor for a while


class Samples(NamedTuple):
    """The times of one call, in microseconds; `number` of them were taken."""

    median_us: float
    p10_us: float
    p90_us: float
    best_us: float
    number: int


def interleave(
    calls: Mapping[str, Callable[[], object]], budget_secs: float, *, settle: bool = False
) -> dict[str, Samples]:
    """Time calls in turns, ABAB…: what slows the machine down for a while slows all of them.

    Each turn starts with a call that is not timed: it brings the caller's own data back into the
    caches, where the others' was. After settling it is as many as it takes for the threads to be
    awake, each on a processor of its own.

    Parameters
    ----------
    budget_secs
        About how long all of it may take; every call gets one turn at least.
    settle
        Wait before each turn until the threads of the one before have stopped spinning. For calls
        that use several threads.
    """
    repeats = {name: _repeats(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(1, MAX_ROUNDS + 1):
        for name, call in calls.items():
            if settle:
                wait_until_idle()
            times[name] += _turn(call, repeats[name], AWAKE_SECS if settle else 0.0)
        spent = time.perf_counter() - start
        if spent * (done + 1) / done > budget_secs:
            break
    return {name: _summary(values) for name, values in times.items()}


def _turn(call: Callable[[], object], repeats: int, warm_secs: float) -> list[float]:
    """Return the microseconds of one call, SAMPLES_A_TURN times."""
    warm = time.perf_counter() + warm_secs
    call()
    while time.perf_counter() < warm:
        call()
    result = []
    for _ in range(SAMPLES_A_TURN):
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        result.append((time.perf_counter_ns() - start) / repeats / 1e3)
    return result


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(3):  # warm: allocations, lazy set-up, the clock frequency
        call()
    start = time.perf_counter_ns()
    call()
    return max(1, SAMPLE_NS // max(time.perf_counter_ns() - start, 1))


def _summary(values: list[float]) -> Samples:
    p10, median, p90 = (float(v) for v in np.percentile(values, [10, 50, 90]))
    return Samples(median, p10, p90, min(values), len(values))


def wait_until_idle() -> None:
    """Return when no thread of this process runs any more, or after IDLE_LIMIT_SECS.

    ONNX Runtime's threads spin for some 50 ms after a call, in the hope of another one: on the
    cores that the next contestant needs.
    """
    end = time.perf_counter() + IDLE_LIMIT_SECS
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.0004:
            return
