"""How searches are shown: texts, lines and the live table."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_searches import ended, result

from tvm_sepconv.commands import display, searches
from tvm_sepconv.commands.display import clock, microseconds, overview, summary
from tvm_sepconv.commands.live_table import CURVE_WIDTH, LiveTable, curve, foot, window
from tvm_sepconv.commands.searches import Task, Tuning
from tvm_sepconv.compiler.tuning.search import Progress


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that it is, in a list to change it in."""
    now = [1000.0]
    monkeypatch.setattr(searches.time, "monotonic", lambda: now[0])
    return now


def task(name: str = "QN-B1", state: str = "measuring", trials: int = 4, **progress: Any) -> Task:
    one = Task(name, flops=10_000_000, trials=8, began=990.0)
    if trials:
        secs = {"default_secs": 2e-4, "best_secs": 1e-4, "elapsed_secs": 10.0}
        one.report(Progress(**{"of": 8, "trials": trials, "phase": state, **secs, **progress}))
    one.state = state
    return one


# ---- texts -------------------------------------------------------------------------------------

FAILING = {"build_failures": 6, "run_failures": 1, "failure": "Traceback:\n  there\nno such tile"}


def _failed(reason: str) -> Task:
    one = task(trials=0)
    one.end("failed", reason)
    return one


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        pytest.param(
            ended(),
            "default 200.0 µs, best 100.0 µs (2.00×), 50% of peak, measured in turns, noise 1%; "
            "8 trials, 0 builds and 0 runs failed, 0 rejected; recorded in x.jsonl",
            id="tuned",
        ),
        pytest.param(
            ended(found=result(best_us=200, path=Path("x"))),
            "default 200.0 µs, best 200.0 µs (the default stays the best), 25% of peak, measured "
            "in turns, noise 1%; 8 trials, 0 builds and 0 runs failed, 0 rejected; recorded in x",
            id="default",
        ),
        pytest.param(
            ended(found=result(noise=math.nan), rejections={"too long": 3}),
            "default 200.0 µs, best 100.0 µs (2.00×), 50% of peak, measured once; 8 trials, "
            "0 builds and 0 runs failed, 3 rejected; not recorded",
            id="replayed",
        ),
        pytest.param(
            ended(**{**FAILING, "build_failures": 2}),
            "default 200.0 µs, best 100.0 µs (2.00×), 50% of peak, measured in turns, noise 1%; "
            "8 trials, 2 builds and 1 runs failed, 0 rejected (the first: no such tile); "
            "recorded in x.jsonl",
            id="some-failed",
        ),
        pytest.param(
            ended(**FAILING),
            "ALL 7 CANDIDATES BESIDES THE DEFAULT FAILED, nothing recorded: 6 builds and 1 runs "
            "failed, 0 rejected. The first error:\n    Traceback:\n      there\n    no such tile",
            id="all-failed",
        ),
        pytest.param(
            _failed("\n".join(map(str, range(20)))),
            "FAILED, nothing recorded:\n    " + "\n    ".join(map(str, range(8, 20))),
            id="failed",
        ),
    ],
)
def test_summaries(shown: Task, expected: str) -> None:
    assert summary(shown, Tuning([shown], peak_flops=2e11)) == expected


def test_metaschedules_own_space_is_compared_with_the_record() -> None:
    one = ended(found=result(math.nan, 100, noise=math.nan, decisions=None))
    tuning = Tuning([one], baseline="recorded")
    assert summary(one, tuning).startswith("best 100.0 µs, measured once; 8 trials")
    assert "geometric mean" not in overview(tuning)
    one.recorded_secs = 8e-5
    assert summary(one, tuning).startswith("recorded 80.0 µs, best 100.0 µs (0.80×), measured")
    assert "0.80× the recorded kernels' speed in the geometric mean" in overview(tuning)
    assert display.as_json(one, tuning)["recorded_secs"] == 8e-5


def test_the_overview_counts_everything(clock_at: list[float], tmp_path: Path) -> None:
    late, short = task(trials=0), task(trials=0)
    late.end("not started")
    short.end("skipped", "too short")
    tasks = [ended(), ended(found=result(best_us=400, path=Path("x.jsonl"))), ended(**FAILING)]
    tuning = Tuning([*tasks, _failed("x"), short, late])
    clock_at[0] += 3725
    assert overview(tuning) == (
        "2 of 6 layers tuned in 1:02:05; 1.00× the default kernels' speed in the geometric mean; "
        "2 FAILED, see above; 1 skipped; 1 not started\nRecorded in x.jsonl"
    )
    tuning.stopping.set()
    last = overview(tuning).splitlines()[-1]
    assert last == "Stopped early: the same command with --resume goes on from there"


