"""Verify and time CUDA libraries: their launches as CUDA graphs, on data of the GPU's own.

What is timed is the library's own launch. No TVM is needed, nor a framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm_ffi

from tvm_sepconv import reference
from tvm_sepconv.bench.cuda_graphs import Gpu
from tvm_sepconv.bench.cuda_graphs import Launch as Launch
from tvm_sepconv.compiler.tuning import measure
from tvm_sepconv.compiler.tuning.measure import Array, Case
from tvm_sepconv.config import KernelConfig, SepConvConfig
from tvm_sepconv.cuda_runtime import CudaLayer

SAMPLE_SECS = 5e-4  # of a replay: the events' own cost vanishes
FEWEST, MOST = 10, 200  # launches of a replay
MOST_SETS = 16
# What operands are rounded to before they are multiplied, beside the sums in float32.
UNITS = {"float32": 0.0, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Graphs(Protocol):
    """What makes launches one, and times it."""

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """Return what launches all of them, without waiting."""

    def seconds(self, action: Launch) -> float:
        """Time what `action` launches, the second time of two."""


class Clock(Graphs, Protocol):
    """What times launches: a `Gpu`."""

    @property
    def index(self) -> int:
        """Of the device."""

    @property
    def stream(self) -> int:
        """What is timed runs on it."""

    @property
    def l2_bytes(self) -> int:
        """The size of the last cache."""

    def synchronize(self) -> None:
        """Wait for all of it."""


@functools.cache
def gpu() -> Clock:
    """Return the machine's first GPU; a process needs its context once."""
    return Gpu()


def precision(config: KernelConfig, allow_tf32: bool) -> str:
    """Return what a kernel's operands are rounded to, of `UNITS`."""
    return "tf32" if allow_tf32 and config.dtype == "float32" else config.dtype


def answer(unit: float, config: KernelConfig, *operands: Any) -> tuple[Array, Array]:
    """The reference's output, and how far from it each element may be.

    Sums in float32 are bounded as on the CPU. Where operands are rounded to `unit` before that,
    their errors are random: they add up as the root of the sum of the terms' squares, and sixteen
    times the unit is more than chance makes of that in 10⁹ outputs.
    """
    x, depthwise, pointwise, _, layer = operands
    expected = reference.separable_conv1d(*operands)
    length = config.kernel_size + config.mid_channels
    steep = np.maximum(1, np.abs(expected))
    sums = 8 * float(np.finfo(np.float32).eps) * length**0.5 * reference.magnitude(*operands)
    allowed = (sums + 2.0**-20) * steep
    if unit:
        squares = [np.square(a.astype(np.float64)) for a in (x, depthwise, pointwise)]
        terms = reference.separable_conv1d(
            squares[0], squares[1], squares[2], None, layer, activate=False
        )
        allowed += 16 * unit * (np.sqrt(terms) + np.abs(expected)) * steep
    return expected, allowed


def write_task(
    path: Path, config: KernelConfig, batch: int, steps: int, allow_tf32: bool = False
) -> None:
    """Save inputs and weights with the right answers, as `measure.write_task` does."""
    unit = UNITS[precision(config, allow_tf32)]
    measure.write_task(path, config, batch, steps, functools.partial(answer, unit))


