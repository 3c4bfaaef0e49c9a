"""The reference against the definition of the layer, term by term in plain Python."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from tvm_sepconv import reference
from tvm_sepconv.config import SepConvConfig

RNG = np.random.default_rng(0)


def config_of(**arguments):
    given = {"filters": 3, "kernel_size": 3, "data_format": "channels_last", "dtype": "float32"}
    return SepConvConfig.parse(**{**given, **arguments})


def weights_of(config, channels, dtype=np.float64):
    shapes = (config.depthwise_shape(channels), config.pointwise_shape(channels), config.bias_shape)
    return [RNG.normal(size=shape).astype(dtype) for shape in shapes]


def by_definition(x, depthwise, pointwise, bias, config):
    """Every output as a sum of its terms; returns (outputs, sums of magnitudes), channels last."""
    batch, steps, channels = x.shape
    left, right = config.pad_amounts(steps)
    size = (steps + left + right - config.effective_kernel) // config.strides + 1
    outputs = np.zeros((batch, max(size, 0), config.filters))
    magnitudes = np.zeros_like(outputs)
    for n, t, f in np.ndindex(outputs.shape):
        terms = [bias[f]]
        taps = itertools.product(
            range(config.kernel_size), range(channels), range(depthwise.shape[2])
        )
        for k, c, m in taps:
            step = t * config.strides + k * config.dilation_rate - left
            if 0 <= step < steps:
                middle = c * depthwise.shape[2] + m
                terms.append(x[n, step, c] * depthwise[k, c, m] * pointwise[0, middle, f])
        outputs[n, t, f] = math.fsum(terms)
        magnitudes[n, t, f] = math.fsum(map(abs, terms))
    return outputs, magnitudes


CASES = [
    {},
    {"kernel_size": 2, "strides": 2},
    {"kernel_size": 1},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4, "strides": 3},
    {"padding": "same", "kernel_size": 2, "strides": 5},
    {"padding": "same", "dilation_rate": 3, "strides": 2},
    {"padding": (2, 0), "depth_multiplier": 2},
    {"padding": (0, 5), "dilation_rate": 2, "depth_multiplier": 3},
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_reference_is_the_definition(arguments, data_format):
    config = config_of(**arguments, data_format=data_format)
    x = RNG.normal(size=(2, 7, 4))
    weights = weights_of(config, channels=4)
    outputs, magnitudes = by_definition(x, *weights, config)
    if data_format == "channels_first":
        x, outputs, magnitudes = (a.swapaxes(1, 2) for a in (x, outputs, magnitudes))
    got = reference.separable_conv1d(x, *weights, config)
    assert got.dtype == np.float64 and got.shape == config.compute_output_shape(x.shape)
    np.testing.assert_allclose(got, outputs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(reference.magnitude(x, *weights, config), magnitudes, rtol=1e-12)


def test_no_bias_is_a_bias_of_zeros():
    config = config_of(use_bias=False)
    x, (depthwise, pointwise, bias) = RNG.normal(size=(2, 7, 4)), weights_of(config, 4)
    without = reference.separable_conv1d(x, depthwise, pointwise, None, config)
    zero = reference.separable_conv1d(x, depthwise, pointwise, 0 * bias, config)
    np.testing.assert_array_equal(without, zero)
    magnitude = reference.magnitude(x, depthwise, pointwise, None, config)
    assert (magnitude >= abs(without) * (1 - 1e-12)).all()


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(data_format, batch, steps):
    config = config_of(padding="same", data_format=data_format)
    last = data_format == "channels_last"
    x = np.zeros((batch, steps, 4) if last else (batch, 4, steps), np.float32)
    y = reference.separable_conv1d(x, *weights_of(config, 4), config)
    assert y.shape == ((batch, steps, 3) if last else (batch, 3, steps))
    assert reference.magnitude(x, *weights_of(config, 4), config).shape == y.shape


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_inputs_are_not_rounded_on_the_way(dtype):
    config = config_of(padding="same")
    x, weights = RNG.normal(size=(1, 6, 4)).astype(dtype), weights_of(config, 4, dtype)
    wide = [a.astype(np.float64) for a in (x, *weights)]
    got = reference.separable_conv1d(x, *weights, config)
    np.testing.assert_array_equal(got, reference.separable_conv1d(*wide, config))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_activation_takes_the_last_axis_of_the_output(data_format):
    config = config_of(activation="softmax", data_format=data_format)
    shape = (2, 7, 4) if data_format == "channels_last" else (2, 4, 7)
    x, weights = RNG.normal(size=shape), weights_of(config, 4)
    np.testing.assert_allclose(reference.separable_conv1d(x, *weights, config).sum(-1), 1)
    linear = reference.separable_conv1d(x, *weights, config, activate=False)
    expected = reference.separable_conv1d(x, *weights, config_of(data_format=data_format))
    np.testing.assert_array_equal(linear, expected)


def test_nan_and_infinity_reach_the_outputs_they_touch():
    config = config_of(activation="relu")
    x = np.ones((1, 9, 4))
    x[0, 4, 1], x[0, 8, 2] = np.nan, np.inf
    depthwise, pointwise, bias = (abs(w) for w in weights_of(config, 4))
    y = reference.separable_conv1d(x, depthwise, pointwise, bias, config)[0]
    assert np.isfinite(y[:2]).all() and np.isnan(y[2:5]).all()
    assert np.isfinite(y[5]).all() and np.isposinf(y[6]).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 7), "found ndim=2"),
        ((2, 7, 5), "to have value 4, but received input with shape"),
        ((2, 2, 4), "Computed output size would be zero or negative"),
    ],
    ids=str,
)
def test_wrong_shapes(shape, message):
    config = config_of()
    with pytest.raises(ValueError, match=message):
        reference.separable_conv1d(np.zeros(shape), *weights_of(config, 4), config)
