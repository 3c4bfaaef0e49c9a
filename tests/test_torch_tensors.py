"""PyTorch's tensors as a layer's inputs and outputs."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "gradients"])
def test_tensors_come_back_as_tensors(gradients, dtype):
    layer = layer_of()
    x = torch.from_numpy(inputs()).to(dtype).requires_grad_(gradients)
    for _ in range(2):
        y = layer(x)
        assert type(y) is torch.Tensor and y.dtype == torch.float32 and not y.requires_grad
        assert_right(layer, x.detach().numpy(), y, tolerance=1e-5)
    assert layer(x[:0]).shape == (0, STEPS, FILTERS)


def test_outputs_are_written_in_place(monkeypatch):
    layer, x = layer_of(), torch.from_numpy(inputs())
    y = layer(x)
    monkeypatch.setattr(layer, "_call_any", None)
    out = torch.empty(SHAPE)
    assert layer(x, out=out) is out and torch.equal(out, y)
    assert torch.equal(layer(x), y)
    assert np.array_equal(layer(normal(BATCH, STEPS, CHANNELS), out=np.empty(SHAPE, "f4")), y)
