"""A session on a GPU, without one: its order, how it stops and goes on, and what it reports."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from waiting import LIMIT_SECS

from tvm_sepconv import cli, gpu, workloads
from tvm_sepconv.compiler.gpu_session import child, figures, plan, session
from tvm_sepconv.compiler.gpu_session.child import Child, ItemError
from tvm_sepconv.compiler.gpu_session.plan import (
    CANDIDATE,
    DEFAULT,
    FINALISTS,
    TWO_KERNELS,
    Item,
    Library,
    Plan,
)

MB = Library("MB-1.float32", "MB-1", "float32", DEFAULT)
LIBRARIES = (
    MB,
    Library("MB-1.tf32", "MB-1", "tf32", DEFAULT),
    Library("MB-1.float32.two", "MB-1", "float32", TWO_KERNELS, {"form": "two_kernels"}),
    Library("MB-1.float32.0", "MB-1", "float32", CANDIDATE, {"form": "cores"}),
)
CELL = Item("comparison", "MB-1", "float32", 1, 128)


@pytest.fixture
def made(tmp_path: Path) -> Plan:
    one = Plan(tmp_path, "sm_90", "0.27", "2026-11-23T00:00:00+00:00", LIBRARIES, {"spills": 2})
    one.save()
    return one


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "capability", lambda index: 90)


# ---- what is to be done ------------------------------------------------------------------------


def test_the_order_of_everything(made: Plan) -> None:
    items = made.items()
    assert list(dict.fromkeys(item.step for item in items)) == list(plan.STEPS)
    assert len({item.key for item in items}) == len(items)
    assert [i.what for i in items if i.step == "correctness"] == [
        "MB-1.float32", "MB-1.tf32", "MB-1.float32.two",
    ]  # fmt: skip
    tuned = [(i.what, i.batch, i.contestants) for i in items if i.step == "tuning"]
    assert tuned == [
        ("MB-1.float32.0", 1, ""), ("MB-1", 1, FINALISTS),
        ("MB-1.float32.0", 32, ""), ("MB-1", 32, FINALISTS),
    ]  # fmt: skip
    assert CELL in items


def test_the_whole_table_is_compared() -> None:
    every = [
        Library(f"{layer}.{precision}", layer, precision, DEFAULT)
        for layer in plan.rows()
        for precision in plan.PRECISIONS
    ]
    cells = [item for item in plan.items(every) if item.step == "comparison"]
    assert len(cells) == (20 * 2 + 1) * 3
    assert (cells[0].what, cells[0].batch, cells[0].steps) == ("QN-B1", 32, 1024)
    compiled = {item.what for item in plan.items(every) if item.step == "compilers"}
    assert compiled == set(plan.NAMED) <= set(workloads.workloads())


def test_a_manifest_says_all(made: Plan) -> None:
    assert Plan.load(made.folder) == made
    assert made.library("MB-1", "float32", TWO_KERNELS) == LIBRARIES[2]
    assert made.library("MB-1", "float16", DEFAULT) is None
    assert (MB.kernel.channels, MB.kernel.dtype, MB.allow_tf32) == (128, "float32", False)
    assert LIBRARIES[1].allow_tf32
    assert Library("", "MB-1", "float16", DEFAULT).kernel.dtype == "float16"


# ---- running -----------------------------------------------------------------------------------


class Answers:
    """A child that has its answers ready; an exception is raised."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked, self.steps = answers, list[str](), list[str]()

    def __call__(self, arguments: list[str], log: Path) -> Any:
        self.steps.append(arguments[1])
        return self

    def ask(self, key: str, limit_secs: float) -> Any:
        if key:
            self.asked.append(key)
        answer = self.answers.get(key, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        pass


def test_everything_is_done_once_and_failures_are_kept(
    made: Plan, with_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = made.items()[1].key
    one = Answers({CELL.key: {"us": {"tvm_sepconv": 4.0}}, bad: ItemError("it is wrong")})
    assert session.run(made.folder, 1.0, child=one) == 0
    assert one.asked == [item.key for item in made.items()]
    assert one.steps == list(plan.STEPS)
    found = plan.results(made.folder)
    assert found[bad]["error"] == "it is wrong"
    assert found[CELL.key]["found"] == {"us": {"tvm_sepconv": 4.0}}
    again = Answers({})
    assert session.run(made.folder, 1.0, child=again) == 0
    assert again.asked == []
    assert session.run(made.folder, 1.0, retry=True, child=again) == 0
    assert again.asked == [bad]
    assert plan.results(made.folder)[bad]["found"] == {}


def test_a_worker_that_does_not_start_is_no_items_failure(made: Plan, with_gpu: None) -> None:
    one = Answers({"": ItemError("its process ended with status 1: No module named 'numpy'")})
    with pytest.raises(RuntimeError, match=r"does not work here.*'numpy'.*results/worker.log"):
        session.run(made.folder, 1.0, child=one)
    assert one.asked == []
    assert plan.results(made.folder) == {}


def test_another_gpu_is_refused(
    made: Plan, with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda index: 80)
    with pytest.raises(RuntimeError, match="for an sm_90, and this machine's GPU is an sm_80"):
        session.run(made.folder)


def test_it_stops_in_time_and_goes_on(
    made: Plan, with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: clock[0])

    class Slow(Answers):
        def ask(self, key: str, limit_secs: float) -> Any:
            if not key:
                return ""
            clock[0] += min(25.0, limit_secs)
            if limit_secs < 25:  # its parent ends it
                raise ItemError("no result")
            return super().ask(key, limit_secs)

    said: list[str] = []
    slow = Slow({})
    assert session.run(made.folder, 1.0, child=slow, show=said.append) == session.AGAIN
    assert len(slow.asked) == 2  # the third was cut off, and is nobody's failure
    assert len(plan.results(made.folder)) == 2
    assert "run it again" in said[-1]
    rest = Answers({})
    assert session.run(made.folder, 1.0, child=rest) == 0
    assert rest.asked == [item.key for item in made.items()][2:]


def test_half_a_line_does_not_count(made: Plan, with_gpu: None) -> None:
    session.run(made.folder, 1.0, child=Answers({}))
    path = made.folder / "results" / plan.RESULTS
    path.write_text(path.read_text()[:-20])
    again = Answers({})
    session.run(made.folder, 1.0, child=again)
    assert again.asked == [made.items()[-1].key]
    assert len(plan.results(made.folder)) == len(made.items())


def test_libraries_are_unpacked_once_a_preparation(made: Plan) -> None:
    library = made.folder / "a.so"
    library.write_text("first")
    with tarfile.open(made.folder / plan.LIBRARIES, "w:xz") as archive:
        archive.add(library, "a.so")
    unpacked = made.folder / "libraries" / "a.so"
    for _ in range(2):
        session.unpack(made.folder)
        assert unpacked.read_text() == "first"
        unpacked.write_text("first")
    unpacked.write_text("old")
    session.unpack(made.folder)
    assert unpacked.read_text() == "old"
    Plan(made.folder, "sm_90", "0.28", "", LIBRARIES, {}).save()
    session.unpack(made.folder)
    assert unpacked.read_text() == "first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "{}"), "Measuring needs an NVIDIA GPU.*the driver finds none.*python3"),
        (("run", "{}", "--minutes", "0"), "`--minutes` must be positive. Received: 0"),
        (("run", "{}/not"), "is no prepared folder.*tvm-sepconv gpu prepare"),
        (("report", "{}/not"), "is no prepared folder"),
        (("prepare", "{}", "--candidates", "0"), "`--candidates` must be at least 1"),
        (("prepare", "{}", "--workloads", "NOPE"), "No layer is called 'NOPE'"),
    ],
)
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...],
    message: str,
    made: Plan,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "the driver finds none")
    words = [word.format(made.folder) for word in arguments]
    assert re.search(message, refused(capsys, "gpu", *words))


