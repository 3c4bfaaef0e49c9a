"""Records and histories of modelled cycles: never taken for times, second to what was measured."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import tuning_histories
from tuning_records import CONFIG, TARGET, append, day, put, record

from tvm_sepconv import cli
from tvm_sepconv.commands.inspect import origins
from tvm_sepconv.compiler.tuning import history, log_writing, logs
from tvm_sepconv.compiler.tuning.history import Trial, Writer, read_history
from tvm_sepconv.compiler.tuning.records import Record, best, read
from tvm_sepconv.report import curves, found, times

MEASURED = record(median_secs=2e-4, date=day(1))
MODELLED = record(
    modelled="cortex-a55", median_secs=0.123456, default_secs=0.2, noise=0.0, date=day(2),
    machine="modelled cortex-a55, LLVM 19.1.7, QEMU 7.2.22",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of logs."""
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "chosen"))
    monkeypatch.setattr(logs, "_announced", set())
    return tmp_path / "chosen"


def test_a_modelled_record_is_written_in_cycles(folder: Path) -> None:
    path = put(folder, MODELLED)
    values = json.loads(path.read_text())
    assert (values["modelled"], values["median_cycles"]) == ("cortex-a55", 123456)
    assert not [name for name in values if name.endswith("_secs")]
    assert read(path) == [MODELLED]


@pytest.mark.parametrize("order", [(MEASURED, MODELLED), (MODELLED, MEASURED)], ids=["1st", "2nd"])
def test_what_was_measured_stays_before_what_was_modelled(
    order: tuple[Record, Record], folder: Path
) -> None:
    assert best(order) == MEASURED
    assert read(put(folder, *order)) == [MEASURED]


def test_of_two_modelled_records_the_fewer_cycles_stay(folder: Path) -> None:
    fewer = dataclasses.replace(MODELLED, median_secs=0.1, date=day(1))
    assert read(put(folder, MODELLED, fewer)) == [fewer]


def test_a_measured_record_wins_over_a_modelled_one_in_a_folder_before(folder: Path) -> None:
    append(folder / f"{TARGET}.jsonl", MODELLED)
    append(logs.packaged() / f"{TARGET}.jsonl", MEASURED)
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None and match.record == MEASURED


def test_announcements_and_lists_say_modelled(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, MODELLED)
    match = logs.lookup(CONFIG, TARGET)
    with caplog.at_level(logging.INFO, "tvm_sepconv"):
        logs.announce(CONFIG, TARGET, match)
    assert "tuned (1.235e+05 modelled cycles, 2026-01-02)" in caplog.text
    assert cli.main(["logs", "show", "--target", TARGET]) == 0
    shown = capsys.readouterr().out
    assert "modelled cortex-a55" in shown
    assert "123456 cycles" in shown and "200000 cycles" in shown


def test_a_merge_keeps_what_was_measured_and_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, MEASURED)
    append(tmp_path / "theirs" / f"{TARGET}.jsonl", MODELLED)
    assert cli.main(["logs", "merge", str(tmp_path / "theirs"), "--into", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "kept" in said and "123456 modelled cycles" in said and "measured" in said
    assert read(folder / f"{TARGET}.jsonl") == [MEASURED]


def test_a_record_measured_against_a_modelled_one_takes_its_place(folder: Path) -> None:
    path = put(folder, MODELLED)
    log_writing.write(MEASURED, folder, MODELLED)
    assert read(path) == [MEASURED]


def test_a_modelled_history_is_in_cycles_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / history.NAME
    trials = [
        Trial(1, {"tile": 1}, [0.123456, 0.123456], None, 1.5),
        Trial(2, {"tile": 2}, None, "wrong", 2.5),
    ]
    writer = Writer(path, {"modelled": "cortex-a55"})
    writer.trial(trials[0])
    writer.close()
    again = Writer(path, None)  # which goes on in cycles
    again.trial(trials[1])
    again.final(default_secs=0.2, best_secs=0.1, noise=0.0)
    again.close()
    _, first, second, final = map(json.loads, path.read_text().splitlines())
    assert (first["cycles"], second["cycles"]) == ([123456, 123456], None)
    assert final == {"final": {"default_cycles": 200000, "best_cycles": 100000, "noise": 0.0}}
    assert "secs" not in first and "secs" not in second
    found = read_history(path)
    assert found.trials == trials
    assert found.final == {"default_secs": 0.2, "best_secs": 0.1, "noise": 0.0}


def test_a_report_says_modelled_and_cycles(folder: Path, tmp_path: Path) -> None:
    put(folder, MODELLED)
    header = tuning_histories.header(
        "MB-1", target=TARGET, config=CONFIG.to_dict(), modelled="cortex-a55"
    )
    place = history.folder(tmp_path / "work", TARGET, CONFIG.key, header["space"])
    place.mkdir(parents=True)
    writer = Writer(place / history.NAME, {k: v for k, v in header.items() if k != "history"})
    writer.trial(Trial(1, {"tile": 1}, [0.2], None, 1.0))
    writer.trial(Trial(2, {"tile": 2}, [0.123456], None, 2.0))
    writer.final(default_secs=0.2, best_secs=0.123456, noise=0.0)
    writer.close()
    everything = found.read(tmp_path / "work", [], TARGET)
    (row,) = curves.table(everything.searches)
    assert [cell for cell in row if "cycles" in cell] == [
        "200000 modelled cycles", "123456 modelled cycles", "123456 modelled cycles"
    ]  # fmt: skip
    lines = times.lines(everything, TARGET, None)
    (cells,) = (dict(zip(times.HEAD, row, strict=True)) for row in times.table(lines))
    assert cells["default, µs"] == "200000 modelled cycles"
    assert cells["tuned, µs"] == "123456 modelled cycles"
    assert cells["measured"] == "not, but modelled, 2026-01-02"
    assert lines[0].modelled and "modelled cycles" in times._note(lines[0])


def test_inspect_says_modelled_and_no_time() -> None:
    variant = {"decisions": {"step_tile": 64}, "origin": "tuned, modelled", "record_secs": None,
               "distance": None}  # fmt: skip
    assert origins([variant]) == "tiles of 64 steps tuned, modelled"
