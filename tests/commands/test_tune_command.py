"""``tvm-sepconv tune``: its options, what it asks of a search, and what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from fake_searches import FakeTune

import tvm_sepconv
from tvm_sepconv import cli, targets
from tvm_sepconv.bench import limits
from tvm_sepconv.bench.timing import Samples
from tvm_sepconv.commands import tune as command
from tvm_sepconv.compiler.tuning import boards, logs, tune
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.workloads import workloads

X86 = any(isa.startswith("x86_64") for isa in targets.runnable())
needs_x86 = pytest.mark.skipif(not X86, reason="measures kernels on an x86 machine")
OWN = ("--filters", "8", "--kernel-size", "3", "--channels", "4", "--steps", "100")


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTune:
    """A search that takes no time, in the place of ours; and no peak is measured."""
    one = FakeTune(tmp_path / "logs" / "here.jsonl")
    monkeypatch.setattr(tune, "tune", one)
    monkeypatch.setattr(command, "_peak_flops", lambda target, threads: threads * 1e11)
    return one


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "vax"), "must be one of .*x86_64-avx2.*Received: target=vax"),
        (("--workloads", "NOPE"), "No layer is called 'NOPE'. There are SEED, "),
        (("QN-B1,Z*",), r"No layer is called 'Z\*'"),
        (("--workloads", " ,"), "A layer must be named. There are SEED"),
        (("--trials", "1"), "`--trials` must be at least 2.*Received: 1"),
        (("--minutes", "0"), "`--minutes` must be positive. Received: 0"),
        (("--minutes", "nan"), "`--minutes` must be positive. Received: nan"),
        (("--num-threads", "0"), r"`--num-threads` must be of 1 to \d+ here. Received: 0"),
        (("--num-threads", "9999"), "Received: 9999"),
        (("MB-1", *OWN), "IDS name published layers .*Received also: --filters, --kernel-size"),
        (("--workloads", "MB-1", "--keras", "a.keras"), "Received also: --keras"),
        (("--keras", "a.keras"), "`--keras` needs --steps"),
        (("--filters", "8"), "needs --kernel-size, --channels, --steps too"),
        (("--replay", "a", "--rpc", "9190", "--key", "k"), "measures nothing .* also: --rpc"),
        (("--replay", "a", "--resume"), "Received also: --resume"),
        (("--replay", "a.jsonl", "MB-1,CN-21"), "is one layer's: .*Received: CN-21, MB-1"),
        (("MB-1", "--replay", "a.jsonl"), "`--replay` must be .*There is none called a.jsonl"),
        (("--space", "auto", "--logs", "a"), "`--space auto` .*Received also: --logs"),
        (("--space", "auto", "--replay", "a"), "Received also: --replay"),
        (("--space", "auto", "--resume"), "Received also: --resume"),
        (("--space", "auto", "--rpc", "9190", "--key", "k"), "Received also: --rpc"),
        (("--rpc", "9190"), "`--rpc` needs --key too"),
        (("--key", "rpi4"), "`--key` needs --rpc too"),
        (("--rpc", "here", "--key", "rpi4"), "`--rpc` must be the tracker's port .*: here"),
        (("--json", "no/such/folder/a"), "`--json` must lie in a folder. .*no/such/folder"),
        (("--json", "/"), "Is a directory"),
    ],
)  # fmt: skip
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...],
    message: str,
    fake: FakeTune,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert re.search(message, refused(capsys, "tune", *arguments))
    assert fake.calls == []


@pytest.mark.parametrize("target", ["armv7-neon", "x86_64-avx512"])
def test_tuning_for_another_machine(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "missing_features", lambda isa: ("avx9",))
    message = refused(capsys, "tune", "--target", target)
    assert "measures kernels, and this machine lacks avx9. Run it on such a machine" in message
    assert "let such machines measure with --rpc HOST:PORT --key KEY, or tune for" in message


def test_logs_that_cannot_be_written_are_named_at_once(
    fake: FakeTune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, "tune", "--logs", str(tmp_path / "file"))
    assert fake.calls == []


@needs_x86
def test_without_the_tuner(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = ("xgboost", "psutil")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in missing else find(n))
    message = refused(capsys, "tune")
    assert "Tuning needs xgboost, psutil: pip install 'tvm-sepconv[compiler,tune]'" in message


# ---- what it asks of a search ------------------------------------------------------------------


def test_layers_by_id_pattern_and_arguments(fake: FakeTune, tmp_path: Path) -> None:
    where = ["--work-dir", str(tmp_path / "work")]
    assert cli.main(["tune", "MB-?", "--workloads", "CN-21,QN-B1*", *where]) == 0
    assert cli.main(["tune", *where]) == 0
    assert cli.main(["tune", "MB-1", "--data-format", "channels_first", *where]) == 0
    assert cli.main(["tune", *OWN, "--batch", "3", "--activation", "softmax", *where]) == 0
    names = [call["workload"] for call in fake.calls]
    assert names[:5] == ["QN-B1", "CN-21", "MB-0", "MB-1", "MB-e"]  # a kernel once
    assert names[5:] == ["QN-B1", "CN-21", "MB-1", "MB-1", "layer"]
    table = workloads()["CN-21"]
    call = fake.calls[1]
    assert (call["batch"], call["steps"]) == (table.batch, table.steps)
    assert call["config"] == table.config().kernel_config(table.channels)
    assert fake.calls[8]["config"].data_format == "channels_first"
    own = fake.calls[-1]
    assert (own["batch"], own["steps"]) == (3, 100)
    config = own["config"]
    assert (config.filters, config.channels, config.kernel_size) == (8, 4, 3)
    assert config.activation == "linear"  # softmax comes after the kernel


def test_layers_of_a_saved_model(fake: FakeTune, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {}
    for name, dtype in (("first", "float32"), ("second", "float64"), ("same", "float32")):
        layer = tvm_sepconv.SeparableConv1D(3, 2, name=name, dtype=dtype)
        layer.build((None, None, 4))
        layers[name] = layer
    monkeypatch.setattr("tvm_sepconv.interop.keras.from_keras", lambda path: layers)
    assert cli.main(["tune", "--keras", "a.keras", "--steps", "70", "--batch", "2"]) == 0
    assert [(c["workload"], c["batch"], c["steps"]) for c in fake.calls] == [
        ("first", 2, 70), ("second", 2, 70),
    ]  # fmt: skip
    assert [c["config"].dtype for c in fake.calls] == ["float32", "float64"]


def test_options_reach_the_search(fake: FakeTune, tmp_path: Path) -> None:
    most = len(os.sched_getaffinity(0))
    weakest = targets.runnable()[-1]
    (tmp_path / "history.jsonl").touch()
    options = ["--trials", "5", "--seed", "7", "--num-threads", str(most), "--target", weakest]
    assert cli.main(["tune", "MB-1", *options, "--work-dir", str(tmp_path), "--resume"]) == 0
    assert cli.main(["tune", "MB-1", "--replay", str(tmp_path / "history.jsonl")]) == 0
    assert cli.main(["tune", "MB-1", "--space", "auto"]) == 0
    first, second, third = fake.calls
    assert (first["trials"], first["seed"], first["threads"]) == (5, 7, most)
    assert (first["target"].name, first["work_dir"]) == (weakest, tmp_path)
    assert (first["resume"], first["replay"], first["runner"]) == (True, None, None)
    assert first["space"] == second["space"] == "tvm_sepconv"
    assert second["replay"] == tmp_path / "history.jsonl"
    assert second["trials"] == command.DEFAULT_TRIALS
    assert third["space"] == "metaschedule"
    assert first["should_stop"]() is False


def test_boards_measure_all_layers(
    fake: FakeTune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[tuple[Any, ...]] = []

    class Boards:
        def __init__(self, address: Any, key: str, target: Any, threads: int) -> None:
            opened.append((str(address), key, target.name, threads))
            self.target = target

        def __enter__(self) -> Boards:
            return self

        def __exit__(self, *exception: object) -> None:
            opened.append(("closed",))

    monkeypatch.setattr(boards, "Boards", Boards)
    options = ["--target", "arm", "--rpc", "pi.local:9190", "--key", "rpi4", "--num-threads", "4"]
    assert cli.main(["tune", "MB-1,CN-21", *options]) == 0
    assert opened == [("pi.local:9190", "rpi4", "aarch64-neon@cortex-a76", 4), ("closed",)]
    assert all(isinstance(call["runner"], Boards) for call in fake.calls)
    out, err = capsys.readouterr()
    assert "TVM's RPC lets anyone" in err
    assert "of peak" not in out  # this machine's is not theirs


def test_a_board_that_is_gone_ends_everything(
    fake: FakeTune, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = RunnerError("the board is gone: go on with --resume")
    assert cli.main(["tune", "MB-1,CN-21"]) == 1
    out = capsys.readouterr().out
    assert "CN-21: FAILED, nothing recorded:\n    the board is gone" in out
    assert "MB-1: not started" in out
    assert "1 FAILED, see above; 1 not started" in out


# ---- what it says ------------------------------------------------------------------------------


def test_plain_lines(fake: FakeTune, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "MB-1", "QN-B1*", "--trials", "8", "--target", "x86_64-avx2"]) == 0
    out, err = capsys.readouterr()
    assert "QN-B1-b16 is left out: it has the kernel of QN-B1" in err
    lines = out.splitlines()
    assert lines[0] == "Tuning QN-B1, MB-1 for x86_64-avx2, up to 8 trials each"
    assert re.fullmatch(
        r"QN-B1: 8/8 trials, best 100.0 µs \(default 200.0\), 0 failed, .* left in all", lines[1]
    )
    assert re.fullmatch(
        r"QN-B1: default 200.0 µs, best 100.0 µs \(2.00×\), \d+% of peak, measured in turns, noise "
        r"1%; 8 trials, 0 builds and 0 runs failed, 0 rejected; recorded in .*here.jsonl",
        lines[2],
    )
    assert lines[-2].startswith("2 of 2 layers tuned in 0:00; 2.00× the default kernels' speed")
    assert re.fullmatch(r"Recorded in .*here.jsonl", lines[-1])
    assert len(lines) == 7


def test_many_layers_are_counted_not_listed(
    fake: FakeTune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "*", "--trials", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"Tuning {len(fake.calls)} layers for ")


def test_quiet_prints_results_only(fake: FakeTune, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "MB-1,CN-21", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": default 200.0 µs, best ")[0] for line in lines] == ["CN-21", "MB-1"]


def test_json_to_standard_output_stands_there_alone(
    fake: FakeTune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "MB-1,CN-21", "--json", "-", "--trials", "8", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert (first["layer"], second["layer"]) == ("CN-21", "MB-1")
    table = workloads()["MB-1"]
    config = table.config().kernel_config(table.channels)
    assert second["config"] == config.to_dict()
    assert second["key"] == config.key
    flops = config.flops(1, table.out_steps)
    expected = {
        "target": targets.runnable()[0], "batch": 1, "steps": 128, "threads": 1, "seed": 3,
        "space": "tvm_sepconv", "state": "done", "reason": None, "trials": 8, "trials_asked": 8,
        "best_secs": pytest.approx(1e-4), "default_secs": 2e-4, "noise": 0.012, "flops": flops,
        "share_of_peak": pytest.approx(flops / 1e-4 / 1e11), "decisions": {"step_tile": 96},
        "recorded": str(fake.path), "first_failure": None,
    }  # fmt: skip
    assert {name: second[name] for name in expected} == expected
    assert "Tuning CN-21, MB-1 for" in err


def test_json_to_a_file(fake: FakeTune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.failing = 2
    assert cli.main(["tune", "MB-1", "--json", str(tmp_path / "a"), "--trials", "4"]) == 1
    plain = json.loads((tmp_path / "a").read_text())
    assert (plain["build_failures"], plain["state"]) == (3, "done")
    assert "LookupError: no such vector" in plain["first_failure"]
    assert "Tuning MB-1 for" in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["plain", "quiet"])
def test_when_all_builds_fail_it_is_said_loudly(
    quiet: list[str], fake: FakeTune, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = 2
    assert cli.main(["tune", "MB-1", "--trials", "64", *quiet]) == 1
    out = capsys.readouterr().out
    assert "MB-1: ALL 63 CANDIDATES BESIDES THE DEFAULT FAILED, nothing recorded: 63 builds" in out
    assert (
        "The first error:\n    Traceback:\n      somewhere\n    LookupError: no such vector" in out
    )
    assert out.count("MB-1: the first failure: LookupError") == (not quiet)


def test_the_status_says_that_one_layer_failed(
    fake: FakeTune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_fails(config: Any, **settings: Any) -> tune.Result:
        if settings["workload"] == "CN-21":
            raise RuntimeError("There is nothing to tune: the default kernel fails. No such lane")
        return fake(config, **settings)

    monkeypatch.setattr(tune, "tune", one_fails)
    assert cli.main(["tune", "MB-1,CN-21"]) == 1
    out = capsys.readouterr().out
    assert "CN-21: FAILED, nothing recorded:\n    There is nothing to tune" in out
    assert "1 of 2 layers tuned" in out
    assert cli.main(["tune", "MB-1"]) == 0


def test_without_a_c_compiler_there_is_no_share_of_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(isa: str) -> None:
        raise RuntimeError("No C compiler")

    monkeypatch.setattr(limits, "Peak", missing)
    assert command._peak_flops("x86_64-avx2", 1) is None


@needs_x86
def test_the_peak_is_that_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, Callable[[], Any]], budget_secs: float) -> dict[str, Samples]:
        return {name: Samples(60.0, 55.0, 70.0, 50.0, len(call())) for name, call in calls.items()}

    monkeypatch.setattr(command.timing, "interleave", timed)
    flops = limits.Peak("x86_64-sse42").flops
    for threads in (1, 2):
        peak = command._peak_flops("x86_64-sse42", threads)
        assert peak == pytest.approx(threads * flops / 50e-6)
