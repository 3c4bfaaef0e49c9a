"""Copies of a layer: of the object, through pickle and through bundles."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

pytest.importorskip("tvm")

from layers import BATCH, FILTERS, FORMATS, STEPS, inputs, layer_of

from tvm_sepconv import BuildOptions, SeparableConv1D, load, targets

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_layers_of_their_own(way):
    layer = layer_of(activation="relu")
    y = layer(inputs())
    layer.trainable = False
    other = COPIES[way](layer)
    np.testing.assert_array_equal(other(inputs()), y)
    assert other.trainable is False and other.get_config() == layer.get_config()
    other.bias.assign(np.full(FILTERS, 100))
    np.testing.assert_array_equal(layer(inputs()), y)
    assert (other(inputs()) > 50).all()
    unbuilt = COPIES[way](SeparableConv1D(FILTERS, 3, seed=1))
    assert not unbuilt.built and unbuilt(inputs()).shape == (BATCH, STEPS - 2, FILTERS)


def test_a_copy_keeps_its_target():
    layer = layer_of()
    layer.compile(BuildOptions(target=targets.runnable()[-1]))
    other = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(other(inputs()), layer(inputs()))
    assert other._options == layer._options


def test_a_pickle_outlives_its_library(tmp_path, monkeypatch):
    layer = layer_of()
    layer.save(tmp_path / "bundle", [targets.runnable()[0]])
    loaded = load(tmp_path / "bundle")
    y, pickled = loaded(inputs()), pickle.dumps(loaded)
    (tmp_path / "bundle").rename(tmp_path / "moved")
    np.testing.assert_array_equal(pickle.loads(pickled)(inputs()), y)


def test_a_pickle_does_not_trust_a_bundle_saved_anew(tmp_path):
    layer = layer_of()
    layer.save(tmp_path / "bundle", [targets.runnable()[0]])
    loaded = load(tmp_path / "bundle")
    y, pickled = loaded(inputs()), pickle.dumps(loaded)
    other = SeparableConv1D(5, 3, name=layer.name)
    other.build((None, None, 7))
    other.save(tmp_path / "bundle", [targets.runnable()[0]])
    again = pickle.loads(pickled)
    assert again._origin is None
    np.testing.assert_array_equal(again(inputs()), y)


def test_a_bundle_keeps_trainable(tmp_path):
    layer = layer_of()
    layer.trainable = False
    layer.save(tmp_path / "bundle", [targets.runnable()[0]])
    assert not load(tmp_path / "bundle").trainable


@pytest.mark.parametrize("data_format", FORMATS)
def test_save_and_load(data_format, tmp_path):
    first = data_format == "channels_first"  # where glu halves the steps
    activation = "glu" if first else "relu"
    layer = layer_of(data_format, use_bias=first, strides=2, padding="valid", activation=activation)
    layer.save(tmp_path / "bundle", [targets.runnable()[0]])
    again = load(tmp_path / "bundle")
    x = inputs(data_format, steps=10)
    np.testing.assert_array_equal(again(x), layer(x))
    for a, b in zip(again.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    again.weights[0].assign(again.weights[0].numpy() * 0)
    other = copy.copy(again)
    assert not again(x).any() and not other(x).any()
