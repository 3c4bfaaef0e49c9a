"""The layer in MetaSchedule's own design space, as somebody would tune it who writes no schedule.

The layer is a plain tensor expression. Space, search strategy and cost model are MetaSchedule's own
for the target, which include rewriting the weights' layouts; builder and runner are its own too,
except that the build loads no tensor intrinsics of other targets. The fastest candidate is kept as
a compiled library with its weights' layouts.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from tvm_sepconv import bundle
from tvm_sepconv.bench.machine import cpu_name
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.plain import arranged, workload
from tvm_sepconv.compiler.search import Progress
from tvm_sepconv.compiler.static import Shape, set_threads
from tvm_sepconv.compiler.targets import CpuTarget, cpu
from tvm_sepconv.config import KernelConfig

Array = npt.NDArray[Any]

LIBRARY, DESCRIPTION, TABLES = "kernel.so", "result.json", "layouts.npz"
BUILD_LIMIT_SECS = 60
STRATEGY = "evolutionary"
BATCH = 64  # candidates between two lessons of the cost model, as MetaSchedule has it
FORMAT = 1  # of what `tune` writes and `Tuned` reads
_WEIGHTS = ("depthwise", "pointwise")
_REWRITES = "meta_schedule.layout_rewrite_preproc"
_INTRINSICS = "tvm.s_tir.tensor_intrin"


def folder(root: Path, config: KernelConfig, target: CpuTarget, shape: Shape, threads: int) -> Path:
    """Where results for a layer and shape are: a folder for each number of trials."""
    parts = {
        "format": FORMAT,
        "config": config.to_dict(),
        "shape": asdict(shape),
        "target": target.name,
        "threads": threads,
        "tvm": importlib.metadata.version("apache-tvm"),
        "machine": cpu_name(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return root / "metaschedule" / key


def tune(
    config: KernelConfig,
    target: CpuTarget,
    shape: Shape,
    threads: int,
    trials: int,
    work_dir: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    seed: int = 0,
) -> Path:
    """Search for `trials` candidates and write the fastest one to a new folder in `work_dir`.

    Parameters
    ----------
    work_dir
        For the database, candidates' libraries and the result.
    report
        Called after every batch of candidates.

    Returns
    -------
    Path
        A folder for `Tuned`.

    Raises
    ------
    ValueError
        If `trials` is not positive.
    RuntimeError
        If none of the candidates could be built and run; it says why.
    """
    if trials < 1:
        raise ValueError(f"The `trials` argument must be at least 1. Received: trials={trials}")
    work_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="search-", dir=work_dir)).absolute()
    mod = workload(config, shape)
    chosen = tvm.target.Target({**target.description, "num-cores": threads})
    batch, progress = min(BATCH, max(trials // 4, 1)), Progress(of=trials)
    database = ms.tune.tune_tasks(
        tasks=[started(mod, chosen, seed)],
        task_weights=[1.0],
        work_dir=str(scratch),
        max_trials_global=trials,
        num_trials_per_iter=batch,
        builder=_builder(target, scratch),
        runner=ms.runner.LocalRunner(initializer=partial(set_threads, threads)),
        # It warms up for 100 candidates by itself, more than some have to spend.
        cost_model=ms.cost_model.XGBModel(num_warmup_samples=batch, num_tuning_cores=1),
        measure_callbacks=[
            *ms.measure_callback.MeasureCallback.create("default"),
            _Count(progress, report),
        ],
    )
    record = database.query_tuning_record(mod, chosen, "main")
    if record is None or not progress.best_secs < float("inf"):
        raise RuntimeError(
            f"None of MetaSchedule's {progress.trials} candidates ran: "
            f"{progress.build_failures} builds and {progress.run_failures} runs failed. "
            f"The first failure: {progress.failure}"
        )
    sch = database.query_schedule(mod, chosen, "main")
    result = scratch / "result"
    result.mkdir()
    write(result, sch, target, progress, {"trials": trials, "threads": threads})
    return result


def started(mod: tvm.IRModule, target: tvm.target.Target, seed: int = 0) -> ms.TuneContext:
    """MetaSchedule's own space and search strategy for a workload."""
    with _own_intrinsics():
        return ms.TuneContext(
            mod,
            target=target,
            space_generator="post-order-apply",
            search_strategy=STRATEGY,
            rand_state=1 + seed % (2**31 - 2),
            num_threads=len(os.sched_getaffinity(0)),
        )


def keep(result: Path, place: Path, trials: int) -> Path:
    """Move a result of `tune` into its `folder`, in the place of one of as many trials."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = place / str(trials)
    with tempfile.TemporaryDirectory(dir=place, prefix="new-") as new:
        copy = Path(shutil.copytree(result, Path(new, "entry")))
        if entry.exists():
            entry.rename(Path(new, "old"))
        copy.rename(entry)
    return entry


def best(place: Path) -> Path | None:
    """The entry of most trials in a `folder`; None if there is none that is whole."""
    entries = place.iterdir() if place.is_dir() else iter(())
    found = sorted((e for e in entries if e.name.isdecimal()), key=lambda e: int(e.name))
    return next((entry for entry in reversed(found) if _intact(entry)), None)


class Tuned:
    """A result of `tune` with weights, ready to run.

    Parameters
    ----------
    weights
        In Keras's order and shapes.
    """

    def __init__(
        self, entry: Path, config: KernelConfig, weights: Sequence[Array], threads: int
    ) -> None:
        self.description: dict[str, Any] = json.loads((entry / DESCRIPTION).read_text())
        arrays = list(arranged(config, weights))
        with np.load(entry / TABLES) as tables:
            for i, name in enumerate(_WEIGHTS):
                packed = np.zeros(self.description["layouts"][name], np.float32)
                packed.reshape(-1)[tables[name]] = arrays[i]
                arrays[i] = packed
        set_threads(threads)
        self.arguments = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        self.run = tvm_ffi.load_module(str(entry / LIBRARY), keep_module_alive=True)["main"]

    def __call__(self, x: Array, output: Array) -> None:
        """Compute `output` from `x`: float32, contiguous, of the shapes tuned for."""
        self.run(x, *self.arguments, output)


def build_candidate(
    mod: tvm.IRModule, _target: Any, _params: Any, *, target: str, path: str
) -> str:
    """Compile a candidate in one of LocalBuilder's processes; returns the library."""
    # MetaSchedule removes the folder of a library once it was measured.
    library = Path(tempfile.mkdtemp(dir=path), LIBRARY)
    compile_candidate(mod, cpu(target), library)
    return str(library)


