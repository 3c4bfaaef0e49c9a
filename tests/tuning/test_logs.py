"""Tuning logs: which record applies, and where records are read."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tuning_records import CONFIG, DECISIONS, TARGET, append, day, other, put, record

from tvm_sepconv import jit
from tvm_sepconv.compiler.tuning import logs, records

WITHOUT_BLOCK = {name: DECISIONS[name] for name in DECISIONS if name != "channel_block"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The places records are read from, all empty: the checkout's own decide nothing here."""
    places = {name: tmp_path / name for name in ("chosen", "data", "packaged")}
    places["user"] = places["data"] / "tvm_sepconv" / "tuning_logs"
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(places["chosen"]))
    monkeypatch.setenv("XDG_DATA_HOME", str(places["data"]))
    monkeypatch.setattr(logs, "packaged", lambda: places["packaged"])
    monkeypatch.setattr(records, "_named", set())
    monkeypatch.setattr(logs, "_announced", set())
    return places


# ---- lookup ------------------------------------------------------------------------------------


def test_without_records_there_is_no_match() -> None:
    assert logs.lookup(CONFIG, TARGET) is None


def test_the_own_record_is_exact(folders: dict[str, Path]) -> None:
    put(folders["chosen"], record(other(filters=65)), record())
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert (match.distance, match.origin, match.record) == (0.0, "tuned", record())
    assert json.loads(json.dumps(match.tiling.to_dict())) == DECISIONS


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


def test_what_would_be_transferred_to_a_kernel_that_has_a_record(folders: dict[str, Path]) -> None:
    put(folders["user"], record(), record(threads=2), record(other(filters=128)))
    match = logs.lookup(CONFIG, TARGET, besides=CONFIG)
    assert match is not None
    assert (match.record.config, match.origin) == (other(filters=128), "transferred")


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


@pytest.mark.parametrize(("tile", "used"), [(96, True), (192, False)])
def test_a_transferred_record_must_leave_the_scratch_in_cache(
    tile: int, used: bool, folders: dict[str, Path]
) -> None:
    near = record(other(channels=1024), decisions={**DECISIONS, "step_tile": tile})
    put(folders["user"], near)
    assert logs.lookup(other(channels=1024), TARGET) is not None
    assert (logs.lookup(other(channels=2048), TARGET) is not None) == used


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"variant": "short"}, "there is no schedule with decisions of the short variant"),
        ({"target": "x86_64-avx512"}, "it is of target x86_64-avx512, which the log is not named"),
    ],
    ids=lambda changes: next(iter(changes)) if isinstance(changes, dict) else "",
)
def test_records_of_something_else_are_named_and_not_used(
    changes: dict[str, Any], reason: str, folders: dict[str, Path]
) -> None:
    path = append(folders["user"] / f"{TARGET}.jsonl", record(**changes))
    message = f"{path}, line 1, 64→64 k9 of 2026-01-01, is skipped: {reason}"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert logs.lookup(CONFIG, TARGET) is None


def test_another_targets_log_in_the_same_folder_is_not_read(folders: dict[str, Path]) -> None:
    put(folders["user"], record(target="x86_64-avx512"))
    assert logs.lookup(CONFIG, TARGET) is None
    assert logs.lookup(CONFIG, "x86_64-avx512") is not None


def test_a_log_that_cannot_be_read_is_named_once_and_skipped(folders: dict[str, Path]) -> None:
    path = folders["chosen"] / f"{TARGET}.jsonl"
    path.mkdir(parents=True)  # a permission bit would not stop root
    put(folders["user"], record())
    with pytest.warns(UserWarning, match=f"cannot be read and is skipped: .*{path}"):
        match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert logs.lookup(CONFIG, TARGET) == match


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        ((1, 2, 4), 1, 1), ((4, 2), 1, 2), ((1, 2, 8), 2, 2), ((1, 8), 3, 8), ((4, 1), 2, 1),
    ],
)  # fmt: skip
def test_the_record_of_the_nearest_number_of_threads_is_used(
    there: tuple[int, ...], asked: int, chosen: int, folders: dict[str, Path]
) -> None:
    put(folders["user"], *(record(threads=n) for n in there))
    match = logs.lookup(CONFIG, TARGET, threads=asked)
    assert match is not None
    assert (match.record.threads, match.origin) == (chosen, "tuned")


