"""``tvm-sepconv bench``: its options, what is measured, and the peers' environments."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from bench_reports import complete, swept

import tvm_sepconv
from tvm_sepconv import cli, subjects, targets
from tvm_sepconv.bench import (
    calls,
    contest,
    environments,
    limits,
    measure,
    page,
    process,
    sweep,
    table,
)
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import CONTESTANTS, metaschedule
from tvm_sepconv.bench.measure import Terms
from tvm_sepconv.bench.report import BESIDE, OURS, REQUIRED, Report
from tvm_sepconv.bench.sweep import Sweep
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.subjects import Subject
from tvm_sepconv.workloads import select, workloads

OWN = ("--filters", "8", "--kernel-size", "3", "--channels", "4", "--steps", "10")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return command_line.refused(capsys, "bench", *arguments)


def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Subject], Terms]]:
    """Put a made-up report in the place of measuring; returns what would have been measured."""
    asked: list[tuple[list[Subject], Terms]] = []

    def note(chosen: list[Subject], terms: Terms, *args: Any) -> Report:
        asked.append((chosen, terms))
        return complete()

    monkeypatch.setattr(measure, "measure", note)
    return asked


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("QN-B1", "nobody*"), r"No layer is called 'nobody\*'\. There are SEED, "),
        (("--threads", "0"), "`--threads` must be positive numbers: 1 or 1,2. Received: 0"),
        (("--threads", "1,x"), "Received: 1,x"),
        (("--threads", "9999"), r"`--threads` must be at most \d+, .* Received: 9999"),
        (("--target", "vax"), "must be one of .* Received: target=vax"),
        (("--target", "armv7-neon"), "`--target` must be one of .* Received: armv7-neon"),
        (("--json", "no/such/folder/a.json"), "`--json` must lie in a folder.*no/such/folder"),
        (("--html", "no/such/folder/a.html"), "`--html` must lie in a folder"),
        (("--peers", "excel"), "`--peers` must be of pytorch, .*, or none. Received: excel"),
        (("QN-B1", *OWN), "IDS name published layers .*Received also: --filters, --kernel-size"),
        (("QN-B1", "--batch", "2"), "Received also: --batch"),
        (("--workloads", "QN-B1", "--steps", "2"), "IDS name published .*Received also: --steps"),
        (("QN-B1", "--keras", "a.keras"), "Received also: --keras"),
        (("--keras", "a.keras", "--filters", "3"), "brings its layers' .*also: --filters"),
        (("--keras", "a.keras", "--data-format", "channels_last"), "also: --data-format"),
        (("--keras", "a.keras"), "`--keras` needs --steps"),
        (("--keras", "/no/such.keras", "--steps", "9"), "/no/such.keras"),
        (("--filters", "8", "--steps", "9"), "needs --kernel-size, --channels too"),
        ((*OWN, "--padding", "3,x"), "`--padding` must be valid, same or .* Received: 3,x"),
        ((*OWN, "--padding", "1,2,3"), "padding"),
        ((*OWN, "--strides", "0"), "strides"),
        ((*OWN, "--batch", "0"), "`--batch` must be at least 1. Received: 0"),
        ((*OWN, "--activation", "softmax"), "element-wise activation .* activation=softmax"),
        ((*OWN, "--dilation-rate", "9"), "The output of layer is empty: .* 19 steps"),
        (("--setup", "excel"), "no environment 'excel' to set up. There are torch, "),
        (("--setup", "--threads", "2"), "`--setup` measures nothing .*also: --threads"),
        (("--setup", "--json", "a.json"), "also: --json"),
        (("--from", "a.json", "--cold"), "`--from` shows an earlier run .*also: --cold"),
        (("QN-B1", "--from", "a.json"), "also: IDS"),
        (("--from", "/no/such.json"), "/no/such.json"),
        (("--from", "a.json", "--sweep"), "also: --sweep"),
        (("SEED", "--sweep"), "`--sweep` has shapes of its own .*also: IDS"),
        (("--sweep", "--metaschedule", "8"), "also: --metaschedule"),
        (("--calls", "--cold"), "`--calls` measures ours alone.*also: --cold"),
        (("--calls", "--json", "a.json"), "also: --json"),
        (("--calls", "--spaces"), "`--spaces` measures two searches .*also: --calls"),
        (("SEED", "--calls", "--threads", "1,1,2"), "`--calls` takes one number of --threads"),
        (("SEED", "--metaschedule", "0"), "`--metaschedule` must be positive. Received: 0"),
    ],
)  # fmt: skip
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing_measured(monkeypatch)
    assert re.search(message, refused(capsys, *arguments))


@pytest.mark.parametrize("content", ["no json", "[1]", '{"format": 0}'])
def test_from_takes_only_reports(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(content)
    message = refused(capsys, "--from", str(tmp_path / "a.json"))
    assert re.search(r"`--from` must name what --json wrote|A report must be what", message)


def test_from_shows_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = complete()
    (tmp_path / "a.json").write_text(json.dumps(report.to_dict()))
    arguments = ["bench", "--from", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == table.text(report)
    assert "<html" in (tmp_path / "a.html").read_text()


def test_options_reach_the_contest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = nothing_measured(monkeypatch)
    monkeypatch.setattr(process, "processors", lambda threads: list(range(threads)))
    monkeypatch.setattr(page, "html", lambda report: "<html>")  # pictures take their time
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    weakest = targets.runnable()[-1]
    arguments = ["MB-?", "SEED", "--threads", "1,2", "--cold", "--target", weakest, *files]
    arguments += ["--data-format", "channels_first", "--peers", "litert,dense"]
    assert cli.main(["bench", *arguments]) == 0
    (chosen, one), (_, two) = asked
    assert [s.id for s in chosen] == ["SEED", "MB-0", "MB-1", "MB-e"]
    assert {s.config.data_format for s in chosen} == {"channels_first"}
    assert one == Terms(1, weakest, True, ("litert", "dense"))
    assert two == Terms(2, weakest, True, ("litert", "dense"))
    names = {"a-1.json", "a-2.json", "a-1.html", "a-2.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Report.from_dict(json.loads((tmp_path / "a-2.json").read_text())) == complete()
    assert capsys.readouterr().out == 2 * table.text(complete())


def test_sweep_is_shown_and_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure_sweep(target: str, *args: Any) -> Sweep:
        asked.append(target)
        return swept()

    monkeypatch.setattr(sweep, "measure_sweep", measure_sweep)
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    weakest = targets.runnable()[-1]
    assert cli.main(["bench", "--sweep", "--target", weakest, *files]) == 0
    assert asked == [weakest]
    shown = (tmp_path / "a.html").read_text()
    files[1], files[3] = str(tmp_path / "b.json"), str(tmp_path / "b.html")
    assert cli.main(["bench", "--from", str(tmp_path / "a.json"), *files]) == 0
    assert (tmp_path / "b.html").read_text() == shown
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert capsys.readouterr().out == 2 * swept().text()


def test_calls_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_measured(monkeypatch)
    monkeypatch.setattr(calls, "ROW_SECS", 0.0)
    assert cli.main(["bench", "SEED", "--calls"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^SEED +4×10 12→3 k2 s2 +\d", out, re.MULTILINE)
    assert "Python adds at most" in out


def test_wrong_output_in_a_sweep_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Any) -> Sweep:
        raise AssertionError("3→1 is not the layer")

    monkeypatch.setattr(sweep, "measure_sweep", wrong)
    assert "error: 3→1 is not the layer" in refused(capsys, "--sweep")


def test_metaschedule_is_tuned_before_the_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[tuple[object, ...]] = []

    def tune(case: Case, threads: int, trials: int, folder: Path, progress: Any) -> None:
        assert folder.is_dir()
        progress(search.Progress(of=trials))
        tuned.append((case.config.name, case.target, threads, trials))

    pytest.importorskip("tvm")
    from tvm_sepconv.compiler.tuning import search

    monkeypatch.setattr(metaschedule, "tune", tune)
    asked = nothing_measured(monkeypatch)
    assert cli.main(["bench", "SEED", "MB-1", "--metaschedule", "8"]) == 0
    assert tuned == [(name, targets.runnable()[0], 1, 8) for name in ("SEED", "MB-1")]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("peers", "taken"),
    [([], len(CONTESTANTS)), (["--peers", "none"], 1), (["--peers", "openvino"], 2)],
)
def test_peers_are_all_or_those_named(
    peers: list[str], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = nothing_measured(monkeypatch)
    assert cli.main(["bench", "SEED", *peers]) == 0
    ((_, terms),) = asked
    assert sum(map(terms.takes, CONTESTANTS)) == taken
    assert terms == Terms(1, targets.runnable()[0], False, terms.contestants)


# ---- subjects ----------------------------------------------------------------------------------


def test_layer_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = nothing_measured(monkeypatch)
    more = ["--padding", "32,0", "--strides", "2", "--dilation-rate", "3", "--batch", "5"]
    more += ["--depth-multiplier", "2", "--activation", "silu", "--data-format", "channels_first"]
    assert cli.main(["bench", *OWN, *more]) == 0
    (((subject,), _),) = asked
    expected = SepConvConfig.parse(
        8, 3, strides=2, dilation_rate=3, depth_multiplier=2, padding=(32, 0), activation="silu",
        data_format="channels_first", name="layer",
    )  # fmt: skip
    assert subject.config.to_dict() == expected.to_dict()
    assert subject.input_shape == (5, 4, 10)
    assert subject.weights is None


def test_layers_of_a_saved_model_bring_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {}
    for name, use_bias in (("first", True), ("second", False)):
        layer = tvm_sepconv.SeparableConv1D(3, 2, use_bias=use_bias, name=name)
        layer.build((None, None, 4))
        layers[name] = layer
    monkeypatch.setattr("tvm_sepconv.interop.keras.from_keras", lambda path: layers)
    asked = nothing_measured(monkeypatch)
    assert cli.main(["bench", "--keras", "a.keras", "--steps", "7", "--batch", "2"]) == 0
    ((chosen, _),) = asked
    assert [(s.id, s.input_shape) for s in chosen] == [("first", (2, 7, 4)), ("second", (2, 7, 4))]
    for subject in chosen:
        case = Case.of_subject(subject)
        for mine, theirs in zip(case.weights, layers[subject.id].get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "compute in float32 are measured. Received: dtype=float64 of a"),
        ({"dtype": "mixed_float16"}, "dtype=mixed_float16"),
        ({"activation": "glu"}, "element-wise activation by name .*activation=glu of a"),
    ],
)
def test_layers_that_cannot_be_measured(
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = tvm_sepconv.SeparableConv1D(3, 2, name="a", **changes)
    layer.build((None, None, 4))
    monkeypatch.setattr("tvm_sepconv.interop.keras.from_keras", lambda path: {"a": layer})
    assert re.search(message, refused(capsys, "--keras", "a.keras", "--steps", "9"))


def test_select_keeps_the_tables_order() -> None:
    assert [w.id for w in select(["QN-B1", "SEED,MB-?"])] == [
        "SEED", "QN-B1", "MB-0", "MB-1", "MB-e",
    ]  # fmt: skip
    assert select([]) == list(workloads().values())
    assert len(subjects.of_table([], "channels_last")) == len(workloads())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["QN-B1,Z*"], r"No layer is called 'Z\*'"),
        ([" ,"], "A layer must be named. There are SEED"),
    ],
)
def test_select_refuses_what_is_not_there(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(patterns)


# ---- the table of contestants, and end to end ----------------------------------------------------


def test_table_of_contestants_is_sound() -> None:
    names = [c.name for c in CONTESTANTS]
    assert len(set(names)) == len({c.key for c in CONTESTANTS}) == len(CONTESTANTS)
    assert names[0] == OURS
    assert set(REQUIRED) <= {c.name for c in CONTESTANTS if c.counts}
    assert {c.name for c in CONTESTANTS if not c.counts} == {OURS, *BESIDE}
    for contestant in CONTESTANTS:
        assert contestant.environment is None or contestant.environment in environments.ENVIRONMENTS


def test_command_end_to_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("tvm", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.setattr(contest, "ROUNDS", 2)
    monkeypatch.setattr(contest, "CHOICE_SECS", 0.0)
    monkeypatch.setattr(contest, "KERNEL_SECS", 0.0)
    monkeypatch.setattr(limits, "BUDGET_SECS", 0.1)
    threads = min(2, len(os.sched_getaffinity(0)))
    arguments = ["SEED", "--data-format", "channels_first", "--threads", str(threads)]
    arguments += ["--peers", "onnxruntime,dense", "--json", str(tmp_path / "a.json")]
    assert cli.main(["bench", *arguments]) == 0
    printed, progress = capsys.readouterr()
    assert "1 of 1, SEED" in progress
    assert printed.startswith("INCOMPLETE: not measured: PyTorch, torch.compile, OpenVINO, LiteRT.")
    report = Report.from_dict(json.loads((tmp_path / "a.json").read_text()))
    assert (report.threads, report.data_format) == (threads, "channels_first")
    (row,) = report.rows
    assert set(row.whole_call) == {OURS, "ONNX Runtime", "dense Conv1D"}
    assert row.failures == {}
    assert row.best_peer == "ONNX Runtime"
    assert {"onnxruntime", "apache-tvm", "numpy"} <= set(report.versions)


def test_without_the_compiler_its_error_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise RuntimeError("Compiling a layer needs the compiler")

    limits._library.cache_clear()
    monkeypatch.setattr(limits.jit, "compiler", missing)
    assert "Compiling a layer needs the compiler" in refused(capsys, "SEED", "--peers", "none")
