"""Tuning logs as files: their lines, the schema, writing, merging, pruning, and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tuning_records import CONFIG, DECISIONS, TARGET, append, day, other, put, record
from waiting import LIMIT_SECS, until

from tvm_sepconv.compiler.tuning import log_writing, logs, records
from tvm_sepconv.compiler.tuning.logs import Record

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: what was warned of is forgotten."""
    monkeypatch.setattr(records, "_named", set())


# ---- lines -------------------------------------------------------------------------------------


def test_a_record_is_one_readable_line(tmp_path: Path) -> None:
    path = put(tmp_path, record())
    assert path.name == "x86_64-avx2.jsonl"
    (line,) = path.read_text().splitlines()
    values = json.loads(line)
    assert values["decisions"] == DECISIONS
    assert values["config"]["channels"] == 64
    assert set(values) == {field.name for field in dataclasses.fields(Record)} - {"modelled"}
    assert logs.read(path) == [record()]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "line",
    [
        "{", "7", '"x"', "null", "[]", "{}", "\udc80\udcff",
        json.dumps({**record().to_dict(), "trials": "8"}),
        json.dumps({**record().to_dict(), "trials": True}),
        json.dumps({**record().to_dict(), "unknown": 1}),
        json.dumps({**record().to_dict(), "config": {"channels": 0}}),
        json.dumps({**record().to_dict(), "config": 3}),
        json.dumps({**record().to_dict(), "config": {**CONFIG.to_dict(), "colour": 1}}),
        json.dumps({**record().to_dict(), "median_secs": math.nan}),
        json.dumps({**record().to_dict(), "median_secs": -1e-4}),
        json.dumps({**record().to_dict(), "median_secs": 0}),
        json.dumps({**record().to_dict(), "default_secs": math.inf}),
        json.dumps({**record().to_dict(), "default_secs": 10**400}),
        json.dumps({**record().to_dict(), "noise": -0.1}),
        json.dumps({**record().to_dict(), "threads": 0}),
        json.dumps({**record().to_dict(), "steps": -500}),
        json.dumps({**record().to_dict(), "date": "yesterday"}),
        json.dumps({**record().to_dict(), "date": "2026-01-01T00:00:00"}),
        "[" * 9999,
        json.dumps({**record().to_dict(), "decisions": [1]}),
        json.dumps(record().to_dict())[:-40],
    ],
)  # fmt: skip
def test_a_garbled_line_is_named_skipped_and_kept(line: str, tmp_path: Path) -> None:
    path = put(tmp_path, record(other(filters=128)))
    garbled = line.encode(errors="surrogateescape")
    path.write_bytes(garbled + b"\n\n" + path.read_bytes())
    message = f"{path}, line 1, is skipped: it is no record ("
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert logs.read(path) == [record(other(filters=128))]
    logs.write(record(), tmp_path)
    assert path.read_bytes().startswith(garbled + b"\n{")
    assert len(path.read_bytes().splitlines()) == 3
    assert logs.read(path) == [record(other(filters=128)), record()]  # named once a process


def test_a_log_cut_anywhere_loses_one_record_at_most(tmp_path: Path) -> None:
    path = put(tmp_path, record(), record(other(filters=32)))
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(logs.read(path)) >= whole[:length].count(b"\n")
        logs.write(record(other(filters=16)), tmp_path)
        assert records.lines(path)[-1].record == record(other(filters=16))


# ---- writing -----------------------------------------------------------------------------------


def test_a_record_replaces_the_one_of_its_key(tmp_path: Path) -> None:
    old, new, neighbour = record(), record(median_secs=9e-5), record(other(filters=32))
    assert logs.read(put(tmp_path, old, neighbour, new)) == [neighbour, new]


@pytest.mark.parametrize("steps", [500, 250])
def test_a_faster_record_that_came_in_between_stays(steps: int, tmp_path: Path) -> None:
    fast = record(steps=steps, median_secs=5e-5 * steps / 500)
    slow = record(median_secs=8e-5)
    assert logs.read(put(tmp_path, fast, slow)) == [fast]
    assert logs.read(logs.write(slow, tmp_path, replacing=fast)) == [slow]


def test_a_newer_record_of_another_machine_replaces_a_faster_one(tmp_path: Path) -> None:
    here, there = record(), record(median_secs=9e-4, machine="another", date=day(2))
    assert logs.read(put(tmp_path, here, there)) == [there]
    assert logs.read(put(tmp_path, here)) == [there]  # which is newer