class Loaded:
    """A library with a layer's weights on a GPU.

    Parameters
    ----------
    weights
        ``depthwise``, ``pointwise`` and ``bias`` (or None), in Keras's shapes.
    """

    def __init__(
        self, library: Path, layer: SepConvConfig, weights: Sequence[Any], clock: Clock
    ) -> None:
        self.path, self.layer, self._clock = library, layer, clock
        self._cuda = CudaLayer(library, *weights)
        self._weights = self._cuda.on(clock.index)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory on the GPU."""
        return self._cuda.library.empty(tvm_ffi.Shape(shape), dtype, self._clock.index)

    def tensor(self, array: Array) -> Any:
        """A copy on the GPU."""
        copy = self.empty(array.shape, array.dtype.name)
        self._cuda.upload(array, copy, self._clock.index)
        return copy

    def copy(self, source: Any, to: Any) -> None:
        """Put a copy on the stream."""
        self._cuda.library.copy(source, to)

    def launch(self, x: Any, out: Any) -> Launch:
        """What launches the kernel once."""
        steps = int(x.shape[1 if self.layer.channel_axis == -1 else 2])
        left = self.layer.pad_amounts(steps)[0]
        size = self._cuda.workspace_bytes(tuple(out.shape), self._clock.index)
        room = self.empty((size,), "uint8") if size else None
        return functools.partial(self._cuda.library.run, x, *self._weights, left, out, room)

    def output(self, x: Array, out_shape: tuple[int, ...]) -> Array:
        """The library's answer; NaN where it wrote nothing."""
        out = self.tensor(np.full(out_shape, np.nan, x.dtype))
        self.launch(self.tensor(x), out)()
        return self._cuda.download(out, self._clock.index)

    def verify(self, case: Case) -> None:
        """Raise ValueError if the library's answer is not the case's."""
        case.check(self.output(case.x, case.expected.shape))

    def rotation(self, x: Array, out_shape: tuple[int, ...]) -> list[Launch]:
        """Launches on enough copies of input and output to pass through the last cache."""
        blank = np.zeros(out_shape, x.dtype)
        count = rotated(x.nbytes + blank.nbytes, self._clock.l2_bytes)
        return [self.launch(self.tensor(x), self.tensor(blank)) for _ in range(count)]


def rotated(call_bytes: int, l2_bytes: int) -> int:
    """How many buffers to take turns with: three times the last cache, as far as that goes."""
    return min(max(2, -(-3 * l2_bytes // call_bytes)), MOST_SETS)


class Timer:
    """One call, in a graph of as many as it takes to be timed; ``sample()`` is a call's seconds."""

    def __init__(self, launches: Sequence[Launch], clock: Graphs) -> None:
        self._clock = clock
        self._capture(launches, FEWEST)
        self.sample()
        self._capture(launches, round(SAMPLE_SECS / max(self.sample(), 1e-9)))

    def _capture(self, launches: Sequence[Launch], calls: int) -> None:
        turns = -(-min(max(calls, FEWEST), MOST) // len(launches))
        self._replay = self._clock.graph([*launches] * turns)
        self._calls = turns * len(launches)

    def sample(self) -> float:
        """Time a replay."""
        return self._clock.seconds(self._replay) / self._calls


def alternated(timers: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Take samples in turns; timers warm up by themselves."""
    samples: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, times in zip(timers, samples, strict=True):
            times.append(timer())
    return samples


def on_stream(clock: Clock) -> AbstractContextManager[Any]:
    """Make the clock's stream the current one of its device, for all that tvm-ffi calls."""
    device = tvm_ffi.device(f"cuda:{clock.index}")
    context: AbstractContextManager[Any] = tvm_ffi.use_raw_stream(device, clock.stream)
    return context


def sample(
    task: str, libraries: Sequence[str], rounds: int, *, clock: Callable[[], Clock] = gpu
) -> list[list[float]]:
    """Verify libraries, then time them in alternation; see `measure.sample`.

    Raises
    ------
    ValueError
        If a library's answer is not the reference's.
    RuntimeError
        If CUDA refuses something, out of memory among it.
    """
    data, one = measure.loaded(task), clock()
    with on_stream(one):
        kernels = [Loaded(Path(name), data.config, data.weights, one) for name in libraries]
        for kernel in kernels:
            for case in data.cases:
                kernel.verify(case)
        size = data.x, data.expected.shape
        timers = [Timer(kernel.rotation(*size), one) for kernel in kernels]
        return alternated([timer.sample for timer in timers], rounds)
