"""The contest: everybody is checked, then timed in turns; nothing is timed before it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.process import ContestantError, Worker
from tvm_sepconv.bench.report import OURS
from tvm_sepconv.bench.timing import AWAKE_SECS, Samples, Turn, plan, summary, wait_until_idle

ROUNDS = 40  # machines that others share are slow for a second now and then: a row outlasts that
ROW_SECS = 6.0  # for the turns of a row; preparing and verifying come on top
CHOICE_SECS = 0.2  # to find the fastest form, for each of them
KERNEL_SECS = 0.5
WARM_SECS = 0.001  # at the head of a turn on one thread; several threads have to wake up as well
LEAST_SAMPLES = 3
LONGEST_US = 1e6  # of a call of one that is no peer: beyond, its place in the row is left empty
CASE = "case.npz"


@dataclass
class Outcome:
    """What a row's contest gave, by contestant: times and forms, or why there are none."""

    whole_call: dict[str, Samples] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def hold(
    contestants: Mapping[str, Worker],
    case: Case,
    copies: int,
    progress: Callable[[str], None],
) -> Outcome:
    """Prepare, verify and time everybody on one case.

    Parameters
    ----------
    copies
        Of the input, which calls go through in turn.
    """
    outcome = Outcome()
    for folder in {worker.folder for worker in contestants.values()}:
        case.save(folder / CASE)
    turns: dict[str, tuple[Turn, int]] = {}
    for name, worker in contestants.items():
        progress(f"{name} prepares")
        try:
            form, call_us = _prepare(worker, case, copies)
        except (ContestantError, AssertionError, ValueError) as error:
            outcome.failures[name] = " ".join(str(error).split())
            continue
        outcome.forms[name] = form
        turns[name] = _turns(call_us, worker.threads, ROW_SECS / len(contestants))
    progress("taking turns")
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS):
        for name, (turn, of_rounds) in turns.items():
            if name in outcome.failures or not _takes_part(number, of_rounds):
                continue
            try:
                times[name] += contestants[name].ask("turn", **turn._asdict())["times_us"]
            except ContestantError as error:
                outcome.failures[name] = str(error)
    for name, values in times.items():
        if name in outcome.failures:
            del outcome.forms[name]
        else:
            outcome.whole_call[name] = summary(values)
    return outcome


def _prepare(worker: Worker, case: Case, copies: int) -> tuple[str, float]:
    """Return the fastest form if all are right, and about what a call takes in µs."""
    contestant, file = worker.contestant, worker.folder / CASE
    answer = contestant.answer(case)
    reply = worker.ask(
        "prepare", case=str(file), threads=worker.threads, copies=copies, folder=str(worker.folder)
    )
    for form, path in reply["forms"]:
        check(f"{contestant.name} ({form})", np.load(path), *answer)
    wait_until_idle()  # the checks' own threads
    choice = worker.ask("choose", secs=CHOICE_SECS)
    if choice["call_us"] > LONGEST_US and not contestant.counts and contestant.name != OURS:
        raise ContestantError(f"left out: a call takes {choice['call_us'] / 1e6:.1f} s")
    return choice["form"], choice["call_us"]


def _turns(call_us: float, threads: int, share_secs: float) -> tuple[Turn, int]:
    """Return how a contestant's turns go and in how many rounds it has one."""
    turn = plan(call_us, WARM_SECS if threads == 1 else AWAKE_SECS)
    rounds = int(share_secs / turn.secs(call_us))
    return turn, min(max(rounds, -(-LEAST_SAMPLES // turn.samples)), ROUNDS)


def _takes_part(number: int, of_rounds: int) -> bool:
    """Whether one that is in so many of all rounds is in this one: spread over them evenly."""
    return number * of_rounds // ROUNDS != (number + 1) * of_rounds // ROUNDS


def kernel_alone(worker: Worker, isa: str) -> tuple[Samples, Samples]:
    """Return the times of our kernel alone, on one thread, and of the loop at the peak beside it.

    Raises
    ------
    ContestantError
        If the kernel fails or is wrong.
    """
    reply = worker.ask("kernel", isa=isa, secs=KERNEL_SECS)
    return Samples(**reply["kernel"]), Samples(**reply["peak"])
