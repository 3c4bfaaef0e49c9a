"""SepConvConfig: every argument and every message."""

from __future__ import annotations

import functools
import json
import re
import types

import ml_dtypes
import numpy as np
import pytest

from tvm_sepconv import activations, constraints, initializers, regularizers
from tvm_sepconv.config import SepConvConfig


@pytest.fixture(autouse=True)
def no_keras_json(monkeypatch, tmp_path):
    """The machine's own keras.json decides nothing here."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path / "keras.json"


def parse(**arguments):
    return SepConvConfig.parse(**{"filters": 3, "kernel_size": 4, **arguments})


def test_defaults_are_those_of_keras():
    config = SepConvConfig.parse(3, 4, name="x")
    assert config == SepConvConfig(3, 4, name="x")
    assert config.strides == config.dilation_rate == config.depth_multiplier == 1
    assert (config.padding, config.data_format, config.dtype) == (
        "valid",
        "channels_last",
        "float32",
    )
    assert config.use_bias is True and config.trainable is True
    assert config.activation is activations.linear
    assert config.depthwise_initializer == initializers.GlorotUniform()
    assert config.pointwise_initializer == initializers.GlorotUniform()
    assert config.bias_initializer == initializers.Zeros()


def test_positional_order_is_that_of_keras():
    config = SepConvConfig.parse(3, 2, 5, "same", "channels_first", 7, 11, "relu", False, "ones")
    assert (config.filters, config.kernel_size, config.strides, config.padding) == (3, 2, 5, "same")
    assert (config.data_format, config.dilation_rate) == ("channels_first", 7)
    assert (config.depth_multiplier, config.activation) == (11, activations.relu)
    assert config.use_bias is False and config.depthwise_initializer == initializers.Ones()


@pytest.mark.parametrize("name", ["kernel_size", "strides", "dilation_rate"])
@pytest.mark.parametrize("value", [2, (2,), [2], np.array([2]), (np.int64(2),)], ids=repr)
def test_one_integer_in_many_forms(name, value):
    parsed = getattr(parse(**{name: value}), name)
    assert parsed == 2 and type(parsed) is int


@pytest.mark.parametrize("name", ["filters", "depth_multiplier"])
@pytest.mark.parametrize("value", [2, np.int64(2)], ids=repr)
def test_counts(name, value):
    parsed = getattr(parse(**{name: value}), name)
    assert parsed == 2 and type(parsed) is int


def test_bool_passes_as_int():
    config = parse(kernel_size=True, filters=True)
    assert (config.kernel_size, config.filters) == (1, 1) and type(config.kernel_size) is int


@pytest.mark.parametrize(
    ("value", "parsed"),
    [("Same", "same"), ("VALID", "valid"), ((1, 2), (1, 2)), ([0, np.int32(3)], (0, 3))],
    ids=repr,
)
def test_padding(value, parsed):
    assert parse(padding=value).padding == parsed


@pytest.mark.parametrize(
    ("dtype", "name", "compute", "variable", "accumulation"),
    [
        (None, "float32", "float32", "float32", "float32"),
        ("float64", "float64", "float64", "float64", "float64"),
        (np.float16, "float16", "float16", "float16", "float32"),
        (np.dtype(">f4"), "float32", "float32", "float32", "float32"),
        (ml_dtypes.bfloat16, "bfloat16", "bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "mixed_float16", "float16", "float32", "float32"),
        (
            types.SimpleNamespace(name="mixed_bfloat16"),
            "mixed_bfloat16", "bfloat16", "float32", "float32",
        ),
        (
            {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float64"}},
            "float64", "float64", "float64", "float64",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes(dtype, name, compute, variable, accumulation):
    config = parse(dtype=dtype)
    assert config.dtype == name
    assert (config.compute_dtype, config.variable_dtype) == (compute, variable)
    assert config.accumulation_dtype == accumulation


def test_keras_json_gives_the_defaults(no_keras_json):
    settings = {"image_data_format": "channels_first", "floatx": "float16", "backend": "jax"}
    no_keras_json.write_text(json.dumps(settings))
    config = parse()
    assert (config.data_format, config.dtype) == ("channels_first", "float16")
    config = parse(data_format="Channels_Last", dtype="float32")
    assert (config.data_format, config.dtype) == ("channels_last", "float32")


def test_keras_json_is_looked_for_at_home(no_keras_json, monkeypatch):
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(no_keras_json.parent))
    (no_keras_json.parent / ".keras").mkdir()
    (no_keras_json.parent / ".keras" / "keras.json").write_text('{"floatx": "float64"}')
    assert parse().dtype == "float64"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_broken_keras_json_counts_for_nothing(no_keras_json, text):
    no_keras_json.write_text(text)
    assert (parse().data_format, parse().dtype) == ("channels_last", "float32")


@pytest.mark.parametrize("key", ["floatx", "image_data_format"])
def test_a_wrong_keras_json_is_named(no_keras_json, key):
    no_keras_json.write_text(json.dumps({key: "x"}))
    with pytest.raises(ValueError, match=f"Invalid `{key}` configuration in .*keras.json.*{key}=x"):
        parse()


def test_objects_are_resolved():
    config = parse(
        depthwise_regularizer="l2",
        pointwise_regularizer=regularizers.L1(0.5),
        bias_regularizer={"class_name": "L1L2", "config": {"l1": 1}},
        activity_regularizer=np.sum,
        depthwise_constraint="non_neg",
        pointwise_constraint=constraints.UnitNorm,
        bias_constraint=np.abs,
        bias_initializer=np.ones(3),
    )
    assert config.depthwise_regularizer == regularizers.L2()
    assert config.pointwise_regularizer == regularizers.L1(0.5)
    assert config.bias_regularizer == regularizers.L1L2(1)
    assert config.activity_regularizer is np.sum
    assert config.depthwise_constraint == constraints.NonNeg()
    assert config.pointwise_constraint == constraints.UnitNorm()
    assert config.bias_constraint is np.abs
    np.testing.assert_array_equal(config.bias_initializer((3,)), [1, 1, 1])


def test_none_for_an_initializer_is_the_documented_default():
    config = parse(depthwise_initializer=None, pointwise_initializer=None, bias_initializer=None)
    assert (
        config.depthwise_initializer == config.pointwise_initializer == initializers.GlorotUniform()
    )
    assert config.bias_initializer == initializers.Zeros()


def test_seed_gives_each_initializer_a_stream_of_its_own():
    one, same, other = parse(seed=1), parse(seed=1), parse(seed=2)
    draw = [c.depthwise_initializer((4, 5, 6)) for c in (one, same, other)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])
    assert not np.array_equal(draw[0], one.pointwise_initializer((4, 5, 6)))
    assert parse(seed=-1).depthwise_initializer != one.depthwise_initializer
    kept = parse(seed=1, depthwise_initializer=initializers.HeNormal(seed=9))
    assert kept.depthwise_initializer == initializers.HeNormal(seed=9)
    # The config carries the seeds, so the layer made from it starts with the same weights.
    again = SepConvConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    np.testing.assert_array_equal(again.depthwise_initializer((4, 5, 6)), draw[0])


def test_layers_without_a_name_are_counted():
    first, second = parse().name, parse().name
    pattern = r"separable_conv1d(?:_(\d+))?"
    numbers = [int(re.fullmatch(pattern, n).group(1) or 0) for n in (first, second)]
    assert numbers[1] == numbers[0] + 1
    assert parse(name="mine").name == "mine"


def test_autocast_is_accepted_and_input_shape_warned_about():
    parse(autocast=False)
    for keyword in ({"input_shape": (10, 3)}, {"input_dim": 3}):
        with pytest.warns(UserWarning, match="Do not pass an `input_shape`/`input_dim`") as caught:
            parse(**keyword)
        assert len(caught) == 1


TUPLE = "The `{name}` argument must be a tuple of 1 integers. Received {name}={value}"


@pytest.mark.parametrize("name", ["kernel_size", "strides", "dilation_rate"])
@pytest.mark.parametrize(
    ("value", "rest"),
    [
        (None, ""),
        (2.0, ""),
        (np.int64(2), ""),
        ((1, 2), ""),
        ((), ""),
        ("12", ""),
        ("a", "including element a of type <class 'str'>"),
        ((2.7,), "including element 2.7 of type <class 'float'>"),
        ((None,), "including element None of type <class 'NoneType'>"),
        (0, ", including values {0} that do not satisfy `value > 0`"),
        ((-1,), ", including values {-1} that do not satisfy `value > 0`"),
    ],
    ids=repr,
)
def test_integers_that_are_none(name, value, rest):
    with pytest.raises(ValueError) as error:
        parse(**{name: value})
    assert str(error.value) == TUPLE.format(name=name, value=value) + rest


@pytest.mark.parametrize("name", ["filters", "depth_multiplier"])
@pytest.mark.parametrize(
    ("value", "received"),
    [
        (0, "0."),
        (-2, "-2."),
        (2.0, "2.0 (of type <class 'float'>); pass an int."),
        ("3", "3 (of type <class 'str'>); pass an int."),
        (None, "None (of type <class 'NoneType'>); pass an int."),
    ],
    ids=repr,
)
def test_counts_that_are_none(name, value, received):
    with pytest.raises(ValueError) as error:
        parse(**{name: value})
    assert str(error.value) == (
        f"Invalid value for argument `{name}`. Expected a strictly positive value. "
        f"Received {name}={received}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "x"}, "one of {'valid', 'same'}. Received: x"),
        ({"padding": "Causal"}, "Received: causal. For causal padding pass `padding=((kernel_size"),
        ({"padding": None}, "is (left, right), two integers >= 0. Received: None"),
        ({"padding": (1, -1)}, "is (left, right), two integers >= 0. Received: (1, -1)"),
        ({"padding": (1, 2, 3)}, "two integers >= 0. Received: (1, 2, 3)"),
        ({"padding": (1, 0.5)}, "two integers >= 0. Received: (1, 0.5)"),
        (
            {"data_format": "x"},
            "The `data_format` argument must be one of {'channels_first', 'channels_last'}. "
            "Received: data_format=x",
        ),
        (
            {"dtype": "int32"},
            "Cannot convert 'int32' to a mixed precision DTypePolicy. Valid policies",
        ),
        ({"dtype": np.int8}, "Cannot convert 'int8' to a mixed"),
        ({"dtype": "int8_from_float32"}, "Cannot convert 'int8_from_float32' to a mixed"),
        ({"dtype": {"class_name": "DTypePolicyMap"}}, "Cannot convert 'None' to a mixed"),
        ({"dtype": 3}, "Cannot interpret `dtype` argument. Expected a string or an instance of"),
        ({"trainable": 1}, "Expected `trainable` to be a boolean. Received: trainable=1 (of type"),
        (
            {"name": "a/b"},
            "cannot contain character `/`. Received: name=a/b (of type <class 'str'>)",
        ),
        (
            {"name": 3},
            "Argument `name` must be a string and cannot contain character `/`. Received",
        ),
        ({"seed": 0.5}, "The `seed` argument must be an int or None. Received: seed=0.5"),
        (
            {"stride": 2, "pad": 1},
            "Unrecognized keyword arguments passed to SeparableConv1D: {'stride': 2, 'pad': 1}",
        ),
        ({"activation": "x"}, "Could not interpret activation function identifier: x"),
        ({"activation": "threshold"}, "cannot be 'threshold' alone, which needs a threshold and"),
        ({"depthwise_initializer": "x"}, "Could not interpret initializer identifier: x"),
        ({"pointwise_regularizer": 0.1}, "Could not interpret regularizer identifier: 0.1"),
        ({"bias_constraint": "x"}, "Could not interpret constraint identifier: x"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(**arguments)


def test_the_missing_are_named():
    with pytest.raises(TypeError, match="kernel_size"):
        SepConvConfig.from_dict({"filters": 3})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding": (3, 4), "strides": 2, "dilation_rate": 2},
        {"activation": "swish", "dtype": "mixed_float16", "trainable": False, "use_bias": False},
        {"activation": {"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}}},
        {"depthwise_initializer": initializers.Constant(2), "bias_initializer": "ones"},
        {
            "depthwise_regularizer": "l1",
            "activity_regularizer": "l2",
            "bias_constraint": "max_norm",
        },
    ],
    ids=str,
)
def test_configs_round_trip_through_json(arguments):
    config = parse(**arguments)
    written = config.to_dict()
    assert list(written) == [
        "name", "trainable", "dtype", "depth_multiplier", "filters", "kernel_size", "strides",
        "padding", "data_format", "dilation_rate", "activation", "use_bias",
        "depthwise_initializer", "pointwise_initializer", "bias_initializer",
        "depthwise_regularizer", "pointwise_regularizer", "bias_regularizer",
        "activity_regularizer", "depthwise_constraint", "pointwise_constraint", "bias_constraint",
    ]  # fmt: skip
    assert SepConvConfig.from_dict(written) == config
    again = SepConvConfig.from_dict(json.loads(json.dumps(written)))
    assert again == config and hash(again) == hash(config)


def test_a_padding_pair_is_not_for_keras():
    config = parse(padding=(1, 2))
    assert config.to_dict()["padding"] == [1, 2]
    with pytest.raises(ValueError, match=r"The `padding` argument is \(1, 2\).*ZeroPadding1D"):
        config.keras_config()
    assert parse(padding="same").keras_config()["padding"] == "same"


def test_custom_callables_have_no_config():
    fn = functools.partial(activations.threshold, threshold=0.0, default_value=1.0)
    with pytest.raises(ValueError, match="a custom callable has no Keras name"):
        parse(activation=fn).to_dict()