def test_a_record_the_schedule_cannot_follow_is_replaced_however_fast(tmp_path: Path) -> None:
    old = record(decisions={"tile": 8}, median_secs=1e-9)
    assert logs.read(put(tmp_path, old, record())) == [record()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median_secs": math.nan}, "`median_secs`"), ({"default_secs": -1.0}, "`default_secs`"),
        ({"trials": 0}, "`trials` must be at least 1"), ({"date": ""}, "isoformat"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_is_not_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        logs.write(record(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- what goes wrong ----------------------------------------------------------------------------


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """A process of this interpreter with the tests' modules."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


WRITE = """
import sys, pathlib
from tuning_records import other, put, record
first, number = map(int, sys.argv[2:])
print("ready", flush=True)
for filters in range(first, first + number):
    put(pathlib.Path(sys.argv[1]), record(other(filters=filters)))
"""


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start(WRITE, tmp_path, first, 50) for first in (100, 200)]
    for writer in writers:
        writer.communicate(timeout=LIMIT_SECS)
        assert writer.returncode == 0
    filters = sorted(r.config.filters for r in logs.read(tmp_path / f"{TARGET}.jsonl"))
    assert filters == [*range(100, 150), *range(200, 250)]
    assert [path.name for path in tmp_path.iterdir()] == [f"{TARGET}.jsonl"]


def test_a_writer_killed_before_it_renames_loses_its_own_record_only(tmp_path: Path) -> None:
    path = put(tmp_path, record())
    before = path.read_bytes()
    stopped = "import os, time\nos.replace = lambda *_: print('here', flush=True) or time.sleep(60)"
    process = start(f"{stopped}\n{WRITE}", tmp_path, 100, 1)
    assert [said(process), said(process)] == ["ready", "here"]
    process.kill()
    process.communicate()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # what it had written
    logs.write(record(other(filters=32)), tmp_path)  # … is gone with the next one; no lock is left
    assert list(tmp_path.iterdir()) == [path]
    assert logs.read(path) == [record(), record(other(filters=32))]


def test_writers_killed_anywhere_leave_a_whole_log(tmp_path: Path) -> None:
    path = tmp_path / f"{TARGET}.jsonl"
    found = 0

    def records_now() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for number in range(6):
        process = start(WRITE, tmp_path, 1000 * (number + 1), 900)
        assert said(process) == "ready"
        until(lambda: records_now() > found, "another record")  # noqa: B023
        time.sleep(0.013 * number)
        process.kill()
        process.communicate()
        now = len(logs.read(path))  # a damaged line would be an error here
        assert found < now == records_now()
        found = now


def fill_up(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def check_full(folder: Path, path: Path, before: bytes) -> None:
    new = record(other(filters=32))
    with pytest.raises(OSError, match=r"No space left on device.*Make room") as caught:
        logs.write(new, folder)
    assert f"could not be written to {path}, which is as it was" in str(caught.value)
    assert Record.from_dict(json.loads(str(caught.value).splitlines()[-1])) == new
    assert path.read_bytes() == before
    assert list(folder.iterdir()) == [path]


def test_a_full_disk_leaves_the_log_as_it_was_and_the_record_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, record())
    monkeypatch.setattr(os, "fsync", fill_up)
    check_full(tmp_path, path, path.read_bytes())


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small: Path) -> None:
    path = put(small, *(record(other(filters=n)) for n in range(64, 74)))
    append(path, *(record(other(filters=n)) for n in range(74, 78)))  # no room for a second copy
    check_full(small, path, path.read_bytes())


def test_a_folder_that_cannot_be_written_is_an_error_with_the_record(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not be written to .*missing.*--logs"):
        logs.write(record(), tmp_path / "missing")
    # A permission bit would not stop root; a file system without files does.
    with pytest.raises(OSError, match="could not be written to /proc/self"):
        logs.write(record(), Path("/proc/self"))


def test_a_log_that_cannot_be_read_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, record())
    before = path.read_bytes()

    def damaged(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", damaged)
        with pytest.raises(OSError, match=r"could not be written .*Input/output error"):
            logs.write(record(other(filters=32)), tmp_path)
        with pytest.raises(OSError, match="Input/output error"):
            log_writing.prune(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("linked", ["folder", "log"])
def test_links_are_followed_and_stay(linked: str, tmp_path: Path) -> None:
    path = put(tmp_path / "real", record())
    link = tmp_path / "link"
    if linked == "folder":
        link.symlink_to(path.parent)
    else:
        link.mkdir()
        (link / path.name).symlink_to(path)
    logs.write(record(other(filters=32)), link)
    assert (link if linked == "folder" else link / path.name).is_symlink()
    assert logs.read(path) == [record(), record(other(filters=32))]
    assert list(path.parent.iterdir()) == [path]


def test_without_locks_it_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\): let one process"):
        path = put(tmp_path, record())
    assert logs.read(path) == [record()]


def test_a_lock_that_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        logs.write(record(), tmp_path)


# ---- the schema ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    text = json.loads((ROOT / "tuning_logs" / "record.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


def test_committed_records_are_of_the_schema_and_can_be_used(schema: Any) -> None:
    for path in sorted((ROOT / "tuning_logs").glob("*.jsonl")):
        for line in records.lines(path):
            schema.validate(json.loads(line.text))
            assert not line.problem, line.where


MODELLED = record(modelled="neoverse-n1").to_dict()


def _without(name: str) -> dict[str, Any]:
    return {n: value for n, value in record().to_dict().items() if n != name}


@pytest.mark.parametrize(
    ("values", "right"),
    [
        (record().to_dict(), True),
        (record(threads=2, steps=1, noise=0, median_secs=1).to_dict(), True),
        ({**record().to_dict(), "date": "2026-01-01T00:00:00.123456-05:00"}, True),
        ({**record().to_dict(), "config": {"channels": 1, "filters": 1, "kernel_size": 1}}, True),
        *((_without(name), False) for name in record().to_dict()),
        (MODELLED, True),
        *(({n: v for n, v in MODELLED.items() if n != name}, False) for name in MODELLED),
        *(({**MODELLED, name: value}, False)
          for name in ("median_cycles", "default_cycles") for value in (0, -1, 1.5, True, None)),
        *(({**MODELLED, name: 1e-4}, False) for name in ("median_secs", "default_secs")),
        *(({**record().to_dict(), name: 3}, False) for name in ("median_cycles", "modelled")),
        *(({**record().to_dict(), field.name: value}, False)
          for field in dataclasses.fields(Record) for value in (None, [1])),
        *(({**record().to_dict(), name: 0}, False)
          for name in ("threads", "batch", "steps", "trials", "median_secs", "default_secs")),
        *(({**record().to_dict(), name: True}, False)
          for name in ("threads", "median_secs", "machine", "date", "config", "decisions")),
        *(({**record().to_dict(), name: -1}, False) for name in ("steps", "median_secs", "noise")),
        *(({**record().to_dict(), "date": text}, False)
          for text in ("", "2026", "2026-01-01", "2026-01-01T00:00:00")),
        *(({**record().to_dict(), "config": {**CONFIG.to_dict(), **change}}, False)
          for change in ({"channels": 0}, {"strides": "1"}, {"use_bias": 1}, {"dtype": "int8"},
                         {"data_format": "last"}, {"colour": 1}, {"accumulation_dtype": "int8"})),
        *(({**record().to_dict(), "config": config}, False) for config in ({}, {"channels": 3}, 3)),
        ({**record().to_dict(), "colour": 1}, False),
        ([], False), (3, False), (None, False),
    ],
)  # fmt: skip
def test_the_reader_takes_what_the_schema_describes(schema: Any, values: Any, right: bool) -> None:
    assert schema.is_valid(json.loads(json.dumps(values))) == right
    line = records._line(Path(f"{TARGET}.jsonl"), 1, json.dumps(values))
    assert (line.record is not None) == right


def test_the_schema_has_the_fields_of_a_record_and_describes_them(schema: Any) -> None:
    measured, modelled = (set(one["required"]) for one in schema.schema["oneOf"])
    common = set(schema.schema["required"])
    assert common | measured == set(record().to_dict())
    assert common | modelled == set(MODELLED)
    assert set(schema.schema["properties"]) == common | measured | modelled
    assert all("description" in value for value in schema.schema["properties"].values())
    config = schema.schema["properties"]["config"]["properties"]
    assert set(config) == set(CONFIG.to_dict())
