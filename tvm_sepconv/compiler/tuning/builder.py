"""MetaSchedule's builder for whole libraries, with processes that live as long as a search.

(Its own starts new ones for every batch of candidates, and each of those imports TVM.)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.schedules.cpu import Tiling
from tvm_sepconv.compiler.targets import CpuTarget, cpu
from tvm_sepconv.compiler.tuning.space import tiling_of
from tvm_sepconv.config import KernelConfig

BUILD_LIMIT_SECS = 120
_USES = 200  # of a process, whose memory grows with every one


@derived_object
class Builder(ms.builder.PyBuilder):  # type: ignore[misc]
    """Calls `f_build` in processes of its own; what that returns is the artifact's path.

    Parameters
    ----------
    f_build
        Takes a scheduled module.
    pool
        Of `processes`.
    """

    def __init__(self, f_build: Callable[[tvm.IRModule], str], pool: PopenPoolExecutor) -> None:
        super().__init__()
        self.f_build, self.pool = f_build, pool

    def build(self, build_inputs: Sequence[Any]) -> list[Any]:
        """One result for each input, failed ones with their reason."""
        modules = [build_input.mod for build_input in build_inputs]
        futures = [self.pool.submit(self.f_build, mod) for mod in modules]
        return [self._result(*pair) for pair in zip(modules, futures, strict=True)]

    def _result(self, mod: tvm.IRModule, future: Future[str]) -> Any:
        try:
            try:
                path = future.result()
            except ChildProcessError:  # perhaps somebody else ended it: bad ones do so again
                path = self.pool.submit(self.f_build, mod).result()
        except TimeoutError:
            return ms.builder.BuilderResult(None, f"Not built after {BUILD_LIMIT_SECS} s")
        except Exception as error:  # of any kind: it is the candidate's
            return ms.builder.BuilderResult(None, f"{type(error).__name__}: {error}")
        return ms.builder.BuilderResult(path, None)


def processes() -> PopenPoolExecutor:
    """As many as there are processors; they start when they are needed."""
    workers = len(os.sched_getaffinity(0))
    return PopenPoolExecutor(workers, BUILD_LIMIT_SECS, maximum_process_uses=_USES)


def of_candidates(
    config: KernelConfig, target: CpuTarget, folder: Path, pool: PopenPoolExecutor
) -> Builder:
    """The builder of a search; it begins with the kernels that all candidates share."""
    for tiling in target.family.default_tilings(config, target.isa)[1:]:
        pool.submit(_object, config, target.name, str(folder), tiling)
    place = {"target": target.name, "folder": str(folder)}
    return Builder(partial(build_candidate, config=config, **place), pool)


def build_candidate(mod: tvm.IRModule, *, config: KernelConfig, target: str, folder: str) -> str:
    """Write the library that would be shipped with a candidate's decisions; returns its path.

    Only its long kernel is compiled for it: all candidates have the shorter ones in common.
    """
    tiling, chosen = tiling_of(mod), cpu(target)
    variants = build.with_long(config, chosen, build.Variant(tiling))
    parts = [_object(config, target, folder, v.tiling) for v in variants]
    if config.data_format == "channels_first":
        parts.append(_object(config, target, folder, variants[-1].tiling, ragged=True))
    path = library(Path(folder), tiling)
    build.link_library(config, chosen, path, variants, parts)
    Path(parts[0]).unlink()
    return str(path)


def library(folder: Path, tiling: Tiling) -> Path:
    """Where a candidate's library is."""
    return folder / f"{_name(tiling)}.so"


def _name(tiling: Tiling) -> str:
    """All decisions, in a file's name."""
    values = tiling.to_dict().values()
    return "_".join("x".join(map(str, v)) if isinstance(v, tuple) else _word(v) for v in values)


def _word(value: Any) -> str:
    return str(int(value) if isinstance(value, bool) else value)


def _object(
    config: KernelConfig, target: str, folder: str, tiling: Tiling, ragged: bool = False
) -> Path:
    """The object file of a variant's kernels, compiled unless it is there."""
    path = Path(folder, f"{'ragged' if ragged else 'kernels'}_{_name(tiling)}.o")
    if path.exists():
        return path
    chosen = cpu(target)
    functions = build.functions(config, chosen, tiling, ragged)
    kernels = build.compile_kernels(functions, chosen)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        kernels.write_to_file(str(Path(work, "kernels.o")))
        os.replace(Path(work, "kernels.o"), path)  # others may be about to read it
    return path
