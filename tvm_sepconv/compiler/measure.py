"""Verify and time whole libraries, in a process that a wrong kernel may take down with it.

What is timed is what will be shipped: a library with all its variants, called through the runtime
on the measured input, one thread, data warm in the caches. No TVM is needed.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import reference
from tvm_sepconv.config import KernelConfig, SepConvConfig
from tvm_sepconv.runtime import CompiledLayer, set_num_threads

SAMPLE_SECS = 1e-3  # calls are repeated to fill this: the clock's own cost vanishes

Array = npt.NDArray[Any]


def layer_config(config: KernelConfig) -> SepConvConfig:
    """A layer with this kernel; its padding is "same", so only the stride shortens the output."""
    names = ("strides", "data_format", "dilation_rate", "depth_multiplier", "activation")
    arguments = {name: getattr(config, name) for name in (*names, "use_bias", "dtype")}
    return SepConvConfig.parse(config.filters, config.kernel_size, padding="same", **arguments)


def write_task(path: Path, config: KernelConfig, batch: int, steps: int) -> None:
    """Draw an input and weights, the same ones each time, and save them with the right answer."""
    layer = layer_config(config)
    draw = np.random.default_rng(0)
    last = config.data_format == "channels_last"
    shapes = {
        "x": (batch, steps, config.channels) if last else (batch, config.channels, steps),
        "depthwise": layer.depthwise_shape(config.channels),
        "pointwise": layer.pointwise_shape(config.channels),
        "bias": layer.bias_shape,
    }
    # Terms of a size that keeps every activation in its interesting range.
    scales = {"depthwise": config.kernel_size**-0.5, "pointwise": config.mid_channels**-0.5}
    arrays = {
        name: (draw.standard_normal(shape) * scales.get(name, 1.0)).astype(config.dtype)
        for name, shape in shapes.items()
    }
    bias = arrays["bias"] if config.use_bias else None
    operands = (arrays["x"], arrays["depthwise"], arrays["pointwise"], bias, layer)
    expected = reference.separable_conv1d(*operands)
    length = config.kernel_size + config.mid_channels
    rounding = 8 * float(np.finfo(config.dtype).eps)
    # The sums' bound, stretched where the activation is steep, and the activation's own error.
    allowed = length**0.5 * reference.magnitude(*operands) * np.maximum(1, np.abs(expected))
    allowed = rounding * (allowed + np.abs(expected) + 1)
    text = json.dumps(config.to_dict())
    np.savez(path, config=text, expected=expected, allowed=allowed, **arrays)


class _Task:
    """A saved task, ready to run."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        self.kernel = KernelConfig.from_dict(json.loads(str(arrays["config"])))
        self.config = layer_config(self.kernel)
        self.x = arrays["x"]
        bias = arrays["bias"] if self.kernel.use_bias else None
        self.weights = (arrays["depthwise"], arrays["pointwise"], bias)
        self.expected, self.allowed = arrays["expected"], arrays["allowed"]

    def verified(self, library: str, runtime: str) -> CompiledLayer:
        """The layer of a library, once it has given the right answer."""
        layer = CompiledLayer(Path(library), Path(runtime), self.config, *self.weights)
        y = np.full(self.expected.shape, np.nan, self.kernel.dtype)
        layer.run(self.x, y, 1 if self.config.channel_axis == -1 else 2)
        wrong = ~(np.abs(y - self.expected) <= self.allowed)  # what was never written is NaN
        if wrong.any():
            raise ValueError(f"{int(wrong.sum())} of {wrong.size} outputs are wrong")
        return layer


_task = functools.lru_cache(maxsize=1)(_Task)


def sample(task: str, runtime: str, libraries: Sequence[str], rounds: int) -> list[list[float]]:
    """Verify libraries, then time them in alternation.

    Parameters
    ----------
    task
        What `write_task` wrote.
    runtime, libraries
        Shared libraries for this machine.

    Returns
    -------
    list
        For each library, `rounds` samples of the seconds of one call.

    Raises
    ------
    ValueError
        If a library's answer is not the reference's.
    """
    set_num_threads(1)
    data = _task(task)
    layers = [data.verified(library, runtime) for library in libraries]
    y = np.empty(data.expected.shape, data.kernel.dtype)
    repeats = [_repeats(layer, data.x, y) for layer in layers]
    samples: list[list[float]] = [[] for _ in layers]
    for _ in range(rounds):
        for layer, count, times in zip(layers, repeats, samples, strict=True):
            _run(layer, data.x, y, 1)  # brings this library's weights back into the caches
            times.append(_run(layer, data.x, y, count) / count)
    return samples


def _repeats(layer: CompiledLayer, x: Array, y: Array) -> int:
    _run(layer, x, y, 3)
    return max(1, round(SAMPLE_SECS / _run(layer, x, y, 1)))


def _run(layer: CompiledLayer, x: Array, y: Array, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        layer.call(layer.handle, x, y)
    return time.perf_counter() - start
