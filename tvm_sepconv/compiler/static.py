"""What kernels of one fixed shape need beside a schedule: sizes, arguments, TVM's own threads."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import tvm
from tvm.tirx import PrimFunc

from tvm_sepconv.config import SepConvConfig


@dataclass(frozen=True)
class Shape:
    """The fixed sizes of a call; ``left`` is the zeros before the first step."""

    batch: int
    steps: int
    out_steps: int
    left: int

    @classmethod
    def of(cls, config: SepConvConfig, batch: int, steps: int) -> Shape:
        """The sizes of a layer's call."""
        return cls(batch, steps, config.out_steps(steps), config.pad_amounts(steps)[0])


def set_threads(threads: int) -> None:
    """Let kernels that TVM made parallel use so many threads, the calling one included.

    It holds for kernels that this thread calls. TVM would take half of the processors by itself and
    bind threads to the first of them, whatever this process may use; here none is bound.

    Raises
    ------
    RuntimeError
        If TVM's pool was started with fewer threads, which it cannot add to.
    """
    os.environ["TVM_BIND_THREADS"] = "0"
    configure = tvm.get_global_func("runtime.config_threadpool")
    # The first call ever starts the threads: as many as any later one may ask for.
    for count in (max(threads, len(os.sched_getaffinity(0))), threads):
        configure(-2, count, ["0"] * count)  # -2: as many as there are names of processors
    started = int(tvm.get_global_func("runtime.NumThreads")())
    if started != threads:
        raise RuntimeError(
            f"TVM's thread pool of this process has {started} threads and cannot grow; prepare the "
            f"case of most threads first, or in a new process. Received: threads={threads}"
        )


def declare(func: PrimFunc, name: str, more: str) -> PrimFunc:
    """Add to the declaration of an argument what `create_prim_func` cannot be told.

    It takes every buffer for compact and aligned to 64 bytes: an ordinary array would crash the
    process.
    """
    script = func.script()
    old = re.search(rf'\b{name}: T\.Buffer\((\(.*?\))(, "\w+")?\)', script)
    assert old is not None, script  # TVM prints every argument so
    new = f"{name}: T.Buffer({old[1]}, {more})"  # the dtype is the default one, float32
    return tvm.script.from_source(script.replace(old[0], new, 1))
