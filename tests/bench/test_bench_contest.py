"""The contest: that only what is right is timed, in turns, and that nobody can spoil it for others.

No test says how fast anything is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_worker import FAKES

from tvm_sepconv.bench import contest, environments, limits, measure, process, timing
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contest import hold
from tvm_sepconv.bench.contestants import CONTESTANTS
from tvm_sepconv.bench.measure import Terms
from tvm_sepconv.bench.process import ContestantError, Worker
from tvm_sepconv.bench.report import OURS, REQUIRED
from tvm_sepconv.bench.timing import Samples, Turn
from tvm_sepconv.bench.worker import ERROR_CHARACTERS, one_line
from tvm_sepconv.subjects import of_table
from tvm_sepconv.workloads import workloads

SEED = Case.of(workloads()["SEED"], "channels_last")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "ROUNDS", 2)
    monkeypatch.setattr(contest, "CHOICE_SECS", 0.0)
    monkeypatch.setattr(contest, "KERNEL_SECS", 0.0)
    monkeypatch.setattr(limits, "BUDGET_SECS", 0.1)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    monkeypatch.setattr(process, "WORKER", (str(Path(__file__).with_name("bench_worker.py")),))
    workers: list[Worker] = []

    def make(key: str) -> Worker:
        (fake,) = (f for f in FAKES if f.key == key)
        workers.append(Worker(fake, Path(sys.executable), tmp_path, [_a_cpu()], None))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def _a_cpu() -> int:
    return min(os.sched_getaffinity(0))


def contested(start: Callable[..., Worker], *keys: str, copies: int = 1) -> contest.Outcome:
    return hold({key: start(key) for key in keys}, SEED, copies, lambda text: None)


# ---- processes ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("wrong", r"wrong \(plain\) is not the layer: .* elements differ more than allowed"),
        ("short", r"short \(plain\) is not the layer: expected an output of shape \(4, 5, 3\)"),
        ("one-form-wrong", r"one-form-wrong \(doubled\) is not the layer"),
        ("crash", "^prepare: its process ended with signal SIGSEGV: .*the sky is falling"),
        ("crash-in-turn", "^turn: its process ended with status 3: it said nothing"),
        ("refusing", "^no form of this layer$"),
        ("overwriting", "its second call overwrites the first one's output"),
    ],
)
def test_failures_are_told_and_the_others_go_on(
    key: str, words: str, start: Callable[..., Worker]
) -> None:
    outcome = contested(start, key, "right")
    assert set(outcome.failures) == {key}
    assert re.search(words, outcome.failures[key])
    assert set(outcome.whole_call) == set(outcome.forms) == {"right"}
    assert outcome.whole_call["right"].number >= contest.LEAST_SAMPLES


@pytest.mark.usefixtures("quick")
def test_one_that_hangs_is_ended(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START_SECS", 0.5)
    monkeypatch.setattr(process, "ANSWER_SECS", 0.5)
    assert contested(start, "hang").failures == {"hang": "prepare: no result after 1 s"}


def test_one_that_died_twice_is_given_up(start: Callable[..., Worker], tmp_path: Path) -> None:
    SEED.save(tmp_path / "case.npz")
    worker, words = start("crash"), []
    fields = {"case": str(tmp_path / "case.npz"), "folder": str(tmp_path)}
    for _ in range(3):
        with pytest.raises(ContestantError) as caught:
            worker.ask("prepare", threads=1, copies=1, **fields)
        words.append(str(caught.value))
    assert words[0].startswith("prepare: its process ended")
    assert words[2] == f"given up after: {words[1]}"


@pytest.mark.usefixtures("quick")
def test_what_a_framework_prints_does_not_disturb(start: Callable[..., Worker]) -> None:
    assert contested(start, "chattering").failures == {}


@pytest.mark.usefixtures("quick")
def test_fastest_form_is_the_contestant(start: Callable[..., Worker]) -> None:
    assert contested(start, "two-forms").forms == {"two-forms": "plain"}


@pytest.mark.usefixtures("quick")
def test_slow_ones_have_few_samples_and_no_untimed_calls(start: Callable[..., Worker]) -> None:
    assert contested(start, "slow").whole_call["slow"].number == contest.LEAST_SAMPLES - 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("copies", [1, 3])
def test_cold_calls_go_through_all_copies(
    copies: int,
    start: Callable[..., Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    contested(start, "seeing", copies=copies)
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "seen").read_text().splitlines()]
    inputs = [x for x, _, _ in seen[2:]]  # after the two that are checked
    assert inputs[: 2 * copies] == inputs[:copies] * 2
    assert len(set(inputs)) == copies
    assert {rest for _, _, rest in seen[2:]} == {0}  # all start on a cache line
    outputs = [y for _, y, _ in seen[2:]]
    assert len(outputs) >= 2 * copies  # however slow the machine is
    last = len(outputs) - copies
    assert all(len(set(outputs[i : i + copies])) == copies for i in range(last + 1))


def test_workers_are_bound_and_told_their_threads(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    worker = Worker(FAKES[0], Path(sys.executable), tmp_path, cpus, None)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_SEPCONV_NUM_THREADS"):
        assert worker._variables[name] == str(len(cpus))
    assert worker._variables["CUDA_VISIBLE_DEVICES"] == ""
    assert worker._command[-1] == ",".join(map(str, cpus))


def test_processors_are_cores_first_and_no_more_than_there_are() -> None:
    allowed = os.sched_getaffinity(0)
    everything = process.processors(len(allowed))
    assert sorted(everything) == sorted(allowed)
    with pytest.raises(ValueError, match=rf"at most {len(allowed)}, .* Received: 1000"):
        process.processors(1000)


def test_package_needs_only_numpy_in_a_peers_environment(tmp_path: Path) -> None:
    """What a worker imports before it prepares, where nothing of ours is installed."""
    (tmp_path / "tvm_sepconv").symlink_to(Path(contest.__file__).parents[1])
    code = (
        "import sys, json, tvm_sepconv.bench.worker; "
        "from tvm_sepconv.bench.contestants import dense, keras, litert, openvino, ours, torch; "
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    loaded = set(json.loads(result.stdout)) - set(sys.stdlib_module_names)
    foreign = {"tvm", "tvm_ffi", "safetensors", "h5py", "keras", "onnx", "torch", "ml_dtypes"}
    assert not loaded & foreign, loaded
    assert {"numpy", "tvm_sepconv"} <= loaded


def test_errors_are_one_line_and_not_a_page() -> None:
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(KeyError("a")) == "KeyError: 'a'"
    assert len(one_line(ValueError("x" * 9999))) == ERROR_CHARACTERS + 2


# ---- turns -------------------------------------------------------------------------------------


class Recorder:
    """A worker without a process: it notes who was asked what."""

    def __init__(self, name: str, call_us: float, folder: Path, notes: list[str]) -> None:
        self.contestant = dataclasses.replace(CONTESTANTS[0], name=name, counts=name != "beside")
        self.folder, self.threads = folder, 1
        self._call_us, self._notes = call_us, notes

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        if op == "prepare":
            path = self.folder / f"{self.contestant.name}.npy"
            np.save(path, SEED.expected)
            return {"forms": [["plain", str(path)]]}
        if op == "choose":
            return {"form": "plain", "call_us": self._call_us}
        self._notes.append(self.contestant.name)
        return {"times_us": [self._call_us] * fields["samples"]}


def recorded(folder: Path, **call_us: float) -> tuple[list[str], contest.Outcome]:
    notes: list[str] = []
    workers = {name: Recorder(name, us, folder, notes) for name, us in call_us.items()}
    outcome = hold(workers, SEED, 1, lambda text: None)  # type: ignore[arg-type]
    return notes, outcome


def test_turns_alternate(tmp_path: Path) -> None:
    notes, outcome = recorded(tmp_path, a=10.0, b=2000.0)
    assert notes == ["a", "b"] * contest.ROUNDS
    assert outcome.whole_call["a"] == Samples(10, 10, 10, 10, 4 * contest.ROUNDS)


def test_slow_ones_take_part_in_few_rounds_spread_over_all(tmp_path: Path) -> None:
    notes, outcome = recorded(tmp_path, fast=10.0, slow=2e6)
    assert outcome.whole_call["slow"].number == contest.LEAST_SAMPLES
    between = [len(part) for part in " ".join(notes).split("slow")]
    assert len(between) == 1 + contest.LEAST_SAMPLES
    assert min(between[:3]) > 4 * len("fast ")
    assert notes.count("fast") == contest.ROUNDS


@pytest.mark.parametrize(("name", "left_out"), [("beside", True), ("peer", False)])
def test_only_a_peer_may_take_more_than_a_second(name: str, left_out: bool, tmp_path: Path) -> None:
    _, outcome = recorded(tmp_path, **{name: 1.5e6})
    assert (outcome.failures == {name: "left out: a call takes 1.5 s"}) == left_out
    assert (name in outcome.whole_call) != left_out


@pytest.mark.parametrize(
    ("call_us", "turn"),
    [(2.0, Turn(100, 4, 0.1)), (3000.0, Turn(1, 4, 0.1)), (60_000.0, Turn(1, 1, None))],
)
def test_plan_of_a_turn(call_us: float, turn: Turn) -> None:
    assert timing.plan(call_us, 0.1) == turn


def test_seconds_of_a_turn_count_the_untimed_ones() -> None:
    assert Turn(10, 4, 0.5).secs(1e5) == pytest.approx(0.5 + 4.1)
    assert Turn(1, 1, None).secs(1e5) == pytest.approx(0.1)


# ---- whole runs --------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_peers_that_are_not_there_make_it_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    ours_alone = lambda name, modules: None if name else Path(sys.executable)  # noqa: E731
    monkeypatch.setattr(environments, "python", ours_alone)
    terms = Terms(1, _target(), False, tuple(c.key for c in CONTESTANTS if c.counts))
    report = measure.measure(of_table(["SEED"], "channels_first"), terms, "c")
    assert list(report.incomplete) == list(REQUIRED)
    assert report.missing["PyTorch"] == "tvm-sepconv bench --setup torch"
    assert report.peers == ()
    assert report.geometric_mean is None
    (row,) = report.rows
    assert set(row.whole_call) == {OURS}
    assert row.shape == "4×10 12→3 k2 s2"
    assert report.data_format == "channels_first"
    assert "apache-tvm" in report.versions
    assert report.peak_gflops >= row.kernel_gflops


@pytest.mark.usefixtures("quick")
def test_a_wrong_layer_of_ours_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    of_subject = Case.of_subject

    def other(*args: Any) -> Case:
        case = of_subject(*args)
        return dataclasses.replace(case, expected=case.expected + 1)

    monkeypatch.setattr(Case, "of_subject", other)
    with pytest.raises(RuntimeError, match=r"SEED: tvm_sepconv: .* is not the layer"):
        measure.measure(of_table(["SEED"], "channels_last"), Terms(1, _target(), False, ()), "c")


@pytest.mark.usefixtures("quick")
def test_cold_run_has_more_copies_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    copies: list[int] = []
    held = contest.hold

    def noted(*args: Any) -> contest.Outcome:
        copies.append(args[2])
        return held(*args)

    monkeypatch.setattr(contest, "hold", noted)
    terms = Terms(1, _target(), True, ())
    report = measure.measure(of_table(["QA-7"], "channels_last"), terms, "c")
    sizes = 4 * 2 * 400 * 128
    assert copies[0] * sizes > 2 * max(report.limits.cache_bytes.values())
    assert report.cold
    assert report.rows[0].traffic.source == "DRAM"


def _target() -> str:
    from tvm_sepconv import targets

    return targets.runnable()[0]
