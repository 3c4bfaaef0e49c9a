"""What items are measured with: the GPU's clock, libraries with weights, inputs with answers."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.compiler.gpu_session.plan import DEFAULT, Library, Plan
from tvm_sepconv.compiler.tuning import cuda_measure, measure
from tvm_sepconv.compiler.tuning.cuda_measure import Clock, Loaded
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.kernel_config import KernelConfig

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """A layer with weights and an input, and the answer for the first and the last sample.

    Parameters
    ----------
    weights
        In Keras's shapes and order; the last may be None.
    x
        In the layer's data format.
    expected, allowed
        Of those samples, and how far from it each element may be.
    """

    config: SepConvConfig
    weights: tuple[Any, ...]
    x: Array
    expected: Array
    allowed: Array

    @classmethod
    def drawn(
        cls, config: SepConvConfig, kernel: KernelConfig, batch: int, steps: int, unit: float
    ) -> Problem:
        """Draw the same one each time.

        Parameters
        ----------
        unit
            Of `cuda_measure.UNITS`.
        """
        draw = np.random.default_rng(0)
        named = measure.drawn_weights(kernel, draw)
        bias = named["bias"] if kernel.use_bias else None
        weights = (named["depthwise"], named["pointwise"], bias)
        last = config.channel_axis == -1
        shape = (batch, steps, kernel.channels) if last else (batch, kernel.channels, steps)
        x = draw.standard_normal(shape, np.float32).astype(kernel.dtype)
        some = x[_ends(batch)]
        return cls(config, weights, x, *cuda_measure.answer(unit, kernel, some, *weights, config))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the whole output."""
        return (len(self.x), *self.expected.shape[1:])

    def error(self, y: Array, slack: float = 1.0) -> float:
        """How far off an output is, 1 being all that is allowed.

        Raises
        ------
        ValueError
            If it is further off than `slack` times what is allowed, or anywhere no number.
        """
        if y.shape != self.out_shape:
            raise ValueError(f"its output is of shape {y.shape}, not {self.out_shape}")
        ends = y[_ends(len(y))].astype(np.float64)
        worst = float(np.max(np.abs(ends - self.expected) / self.allowed, initial=0.0))
        if not (worst <= slack and np.isfinite(y.astype(np.float32)).all()):
            raise ValueError(f"its output is wrong: {worst:.3g} times what rounding may do")
        return worst


def _ends(batch: int) -> list[int]:
    return [0, batch - 1] if batch > 1 else [0]


class Bench:
    """A prepared folder on this machine.

    Parameters
    ----------
    clock
        None is the first GPU.
    """

    def __init__(self, plan: Plan, clock: Clock | None = None) -> None:
        self.plan, self._clock = plan, clock

    @cached_property
    def clock(self) -> Clock:
        """What times launches."""
        return self._clock or cuda_measure.gpu()

    def name(self) -> str:
        """What the GPU is called."""
        return str(getattr(self.clock, "name", ""))

    def on_stream(self) -> AbstractContextManager[Any]:
        """Make the clock's stream tvm-ffi's."""
        return cuda_measure.on_stream(self.clock)

    def works(self) -> bool:
        """Whether the GPU still does anything for this process."""
        try:
            self.clock.synchronize()
        except (OSError, RuntimeError):
            return False
        return True

    def loaded(self, library: Library, problem: Problem) -> Loaded:
        """A library with a problem's weights."""
        path = self.plan.folder / "libraries" / library.file
        return Loaded(path, problem.config, problem.weights, self.clock)

    def problem(self, library: Library, batch: int, steps: int) -> Problem:
        """A problem that a library solves; the same one for all libraries of a layer."""
        return _problem(library.layer, library.precision, library.data_format, batch, steps)


@functools.lru_cache(maxsize=4)  # a candidate's sizes: the next one is asked the same
def _problem(layer: str, precision: str, data_format: str, batch: int, steps: int) -> Problem:
    one = Library("", layer, precision, DEFAULT, data_format=data_format)
    return Problem.drawn(one.config, one.kernel, batch, steps, cuda_measure.UNITS[precision])
