"""What the separable layer replaces: the dense Conv1D of the same shape, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared
from tvm_sepconv.bench.contestants.onnxruntime import FORMS, graph_model, session

Array = npt.NDArray[Any]
MOST_FLOPS = 100e9  # about a second of one core; verifying takes another


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return the dense convolution without bias and activation, as one axis and as two.

    Raises
    ------
    ValueError
        If a call takes too long.
    """
    from onnx import helper

    _check_size(case)
    config = case.config
    x, (left, right) = case.channels_first(case.x), config.pad_amounts(case.steps)
    kernel = weights(case).transpose(2, 1, 0)
    result = []
    for form, height in FORMS.items():
        ones = [1] * height
        node = helper.make_node(
            "Conv", ["x", "kernel"], ["y"],
            pads=[0, left, 0, right] if height else [left, right],
            strides=[*ones, config.strides],
            dilations=[*ones, config.dilation_rate],
        )  # fmt: skip
        image = x[:, :, None] if height else x
        dims: dict[str, list[int | None]] = {
            "x": list(image.shape),
            "y": [x.shape[0], config.filters, *ones, None],
        }
        arrays = {"kernel": kernel[:, :, None] if height else kernel}
        run = session(graph_model("dense", [node], dims, arrays), threads)
        result.append(Prepared(form, run, image, case.from_channels_first))
    return result


def weights(case: Case) -> Array:
    """Return the drawn kernel, (kernel_size, channels, filters); the same one each time."""
    shape = case.config.kernel_size, case.channels, case.config.filters
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def answer(case: Case) -> tuple[Array, Array]:
    """Return the convolution in float64, in the layer's data format, and its allowed error.

    Raises
    ------
    ValueError
        If a call takes too long.
    """
    _check_size(case)
    kernel, x = weights(case).astype(np.float64), case.channels_last(case.x).astype(np.float64)
    expected = _convolved(x, kernel, case)
    terms = kernel.shape[0] * kernel.shape[1]
    # Random signs: the errors of the partial sums grow with the root of their number. The sum of
    # the terms' magnitudes would need a second convolution; inputs and weights have a variance of
    # one, so that it is about 0.64 times the terms everywhere but at the ends.
    allowed = 4 * float(np.finfo(np.float32).eps) * terms**0.5 * 0.64 * terms
    expected = case.from_channels_last(expected)
    return expected, np.full(expected.shape, allowed)


def _convolved(x: Array, kernel: Array, case: Case) -> Array:
    config, steps = case.config, x.shape[1]
    padded = np.pad(x, ((0, 0), config.pad_amounts(steps), (0, 0)))
    out_steps = config.out_steps(steps)
    y = np.zeros((x.shape[0], out_steps, kernel.shape[2]))
    for tap in range(kernel.shape[0]):
        start = tap * config.dilation_rate
        rows = padded[:, start : start + (out_steps - 1) * config.strides + 1 : config.strides]
        y += rows @ kernel[tap]
    return y


def _check_size(case: Case) -> None:
    batch, out_steps = case.x.shape[0], case.config.out_steps(case.steps)
    flops = 2 * batch * out_steps * case.channels * case.config.kernel_size * case.config.filters
    if flops > MOST_FLOPS:
        raise ValueError(f"left out: a call takes {flops / 1e9:.0f} GFLOP")