def test_an_earlier_folder_goes_before_the_number_of_threads(folders: dict[str, Path]) -> None:
    put(folders["packaged"], record())
    put(folders["chosen"], record(threads=2))
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert match.record.threads == 2


def test_the_own_record_goes_before_a_nearer_number_of_threads(folders: dict[str, Path]) -> None:
    put(folders["user"], record(threads=4), record(other(filters=128)))
    match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert (match.record.threads, match.distance) == (4, 0.0)


FAST = record(median_secs=5e-5, date=day(1))
SLOW = record(median_secs=9e-5, date=day(2))
ELSEWHERE = record(median_secs=2e-4, machine="another", date=day(3))


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        ((FAST, SLOW), FAST),
        ((FAST, SLOW, ELSEWHERE), ELSEWHERE),
        ((dataclasses.replace(ELSEWHERE, date="2025-12-31T00:00:00+00:00"), FAST, SLOW), FAST),
        ((dataclasses.replace(FAST, steps=250), SLOW), SLOW),  # 0.2, not 0.18 µs a step
        ((FAST, dataclasses.replace(FAST, date=day(4))), dataclasses.replace(FAST, date=day(4))),
        ((dataclasses.replace(FAST, date="2026-01-05T00:30:00+01:00"),
          dataclasses.replace(ELSEWHERE, date="2026-01-05T00:00:00+00:00")),
         dataclasses.replace(ELSEWHERE, date="2026-01-05T00:00:00+00:00")),
    ],
    ids=["one machine", "two machines", "older elsewhere", "a step", "equally fast", "zones"],
)  # fmt: skip
def test_of_several_records_of_one_key_the_best_counts(
    several: tuple[records.Record, ...], expected: records.Record, folders: dict[str, Path]
) -> None:
    for number, order in enumerate((several, several[::-1])):
        path = append(folders["user"] / f"x{number}" / f"{TARGET}.jsonl", *order)
        os.environ["TVM_SEPCONV_LOGS"] = str(path.parent)  # undone with the fixture's
        match = logs.lookup(CONFIG, TARGET)
        assert match is not None
        assert match.record == expected


def test_a_core_has_records_of_its_own(folders: dict[str, Path]) -> None:
    put(folders["user"], record(target="aarch64-neon"))
    assert logs.lookup(CONFIG, "aarch64-neon") is not None
    assert logs.lookup(CONFIG, "aarch64-neon@cortex-a53") is None


