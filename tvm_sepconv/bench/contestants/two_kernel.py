"""Our layer as two kernels, the stage between them in memory: what does fusing gain? Not a peer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import jit, targets
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared

Array = npt.NDArray[Any]


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return the two kernels, compiled for the case's shape with the schedule of the fused one.

    Raises
    ------
    ValueError
        For channels_first.
    RuntimeError
        If the compiler is not installed, or TVM's pool has fewer threads and cannot grow.
    """
    baselines = jit.compiler("tvm_sepconv.compiler.baselines")
    chosen = jit.compiler("tvm_sepconv.compiler.targets").cpu(case.target or targets.runnable()[0])
    shape = baselines.Shape.of(case.config, case.x.shape[0], case.steps)
    kernel = case.config.kernel_config(case.channels)
    kernels = baselines.TwoKernels(kernel, chosen, shape, case.weights, threads)

    def call(x: Array) -> Array:
        y = np.empty(case.expected.shape, np.float32)
        kernels(x, y)
        return y

    return [Prepared(kernels.form, call, case.x, np.asarray)]
