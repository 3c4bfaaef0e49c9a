"""What is kept of a search in MetaSchedule's own design space: a library, and how it wants weights.

A folder has both; `Tuned` runs it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from tvm_sepconv import bundle
from tvm_sepconv.bench.machine import cpu_name
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.plain import arranged
from tvm_sepconv.compiler.static import Shape, set_threads
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import finalists, measure
from tvm_sepconv.config import KernelConfig

Array = npt.NDArray[Any]

LIBRARY, DESCRIPTION, TABLES = "kernel.so", "result.json", "layouts.npz"
FORMAT = 1  # of what `write` writes and `Tuned` reads
_WEIGHTS = ("depthwise", "pointwise")
_REWRITES = "meta_schedule.layout_rewrite_preproc"


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


def sample(task: str, entries: Sequence[str], rounds: int, *, threads: int) -> list[list[float]]:
    """Verify what is in folders, then time it in alternation, as `measure.sample` does."""
    data = measure.loaded(task)
    weights = [array for array in data.weights if array is not None]
    calls = []
    for entry in entries:
        tuned = Tuned(Path(entry), data.kernel, weights, threads)
        y = np.full(data.expected.shape, np.nan, np.float32)
        tuned(data.x, y)
        data.cases[0].check(y)
        calls.append(partial(tuned, data.x, y))
    return measure.alternated(calls, rounds)


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


def write(entry: Path, sch: Schedule, target: CpuTarget, facts: dict[str, Any]) -> None:
    """Compile a scheduled `workload` and write what `Tuned` needs, and `facts`, to a folder."""
    compile_candidate(sch.mod, target, entry / LIBRARY)
    found = layouts(sch)
    tables: dict[str, Any] = {name: table for name, (_, table) in found.items()}
    np.savez(entry / TABLES, **tables)
    shapes = {name: shape for name, (shape, _) in found.items()}
    (entry / DESCRIPTION).write_text(json.dumps({**facts, "layouts": shapes}) + "\n")


def describe(entry: Path, facts: dict[str, Any]) -> None:
    """Add to a folder's description what makes it a result: `facts`, the machine, the hashes."""
    description = {
        **json.loads((entry / DESCRIPTION).read_text()),
        **facts,
        "machine": cpu_name(),
        "tvm": importlib.metadata.version("apache-tvm"),
        "date": finalists.now(),
        "sha256": {name: bundle.sha256(entry / name) for name in (LIBRARY, TABLES)},
    }
    (entry / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def _intact(entry: Path) -> bool:
    try:
        hashes = json.loads((entry / DESCRIPTION).read_text())["sha256"]
        return bool(hashes == {name: bundle.sha256(entry / name) for name in (LIBRARY, TABLES)})
    except (OSError, ValueError, KeyError, TypeError):
        return False
