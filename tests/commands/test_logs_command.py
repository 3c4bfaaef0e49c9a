"""``tvm-sepconv logs``: what it shows, merges and removes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from tuning_records import DECISIONS, TARGET, append, day, other, put, record

from tvm_sepconv import cli
from tvm_sepconv.compiler.tuning import logs, records
from tvm_sepconv.workloads import workloads

QN_B1 = workloads()["QN-B1"].config().kernel_config(256)
OLD = {name: DECISIONS[name] for name in DECISIONS if name != "channel_block"}


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder that records are read from and written to."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "mine"))
    monkeypatch.setattr(records, "_named", set())
    return tmp_path / "mine"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> str:
    assert cli.main(["logs", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def found(path: Path) -> list[records.Record]:
    return [line.record for line in records.lines(path) if line.record]


# ---- show --------------------------------------------------------------------------------------


def test_records_are_shown_in_read_order_with_what_they_say(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [put(mine, record(QN_B1, median_secs=6.5e-4, default_secs=7.8e-4, trials=48))]
    paths += [put(tmp_path / "packaged", record(QN_B1), record())]
    out = run(capsys, "show").splitlines()
    assert [line for line in out if line.endswith(".jsonl")] == list(map(str, paths))
    row = out[out.index(str(paths[0])) + 2]
    words = "QN-B1 256→256 k33 1×500 1 650.0 µs 780.0 µs 1.20× 1.0% 48 2026-01-01 a machine"
    assert row.split() == words.split()
    assert f"    line 1: shadowed: by {paths[0]}, line 1" in out
    assert out[-1].split()[:2] == ["64→64", "k9"]  # applies: nothing to remark


def test_what_is_skipped_is_shown_with_the_reason(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = append(
        mine / f"{TARGET}.jsonl",
        record(median_secs=2e-4), record(), record(other(filters=32), decisions=OLD),
        record(target="aarch64-neon"),
    )  # fmt: skip
    path.write_text(path.read_text() + "{\n")
    out = run(capsys, "show")
    assert f"line 1: shadowed: by {path}, line 2" in out  # slower, of the same machine
    assert "line 3: skipped: it lacks the schedule's decision channel_block" in out
    assert "line 4: skipped: it is of target aarch64-neon" in out
    assert "line 5: skipped: it is no record (JSONDecodeError" in out
    assert "line 2:" not in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"QN-B1", None, "avx512"}),
        (("--target", "x86_64-avx512"), {"avx512"}),
        (("--workloads", "QN-B1"), {"QN-B1"}),
        (("--workloads", "TN-*, QN-*"), {"QN-B1"}),
        (("--workloads", "c64_*"), {None, "avx512"}),
    ],
    ids=["all", "target", "layer", "patterns", "key"],
)
def test_records_are_chosen_by_target_and_layer(
    arguments: tuple[str, ...], expected: set[str | None], mine: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    put(mine, record(QN_B1), record(), record(target="x86_64-avx512"))
    rows = json.loads(run(capsys, "show", "--json", *arguments))
    shown = {"avx512" if "avx512" in row["file"] else row["workload"] for row in rows}
    assert shown == expected


def test_json_has_the_records_whole(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = append(mine / f"{TARGET}.jsonl", record())
    path.write_text("{\n" + path.read_text())
    first, second = json.loads(run(capsys, "show", "--json"))
    assert first["why"].startswith("it is no record")
    assert {**first, "why": ""} == {
        "file": str(path), "line": 1, "state": "skipped", "why": "", "workload": None,
        "record": None,
    }  # fmt: skip
    assert second == {
        "file": str(path), "line": 2, "state": "applies", "why": "", "workload": None,
        "record": record().to_dict(),
    }  # fmt: skip


def test_another_folder_is_read_first(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(mine, record())
    put(tmp_path / "other", record())
    rows = json.loads(run(capsys, "show", "--json", "--logs", tmp_path / "other"))
    assert [(Path(row["file"]).parent.name, row["state"]) for row in rows] == [
        ("other", "applies"), ("mine", "shadowed"),
    ]  # fmt: skip


def test_no_records_are_said(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"No records in {mine}, " in run(capsys, "show", status=1)
    assert run(capsys, "show", "--json", status=1) == "[]\n"
    assert "Received: target=x87" in refused(capsys, "logs", "show", "--target", "x87")


def test_showing_needs_no_compiler(mine: Path) -> None:
    put(mine, record())
    code = (
        "import sys; from tvm_sepconv import cli; assert cli.main(['logs', 'show']) == 0\n"
        "assert not {'tvm', 'tvm_ffi', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "64→64 k9" in done.stdout


# ---- merge -------------------------------------------------------------------------------------

FASTER = record(median_secs=9e-5, date=day(3))
SLOWER = record(median_secs=2e-4, date=day(4))
NEWER = record(median_secs=3e-4, date=day(5), machine="another")
OLDER = record(median_secs=3e-5, date="2025-01-01T00:00:00+00:00", machine="another")


@pytest.mark.parametrize(
    ("new", "outcome", "why"),
    [
        (FASTER, "replaced", "by 90.0 µs (1×500, a machine, 2026-01-03): faster, of the same"),
        (SLOWER, "kept", "100.0 µs (1×500, a machine, 2026-01-01), not 200.0 µs (1×500, a machine, "
                         "2026-01-04): faster, of the same machine"),
        (NEWER, "replaced", "by 300.0 µs (1×500, another, 2026-01-05): newer, of another machine"),
        (OLDER, "kept", "not 30.0 µs (1×500, another, 2025-01-01): newer, of another machine"),
        (record(), "kept", "100.0 µs (1×500, a machine, 2026-01-01), which is the same"),
        (record(other(filters=32)), "added", "64→32 k9, x86_64-avx2: 100.0 µs"),
        (record(threads=2), "added", "64→64 k9, x86_64-avx2, 2 threads: 100.0 µs"),
    ],
    ids=["faster", "slower", "newer elsewhere", "older elsewhere", "same", "new", "threads"],
)  # fmt: skip
def test_of_one_key_one_record_survives_a_merge(
    new: records.Record, outcome: str, why: str, mine: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, path = put(tmp_path / "source", new), put(mine, record())
    before = path.read_bytes()
    arguments = ("merge", source, "--into", mine)
    planned = run(capsys, *arguments, "--dry-run")
    assert path.read_bytes() == before
    out = run(capsys, *arguments)
    assert planned == f"{out.rstrip()} (not written: --dry-run)\n"
    assert out.startswith(f"{outcome}: ")
    assert why in out
    expected = {"replaced": [new], "kept": [record()], "added": [record(), new]}
    assert found(path) == expected[outcome]
    if outcome == "kept":
        assert path.read_bytes() == before


def test_a_merge_takes_folders_and_files_of_any_name_to_their_targets(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [record(), record(target="x86_64-avx512"), record(QN_B1, decisions=OLD)]
    file = append(tmp_path / "of_a_friend.txt", *several)
    file.write_text(file.read_text() + "garbled\n")
    folder = put(tmp_path / "folder", record(other(filters=32))).parent
    out = run(capsys, "merge", file, folder, "--into", mine / "new")
    assert f"left out: {file}, line 3, QN-B1 256→256 k33 of 2026-01-01: it lacks" in out
    assert f"left out: {file}, line 4: it is no record" in out
    assert out.endswith(f"{mine / 'new'}: 3 added, 0 replaced, 0 kept\n")
    assert found(mine / "new" / f"{TARGET}.jsonl") == [record(), record(other(filters=32))]
    assert found(mine / "new" / "x86_64-avx512.jsonl") == [several[1]]


def test_a_merge_into_a_log_takes_its_targets_records_only(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = append(tmp_path / "source", record(), record(target="x86_64-avx512"))
    out = run(capsys, "merge", source, "--into", mine / f"{TARGET}.jsonl")
    assert f"left out: {source}, line 2, 64→64 k9 of 2026-01-01: it is of target" in out
    assert [path.name for path in mine.iterdir()] == [f"{TARGET}.jsonl"]
    run(capsys, "merge", source, "--into", mine / "aarch64-neon.jsonl", status=1)


def test_damaged_lines_of_the_log_merged_into_stay(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = append(mine / f"{TARGET}.jsonl")
    path.write_text("garbled\n")
    run(capsys, "merge", put(tmp_path / "source", record()), "--into", mine)
    assert path.read_text().splitlines()[0] == "garbled"
    assert found(path) == [record()]


def test_a_source_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "logs", "merge", str(tmp_path / "x"), "--into", str(tmp_path))
    assert f"There is no log and no folder called {tmp_path / 'x'}" in message


# ---- prune -------------------------------------------------------------------------------------


def _aged(days: float, **changes: Any) -> records.Record:
    date = datetime.now(timezone.utc) - timedelta(days=days)
    return dataclasses.replace(record(**changes), date=date.isoformat(timespec="seconds"))


def test_pruning_takes_out_what_is_never_used_and_keeps_it_beside(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = [
        record(median_secs=2e-4), record(QN_B1, decisions=OLD), record(target="aarch64-neon"),
    ]  # fmt: skip
    path = append(mine / f"{TARGET}.jsonl", *useless, record(), record(threads=2), record())
    path.write_text(path.read_text() + "garbled\n")
    whole = path.read_text().splitlines()
    planned = run(capsys, "prune", "--dry-run")
    assert path.read_text().splitlines() == whole
    assert f"would be removed: {path}, line 7: it is no record" in planned
    out = run(capsys, "prune")
    for number, why in (
        (1, "another record of its kernel stays"),
        (2, "it lacks the schedule's decision channel_block"),
        (3, "it is of target aarch64-neon"),
        (6, "another record of its kernel stays"),
        (7, "it is no record"),
    ):
        (line,) = (line for line in out.splitlines() if f", line {number}" in line)
        assert line.startswith(f"removed: {path}") and why in line
    assert out.endswith(f"{mine}: 5 lines removed\n")
    assert path.read_text().splitlines() == whole[3:5]
    assert Path(f"{path}.removed").read_text().splitlines() == [*whole[:3], *whole[5:]]
    assert run(capsys, "prune") == f"{mine}: 0 lines removed\n"
    path.write_text(path.read_text() + "more\n")
    run(capsys, "prune")
    assert Path(f"{path}.removed").read_text().splitlines() == [*whole[:3], *whole[5:], "more"]


def test_pruning_by_age_and_target(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(mine / f"{TARGET}.jsonl", _aged(31), _aged(29, config=QN_B1))
    other_target = append(mine / "x86_64-avx512.jsonl", _aged(31, target="x86_64-avx512"))
    out = run(capsys, "prune", "--older-than", "30", "--target", TARGET)
    assert "it is older than 30 days" in out
    assert [r.config for r in found(mine / f"{TARGET}.jsonl")] == [QN_B1]
    assert len(found(other_target)) == 1
    run(capsys, "prune", "--older-than", "30")
    assert found(other_target) == []


def test_only_the_folder_written_to_or_named_is_pruned(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = append(tmp_path / "packaged" / f"{TARGET}.jsonl", record(), record())
    assert run(capsys, "prune") == f"{mine}: 0 lines removed\n"
    out = run(capsys, "prune", "--logs", path.parent)
    assert out.endswith(f"{path.parent}: 1 lines removed\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--older-than", "-1"), "`--older-than` must be a number of days. Received: -1.0"),
        (("--older-than", "nan"), "`--older-than` must be a number of days. Received: nan"),
        (("--logs", "/nowhere"), "There is no folder called /nowhere"),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "logs", "prune", *arguments)
