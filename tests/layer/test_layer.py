"""The layer as a user meets it: building, weights, configuration, compiling."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading

import numpy as np
import pytest

pytest.importorskip("tvm")

from layers import BATCH, CHANNELS, FILTERS, FORMATS, STEPS, assert_right, inputs, layer_of, normal

from tvm_sepconv import (
    BuildOptions,
    SeparableConv1D,
    jit,
    layer_separable_conv_1d,
    save,
    targets,
)
from tvm_sepconv.variable import Variable

# ---- the function -------------------------------------------------------------------------------


def test_the_documented_example():
    x = np.random.default_rng(0).random((4, 10, 12)).astype("float32")
    y = layer_separable_conv_1d(x, 3, 2, 2, activation="relu", seed=0)
    assert y.shape == (4, 5, 3)
    assert (y >= 0).all() and (y > 0).any()


def test_the_function_takes_the_layers_arguments_in_order():
    layer = layer_separable_conv_1d(None, 3, 2, 2, "same", "channels_first", 1, 2, "relu", False)
    assert isinstance(layer, SeparableConv1D) and not layer.built
    config = layer.get_config()
    assert (config["filters"], config["kernel_size"], config["strides"]) == (3, (2,), (2,))
    assert (config["padding"], config["data_format"]) == ("same", "channels_first")
    assert (config["dilation_rate"], config["depth_multiplier"]) == ((1,), 2)
    assert (config["activation"], config["use_bias"]) == ("relu", False)


def test_the_function_adds_to_a_model():
    class Model:
        def __init__(self):
            self.layers = []

        def add(self, layer):
            self.layers.append(layer)

    model = Model()
    assert layer_separable_conv_1d(model, 3, 2, name="conv") is model
    assert [layer.name for layer in model.layers] == ["conv"]


class WithAdd(np.ndarray):
    def add(self, other):
        raise AssertionError("tensors have `add`, too; it adds numbers")


def test_the_function_applies_to_arrays_even_with_an_add_method():
    y = layer_separable_conv_1d(inputs().view(WithAdd), 3, 2, seed=1)
    np.testing.assert_array_equal(y, layer_separable_conv_1d(inputs().tolist(), 3, 2, seed=1))
    assert type(y) is np.ndarray and y.shape == (BATCH, STEPS - 1, 3)


def test_the_function_refuses_other_objects():
    with pytest.raises(TypeError, match=r"The `inputs` argument must be a NumPy array.*object"):
        layer_separable_conv_1d(object(), 3, 2)


# ---- building and weights -----------------------------------------------------------------------


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
def test_build_makes_keras_weights(data_format, use_bias):
    layer = SeparableConv1D(
        FILTERS, 3, depth_multiplier=2, data_format=data_format, use_bias=use_bias
    )
    assert not layer.built and layer.weights == [] and layer.get_weights() == []
    last = data_format == "channels_last"
    layer.build((None, None, CHANNELS) if last else (None, CHANNELS, None))
    shapes = {"depthwise_kernel": (3, CHANNELS, 2), "pointwise_kernel": (1, CHANNELS * 2, FILTERS)}
    shapes |= {"bias": (FILTERS,)} if use_bias else {}
    assert {v.name: v.shape for v in layer.weights} == shapes
    assert layer.built and (layer.bias is None) == (not use_bias)
    assert layer.count_params() == sum(int(np.prod(s)) for s in shapes.values())
    assert [w.shape for w in layer.get_weights()] == list(shapes.values())
    assert "built=True" in repr(layer) and layer.name in repr(layer)
    before = layer.get_weights()
    layer.build((None, None, CHANNELS) if last else (None, CHANNELS, None))
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_first_call_builds():
    layer = SeparableConv1D(FILTERS, 3, seed=7)
    assert layer(inputs()).shape == (BATCH, STEPS - 2, FILTERS)
    assert layer.built and layer.depthwise_kernel.shape == (3, CHANNELS, 1)
    assert layer.call(inputs()).shape == (BATCH, STEPS - 2, FILTERS)


def test_weights_are_copies_and_setting_them_counts():
    layer, x = layer_of(), inputs()
    first = layer(x)
    for weight in layer.get_weights():
        weight[:] = 0
    np.testing.assert_array_equal(layer(x), first)
    new = [normal(*w.shape, seed=i + 1) for i, w in enumerate(layer.get_weights())]
    layer.set_weights([new[0], new[1].astype(np.float64), new[2].tolist()])
    assert_right(layer, x, layer(x))
    assert np.abs(layer(x) - first).max() > 0.1
    for weight in new:
        weight[:] = 0  # the layer has copies
    assert np.abs(layer(x)).max() > 0.1


@pytest.mark.parametrize("name", ["depthwise_kernel", "pointwise_kernel", "bias"])
def test_assign(name):
    layer, x = layer_of(), inputs()
    first = layer(x)
    variable = getattr(layer, name)
    assert variable.assign(normal(*variable.shape, seed=3)) is variable
    np.testing.assert_array_equal(variable.numpy(), normal(*variable.shape, seed=3))
    assert variable.dtype == "float32" and name in repr(variable)
    assert_right(layer, x, layer(x))
    assert np.abs(layer(x) - first).max() > 1e-3


def test_a_variable_is_an_array_by_copy():
    variable = layer_of().bias
    array = np.asarray(variable)
    array[:] = 9
    assert not variable.numpy().any()
    assert np.asarray(variable, dtype="float64").dtype == np.float64
    with pytest.raises(ValueError, match="by copying its value"):
        variable.__array__(copy=False)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros(FILTERS + 1), ValueError, r"must match\. variable\.shape=\(6,\), Received: "
         r"value\.shape=\(7,\).*Target variable: <Variable bias"),
        (np.zeros(FILTERS, complex), TypeError, r"`bias` must have a floating-point or integer"),
        (["a"] * FILTERS, TypeError, r"dtype=<U1"),
        ([None] * FILTERS, TypeError, r"dtype=object"),
    ],
    ids=["shape", "complex", "text", "objects"],
)  # fmt: skip
def test_assign_refuses(value, error, message):
    layer = layer_of()
    before = layer.bias.numpy()
    with pytest.raises(error, match=message):
        layer.bias.assign(value)
    np.testing.assert_array_equal(layer.bias.numpy(), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w[:2], ValueError, "weight list of length 2, but the layer was expecting 3"),
        (lambda w: [w[0], w[1], w[2][:-1]], ValueError, r"weight `bias` has shape \(6,\), which is "
         r"not compatible with provided weight shape \(5,\)"),
        (lambda w: [w[0] + 1, w[1], w[2].astype(object)], TypeError, "dtype=object"),
        (lambda w: [w[0] + 1, w[1][0], w[2]], ValueError, "`pointwise_kernel` has shape"),
    ],
    ids=["too few", "bias shape", "objects", "kernel shape"],
)  # fmt: skip
def test_set_weights_replaces_all_or_none(change, error, message):
    layer = layer_of()
    before = layer.get_weights()
    with pytest.raises(error, match=message):
        layer.set_weights(change(layer.get_weights()))
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("what", ["count_params", "compile", "save", "set_weights"])
def test_what_needs_a_built_layer(what, tmp_path):
    layer = SeparableConv1D(3, 2, name="early")
    arguments = {"save": [tmp_path / "bundle"], "set_weights": [[]]}.get(what, [])
    with pytest.raises(ValueError, match=f"`{what}` on layer 'early', but the layer isn't built"):
        getattr(layer, what)(*arguments)
    with pytest.raises(ValueError, match="isn't built"):
        save({"early": layer}, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_losses_and_constraints():
    layer = layer_of(
        depthwise_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l1",
        pointwise_constraint="non_neg",
        depthwise_constraint="max_norm",
    )
    layer.bias.assign(np.arange(FILTERS))
    depthwise, pointwise, bias = layer.get_weights()
    weight_losses = [0.01 * np.sum(depthwise**2), 0.01 * np.sum(np.abs(bias))]
    np.testing.assert_allclose(layer.losses, weight_losses, rtol=1e-6)
    y = layer(inputs())
    activity = 0.01 * np.abs(y).sum() / BATCH
    np.testing.assert_allclose(layer.losses, [activity, *weight_losses], rtol=1e-6)
    layer(inputs()[:0])
    np.testing.assert_allclose(layer.losses, [0.0, *weight_losses], rtol=1e-6)
    layer.apply_constraints()
    np.testing.assert_array_equal(layer.pointwise_kernel.numpy(), np.maximum(pointwise, 0))
    assert_right(layer, inputs(), layer(inputs()))
    layer.trainable = False
    assert len(layer.losses) == 1 and layer.trainable_weights == []
    assert layer_of().losses == []


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", FORMATS)
def test_compute_output_shape(data_format):
    layer = SeparableConv1D(FILTERS, 3, 2, data_format=data_format, dilation_rate=2)

    def ordered(batch, steps, size):
        return (batch, steps, size) if data_format == "channels_last" else (batch, size, steps)

    for batch, steps, out in [(4, 10, 3), (None, 11, 4), (2, None, None), (None, None, None)]:
        shape = layer.compute_output_shape(ordered(batch, steps, CHANNELS))
        assert shape == ordered(batch, out, FILTERS)
    layer.build(ordered(None, None, CHANNELS))
    with pytest.raises(ValueError, match=r"expected axis -?1 of input shape to have value 5"):
        layer.compute_output_shape(ordered(4, 10, CHANNELS + 1))


def test_config_goes_through_json():
    layer = layer_of(
        activation="gelu", depth_multiplier=2, strides=2, padding="valid", name="conv",
        trainable=False, bias_regularizer="l2", pointwise_constraint="unit_norm",
    )  # fmt: skip
    config = json.loads(json.dumps(layer.get_config()))
    again = SeparableConv1D.from_config(config)
    assert again.get_config() == layer.get_config() and again.name == "conv"
    assert not again.built and again.trainable is False
    again.build((None, None, CHANNELS))
    for a, b in zip(again.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # the initializers' seeds are part of the config
    layer.trainable = True
    assert layer.get_config()["trainable"] is True


def test_a_padding_pair_has_no_keras_config():
    layer = layer_of(padding=(2, 0))
    assert_right(layer, inputs(), layer(inputs()))
    with pytest.raises(ValueError, match=r"`padding` argument is \(2, 0\).*ZeroPadding1D"):
        layer.get_config()


def test_unknown_keywords_are_named():
    with pytest.raises(ValueError, match=r"passed to SeparableConv1D: \{'stride': 2\}"):
        SeparableConv1D(3, 2, stride=2)
    with pytest.raises(ValueError, match=r"\{'dilatation': 1\}"):
        layer_separable_conv_1d(None, 3, 2, dilatation=1)


# ---- compiling ----------------------------------------------------------------------------------


def test_a_library_is_compiled_once_and_says_so(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "cache_root", lambda: tmp_path)  # where nobody has compiled it before
    x = inputs()
    with caplog.at_level(logging.WARNING, logger="tvm_sepconv"):
        first = layer_of(kernel_size=4, filters=5)
        first(x)
        first(x[:1])
        first.set_weights(first.get_weights())
        first(x)
        layer_of(kernel_size=4, filters=5, padding=(3, 0))(x)
    target = targets.runnable()[0]
    (message,) = (r.getMessage() for r in caplog.records if r.name == "tvm_sepconv")
    assert message.startswith(f"compiling 5→5 k4 for {target}, once: ")  # and where it is from


@pytest.mark.parametrize("target", targets.runnable())
def test_compile_for_a_target(target):
    layer = layer_of()
    layer.compile(BuildOptions(target=target))
    assert_right(layer, inputs(), layer(inputs()))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("x86_64-avx2" if targets.machine() == "aarch64" else "aarch64-neon", "machine can run"),
        ("x86_64-mmx", "target"),
    ],
    ids=["foreign", "unknown"],
)  # fmt: skip
def test_compile_for_a_target_that_does_not_fit(target, message):
    layer = layer_of()
    before = layer(inputs())
    with pytest.raises(ValueError, match=message):
        layer.compile(BuildOptions(target=target))
    np.testing.assert_array_equal(layer(inputs()), before)


def test_without_the_compiler_the_error_names_both_ways_out(monkeypatch, tmp_path):
    def find_spec(name, *rest, found=importlib.util.find_spec):
        return None if name == "tvm" else found(name, *rest)

    layer = layer_of()
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for attempt in (lambda: layer(inputs()), lambda: layer.save(tmp_path / "b")):
        with pytest.raises(RuntimeError, match=r"tvm-sepconv\[compiler\].*tvm_sepconv.load"):
            attempt()


def test_threads_may_share_a_layer_and_change_its_weights():
    layer, failures = layer_of(), []
    xs = [inputs(steps=steps) for steps in (1, 7, 40, 300)]
    right = [layer(x) for x in xs]
    weights = layer.get_weights()

    def work(number):
        try:
            for i in range(50):
                if number == 0:
                    layer.set_weights(weights)
                k = (number + i) % len(xs)
                np.testing.assert_array_equal(layer(xs[k]), right[k])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_training_makes_no_difference():
    layer = layer_of()
    np.testing.assert_array_equal(layer(inputs(), training=True), layer(inputs()))


def test_variables_need_no_layer():
    changes = []
    variable = Variable("v", np.zeros(2, np.float32), lambda: changes.append(1))
    variable.assign([1, 2])
    assert changes == [1] and variable.numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "target", ["sm_80", "x86_64-avx2@", "aarch64-neon@", "x86_64-avx2@cortex-a53"]
)
def test_targets_that_there_are_not(target):
    with pytest.raises(ValueError, match="The `target` argument must be one of"):
        targets.resolve(target)