# ---- the worker's process ----------------------------------------------------------------------

WORKER = """
import json, os, sys, time
for key in map(str.strip, sys.stdin):
    print("some words", file=sys.stderr, flush=True)
    if key == "dies": os.kill(os.getpid(), 11)
    if key == "hangs": time.sleep(1000)
    if key == "breaks": print(json.dumps({"error": "bad", "broken": True}), flush=True)
    elif key == "fails": print(json.dumps({"error": "bad", "broken": False}), flush=True)
    else: print(json.dumps({"found": [key, os.getpid()]}), flush=True)
"""


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(child, "START_SECS", LIMIT_SECS)
    one = Child([], tmp_path / "log")
    one._command = [sys.executable, "-c", WORKER]
    yield one
    one.close()


@pytest.mark.parametrize(
    ("key", "words", "survives"),
    [
        ("dies", "its process ended with signal SIGSEGV: some words", False),
        ("hangs", "no result after", False),
        ("breaks", "bad", False),
        ("fails", "bad", True),
    ],
)
def test_a_bad_item_costs_no_other(real: Child, key: str, words: str, survives: bool) -> None:
    _, process = real.ask("first", LIMIT_SECS)
    with pytest.raises(ItemError, match=words):
        real.ask(key, 0.3 if key == "hangs" else LIMIT_SECS)
    name, again = real.ask("next", LIMIT_SECS)
    assert (name, again == process) == ("next", survives)


