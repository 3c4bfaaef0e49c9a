"""Verify and time whole libraries, in a process that a wrong kernel may take down with it.

What is timed is what will be shipped: a library with all its variants, called through the runtime
on the measured input, data warm in the caches. No TVM is needed.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import reference
from tvm_sepconv.config import KernelConfig, SepConvConfig
from tvm_sepconv.runtime import CompiledLayer, set_num_threads

EDGES = ((2, 37), (1, 331))  # (batch, steps) beside the measured ones
SAMPLE_SECS = 1e-3  # calls are repeated to fill this: the clock's own cost vanishes

Array = npt.NDArray[Any]


class RunnerError(RuntimeError):
    """The place of measuring is gone, so no candidate can be measured there any more."""


def layer_config(config: KernelConfig) -> SepConvConfig:
    """A layer with this kernel; its padding is "same", so only the stride shortens the output."""
    names = ("strides", "data_format", "dilation_rate", "depth_multiplier", "activation")
    arguments = {name: getattr(config, name) for name in (*names, "use_bias", "dtype")}
    return SepConvConfig.parse(config.filters, config.kernel_size, padding="same", **arguments)


def write_task(
    path: Path,
    config: KernelConfig,
    batch: int,
    steps: int,
    answer: Callable[..., tuple[Array, Array]] | None = None,
) -> None:
    """Draw inputs and weights, the same ones each time, and save them with the right answers.

    Beside the measured input there are two of odd lengths: a kernel that is right where whole tiles
    end, and nowhere else, is wrong.

    Parameters
    ----------
    answer
        Takes the config and the reference's operands; returns the output and how far from it each
        element may be. None is for kernels that round no operand.
    """
    layer = layer_config(config)
    draw = np.random.default_rng(0)
    weights = drawn_weights(config, draw)
    bias = weights["bias"] if config.use_bias else None
    cases = []
    for samples, length in ((batch, steps), *EDGES):
        last = config.data_format == "channels_last"
        shape = (samples, length, config.channels) if last else (samples, config.channels, length)
        x = draw.standard_normal(shape).astype(config.dtype)
        operands = (x, weights["depthwise"], weights["pointwise"], bias, layer)
        cases.append(Case(x, *(answer or _answer)(config, *operands)))
    save_task(path, config, weights, cases)


def drawn_weights(config: KernelConfig, draw: np.random.Generator) -> dict[str, Array]:
    """Weights in Keras's shapes, by name; also a ``bias`` for kernels that have none."""
    layer = layer_config(config)
    sizes = {
        "depthwise": layer.depthwise_shape(config.channels),
        "pointwise": layer.pointwise_shape(config.channels),
        "bias": layer.bias_shape,
    }
    # Terms of a size that keeps every activation in its interesting range.
    scales = {"depthwise": config.kernel_size**-0.5, "pointwise": config.mid_channels**-0.5}
    return {
        name: (draw.standard_normal(shape) * scales.get(name, 1.0)).astype(config.dtype)
        for name, shape in sizes.items()
    }


def save_task(
    path: Path, config: KernelConfig, weights: Mapping[str, Array], cases: Sequence[Case]
) -> None:
    """Write what `Task` reads; the first case is the one to measure.

    Parameters
    ----------
    weights
        ``depthwise``, ``pointwise`` and, if there is one, ``bias``, in Keras's shapes.
    """
    arrays = dict(weights)
    for number, case in enumerate(cases):
        arrays |= {f"{name}{number or ''}": array for name, array in vars(case).items()}
    np.savez(path, config=json.dumps(config.to_dict()), **arrays)  # type: ignore[arg-type]


def _answer(config: KernelConfig, *operands: Any) -> tuple[Array, Array]:
    """The reference's output, and how far from it each element may be."""
    expected = reference.separable_conv1d(*operands)
    length = config.kernel_size + config.mid_channels
    rounding = 8 * float(np.finfo(config.dtype).eps)
    # The sums' bound, stretched where the activation is steep, and the activation's own error.
    allowed = length**0.5 * reference.magnitude(*operands) * np.maximum(1, np.abs(expected))
    return expected, rounding * (allowed + np.abs(expected) + 1)


@dataclass(frozen=True)
class Case:
    """An input and its right answer, to within ``allowed``."""

    x: Array
    expected: Array
    allowed: Array

    def check(self, y: Array) -> None:
        """Raise ValueError if `y` is not the answer; what was never written must be NaN."""
        wrong = ~(np.abs(y - self.expected) <= self.allowed)
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {wrong.size} outputs are wrong (input {self.x.shape})"
            )


class Task:
    """What `write_task` wrote; the first of its ``cases`` is the measured one."""

    def __init__(self, path: str | Path) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        self.kernel = KernelConfig.from_dict(json.loads(str(arrays["config"])))
        self.config = layer_config(self.kernel)
        bias = arrays["bias"] if self.kernel.use_bias else None
        self.weights = (arrays["depthwise"], arrays["pointwise"], bias)
        ends = [name[1:] for name in arrays if name.startswith("x")]
        self.cases = [
            Case(*(arrays[n + end] for n in ("x", "expected", "allowed"))) for end in ends
        ]
        self.x, self.expected = self.cases[0].x, self.cases[0].expected
        self.allowed = self.cases[0].allowed

    def verified(self, library: str, runtime: str) -> CompiledLayer:
        """The layer of a library, once it has given the right answers."""
        layer = CompiledLayer(Path(library), Path(runtime), self.config, *self.weights)
        for case in self.cases:
            y = np.full(case.expected.shape, np.nan, self.kernel.dtype)
            layer.run(case.x, y, 1 if self.config.channel_axis == -1 else 2)
            case.check(y)
        return layer


loaded = functools.lru_cache(maxsize=1)(Task)  # by its path: a process has one at a time


def sample(
    task: str, libraries: Sequence[str], rounds: int, *, runtime: str, threads: int = 1
) -> list[list[float]]:
    """Verify libraries, then time them in alternation.

    Parameters
    ----------
    task
        What `write_task` wrote.
    libraries, runtime
        Shared libraries for this machine.
    threads
        That one call may use.

    Returns
    -------
    list
        For each library, `rounds` samples of the seconds of one call.

    Raises
    ------
    ValueError
        If a library's answer is not the reference's.
    """
    set_num_threads(threads)
    data = loaded(task)
    layers = [data.verified(library, runtime) for library in libraries]
    y = np.empty(data.expected.shape, data.kernel.dtype)
    return alternated([partial(layer.call, layer.handle, data.x, y) for layer in layers], rounds)


def alternated(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Time calls in turns; for each `rounds` samples of the seconds of one."""
    repeats = [_repeats(call) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, times in zip(calls, repeats, samples, strict=True):
            call()  # brings this one's weights back into the caches
            times.append(_run(call, count) / count)
    return samples


def _repeats(call: Callable[[], object]) -> int:
    _run(call, 3)
    return max(1, round(SAMPLE_SECS / _run(call, 1)))


def _run(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start
