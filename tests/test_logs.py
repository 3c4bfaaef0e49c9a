"""Tuning logs: which record applies, where records are read and written, and what breaks them."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tvm_sepconv import jit
from tvm_sepconv.compiler import logs
from tvm_sepconv.compiler.logs import Record
from tvm_sepconv.config import KernelConfig

TARGET = "x86_64-avx2"
CONFIG = KernelConfig(channels=64, filters=64, kernel_size=9)
DECISIONS = {
    "step_tile": 96, "register_tile": [6, 2], "depthwise_block": [4, 2], "channel_block": 2,
}  # fmt: skip
WITHOUT_BLOCK = {name: DECISIONS[name] for name in DECISIONS if name != "channel_block"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The places records are read from, all empty: the checkout's own decide nothing here."""
    places = {name: tmp_path / name for name in ("chosen", "data", "packaged")}
    places["user"] = places["data"] / "tvm_sepconv" / "tuning_logs"
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(places["chosen"]))
    monkeypatch.setenv("XDG_DATA_HOME", str(places["data"]))
    monkeypatch.setattr(logs, "packaged", lambda: places["packaged"])
    return places


def record(config: KernelConfig = CONFIG, **changes: Any) -> Record:
    values = {
        "config": config, "variant": "long", "target": TARGET, "threads": 1, "batch": 1,
        "steps": 500, "decisions": DECISIONS, "median_secs": 1e-4,
        "default_secs": 1.1e-4, "noise": 0.01,
        "trials": 8, "machine": "a machine", "tvm": "0.27.0", "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Record(**{**values, **changes})


def put(folder: Path, *records: Record) -> Path:
    for item in records:
        folder.mkdir(parents=True, exist_ok=True)
        path = logs.write(item, folder)
    return path


def other(**changes: Any) -> KernelConfig:
    return dataclasses.replace(CONFIG, **changes)


# ---- lines -------------------------------------------------------------------------------------


def test_a_record_is_one_readable_line(tmp_path: Path) -> None:
    path = put(tmp_path, record())
    assert path.name == "x86_64-avx2.jsonl"
    (line,) = path.read_text().splitlines()
    values = json.loads(line)
    assert values["decisions"] == DECISIONS
    assert values["config"]["channels"] == 64
    assert set(values) == {field.name for field in dataclasses.fields(Record)}
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
        json.dumps({**record().to_dict(), "decisions": [1]}),
        json.dumps(record().to_dict())[:-40],
    ],
)  # fmt: skip
def test_a_garbled_line_is_named_skipped_and_kept(
    line: str, folders: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    path = put(folders["chosen"], record(other(filters=128)))
    garbled = line.encode(errors="surrogateescape")
    path.write_bytes(garbled + b"\n\n" + path.read_bytes())
    with pytest.warns(UserWarning, match=re.escape(f"{path}, line 1, is no record")):
        assert logs.read(path) == [record(other(filters=128))]
    with pytest.warns(UserWarning, match="line 1, is no record"):
        logs.write(record(), folders["chosen"])
    assert path.read_bytes().startswith(garbled + b"\n{")
    assert len(path.read_bytes().splitlines()) == 3


# ---- lookup ------------------------------------------------------------------------------------


def test_without_records_there_is_no_match() -> None:
    assert logs.lookup(CONFIG, TARGET) is None


def test_the_own_record_is_exact(folders: dict[str, Path]) -> None:
    put(folders["chosen"], record(other(filters=65)), record())
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert (match.distance, match.origin, match.record) == (0.0, "tuned", record())
    assert match.tiling.to_dict() == {
        "step_tile": 96, "register_tile": (6, 2), "depthwise_block": (4, 2), "channel_block": 2,
    }  # fmt: skip


@pytest.mark.parametrize("missing", [(), ("chosen",), ("chosen", "user")])
def test_folders_are_read_in_order(missing: tuple[str, ...], folders: dict[str, Path]) -> None:
    order = ("chosen", "user", "packaged")
    for name in order:
        if name not in missing:
            put(folders[name], record(machine=name))
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert match.record.machine == order[len(missing)]


def test_the_variable_names_several_folders(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["", str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setenv("TVM_SEPCONV_LOGS", os.pathsep.join(parts))
    expected = [tmp_path / "one", tmp_path / "two", folders["user"], folders["packaged"]]
    assert logs.folders() == expected


def test_the_nearest_record_is_transferred(folders: dict[str, Path]) -> None:
    far, near = other(filters=128, channels=128), other(filters=128)
    put(folders["user"], record(far, machine="far"), record(near, machine="near"))
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert (match.record.machine, match.distance, match.origin) == ("near", 1.0, "transferred")


def test_a_record_too_far_is_not_used(folders: dict[str, Path]) -> None:
    put(folders["user"], record(other(filters=64 * 8)))
    assert logs.lookup(CONFIG, TARGET) is None


def test_a_transferred_record_must_be_a_candidate(folders: dict[str, Path]) -> None:
    # 24 filters are three vectors of eight: two do not divide them, one does.
    narrow = other(filters=24)
    single = {**DECISIONS, "register_tile": [8, 1]}
    put(folders["user"], record(other(filters=32), machine="near"))
    put(folders["user"], record(other(filters=64), machine="far", decisions=single))
    match = logs.lookup(narrow, TARGET)
    assert match is not None
    assert match.record.machine == "far"


@pytest.mark.parametrize(
    "changes",
    [{"variant": "short"}, {"threads": 2}, {"target": "x86_64-avx512"}],
    ids=lambda changes: next(iter(changes)),
)
def test_records_of_something_else_are_not_used(
    changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    folders["user"].mkdir(parents=True)
    line = json.dumps(record(**changes).to_dict())
    (folders["user"] / f"{TARGET}.jsonl").write_text(line + "\n")
    assert logs.lookup(CONFIG, TARGET) is None


def test_a_core_has_records_of_its_own(folders: dict[str, Path]) -> None:
    put(folders["user"], record(target="aarch64-neon"))
    assert logs.lookup(CONFIG, "aarch64-neon") is not None
    assert logs.lookup(CONFIG, "aarch64-neon@cortex-a53") is None


@pytest.mark.parametrize(
    ("decisions", "reason"),
    [
        ({**DECISIONS, "prefetch": 1}, "prefetch"),
        ({"step_tile": 96}, "decisions are"),
        (WITHOUT_BLOCK, r"decisions are \['channel_block'"),  # as written before there were blocks
        ({**DECISIONS, "register_tile": 3}, "iterable"),
        ({**DECISIONS, "register_tile": [6, 2, 1]}, "pairs of integers"),
        ({**DECISIONS, "depthwise_block": ["4", 2]}, "pairs of integers"),
        ({**DECISIONS, "channel_block": [2]}, "int"),
        ({**DECISIONS, "step_tile": 1536}, "do not fit"),
        ({**DECISIONS, "channel_block": 3}, "do not fit"),
        ({**DECISIONS, "channel_block": 1}, "do not fit"),  # less than the depthwise block
        ({**DECISIONS, "channel_block": 16}, "do not fit"),  # more than there are channels
        ({**DECISIONS, "channel_block": 0}, "do not fit"),
        ({**DECISIONS, "register_tile": [7, 2]}, "do not fit"),
        ({**DECISIONS, "register_tile": [0, 2]}, "do not fit"),
        ({**DECISIONS, "register_tile": [12, 2]}, "do not fit"),
    ],
)
def test_decisions_the_schedule_does_not_know_are_named_and_skipped(
    decisions: dict[str, Any], reason: str, folders: dict[str, Path]
) -> None:
    put(folders["chosen"], record(decisions=decisions, date="2025-05-05"))
    put(folders["user"], record())
    with pytest.warns(UserWarning, match=f"{CONFIG.key} for {TARGET}, 2025-05-05.*{reason}"):
        match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert match.record == record()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0), ({"channels": 128}, 1.0), ({"filters": 32}, 1.0), ({"kernel_size": 36}, 1.0),
        ({"strides": 2}, 1.0), ({"depth_multiplier": 2}, 1.0), ({"dilation_rate": 16}, 1.0),
        ({"activation": "relu"}, 0.1), ({"use_bias": False}, 0.1),
        ({"data_format": "channels_first"}, math.inf),
        ({"dtype": "float64", "accumulation_dtype": "float64"}, math.inf),
    ],
)  # fmt: skip
def test_distance_is_as_stated(changes: dict[str, Any], expected: float) -> None:
    assert logs.distance(CONFIG, other(**changes)) == pytest.approx(expected)
    assert logs.distance(other(**changes), CONFIG) == pytest.approx(expected)


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


def _write_many(folder: str, first: int) -> None:
    for filters in range(first, first + 20):
        logs.write(record(other(filters=filters)), Path(folder))


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_many, args=(str(tmp_path), n)) for n in (100, 200, 300)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    filters = sorted(r.config.filters for r in logs.read(tmp_path / f"{TARGET}.jsonl"))
    assert filters == [n + i for n in (100, 200, 300) for i in range(20)]


