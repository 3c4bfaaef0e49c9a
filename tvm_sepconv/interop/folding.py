"""What two convolutions and the normalisations around them are as one layer: exact, in float64.

A bias or a normalisation between the two is the same for every step, and the pointwise convolution
has no padding that would cut it off: it passes through as ``pointwise @ constant``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_sepconv.arguments import Padding

Array = npt.NDArray[Any]


class Affine(NamedTuple):
    """``scale * x + shift``, both (channels,): what a batch normalisation is once it is trained."""

    scale: Array
    shift: Array


class Weights(NamedTuple):
    """A depthwise convolution and the pointwise one after it.

    Attributes
    ----------
    depthwise
        (channels * depth_multiplier, kernel_size), multiplier innermost as in Keras.
    pointwise
        (filters, channels * depth_multiplier).
    bias
        (filters,), or None.
    """

    depthwise: Array
    pointwise: Array
    bias: Array | None

    def keras(self, channels: int) -> list[Array]:
        """Return them as `SeparableConv1D.set_weights` takes them."""
        taps = self.depthwise.shape[1]
        depthwise = self.depthwise.reshape(channels, -1, taps).transpose(2, 0, 1)
        bias = [] if self.bias is None else [self.bias]
        return [depthwise, self.pointwise.T[None], *bias]


def batch_norm(
    gamma: Array | None, beta: Array | None, mean: Array, variance: Array, epsilon: float
) -> Affine:
    """Return ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``; None is 1 and 0."""
    scale = 1 / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    if gamma is not None:
        scale = scale * gamma
    shift = -scale * mean
    return Affine(scale, shift if beta is None else shift + beta)


def fold(
    depthwise: Array,
    depthwise_bias: Array | None,
    between: Sequence[Affine],
    pointwise: Array,
    pointwise_bias: Array | None,
    after: Sequence[Affine],
) -> Weights:
    """Return the two convolutions with everything around them in the pointwise one and the bias.

    Parameters
    ----------
    depthwise, pointwise
        As in `Weights`.
    between, after
        In the order in which they are applied.
    """
    pointwise = pointwise.astype(np.float64)
    constant = np.zeros(len(depthwise)) if depthwise_bias is None else depthwise_bias.astype("f8")
    scale = np.ones(len(depthwise))
    for affine in between:
        scale, constant = affine.scale * scale, affine.scale * constant + affine.shift
    bias = pointwise @ constant
    if pointwise_bias is not None:
        bias = bias + pointwise_bias
    pointwise = pointwise * scale
    for affine in after:
        pointwise, bias = affine.scale[:, None] * pointwise, affine.scale * bias + affine.shift
    none = depthwise_bias is None and pointwise_bias is None and not (between or after)
    return Weights(depthwise, pointwise, None if none else bias)


def padding(left: int, right: int, kernel_size: int, strides: int, dilation_rate: int) -> Padding:
    """Return these zeros by Keras's name where it has one for them."""
    if (left, right) == (0, 0):
        return "valid"
    total = (kernel_size - 1) * dilation_rate
    # With strides, "same" depends on the steps.
    same = strides == 1 and (left, right) == (total // 2, total - total // 2)
    return "same" if same else (left, right)
