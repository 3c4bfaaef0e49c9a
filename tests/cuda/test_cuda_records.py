"""Tuning records of CUDA's variants: which of them applies, and which nobody can use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tvm_sepconv.compiler.schedules import cuda

from tvm_sepconv.compiler.tuning import logs
from tvm_sepconv.compiler.tuning.records import Record, kernel_name, lines
from tvm_sepconv.config import KernelConfig

CONFIG = KernelConfig(channels=8, filters=8, kernel_size=3, activation="relu")


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def record(**changes: Any) -> Record:
    wide = dataclasses.replace(CONFIG, channels=64, filters=64)
    tilings = cuda.default_tilings(wide, False, "sm_80")
    values: dict[str, Any] = {
        "config": wide, "variant": "long", "target": "cuda-sm_80", "threads": 1, "batch": 32,
        "steps": 500, "decisions": tilings[0].to_dict(), "median_secs": 1e-5,
        "default_secs": 2e-5, "noise": 0.01, "trials": 9, "machine": "NVIDIA H200", "tvm": "0.27",
        "date": "2026-11-23T00:00:00+00:00", **changes,
    }  # fmt: skip
    return Record(**values)


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "logs").mkdir()

    def write(*records: Record) -> Path:
        for one in records:
            path = logs.write(one, tmp_path / "logs")
        return path

    yield write


def test_records_of_variants_and_tf32_are_kept_apart(logged: Any) -> None:
    config = record().config
    tensor = cuda.default_tilings(config, True, "sm_80")
    short = cuda.default_tilings(config, False, "sm_80")[-1]
    logged(
        record(),
        record(variant="short", decisions=short.to_dict()),
        record(variant="long+tf32", decisions=tensor[0].to_dict()),
    )
    found = {
        v: logs.lookup(config, "cuda-sm_80", variant=v) for v in ("long", "short", "long+tf32")
    }
    assert [m is not None and m.tiling for m in found.values()] == [
        cuda.default_tilings(config, False, "sm_80")[0], short, tensor[0],
    ]  # fmt: skip
    assert logs.lookup(config, "cuda-sm_80", variant="short+tf32") is None
    assert logs.lookup(config, "cuda-sm_90") is None


def test_a_near_kernel_gets_the_record_where_it_fits(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(record())
    near = dataclasses.replace(record().config, kernel_size=5)
    match = logs.lookup(near, "cuda-sm_80")
    assert match is not None
    assert (match.origin, match.record) == ("transferred", record())
    assert kernel_name(record().config) in logs.described(near, match)
    real = cuda.refusal
    monkeypatch.setattr(cuda, "refusal", lambda *a: "no room" if a[0] == near else real(*a))
    assert logs.lookup(near, "cuda-sm_80") is None
    assert logs.lookup(dataclasses.replace(near, dtype="float16"), "cuda-sm_80") is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"variant": "middle"}, "no schedule with decisions of the middle variant for cuda-sm_80"),
        ({"decisions": {"form": "other"}}, "The `form` decision must be one of"),
        ({"variant": "long+fast"}, "no schedule with decisions of the long.fast variant"),
    ],
)
def test_a_record_that_nobody_can_use_is_named(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "cuda-sm_80.jsonl"
    path.write_text(json.dumps(record(**changes).to_dict()) + "\n")
    (line,) = lines(path)
    assert line.tiling is None
    assert problem.replace(".", "+") in line.problem.replace("*", "+") or problem in line.problem


def test_a_tiling_that_does_not_fit_the_layer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "refusal", lambda *arguments: "no room")
    path = tmp_path / "cuda-sm_80.jsonl"
    path.write_text(json.dumps(record().to_dict()) + "\n")
    assert lines(path)[0].problem == "its decisions do not fit the layer: no room"