def test_paths_are_shown_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert display.short(tmp_path / "logs" / "a.jsonl") == Path("logs", "a.jsonl")
    assert display.short(Path("/elsewhere")) == Path("/elsewhere")


@pytest.mark.parametrize(
    ("secs", "expected"), [(None, "–"), (math.nan, "–"), (59.6, "1:00"), (3599, "59:59"),
                           (3600, "1:00:00")],
)  # fmt: skip
def test_clock(secs: float | None, expected: str) -> None:
    assert clock(secs) == expected


@pytest.mark.parametrize(
    ("secs", "expected"), [(math.nan, "–"), (1.234e-6, "1.23"), (9e-3, "9000.0"), (0.02, "20000")]
)
def test_microseconds(secs: float, expected: str) -> None:
    assert microseconds(secs) == expected


def test_json_has_no_numbers_that_json_has_not() -> None:
    one = task(trials=0)
    one.began = math.nan
    one.end("not started")
    plain = display.as_json(one, Tuning([one]))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["state"], plain["best_secs"], plain["elapsed_secs"]) == (
        "not started",
        None,
        None,
    )
    plain = display.as_json(ended(**FAILING), Tuning([one], peak_flops=2e11))
    assert (plain["build_failures"], plain["run_failures"], plain["rejected"]) == (6, 1, 0)
    assert (plain["share_of_peak"], plain["decisions"]) == (0.5, {"step_tile": 96})
    assert "no such tile" in plain["first_failure"]


# ---- lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_lines(quiet: bool, clock_at: list[float]) -> None:
    stream = io.StringIO()
    one = Task("QN-B1", flops=1, trials=10, began=clock_at[0])
    now = Progress(of=10, default_secs=2e-4, best_secs=1e-4)
    with display.display(Tuning([one]), stream, quiet) as show:
        for now.trials in range(1, 11):
            clock_at[0] += 2
            now.elapsed_secs += 2
            if now.trials == 3:
                now.build_failures, now.failure = 1, "Traceback:\nno such tile"
            for now.phase in ("building", "measuring"):  # is reported too, and is no trial
                one.report(now)
                show.update(one)
        one.result = result(path=Path("x.jsonl"))
        one.end("done")
        show.end(one)
    lines = stream.getvalue().splitlines()
    assert lines.pop().startswith("QN-B1: default 200.0 µs, best 100.0 µs (2.00×), measured in")
    state = "trials, best 100.0 µs (default 200.0), 1 failed"
    expected = [
        "QN-B1: the first failure: no such tile",
        f"QN-B1: 8/10 {state}, 0:04 left in all",
        f"QN-B1: 10/10 {state}, 0:00 left in all",
    ]
    assert lines == ([] if quiet else expected)


