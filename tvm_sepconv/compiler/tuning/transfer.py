"""What a kernel's own record gains: libraries with and without it, measured in alternation."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning import finalists, logs, measure
from tvm_sepconv.compiler.tuning.records import Record, kernel_name, tiling_of
from tvm_sepconv.compiler.tuning.runner import here

ROUNDS = 41


def measure_record(record: Record, path: Path) -> None:
    """Time a kernel's library with default decisions, with another's record, and with its own.

    Parameters
    ----------
    record
        Of a target that this machine runs; measured on the record's input and threads.
    path
        Where the times go, as JSON; `tvm_sepconv.report.found.Times` reads it.

    Raises
    ------
    RuntimeError
        If a library cannot be built, or is wrong.
    ValueError
        If the schedule cannot follow the record any more.
    OSError
        If `path` cannot be written.
    """
    config, target = record.config, cpu(record.target)
    near = logs.lookup(config, record.target, record.threads, besides=config)
    tilings = {
        "default": target.family.default_tilings(config, target.isa)[0],
        **({"transferred": near.tiling} if near else {}),
        "tuned": tiling_of(record),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task, runtime = folder / "task.npz", folder / "runtime.so"
        measure.write_task(task, config, record.batch, record.steps)
        build.build_runtime(target, runtime)
        libraries = [folder / f"{origin}.so" for origin in tilings]
        for library, tiling in zip(libraries, tilings.values(), strict=True):
            long = build.Variant(tiling)
            build.build_library(config, target, library, build.with_long(config, target, long))
        with closing(here(runtime, record.threads)) as runner:
            samples = runner.measure(task, [str(library) for library in libraries], ROUNDS)
            machine = runner.machine
    source = f"{kernel_name(near.record.config)} (distance {near.distance:.2g})" if near else ""
    values: dict[str, Any] = {
        "samples": dict(zip(tilings, samples, strict=True)),
        "source": source,
        "batch": record.batch, "steps": record.steps, "machine": machine,
        "date": finalists.now(),
        "record_date": record.date,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
