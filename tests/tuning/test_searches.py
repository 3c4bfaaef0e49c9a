"""Several searches: their share of the time, what ends them, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_searches import FakeTune

from tvm_sepconv.commands import searches
from tvm_sepconv.commands.searches import Task, Tuning, interrupts, search
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.compiler.tuning.tune import Result


def run(tuning: Tuning, *tunes: Callable[..., Any]) -> list[str]:
    """Search for every task; returns their states."""
    for task, tune in zip(tuning.tasks, tunes, strict=True):

        def named(tune: Callable[..., Any] = tune, name: str = task.name, **more: Any) -> Result:
            found: Result = tune(None, workload=name, trials=8, **more)
            return found

        search(task, tuning, lambda task: None, named)
    return [task.state for task in tuning.tasks]


def tasks(count: int) -> list[Task]:
    return [Task(f"L{i}", flops=1, trials=8) for i in range(count)]


def test_a_search_ends_with_its_result() -> None:
    tuning = Tuning(tasks(1))
    assert run(tuning, FakeTune(None)) == ["done"]
    (task,) = tuning.tasks
    assert (task.done, task.best_secs, task.default_secs) == (8, pytest.approx(1e-4), 2e-4)
    assert len(task.curve) == 8
    assert task.elapsed_secs >= 0
    assert task.worked
    assert not task.broken


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ValueError("too short"), "skipped"),
        (RuntimeError("the default kernel fails"), "failed"),
        (OSError("no space left"), "failed"),
    ],
)
def test_what_ends_one_search_does_not_end_the_others(error: Exception, state: str) -> None:
    tuning = Tuning(tasks(2))
    assert run(tuning, FakeTune(None, error=error), FakeTune(None)) == [state, "done"]
    assert tuning.tasks[0].reason == str(error)
    assert tuning.tasks[0].broken is (state == "failed")
    assert not tuning.tasks[0].worked


def test_nothing_more_is_measured_where_nothing_can_be() -> None:
    tuning = Tuning(tasks(2))
    lost = FakeTune(None, error=RunnerError("the board is gone"))
    assert run(tuning, lost, FakeTune(None)) == ["failed", "not started"]


def test_errors_of_tvm_itself_pass() -> None:
    class InternalError(RuntimeError):
        pass

    with pytest.raises(InternalError):
        run(Tuning(tasks(1)), FakeTune(None, error=InternalError("a bug")))


def test_a_search_in_which_all_else_failed_is_broken() -> None:
    tuning = Tuning(tasks(2))
    run(tuning, FakeTune(None, failing=2), FakeTune(None, failing=3))
    assert [task.broken for task in tuning.tasks] == [True, False]
    assert [task.worked for task in tuning.tasks] == [False, True]


def test_time_is_divided_and_what_is_left_over_goes_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(searches.time, "monotonic", lambda: now[0])

    def pass_time(name: str, trial: int) -> None:
        now[0] += {"L0": 1.0, "L1": 5.0, "L2": 18.0}[name]

    tuning = Tuning(tasks(4), deadline=36.0)
    tune = FakeTune(None, each=pass_time)
    # 8 s of the first one's 9; 10 of a third of 28, since a trial is not cut off; 18 of 18 / 2.
    assert run(tuning, tune, tune, tune, tune) == ["done", "done", "done", "not started"]
    assert [task.done for task in tuning.tasks] == [8, 2, 1, 0]
    assert [task.stop for task in tuning.tasks[:3]] == [9.0, pytest.approx(8 + 28 / 3), 27.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    stopping = threading.Event()
    with interrupts(stopping, silently=False) as received:
        assert not stopping.is_set()
        os.kill(os.getpid(), number)
        assert stopping.is_set()
        assert received == [number]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert {n: signal.getsignal(n) for n in before} == before
    assert "Stopping after the trial that runs; once more" in capfd.readouterr().err


def test_a_signal_stops_the_search_that_runs_and_keeps_it() -> None:
    tuning = Tuning(tasks(2))

    def interrupt(name: str, trial: int) -> None:
        if trial == 3:
            os.kill(os.getpid(), signal.SIGINT)

    tune = FakeTune(None, each=interrupt)
    with interrupts(tuning.stopping, silently=True):
        assert run(tuning, tune, tune) == ["done", "not started"]
    assert tuning.tasks[0].done == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    code = (
        "import os, threading\nfrom tvm_sepconv.commands.searches import interrupts\n"
        "with interrupts(threading.Event(), silently=True):\n"
        f"    os.kill(os.getpid(), {number})\n    print('once', flush=True)\n"
        f"    os.kill(os.getpid(), {number})\n    print('twice', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-number, "once\n")
