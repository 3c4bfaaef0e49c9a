"""A layer with weights and an input, and what may come out: nothing is timed before it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import reference
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.workloads import Workload

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One layer to be computed by everybody.

    Parameters
    ----------
    weights
        In Keras's order and shapes, float32.
    x
        float32, in the layer's data format.
    expected, allowed
        The reference's answer and how far from it each element may lie; in the data format too.
    """

    config: SepConvConfig
    weights: tuple[Array, ...]
    x: Array
    expected: Array
    allowed: Array

    @classmethod
    def of(cls, workload: Workload, data_format: str) -> Case:
        """Draw weights and an input for a workload; the same ones each time."""
        config = workload.config(data_format=data_format)
        depthwise = config.depthwise_shape(workload.channels)
        pointwise = config.pointwise_shape(workload.channels)
        shapes: list[tuple[int, ...]] = [depthwise, pointwise]
        shapes += [config.bias_shape] * config.use_bias
        draw = np.random.default_rng(0)
        weights = tuple(draw.standard_normal(shape, np.float32) for shape in shapes)
        x = draw.standard_normal(workload.input_shape(data_format), np.float32)
        terms = (weights[0], weights[1], weights[2] if config.use_bias else None, config)
        length = config.kernel_size + pointwise[1]
        rounding = 4 * float(np.finfo(np.float32).eps) * length**0.5
        # The bound is the sums'. Linear, relu and elu do not stretch differences.
        return cls(
            config,
            weights,
            x,
            reference.separable_conv1d(x, *terms),
            rounding * reference.magnitude(x, *terms),
        )

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return int(self.weights[0].shape[1])

    @property
    def steps(self) -> int:
        """Steps of the input."""
        return int(self.x.shape[1 if self.config.channel_axis == -1 else 2])

    def channels_first(self, array: Array) -> Array:
        """Return an array of the layer's data format as (batch, channels, steps), contiguous."""
        channels_last = self.config.channel_axis == -1
        return np.ascontiguousarray(array.swapaxes(1, 2) if channels_last else array)


def check(name: str, output: Array, expected: Array, allowed: Array) -> None:
    """Refuse an output of another shape, or with an element further off than allowed.

    Raises
    ------
    AssertionError
        Naming who it was, and by how much.
    """
    if output.shape != expected.shape:
        raise AssertionError(
            f"{name} is not the layer: expected an output of shape {expected.shape}. "
            f"Received: {output.shape}"
        )
    with np.errstate(all="ignore"):
        excess = np.abs(output - expected) / allowed
    wrong = ~(excess <= 1)  # NaN is wrong too
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, excess, 0)), wrong.shape)
        raise AssertionError(
            f"{name} is not the layer: {np.count_nonzero(wrong)} of {wrong.size} elements differ "
            f"more than allowed. Expected: {expected[worst]} ± {allowed[worst]:.2g} at "
            f"{tuple(map(int, worst))}. Received: {output[worst]}"
        )


def describe(config: SepConvConfig, channels: int) -> str:
    """Return a layer's shape in one word each: 64→256 k33 s2."""
    words = [f"{channels}→{config.filters}", f"k{config.kernel_size}"]
    rare = {"s": config.strides, "d": config.dilation_rate, "m": config.depth_multiplier}
    return " ".join([*words, *(f"{letter}{n}" for letter, n in rare.items() if n > 1)])
