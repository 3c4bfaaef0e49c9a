"""Medians of calls that take turns, so that all of them see the same machine."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SAMPLE_NS = 200_000  # a sample repeats short calls to last this long: the clock's own cost vanishes
SAMPLES_A_TURN = 4
MAX_ROUNDS = 25
SLOW_US = 50_000.0  # beyond, caches do not matter and time does: no call goes untimed
IDLE_LIMIT_SECS = 0.25
AWAKE_SECS = 0.005  # a thread woken from sleep may share its caller's processor for a while
ALIGNMENT_BYTES = 64  # of inputs, everybody's: some frameworks copy what lies otherwise

Array = npt.NDArray[Any]


class Samples(NamedTuple):
    """The times of one call, in microseconds; `number` of them were taken."""

    median_us: float
    p10_us: float
    p90_us: float
    best_us: float
    number: int


class Turn(NamedTuple):
    """How a turn goes: untimed calls for `warm_secs`, one at least, then `samples` of `repeats`.

    With `warm_secs` None there is no untimed call.
    """

    repeats: int
    samples: int
    warm_secs: float | None

    def secs(self, call_us: float) -> float:
        """About how long it takes if a call takes so long."""
        calls = self.repeats * self.samples + (self.warm_secs is not None)
        return calls * call_us / 1e6 + (self.warm_secs or 0.0)


def plan(call_us: float, warm_secs: float) -> Turn:
    """Return the turn for a call that takes about so long."""
    if call_us > SLOW_US:
        return Turn(1, 1, None)
    return Turn(max(1, int(SAMPLE_NS / 1e3 / max(call_us, 1e-3))), SAMPLES_A_TURN, warm_secs)


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
    warm_secs = AWAKE_SECS if settle else 0.0
    turns = {name: plan(estimate_us(call), warm_secs) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(1, MAX_ROUNDS + 1):
        for name, call in calls.items():
            if settle:
                wait_until_idle()
            times[name] += take(call, turns[name])
        spent = time.perf_counter() - start
        if spent * (done + 1) / done > budget_secs:
            break
    return {name: summary(values) for name, values in times.items()}


def estimate_us(call: Callable[[], object]) -> float:
    """Return about what a call takes, in µs."""
    took_us = 0.0
    for _ in range(4):  # the first three warm: allocations, lazy set-up, the clock frequency
        start = time.perf_counter_ns()
        call()
        took_us = (time.perf_counter_ns() - start) / 1e3
        if took_us > SLOW_US:
            break
    return took_us


def take(call: Callable[[], object], turn: Turn) -> list[float]:
    """Take a turn; returns the microseconds of one call, a sample each."""
    if turn.warm_secs is not None:
        end = time.perf_counter() + turn.warm_secs
        call()
        while time.perf_counter() < end:
            call()
    result = []
    for _ in range(turn.samples):
        start = time.perf_counter_ns()
        for _ in range(turn.repeats):
            call()
        result.append((time.perf_counter_ns() - start) / turn.repeats / 1e3)
    return result


def summary(values: Sequence[float]) -> Samples:
    """Summarise the times of one call, in µs."""
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


def aligned_copies(array: Array, count: int) -> list[Array]:
    """Return contiguous copies of an array, each starting on a cache line, behind each other."""
    step = -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    block = np.empty(count * step + ALIGNMENT_BYTES, np.uint8)
    start = -block.ctypes.data % ALIGNMENT_BYTES
    result = []
    for offset in range(start, start + count * step, max(step, 1)):
        copy = block[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        result.append(copy)
    return result


def rotating(call: Callable[[Array], object], inputs: Sequence[Array]) -> Callable[[], object]:
    """Return the call on the next of `inputs`, whose output lives as long as that input rests.

    With one input it is the plain call. With more than fit into the caches, neither an input nor
    the memory that an output goes to is in them.
    """
    if len(inputs) == 1:
        (x,) = inputs
        return lambda: call(x)
    following, outputs = itertools.cycle(inputs), deque[object](maxlen=len(inputs))
    return lambda: outputs.append(call(next(following)))
