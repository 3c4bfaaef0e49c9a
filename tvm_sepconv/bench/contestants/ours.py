"""Our layer, compiled for the case's target."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import tvm_sepconv
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared

Array = npt.NDArray[Any]


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return our layer and its kernel.

    Raises
    ------
    RuntimeError
        If the layer cannot be compiled.
    """
    tvm_sepconv.set_num_threads(threads)
    layer = tvm_sepconv.SeparableConv1D.from_config(case.config.to_dict())
    layer.build(case.x.shape)
    layer.set_weights(case.weights)
    layer.compile(tvm_sepconv.BuildOptions(target=case.target or None))
    compiled = layer._compiled
    assert compiled is not None  # `compile` made it
    call, handle, at = compiled.call, compiled.handle, compiled.at

    def kernel(x: Array, out: Array) -> None:
        if status := call(handle, at(x), at(out)):
            raise RuntimeError(f"the kernel of {layer.name} returned status {status}")

    return [Prepared("one fused kernel", layer, case.x, np.asarray, kernel)]