def test_a_failed_write_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, record())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        logs.write(record(other(filters=32)), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_records_go_to_the_folder_that_was_named(folders: dict[str, Path]) -> None:
    assert logs.writable() == folders["chosen"]


def test_records_go_to_the_users_folder(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TVM_SEPCONV_LOGS")
    assert logs.checkout() is None
    assert logs.writable() == folders["user"]


def test_records_of_a_checkout_stay_in_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TVM_SEPCONV_LOGS")
    (folders["packaged"].parent / "pyproject.toml").touch()
    assert logs.checkout() == folders["packaged"].parent
    assert logs.writable() == folders["packaged"]


def test_a_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"(?s)cannot|can be written.*file.*--logs"):
        logs.writable()


# ---- the cache ---------------------------------------------------------------------------------


def test_the_cache_key_follows_the_record_that_applies(folders: dict[str, Path]) -> None:
    keys = [jit._key(CONFIG, TARGET)]
    put(folders["user"], record(other(filters=64 * 8)), record(target="x86_64-avx512"))
    assert jit._key(CONFIG, TARGET) == keys[0]  # neither applies
    for applies in (
        record(other(filters=128)),
        record(),
        record(decisions={**DECISIONS, "step_tile": 48}),
    ):
        put(folders["user"], dataclasses.replace(applies, median_secs=1e-4 / (1 + len(keys))))
        keys.append(jit._key(CONFIG, TARGET))
    assert len(set(keys)) == len(keys)
    put(folders["user"], record(other(filters=256)))
    assert jit._key(CONFIG, TARGET) == keys[-1]  # farther than the own record


def test_a_lookup_needs_no_tvm(folders: dict[str, Path]) -> None:
    put(folders["chosen"], record())
    code = (
        "import sys; from tvm_sepconv import jit; from tvm_sepconv.compiler import logs\n"
        "from tvm_sepconv.config import KernelConfig\n"
        f"config = KernelConfig.from_dict({CONFIG.to_dict()})\n"
        f"assert logs.lookup(config, {TARGET!r}).origin == 'tuned'\n"
        f"jit._key(config, {TARGET!r})\n"
        "assert not {'tvm', 'tvm_ffi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
