"""Tuning records for tests, and folders to read them from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler.schedules import x86
from tvm_sepconv.compiler.schedules.cpu import tilings

from tvm_sepconv.compiler.tuning import logs
from tvm_sepconv.compiler.tuning.logs import Record
from tvm_sepconv.config import KernelConfig

TARGET = "x86_64-avx2"
CONFIG = KernelConfig(channels=64, filters=64, kernel_size=9)
# Whatever else the schedule decides, as by default; plain values as a log has them.
DECISIONS: dict[str, Any] = {
    **json.loads(json.dumps(tilings(CONFIG, x86.UNITS[TARGET])[0].to_dict())),
    "step_tile": 96, "register_tile": [6, 2], "depthwise_block": [4, 2], "channel_block": 2,
}  # fmt: skip


def record(config: KernelConfig = CONFIG, **changes: Any) -> Record:
    values = {
        "config": config, "variant": "long", "target": TARGET, "threads": 1, "batch": 1,
        "steps": 500, "decisions": DECISIONS, "median_secs": 1e-4,
        "default_secs": 1.1e-4, "noise": 0.01,
        "trials": 8, "machine": "a machine", "tvm": "0.27.0", "date": day(1),
    }  # fmt: skip
    return Record(**{**values, **changes})


def day(number: int) -> str:
    return f"2026-01-{number:02}T00:00:00+00:00"


def other(**changes: Any) -> KernelConfig:
    return dataclasses.replace(CONFIG, **changes)


def put(folder: Path, *records: Record) -> Path:
    """Write records one by one, as tuning does."""
    for item in records:
        folder.mkdir(parents=True, exist_ok=True)
        path = logs.write(item, folder)
    return path


def append(path: Path, *records: Record) -> Path:
    """Put lines at the end of a log, whatever is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(item.to_dict()) + "\n" for item in records)
    return path
