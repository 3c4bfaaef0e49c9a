"""A layer with weights and an input, and what may come out: nothing is timed before it is right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import reference
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.subjects import Subject, of_workload
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
    target
        The instruction set that ours is compiled for; "" for this machine's best.
    """

    config: SepConvConfig
    weights: tuple[Array, ...]
    x: Array
    expected: Array
    allowed: Array
    target: str = ""

    @classmethod
    def of(cls, workload: Workload, data_format: str) -> Case:
        """Draw weights and an input for a workload; the same ones each time."""
        return cls.of_subject(of_workload(workload, data_format))

    @classmethod
    def of_subject(cls, subject: Subject, target: str = "") -> Case:
        """Draw an input for a subject, and weights if it has none; the same ones each time."""
        config, draw = subject.config, np.random.default_rng(0)
        shapes = config.weight_shapes(subject.channels).values()
        drawn = tuple(draw.standard_normal(shape, np.float32) for shape in shapes)
        weights = subject.weights or drawn
        x = draw.standard_normal(subject.input_shape, np.float32)
        terms = (weights[0], weights[1], weights[2] if config.use_bias else None, config)
        length = config.kernel_size + weights[1].shape[1]
        rounding = 4 * float(np.finfo(np.float32).eps) * length**0.5
        bound = rounding * reference.magnitude(x, *terms)
        sums = reference.separable_conv1d(x, *terms, activate=False)
        expected = np.asarray(config.activation(sums))
        return cls(config, weights, x, expected, _stretched(config, sums, bound, expected), target)

    def save(self, path: Path) -> None:
        """Write it to an ``.npz`` file, for another process."""
        arrays: dict[str, Any] = {f"weights_{i}": array for i, array in enumerate(self.weights)}
        arrays["config"] = json.dumps({"config": self.config.to_dict(), "target": self.target})
        np.savez(path, x=self.x, expected=self.expected, allowed=self.allowed, **arrays)

    @classmethod
    def load(cls, path: Path) -> Case:
        """Read what `save` wrote."""
        with np.load(path) as file:
            arrays = dict(file)
        plain = json.loads(str(arrays["config"]))
        weights = tuple(arrays[name] for name in sorted(arrays) if name.startswith("weights_"))
        return cls(
            SepConvConfig.from_dict(plain["config"]), weights, arrays["x"], arrays["expected"],
            arrays["allowed"], plain["target"],
        )  # fmt: skip

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
        return np.ascontiguousarray(array.swapaxes(1, 2) if self._channels_last else array)

    def channels_last(self, array: Array) -> Array:
        """Return an array of the layer's data format as (batch, steps, channels), contiguous."""
        return np.ascontiguousarray(array if self._channels_last else array.swapaxes(1, 2))

    def from_channels_first(self, array: Array) -> Array:
        """Return (batch, filters, [1,] steps) in the layer's data format."""
        array = array.reshape(array.shape[0], array.shape[1], -1)
        return array.swapaxes(1, 2) if self._channels_last else array

    def from_channels_last(self, array: Array) -> Array:
        """Return (batch, [1,] steps, filters) in the layer's data format."""
        array = array.reshape(array.shape[0], -1, array.shape[-1])
        return array if self._channels_last else array.swapaxes(1, 2)

    @property
    def _channels_last(self) -> bool:
        return self.config.channel_axis == -1


def _stretched(config: SepConvConfig, sums: Array, bound: Array, expected: Array) -> Array:
    """How far an output may lie off if its sum lies off by `bound`: more where it is steep."""
    with np.errstate(all="ignore"):
        less, more = (np.abs(config.activation(sums + s * bound) - expected) for s in (-1, 1))
    return np.asarray(np.maximum(np.maximum(less, more), bound))


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
