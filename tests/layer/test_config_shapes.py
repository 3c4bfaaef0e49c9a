"""Numbers derived from a SepConvConfig: steps, shapes, costs; and the kernel that it needs."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_sepconv.config import KernelConfig, SepConvConfig


def parse(**arguments):
    return SepConvConfig.parse(**{"filters": 3, "kernel_size": 4, **arguments})


@given(
    steps=st.integers(0, 60),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 9),
    dilation=st.integers(1, 4),
    padding=st.one_of(
        st.sampled_from(["valid", "same"]), st.tuples(st.integers(0, 9), st.integers(0, 9))
    ),
)
def test_steps_out_are_the_places_where_the_kernel_fits(steps, kernel, stride, dilation, padding):
    config = SepConvConfig(1, kernel, stride, padding, dilation_rate=dilation)
    left, right = config.pad_amounts(steps)
    reach = (kernel - 1) * dilation
    assert config.effective_kernel == reach + 1
    starts = range(0, left + steps + right - reach, stride)
    if padding == "same":
        assert config.out_steps(steps) == -(-steps // stride)
        # No more zeros than the last place needs, the odd one on the right.
        needed = max((config.out_steps(steps) - 1) * stride + reach + 1 - steps, 0)
        assert (left + right, right - left) == (needed, needed % 2)
    else:
        assert (left, right) == ((0, 0) if padding == "valid" else padding)
        assert config.out_steps(steps) == len(starts)


def test_weight_shapes_and_costs():
    config = parse(depth_multiplier=2, strides=2)
    assert config.depthwise_shape(5) == (4, 5, 2)
    assert config.pointwise_shape(5) == (1, 10, 3)
    assert config.bias_shape == (3,)
    assert config.out_steps(12) == 5
    assert config.flops(2, 12, 5) == 2 * 2 * 5 * 10 * (4 + 3)
    shapes = {"depthwise_kernel": (4, 5, 2), "pointwise_kernel": (1, 10, 3), "bias": (3,)}
    assert config.weight_shapes(5) == shapes
    assert list(dataclasses.replace(config, use_bias=False).weight_shapes(5)) == list(shapes)[:2]


@pytest.mark.parametrize(
    ("arguments", "shape", "want"),
    [
        ({}, (2, 10, 5), (2, 7, 3)),
        ({}, (None, None, 5), (None, None, 3)),
        ({"data_format": "channels_first"}, (2, 5, 10), (2, 3, 7)),
        ({"data_format": "channels_first"}, (None, 5, None), (None, 3, None)),
        ({"padding": "same", "strides": 2}, (0, 7, 5), (0, 4, 3)),
        ({"padding": "same"}, (2, 0, 5), (2, 0, 3)),
        ({"padding": (3, 0)}, (2, 10, 5), (2, 10, 3)),
        ({"activation": "glu", "filters": 6}, (2, 10, 5), (2, 7, 3)),
        ({"activation": "glu", "data_format": "channels_first"}, (2, 5, 11), (2, 3, 4)),
        ({"activation": "glu", "data_format": "channels_first"}, (2, 5, None), (2, 3, None)),
    ],
    ids=str,
)
def test_output_shapes(arguments, shape, want):
    assert parse(**arguments).compute_output_shape(shape) == want
    assert parse(**arguments).compute_output_shape(list(shape)) == want


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        (
            {},
            (4, 10),
            "Input 0 with name 'None' of layer 'x' is incompatible with the layer: expected "
            "min_ndim=3, found ndim=2. Full shape received: (4, 10)",
        ),
        (
            {},
            (4, 2, 10, 3),
            "Kernel shape must have the same length as input, but received kernel of shape "
            "(4, 3, 3) and input of shape (4, 2, 10, 3).",
        ),
        (
            {},
            (1, 3, 5),
            "Computed output size would be zero or negative. Received `inputs shape=(1, 3, 5)`, "
            "`kernel shape=(4, 5, 3)`, `dilation_rate=[1]`, `strides=(1,)`, `padding=valid`.",
        ),
        ({"padding": (1, 0)}, (1, 2, 5), "zero or negative. Received `inputs shape=(1, 2, 5)`"),
        ({}, (1, 9, None), "must be a positive number. Received: input_shape=(1, 9, None), whose"),
        (
            {"data_format": "channels_first"},
            (1, 0, 9),
            "channels are at axis 1 (data_format='channels_first')",
        ),
        ({"activation": "glu"}, (1, 9, 5), "even length. Received: output shape before the"),
    ],
    ids=str,
)
def test_wrong_input_shapes(arguments, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(name="x", **arguments).compute_output_shape(shape)


@pytest.mark.parametrize(
    ("data_format", "axis", "good", "bad"),
    [("channels_last", -1, (1, 9, 5), (1, 9, 4)), ("channels_first", 1, (1, 5, 9), (1, 4, 9))],
)
def test_a_built_layer_wants_its_channels(data_format, axis, good, bad):
    config = parse(name="x", data_format=data_format)
    config.check_input_shape(good, channels=5)
    message = (
        f"expected axis {axis} of input shape to have value 5, but received input with shape {bad}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check_input_shape(bad, channels=5)


def test_kernel_config():
    config = parse(filters=256, kernel_size=33, strides=2, padding="same", activation="relu")
    kernel = config.kernel_config(64)
    assert kernel == KernelConfig(64, 256, 33, 2, activation="relu")
    assert kernel.key == "c64_f256_k33_s2_d1_m1_cl_relu_bias_float32"
    assert KernelConfig.from_dict(json.loads(json.dumps(kernel.to_dict()))) == kernel
    assert kernel.effective_kernel == 33 and kernel.mid_channels == 64
    assert kernel.flops(3, 100) == config.flops(3, 200, 64) == 2 * 3 * 100 * 64 * (33 + 256)
    assert dataclasses.replace(kernel, dilation_rate=2, depth_multiplier=3).effective_kernel == 65


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("swish", "silu"),
        ("softmax", "linear"),
        ("glu", "linear"),
        (np.tanh, "linear"),
        ({"class_name": "LeakyReLU", "config": {}}, "linear"),
        ({"class_name": "LeakyReLU", "config": {"negative_slope": 0.2}}, "leaky_relu"),
    ],
    ids=str,
)
def test_what_a_kernel_does_not_apply_is_linear(activation, name):
    assert parse(activation=activation).kernel_config(1).activation == name


def test_keys_tell_configs_apart():
    base = KernelConfig(2, 3, 4)
    changes = {
        "channels": 5, "filters": 5, "kernel_size": 5, "strides": 5, "dilation_rate": 5,
        "depth_multiplier": 5, "data_format": "channels_first", "use_bias": False,
        "activation": "relu", "dtype": "float16", "accumulation_dtype": "float64",
    }  # fmt: skip
    assert changes.keys() == {f.name for f in dataclasses.fields(KernelConfig)}
    keys = {dataclasses.replace(base, **{k: v}).key for k, v in changes.items()} | {base.key}
    assert len(keys) == len(changes) + 1
    wide = parse(dtype="float64", depth_multiplier=2, data_format="channels_first").kernel_config(5)
    assert wide.key == "c5_f3_k4_s1_d1_m2_cf_linear_bias_float64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "Invalid value for argument `channels`. Expected a strictly positive"),
        ({"strides": 1.5}, "Invalid value for argument `strides`"),
        ({"activation": "softmax"}, "Received activation=softmax."),
        ({"data_format": "x"}, "Received data_format=x."),
        ({"dtype": "mixed_float16"}, "Received dtype=mixed_float16."),
        ({"accumulation_dtype": "float16"}, "Received accumulation_dtype=float16."),
        ({"lanes": 8}, "Unrecognized keyword arguments passed to KernelConfig: {'lanes': 8}"),
    ],
    ids=str,
)
def test_wrong_kernel_configs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KernelConfig.from_dict({"channels": 2, "filters": 3, "kernel_size": 4, **change})


@pytest.mark.parametrize(
    "reach", [{"strides": 2**40}, {"dilation_rate": 2**29}, {"kernel_size": 2**24}], ids=str
)
def test_a_kernel_does_not_reach_beyond_its_scratch(reach: dict[str, int]) -> None:
    config = SepConvConfig.parse(**{"filters": 8, "kernel_size": 3, "padding": "same", **reach})
    with pytest.raises(ValueError, match=r"reach too far for a compiled kernel: .* Subsample"):
        config.kernel_config(16)


def test_a_kernel_may_reach_far() -> None:
    config = SepConvConfig.parse(8, 3, dilation_rate=2**16, padding="same")
    assert config.kernel_config(256).effective_kernel == 2**17 + 1