@pytest.mark.parametrize(
    ("terminal", "kind", "expected"),
    [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_only_a_terminal_shows_the_table(
    terminal: bool, kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", kind)
    assert display.live(sys.stdout) is expected


def test_without_rich_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(display.importlib.util, "find_spec", lambda name: None)
    with display.display(Tuning([]), sys.stdout) as show:
        assert isinstance(show, display.Lines)


# ---- the live table ----------------------------------------------------------------------------


def drawn(tuning: Tuning, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The table's lines on a screen of that size."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    table = LiveTable(tuning, io.StringIO())
    with table.console.capture() as capture:
        table.console.print(table._draw())
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize(
    ("columns", "failures", "more"), [(80, "3", []), (120, "2/1/7", ["▅▅▅▁▁▁▁"])]
)
def test_the_table(
    columns: int, failures: str, more: list[str], clock_at: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    going = task(build_failures=2, run_failures=1, rejections={"too long": 7}, best_secs=1.9e-4)
    going.curve = [2e-4, 2e-4, 1.9e-4, 1.9e-4]
    waiting = task("CN-21", "waiting", 0)
    waiting.began = math.nan
    tuning = Tuning([ended("separable_conv1d_17_of_a_long_name"), going, waiting], math.inf, 2e11)
    head, first, second, third, below = drawn(tuning, columns, 24, monkeypatch)
    assert max(map(len, (head, first, second, third, below))) <= columns
    words = "layer state trials best µs peak default gain"
    assert head.startswith(words.split()[0])
    assert " ".join(head.split()).startswith(f"{words} {'failed' if columns == 80 else 'build/'}")
    assert first.startswith("separable")
    assert first.split()[1:8] == ["done", "8/8", "100.0", "50%", "200.0", "2.00×", "–"]
    assert second.split()[:7] == ["QN-B1", "measuring", "4/8", "190.0", "26%", "200.0", "1.05×"]
    assert second.split()[7:] == [failures, "0:10", "0:10", *more]
    assert " ".join(third.split()) == "CN-21 waiting 0/8 – – – – – – 0:42"
    assert below == "Ctrl-C stops and keeps what was found · 0:52 left in all"


def test_the_table_without_a_peak_has_no_column_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *_ = drawn(Tuning([task()]), 80, 24, monkeypatch)
    assert "peak" not in head


def test_a_low_screen_shows_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [ended(f"L{i}") for i in range(9)] + [task("L9")]
    tasks += [task(f"L{i}", "waiting", 0) for i in range(10, 30)]
    lines = drawn(Tuning(tasks), 80, 12, monkeypatch)
    assert [line.split()[0] for line in lines[1:-1]] == [
        "L6",
        "L7",
        "L8",
        "L9",
        "L10",
        "L11",
        "L12",
    ]
    assert lines[-1].startswith("and 23 more · ")


@pytest.mark.parametrize(
    ("going", "lines", "expected"),
    [
        (0, 3, "012"),
        (1, 3, "012"),
        (4, 3, "345"),
        (9, 3, "789"),
        (5, 20, "0123456789"),
        (5, 0, "5"),
    ],
)
def test_the_window_holds_what_goes_on(going: int, lines: int, expected: str) -> None:
    tasks = [task(str(i), "waiting", 0) for i in range(10)]
    for done in tasks[:going]:
        done.end("done")
    assert "".join(one.name for one in window(tasks, lines)) == expected


@pytest.mark.parametrize(
    ("values", "trials", "expected"),
    [
        ([], 14, ""),
        ([10.0], 14, "▁"),
        ([20.0, 10.0], 14, "█▁"),
        ([10.5] * 7 + [10.0] * 7, 14, "▅▅▅▅▅▅▅▁▁▁▁▁▁▁"),
        ([20.0] * 14 + [10.0] * 14, 28, "███████▁▁▁▁▁▁▁"),
        ([20.0, 10.0], 2, "███████▁▁▁▁▁▁▁"),
    ],
)
def test_curve(values: list[float], trials: int, expected: str) -> None:
    one = Task("a", 1, trials, curve=values)
    assert curve(one) == expected
    assert len(curve(one)) <= CURVE_WIDTH


def test_the_foot_says_that_it_stops() -> None:
    tuning = Tuning([task()])
    assert foot(tuning, 0).startswith("Ctrl-C stops and keeps")
    tuning.stopping.set()
    assert foot(tuning, 0) == "stopping after the trial that runs; Ctrl-C again ends it at once"
    tuning.tasks[0].end("done")
    assert foot(tuning, 0) == ""


def test_the_live_table_says_first_failures_and_what_found_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = io.StringIO()
    one, other = task(**FAILING), task("CN-21", **FAILING)
    with LiveTable(Tuning([one, other]), stream) as table:
        for each in (one, one, other):
            table.update(each)
        table.end(ended())
        table.end(_failed("the reason"))
    text = stream.getvalue()
    assert text.count("the first failure: no such tile") == 1
    assert "QN-B1: FAILED, nothing recorded:\n    the reason" in text
    assert "recorded in x.jsonl" not in text  # the table has it


# ---- how long yet ------------------------------------------------------------------------------


def test_time_left(clock_at: list[float]) -> None:
    going, waiting = task(), task("CN-21", "waiting", 0)
    tuning = Tuning([ended(), going, waiting])
    assert tuning.task_secs_left(tuning.tasks[0]) == 0
    assert tuning.task_secs_left(going) == 10  # four trials in ten seconds, four to go
    assert tuning.task_secs_left(waiting) == pytest.approx(8 * (65 / 8 + 10 / 4) / 2)
    assert tuning.secs_left() == pytest.approx(10 + 42.5)
    going.stop = 1003
    tuning.deadline = 1030
    assert tuning.task_secs_left(going) == 3
    assert tuning.secs_left() == 30


def test_time_left_of_a_resumed_search(clock_at: list[float]) -> None:
    one = Task("QN-B1", flops=1, trials=8, began=998.0)
    one.report(Progress(of=8, trials=6, best_secs=1e-4, elapsed_secs=30.0))
    assert one.curve == [1e-4] * 6
    assert Tuning([one]).task_secs_left(one) == 10  # six in thirty seconds, two to go


def test_nobody_knows_the_time_left_at_first(clock_at: list[float]) -> None:
    tuning = Tuning([task(state="building", trials=0)])
    assert tuning.secs_left() is None
    tuning.deadline = 1060
    assert tuning.secs_left() == 60


def test_no_share_of_peak_for_other_dtypes() -> None:
    one = ended()
    assert Tuning([one], peak_flops=2e11).share_of_peak(one) == pytest.approx(0.5)
    one.usual = False
    assert Tuning([one], peak_flops=2e11).share_of_peak(one) is None
    assert Tuning([task(trials=0)], peak_flops=2e11).share_of_peak(task(trials=0)) is None