# ---- the report --------------------------------------------------------------------------------


def found(**more: Any) -> dict[str, Any]:
    us = {"tvm_sepconv": 4.0, "two kernels": 5.0, "torch": 12.0, "cuDNN channels_last: a": 9.0,
          "cuDNN channels_last: b": 8.0}  # fmt: skip
    return {
        CELL.key: {"key": CELL.key, "found": {"us": us, "errors": {"JAX": "no such thing"}}},
        "rest/bandwidth": {"found": {"bytes_a_second": 4e12, "machine": "NVIDIA H200"}},
        "rest/matrix products": {"found": {"flops": {"float32": 5e13}}},
        "correctness/MB-1.tf32": {"error": "it is wrong"},
        **more,
    }


def test_a_cell_has_the_best_form_of_each_and_a_floor(made: Plan) -> None:
    cell = next(c for c in figures.cells(made, found()) if c.item == CELL)
    assert (cell.best, cell.ratio) == ("cuDNN channels_last", 2.0)
    assert cell.floor_us == pytest.approx(2 * 128 * 128 * (13 + 64) / 5e7)  # multiply-adds
    flops = {"found": {"flops": {"float32": 5e15}}}
    every = figures.cells(made, found(**{"rest/matrix products": flops}))
    moved = 4 * (128 * (128 + 64) + 128 * (13 + 64))  # input, output, weights
    assert next(c for c in every if c.item == CELL).floor_us == pytest.approx(moved / 4e6)


def test_compilers_join_the_cell_with_ours_from_where_all_take_turns(made: Plan) -> None:
    key = Item("compilers", "MB-1", "float32", 1, 128, "torch.compile").key
    late = {"us": {"tvm_sepconv": 3.0, "torch.compile: conv1d": 6.0}}
    every = figures.cells(made, found(**{key: {"found": late}}))
    cell = next(c for c in every if c.item == CELL)
    assert (cell.best, cell.ratio) == ("torch.compile", 1.5)


def test_what_is_missing_says_so(made: Plan) -> None:
    text = figures.text(made, found())
    assert "comparison: 1 of 4, 0 failed INCOMPLETE, 3 missing" in text
    assert "FAILED correctness/MB-1.tf32: it is wrong" in text
    assert f"FAILED JAX in {CELL.key}: no such thing" in text
    same = {item.key: {"error": "bad"} for item in made.items() if item.step == "tuning"}
    groups = figures.text(made, same)
    assert "FAILED tuning/MB-1.float32.0/float32/1x128 and 3 more: bad" in groups
    assert "rejected before they ran: 2, spills" in text
    assert "machine: NVIDIA H200" in text
    assert "matrix products, float16: missing" in text
    assert "batch 1, float32: 2.00×, 1 of 20 measured, none lost" in text
    row = next(line for line in text.splitlines() if line.startswith("MB-1") and "1×128" in line)
    assert row.split()[3:8] == ["4.00", "5.00", "12.00", "8.00", "missing"]


def test_a_loss_is_named(made: Plan) -> None:
    lost = {"us": {"tvm_sepconv": 10.0, "torch": 5.0}}
    text = figures.text(made, found(**{CELL.key: {"found": lost}}))
    assert "batch 1, float32: 0.50×, 1 of 20 measured, lost: MB-1" in text


def test_the_report_as_a_page(made: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.folder / "results" / plan.RESULTS
    path.parent.mkdir()
    lines = [json.dumps({"key": key, **values}) for key, values in found().items()]
    path.write_text("\n".join(lines))
    page = made.folder / "page.html"
    assert cli.main(["gpu", "report", str(made.folder), "--html", str(page)]) == 0
    assert "MB-1" in capsys.readouterr().out
    html = page.read_text()
    assert '<td class="won">2.00×</td>' in html
    assert "missing" in html
    assert "http" not in html.replace("http://www.w3.org", "")
