"""Tuning from candidates that were built beforehand: as the tuner measures, chooses and records."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_sepconv.bench import cuda_graphs
from tvm_sepconv.compiler.gpu_session.bench import Bench
from tvm_sepconv.compiler.gpu_session.plan import CANDIDATE, FINALISTS, Item, Library, results
from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.compiler.tuning import finalists, log_writing
from tvm_sepconv.compiler.tuning.cuda_measure import Timer, alternated
from tvm_sepconv.compiler.tuning.history import Trial
from tvm_sepconv.compiler.tuning.records import TF32

SAMPLES, FINAL_SAMPLES = 15, 41
CHECKED = ((2, 37), (1, 331))  # beside the measured size


def tune(bench: Bench, item: Item) -> dict[str, Any]:
    """Measure a candidate, or the best ones in turns; the latter writes a record."""
    if item.contestants == FINALISTS:
        return _record(bench, item)
    library = next(one for one in bench.plan.libraries if one.name == item.what)
    for batch, steps in CHECKED:
        problem = bench.problem(library, batch, steps)
        problem.error(bench.loaded(library, problem).output(problem.x, problem.out_shape))
    return {"secs": alternated([_timer(bench, library, item).sample], SAMPLES)[0]}


def _timer(bench: Bench, library: Library, item: Item) -> Timer:
    problem = bench.problem(library, item.batch, item.steps)
    loaded = bench.loaded(library, problem)
    problem.error(loaded.output(problem.x, problem.out_shape))
    return Timer(loaded.rotation(problem.x, problem.out_shape), bench.clock)


def _record(bench: Bench, item: Item) -> dict[str, Any]:
    found = results(bench.plan.folder)
    libraries: dict[Any, Library] = {}
    trials: dict[Any, Trial] = {}
    for one in bench.plan.libraries:
        if (one.layer, one.precision, one.kind) != (item.what, item.precision, CANDIDATE):
            continue
        key = Item("tuning", one.name, item.precision, item.batch, item.steps).key
        secs = found.get(key, {}).get("found", {}).get("secs")
        tiling = cuda.tiling_from_dict(one.decisions or {})
        libraries[tiling] = one
        error = None if secs else str(found.get(key, {}).get("error", "not measured"))
        trials[tiling] = Trial(len(trials) + 1, one.decisions, secs, error, 0.0)
    first = next(iter(libraries.values()))
    out_steps, tf32 = first.config.out_steps(item.steps), first.allow_tf32
    defaults = cuda.default_tilings(first.kernel, tf32, bench.plan.arch)
    number = cuda.choose(first.kernel, defaults, item.batch, out_steps)
    if trials.get(defaults[number]) is None or trials[defaults[number]].secs is None:
        raise RuntimeError("There is nothing to tune: the default was not measured, or failed")
    best = finalists.finalists([defaults[number]], trials)
    samples = alternated([_timer(bench, libraries[t], item).sample for t in best], FINAL_SAMPLES)
    won = finalists.winner(samples)
    values = {
        "config": first.kernel.to_dict(), "variant": cuda.VARIANTS[number] + TF32 * tf32,
        "target": f"cuda-{bench.plan.arch}", "threads": 1, "batch": item.batch,
        "steps": item.steps, "decisions": best[won].to_dict(), "machine": cuda_graphs.machine(),
        "tvm": bench.plan.tvm,
    }  # fmt: skip
    records = bench.plan.folder / "results" / "records"
    records.mkdir(parents=True, exist_ok=True)
    record = finalists.record_of(values, samples[won], samples[0], len(trials))
    log_writing.write(record, records)
    gain = float(np.median(samples[0]) / np.median(samples[won]))
    return {"gain": gain, "trials": len(trials), "decisions": best[won].to_dict()}
