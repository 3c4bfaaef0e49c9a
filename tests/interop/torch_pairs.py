"""Pairs of convolutions for the tests of `from_torch`, and what is right for them."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from tvm_sepconv.interop import torch as interop

CHANNELS, FILTERS, STEPS = 5, 7, 41


def norm(channels: int, **options) -> nn.BatchNorm1d:
    """A normalisation that has seen data."""
    made = nn.BatchNorm1d(channels, **options)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made


def pair(
    kernel=3, stride=1, dilation=1, multiplier=1, bias=(True, True), norms="", padding=0,
    activation=None, channels=CHANNELS,
) -> nn.Sequential:  # fmt: skip
    torch.manual_seed(3)
    middle = channels * multiplier
    modules = [
        nn.Conv1d(channels, middle, kernel, stride, padding, dilation, channels, bias[0]),
        *([norm(middle)] if "between" in norms else []),
        nn.Conv1d(middle, FILTERS, 1, bias=bias[1]),
        *([norm(FILTERS)] if "after" in norms else []),
        *([activation] if activation else []),
    ]
    return nn.Sequential(*modules).eval()


class Block(nn.Module):
    """A depthwise and a pointwise convolution in a forward of its own."""

    def __init__(self, between=None, after=None, **options):
        super().__init__()
        self.depthwise, self.pointwise = pair(padding=1, **options)[:2]
        self.between, self.after = between, after
        self.norm, self.relu = norm(FILTERS), nn.ReLU()

    def forward(self, x):
        y = self.depthwise(x)
        if self.between is not None:
            y = self.between(y)
        y = self.norm(self.pointwise(y))
        return self.relu(y) if self.after is None else self.after(y, self.relu)


class Untraceable(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def normal(*shape: int, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).to(dtype)


def assert_same(model, original, x, tolerance: float = 1e-5):
    """Compare with `original`, which is computed in float64."""
    with torch.no_grad():
        y, right = model(x), copy.deepcopy(original).double()(x.double())
    assert y.dtype == x.dtype and y.shape == right.shape
    torch.testing.assert_close(y.double(), right, rtol=tolerance, atol=tolerance)


def replaced(model):
    """Return the original, the report and the changed model."""
    original = copy.deepcopy(model)
    return original, interop.from_torch(model)
