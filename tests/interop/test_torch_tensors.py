"""PyTorch's tensors as a layer's inputs and outputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from layers import BATCH, CHANNELS, FILTERS, STEPS, assert_right, inputs, layer_of, normal

SHAPE = (BATCH, STEPS, FILTERS)


def negated():
    """A view that torch negates when it reads it; DLPack exports the memory below it."""
    x = torch.from_numpy(inputs())
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "first call"])
def test_views_with_the_negative_bit_are_resolved(compiled):
    layer, x = layer_of(), negated()
    if compiled:
        layer(inputs())
    y = layer(x)
    assert type(y) is torch.Tensor and torch.equal(x, negated())
    assert_right(layer, inputs(), y)
    out = torch.empty(SHAPE)
    assert layer(x, out=out) is out and torch.equal(out, y)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "first call"])
def test_views_with_the_negative_bit_are_no_outputs(compiled):
    layer = layer_of()
    if compiled:
        layer(inputs())
    out = torch.zeros(SHAPE, dtype=torch.complex64).conj().imag
    for x in (inputs(), torch.from_numpy(inputs())):
        with pytest.raises(ValueError, match=r"`out` argument must be plain memory.*`is_neg\(\)`"):
            layer(x, out=out)
    assert not out.any()


def test_complex_views_are_refused():
    x = torch.zeros(BATCH, STEPS, CHANNELS, dtype=torch.complex64)
    for given in (x, x.conj()):
        with pytest.raises(TypeError, match=r"inputs\.dtype=complex64"):
            layer_of()(given)


# What a layer of each dtype gives, and how far that may be from what is right.
OF_LAYERS = {
    "float32": (torch.float32, 1e-5),
    "float64": (torch.float64, 1e-12),
    "float16": (torch.float16, 4e-3),
    "bfloat16": (torch.bfloat16, 3e-2),
    "mixed_bfloat16": (torch.bfloat16, 3e-2),
}


@pytest.mark.parametrize("dtype", OF_LAYERS)
@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "gradients"])
def test_tensors_come_back_as_tensors(gradients, dtype):
    """Of the layer's dtype, whatever theirs is."""
    layer, (wanted, tolerance) = layer_of(dtype=dtype), OF_LAYERS[dtype]
    for given in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.from_numpy(inputs()).to(given).requires_grad_(gradients)
        rounded = x.detach().to(wanted).double().numpy()
        for _ in range(2):
            y = layer(x)
            assert type(y) is torch.Tensor and y.dtype == wanted and not y.requires_grad
            assert_right(layer, rounded, y.double(), tolerance)
        out = torch.empty(SHAPE, dtype=wanted)
        assert layer(x, out=out) is out and torch.equal(out, y)
        assert layer(x[:0]).shape == (0, STEPS, FILTERS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int16], ids=str)
@pytest.mark.parametrize("layers", ["float32", "bfloat16"])
def test_numbers_that_are_no_floats_are_refused(layers, dtype):
    with pytest.raises(TypeError, match=r"floating-point dtype.*inputs\.dtype=(int|bool)"):
        layer_of(dtype=layers)(torch.ones(BATCH, STEPS, CHANNELS, dtype=dtype))


def test_bfloat16_of_any_layout_and_without_its_package(monkeypatch):
    layer, x = layer_of(), torch.from_numpy(inputs()).bfloat16()
    wide = x.repeat_interleave(2, dim=2)[..., ::2]
    assert torch.equal(layer(wide), layer(x)) and torch.equal(layer(x[::2]), layer(x)[::2])
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        layer(x)


def test_outputs_are_written_in_place(monkeypatch):
    layer, x = layer_of(), torch.from_numpy(inputs())
    y = layer(x)
    monkeypatch.setattr(layer, "_call_any", None)
    out = torch.empty(SHAPE)
    assert layer(x, out=out) is out and torch.equal(out, y)
    assert torch.equal(layer(x), y)
    assert np.array_equal(layer(normal(BATCH, STEPS, CHANNELS), out=np.empty(SHAPE, "f4")), y)
