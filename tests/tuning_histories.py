"""Histories and records made up for tests: what searches might have measured, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv.compiler.tuning.records import Record
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.workloads import workloads

MACHINE = "Some CPU, 2 processors"
TARGET = "x86_64-avx512"
_CHOICES: dict[str, list[Any]] = {
    "step_tile": [16, 32, 64, 128], "register_tile": [[4, 4], [8, 2], [6, 4]],
    "depthwise_block": [[8, 1], [4, 2]], "channel_block": [1, 2, 4], "in_place": [False, True],
}  # fmt: skip


def kernel(layer: str) -> KernelConfig:
    """A published layer's kernel."""
    workload = workloads()[layer]
    return workload.config().kernel_config(workload.channels)


def header(layer: str, space: str = "tvm_sepconv", **changes: Any) -> dict[str, Any]:
    """The first line of a history."""
    workload = workloads()[layer]
    return {
        "history": 1, "config": kernel(layer).to_dict(), "workload": layer, "target": TARGET,
        "batch": workload.batch, "steps": workload.steps, "threads": 1, "space": space, "seed": 0,
        "trials": 48, "tvm": "0.27.0", "machine": MACHINE, "date": "2026-01-02T03:04:05+00:00",
        "modelled": False, **changes,
    }  # fmt: skip


def search(layer: str, space: str = "tvm_sepconv", trials: int = 48, **changes: Any) -> list[Any]:
    """The lines of a history: about as fast as the layer is, some candidates failing."""
    draw = np.random.default_rng([sum(layer.encode()), len(space)])
    workload = workloads()[layer]
    steps = workload.out_steps * workload.batch
    least = 0.5e-6 + kernel(layer).flops(1, steps) / 115e9
    ours = space == "tvm_sepconv"
    lines, best, decisions = [header(layer, space, trials=trials, **changes)], np.inf, None
    default = 1.0
    for number in range(1, trials + 1):
        chosen = {name: c[int(draw.integers(len(c)))] for name, c in _CHOICES.items()}
        slow = np.exp(draw.gamma(2, 0.06 if ours else 0.5)) * (1 if ours else 1.3)
        slow = slow * 0.3 ** (number / trials / 3) if not ours else slow
        slow = max(slow, 1.0) if number > 1 or not ours else 1.06
        secs = list(least * slow * draw.gamma(2500, 1 / 2500, 15))
        failed = number > 1 and draw.random() < 0.06
        default = least * slow if number == 1 else default
        if not failed and np.median(secs) < best:
            best, decisions = float(np.median(secs)), chosen
        lines.append({
            "trial": number, "decisions": chosen if ours else None,
            "secs": None if failed else secs, "error": "it broke" if failed else None,
            "elapsed_secs": 1.9 * number,
        })  # fmt: skip
    lines.append({"final": {"default_secs": default, "best_secs": best * 1.01, "noise": 0.02,
                            "decisions": decisions, "recorded": None}})  # fmt: skip
    return lines


def record(lines: list[Any]) -> Record:
    """What the search of these lines would have recorded."""
    first, final = lines[0], lines[-1]["final"]
    return Record(
        config=KernelConfig.from_dict(first["config"]), variant="long", target=first["target"],
        threads=first["threads"], batch=first["batch"], steps=first["steps"],
        decisions=final["decisions"], median_secs=final["best_secs"],
        default_secs=final["default_secs"], noise=final["noise"], trials=len(lines) - 2,
        machine=first["machine"], tvm=first["tvm"], date=first["date"],
    )  # fmt: skip


def write_records(folder: Path, *records: Record) -> None:
    """Write a folder of logs."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        with (folder / f"{one.target}.jsonl").open("a") as file:
            file.write(json.dumps(one.to_dict()) + "\n")


def write(folder: Path, lines: list[Any]) -> Path:
    """Write a history into its place in a work folder."""
    first = lines[0]
    place = folder / first["target"] / KernelConfig.from_dict(first["config"]).key / first["space"]
    place.mkdir(parents=True, exist_ok=True)
    path = place / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
