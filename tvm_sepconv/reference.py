"""The layer in NumPy with float64 accumulation: the oracle the kernels are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tvm_sepconv.config import SepConvConfig

Array = npt.NDArray[Any]


def separable_conv1d(
    x: npt.ArrayLike,
    depthwise_kernel: npt.ArrayLike,
    pointwise_kernel: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    config: SepConvConfig,
    *,
    activate: bool = True,
) -> npt.NDArray[np.float64]:
    """Apply the layer that `config` describes.

    Parameters
    ----------
    x
        (batch, steps, channels), or (batch, channels, steps) for channels_first; any float dtype.
    depthwise_kernel
        (kernel_size, channels, depth_multiplier).
    pointwise_kernel
        (1, channels * depth_multiplier, filters).
    bias
        (filters,), or None.
    activate
        False leaves the activation out.

    Returns
    -------
    numpy.ndarray
        float64, in the layout of `x`. Nothing is rounded to a narrower dtype on the way.

    Raises
    ------
    ValueError
        If the shape of `x` does not fit the layer.
    """
    inputs, depthwise, pointwise = (
        np.asarray(a).astype(np.float64) for a in (x, depthwise_kernel, pointwise_kernel)
    )
    config.check_input_shape(inputs.shape, channels=depthwise.shape[1])
    channels_first = config.data_format == "channels_first"
    if channels_first:
        inputs = inputs.swapaxes(1, 2)
    # Infinite inputs make NaN, as they do in Keras; that is an answer and not worth a warning.
    with np.errstate(all="ignore"):
        y = _depthwise(inputs, depthwise, config) @ pointwise[0]
        if bias is not None:
            y = y + np.asarray(bias).astype(np.float64)
    if channels_first:
        y = y.swapaxes(1, 2)
    # The activation sees the layer's own layout: softmax takes the last axis, whatever it is.
    return np.asarray(config.activation(y) if activate else y, dtype=np.float64)


def _depthwise(x: Array, kernel: Array, config: SepConvConfig) -> Array:
    """(batch, steps, channels) -> (batch, output steps, channels * multiplier), channel-major."""
    batch, steps, channels = x.shape
    out_steps, stride = config.out_steps(steps), config.strides
    padded = np.pad(x, ((0, 0), config.pad_amounts(steps), (0, 0)))
    y = np.zeros((batch, out_steps, channels, kernel.shape[2]))
    for tap in range(config.kernel_size):
        start = tap * config.dilation_rate
        window = padded[:, start : start + (out_steps - 1) * stride + 1 : stride]
        if out_steps:
            y += window[..., None] * kernel[tap]
    return y.reshape(batch, out_steps, channels * kernel.shape[2])


def magnitude(
    x: npt.ArrayLike,
    depthwise_kernel: npt.ArrayLike,
    pointwise_kernel: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    config: SepConvConfig,
) -> npt.NDArray[np.float64]:
    """Return Σ|terms|, the sum of the magnitudes of all terms of each pre-activation output.

    It scales the rounding error a kernel may make: `4 * eps * sqrt(K) * magnitude`, where
    K = kernel_size + channels * depth_multiplier. Shapes are those of `separable_conv1d`.
    """
    arrays = (x, depthwise_kernel, pointwise_kernel)
    x, depthwise, pointwise = (np.abs(np.asarray(a).astype(np.float64)) for a in arrays)
    bias = None if bias is None else np.abs(np.asarray(bias).astype(np.float64))
    return separable_conv1d(x, depthwise, pointwise, bias, config, activate=False)
