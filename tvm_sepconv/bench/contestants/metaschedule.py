"""The layer in TVM's own MetaSchedule space, tuned beforehand. Not a peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import jit, targets
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.contestants import Prepared

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.search import Progress

Array = npt.NDArray[Any]
NEEDED = ("xgboost", "cloudpickle", "psutil")  # to search; a result is run without them


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return the fastest candidate of the longest search there was for this case.

    Raises
    ------
    ValueError
        If there was none with as many threads.
    RuntimeError
        If the compiler is not installed.
    """
    space, kernel, sizes = _task(case, threads)
    entry = space.best(space.folder(jit.cache_root(), kernel, *sizes))
    if entry is None:
        raise ValueError("not tuned: run tvm-sepconv bench --metaschedule TRIALS")
    tuned = space.Tuned(entry, kernel, case.weights, threads)

    def call(x: Array) -> Array:
        y = np.empty(case.expected.shape, np.float32)
        tuned(x, y)
        return y

    return [Prepared(f"{tuned.description['trials']} trials", call, case.x, np.asarray)]


def tune(
    case: Case, threads: int, trials: int, work_dir: Path, progress: Callable[[Progress], None]
) -> Path:
    """Search MetaSchedule's own space for a case and keep the result for `prepare`.

    It takes about half a minute of one core for every 64 candidates, and what they take to build
    and run. What is found is checked before it is kept.

    Parameters
    ----------
    work_dir
        For MetaSchedule's database and the candidates; a new folder is made in it.
    progress
        Called after every candidate.

    Returns
    -------
    Path
        Where the result is kept, in the cache.

    Raises
    ------
    ValueError
        If `trials` is not positive, or the activation has no plain form.
    RuntimeError
        If the compiler or what searches is not installed, or no candidate could be built and run.
    AssertionError
        If the fastest candidate is wrong.
    """
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise RuntimeError(
            f"Searching MetaSchedule's own space needs {', '.join(absent)}: "
            "pip install 'tvm-sepconv[tune]'"
        )
    space, kernel, sizes = _task(case, threads)
    measure = jit.compiler("tvm_sepconv.compiler.tuning.measure")
    weights = dict(zip(("depthwise", "pointwise", "bias"), case.weights, strict=False))
    work_dir.mkdir(parents=True, exist_ok=True)
    given = measure.Case(case.x, case.expected, case.allowed)
    measure.save_task(work_dir / "task.npz", kernel, weights, [given])
    result, _ = space.tune(kernel, *sizes, trials, work_dir, work_dir / "task.npz", progress)
    output = np.full(case.expected.shape, np.nan, np.float32)
    space.Tuned(result, kernel, case.weights, threads)(case.x, output)
    check("MetaSchedule", output, case.expected, case.allowed)
    place = space.folder(jit.cache_root(), kernel, *sizes)
    kept: Path = space.keep(result, place, trials)
    return kept


def _task(case: Case, threads: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """The compiler's module, the kernel, and (target, shape, threads)."""
    space = jit.compiler("tvm_sepconv.compiler.default_space")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(case.target or targets.runnable()[0])
    shape = space.Shape.of(case.config, case.x.shape[0], case.steps)
    return space, case.config.kernel_config(case.channels), (chosen, shape, threads)