@pytest.mark.parametrize(
    ("decisions", "reason"),
    [
        ({**DECISIONS, "prefetch": 1}, "the schedule has no decision prefetch"),
        ({}, "it lacks the schedule's decision channel_block, "),
        (WITHOUT_BLOCK, "it lacks the schedule's decision channel_block"),
        ({**DECISIONS, "register_tile": 3}, "register_tile must be tuple[int, int], and is 3"),
        ({**DECISIONS, "register_tile": "62"}, "must be tuple[int, int], and is '62'"),
        ({**DECISIONS, "register_tile": [6, 2, 1]}, "must be tuple[int, int], and is [6, 2, 1]"),
        ({**DECISIONS, "depthwise_block": ["4", 2]}, "must be tuple[int, int], and is ['4', 2]"),
        ({**DECISIONS, "channel_block": [2]}, "channel_block must be int, and is [2]"),
        ({**DECISIONS, "step_tile": True}, "step_tile must be int, and is True"),
        ({**DECISIONS, "step_tile": "96"}, "step_tile must be int, and is '96'"),
        ({**DECISIONS, "in_place": 1}, "in_place must be bool, and is 1"),
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
def test_decisions_the_schedule_does_not_know_are_named_once_and_skipped(
    decisions: dict[str, Any], reason: str, folders: dict[str, Path]
) -> None:
    path = put(folders["chosen"], record(decisions=decisions, date=day(5)))
    put(folders["user"], record())
    message = f"{path}, line 1, 64→64 k9 of 2026-01-05, is skipped: "
    with pytest.warns(UserWarning, match=re.escape(message) + ".*" + re.escape(reason)):
        match = logs.lookup(CONFIG, TARGET)
    assert match is not None
    assert match.record == record()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logs.lookup(CONFIG, TARGET) == match  # named once a process


def test_a_record_that_cannot_be_used_hides_no_other_of_its_kernel(
    folders: dict[str, Path],
) -> None:
    fast = record(decisions=WITHOUT_BLOCK, median_secs=1e-5)
    append(folders["chosen"] / f"{TARGET}.jsonl", fast, record())
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


# ---- the folder that is written to --------------------------------------------------------------


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
    def key() -> str:
        return jit._key(CONFIG, TARGET, logs.lookup(CONFIG, TARGET))

    keys = [key()]
    put(folders["user"], record(other(filters=64 * 8)), record(target="x86_64-avx512"))
    assert key() == keys[0]  # neither applies
    for applies in (
        record(other(filters=128)),
        record(),
        record(decisions={**DECISIONS, "step_tile": 48}),
    ):
        put(folders["user"], dataclasses.replace(applies, median_secs=1e-4 / (1 + len(keys))))
        keys.append(key())
    assert len(set(keys)) == len(keys)
    put(folders["user"], record(other(filters=256)))
    assert key() == keys[-1]  # farther than the own record


def test_a_lookup_needs_no_tvm(folders: dict[str, Path]) -> None:
    put(folders["chosen"], record())
    code = (
        "import sys; from tvm_sepconv import jit; from tvm_sepconv.compiler.tuning import logs\n"
        "from tvm_sepconv.config import KernelConfig\n"
        f"config = KernelConfig.from_dict({CONFIG.to_dict()})\n"
        f"match = logs.lookup(config, {TARGET!r})\n"
        "assert match.origin == 'tuned'\n"
        f"jit._key(config, {TARGET!r}, match)\n"
        "assert not {'tvm', 'tvm_ffi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- saying which one it is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "config", "text"),
    [
        ([], CONFIG, "64→64 k9 for x86_64-avx2: default decisions; `tvm-sepconv tune` can search "
                     "better ones"),
        ([record()], CONFIG, "64→64 k9 for x86_64-avx2: tuned (100 µs, 2026-01-01)"),
        ([record(threads=2)], CONFIG, "64→64 k9 for x86_64-avx2: tuned (100 µs on 2 threads, "
                                      "2026-01-01)"),
        ([record(other(kernel_size=18))], CONFIG, "64→64 k9 for x86_64-avx2: transferred from "
                                                  "64→64 k18 (distance 0.5)"),
    ],
    ids=["default", "tuned", "threads", "transferred"],
)  # fmt: skip
def test_where_decisions_are_from_is_logged_once(
    there: list[records.Record], config: records.KernelConfig, text: str,
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for item in there:
        put(folders["user"], item)
    with caplog.at_level(logging.INFO, "tvm_sepconv"):
        for _ in range(2):
            logs.announce(config, TARGET, logs.lookup(config, TARGET))
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "tvm_sepconv"]
    assert said == [("INFO", text)]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "64→64 k9"),
        ({"strides": 2, "dilation_rate": 3, "depth_multiplier": 4}, "64→64 k9 s2 d3 m4"),
        ({"activation": "relu", "use_bias": False, "dtype": "float16"},
         "64→64 k9 relu without bias float16"),
        ({"channels": 256, "filters": 256, "kernel_size": 33, "activation": "relu"},
         "QN-B1 256→256 k33"),
        ({"channels": 256, "filters": 256, "kernel_size": 33, "activation": "relu",
          "data_format": "channels_first"}, "QN-B1 256→256 k33 channels_first"),
    ],
)  # fmt: skip
def test_kernels_are_named_for_people(changes: dict[str, Any], name: str) -> None:
    assert records.kernel_name(other(**changes)) == name