def compile_candidate(mod: tvm.IRModule, target: CpuTarget, library: Path) -> None:
    """Compile a scheduled `workload` into a library that takes weights in its own layouts."""
    func = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod)["main"]
    kernel = build.compile_kernels({"main": func}, target)
    with tempfile.TemporaryDirectory() as scratch:
        objects = Path(scratch, "kernel.o")
        kernel.write_to_file(str(objects))
        toolchain(target.triple).shared_library([objects], library)


def layouts(sch: Schedule) -> dict[str, tuple[tuple[int, ...], Array]]:
    """For each weight of a scheduled `workload` its shape and where its elements go in there.

    The table has the weight's own shape and holds positions in the flat rewritten array.
    """
    found = {}
    for child in sch.get_child_blocks(sch.get_sblock("root")):
        block = sch.get(child)
        if _REWRITES in block.annotations:
            store = block.body
            shape = tuple(int(extent) for extent in store.buffer.shape)
            found[store.value.source.name] = shape, _table(store)
    result = {}
    for param, name in zip(sch.mod["main"].params[1:3], _WEIGHTS, strict=True):
        shape = tuple(int(extent) for extent in param.shape)
        plain = shape, np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        result[name] = found.get(param.name, plain)
    return result


def _table(store: Any) -> Array:
    """Where ``rewritten[f(i, j, …)] = weight[i, j, …]`` puts the weight's elements."""
    moved = tirx.IndexMap(list(store.value.indices), list(store.indices), None)

    def position(*indices: Any) -> Any:
        flat: Any = 0
        for index, extent in zip(moved.map_indices(list(indices)), store.buffer.shape, strict=True):
            flat = flat * extent + index
        return flat

    sizes = store.value.source.shape
    func = te.create_prim_func([te.compute(sizes, position, name="table")])
    table = tvm.runtime.empty([int(extent) for extent in sizes], "int32")
    tvm.compile(func, target="llvm")(table)
    return table.numpy()  # type: ignore[no-any-return]


def write(
    entry: Path, sch: Schedule, target: CpuTarget, progress: Progress, facts: dict[str, Any]
) -> None:
    """Compile a scheduled `workload` and write what `Tuned` needs, and `facts`, to a folder."""
    compile_candidate(sch.mod, target, entry / LIBRARY)
    found = layouts(sch)
    tables: dict[str, Any] = {name: table for name, (_, table) in found.items()}
    np.savez(entry / TABLES, **tables)
    description = {
        **facts,
        "layouts": {name: shape for name, (shape, _) in found.items()},
        "best_secs": progress.best_secs,
        "failed": progress.build_failures + progress.run_failures,
        "machine": cpu_name(),
        "tvm": importlib.metadata.version("apache-tvm"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sha256": {name: bundle.sha256(entry / name) for name in (LIBRARY, TABLES)},
    }
    (entry / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def _intact(entry: Path) -> bool:
    try:
        hashes = json.loads((entry / DESCRIPTION).read_text())["sha256"]
        return bool(hashes == {name: bundle.sha256(entry / name) for name in (LIBRARY, TABLES)})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _builder(target: CpuTarget, scratch: Path) -> ms.builder.LocalBuilder:
    return ms.builder.LocalBuilder(
        max_workers=len(os.sched_getaffinity(0)),
        timeout_sec=BUILD_LIMIT_SECS,
        f_build=partial(build_candidate, target=target.name, path=str(scratch)),
        f_export=str,
    )


@derived_object
class _Count(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
    """Keep count of what was measured."""

    def __init__(self, progress: Progress, report: Callable[[Progress], None]) -> None:
        super().__init__()
        self.progress, self.report = progress, report

    def apply(
        self, task_scheduler: Any, task_id: int, candidates: Any, built: Any, ran: Any
    ) -> None:
        now = self.progress
        for build_result, run_result in zip(built, ran, strict=True):
            now.trials += 1
            if build_result.error_msg:
                now.build_failures += 1
            elif run_result.error_msg:
                now.run_failures += 1
            else:
                secs = float(np.mean([float(value) for value in run_result.run_secs]))
                now.best_secs = min(secs, now.best_secs) if now.best_secs > 0 else secs
            error = build_result.error_msg or run_result.error_msg
            now.failure = now.failure or str(error or "")
        self.report(now)


@contextmanager
def _own_intrinsics() -> Iterator[None]:
    """Let TuneContext import x86's tensor intrinsics alone; all families' take 13 s.

    The space for AVX-512 asks for them by name, though no layer in float32 has a use for them.
    """
    if _INTRINSICS in sys.modules:
        yield
        return
    package = ModuleType(_INTRINSICS)
    package.__path__ = [str(Path(tvm.s_tir.__file__).parent / "tensor_intrin")]
    sys.modules[_INTRINSICS] = package
    try:
        importlib.import_module(f"{_INTRINSICS}.x86")
        yield
    finally:
        del sys.modules[_INTRINSICS]  # its module x86 stays: it can be registered once only
