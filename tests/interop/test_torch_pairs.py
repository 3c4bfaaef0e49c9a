"""`from_torch` on pairs of convolutions: the same outputs as torch's own modules in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from torch import nn
from torch_pairs import CHANNELS, FILTERS, STEPS, assert_same, norm, normal, pair, replaced

from tvm_sepconv import reference
from tvm_sepconv.interop import torch as interop

pytestmark = pytest.mark.filterwarnings(
    # PyTorch's own words on its padding="same" for even kernels.
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)


TABLE = {
    "kernel 1": {"kernel": 1},
    "kernel 3": {},
    "kernel 33": {"kernel": 33, "padding": 16},
    "stride 2": {"stride": 2, "padding": 1},
    "kernel 33, stride 2": {"kernel": 33, "stride": 2, "padding": 16},
    "dilation 3": {"dilation": 3, "padding": 3},
    "stride 2, dilation 2": {"stride": 2, "dilation": 2, "padding": 2},
    "multiplier 2": {"multiplier": 2, "padding": 1},
    "multiplier 3, stride 2": {"multiplier": 3, "stride": 2, "padding": 2},
    "no bias": {"bias": (False, False)},
    "depthwise bias": {"bias": (True, False), "padding": 1},
    "pointwise bias": {"bias": (False, True), "padding": 1},
    "norm between": {"norms": "between", "padding": 1},
    "norm between, no bias": {"norms": "between", "padding": 1, "bias": (False, False)},
    "norm after": {"norms": "after", "padding": 1, "bias": (False, False)},
    "norms between and after": {"norms": "between after", "padding": 1, "multiplier": 2},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel": 4},
    "same, even kernel, dilation 3": {"padding": "same", "kernel": 4, "dilation": 3},
    "valid": {"padding": "valid"},
    "wide padding": {"padding": 7},
    "one channel": {"channels": 1, "multiplier": 4, "padding": 1},
    "sixteen channels": {"channels": 16, "padding": 1, "norms": "after"},
}


@pytest.mark.parametrize("name", TABLE)
def test_outputs_are_those_of_torch(name):
    original, report = replaced(model := pair(**TABLE[name]))
    (one,) = report.replaced
    assert one.name == "0" and model[0] is one.module and report.refused == {}
    assert all(type(module) is interop.Folded for module in model[1:])
    for batch, steps in ((1, STEPS), (3, 66)):
        channels = original[0].in_channels
        assert_same(model, original, normal(batch, channels, steps))


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.CELU(), nn.SELU(),
        nn.GELU(), nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid(),
        nn.Hardswish(), nn.Tanh(), nn.Hardtanh(), nn.Tanhshrink(), nn.Softsign(), nn.Softshrink(),
        nn.Hardshrink(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_activations_are_part_of_the_layer(activation):
    model = pair(padding=1, norms="after", activation=activation)
    original, report = replaced(model)
    assert report.replaced[0].folded == ("1", "2", "3")
    # Every function, at values around and far from its corners, against torch's own.
    z = torch.linspace(-8, 8, 513, dtype=torch.float64)
    of_keras = report.replaced[0].module.as_layer().config.activation(z.numpy())
    np.testing.assert_allclose(of_keras, copy.deepcopy(activation)(z.clone()), rtol=1e-7, atol=1e-7)
    if type(activation) in (nn.ReLU, nn.SiLU):
        assert_same(model, original, normal(2, CHANNELS, STEPS))


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(), nn.ELU(0.5), nn.GELU("tanh"), nn.Hardtanh(-2, 2), nn.Softmax(1), nn.PReLU()],
    ids=repr,
)
def test_other_activations_stay(activation):
    original, report = replaced(model := pair(padding=1, activation=activation))
    assert model[2] is activation and report.replaced[0].folded == ("1",)
    assert type(activation).__name__ in report.replaced[0].kept
    assert_same(model, original, normal(2, CHANNELS, STEPS))


def test_dropout_and_identity_are_passed_by():
    model = pair(norms="between after", activation=nn.ReLU())
    model.insert(1, nn.Dropout(0.4))
    model.insert(4, nn.Identity())
    model.append(nn.Dropout(0.5))
    original, report = replaced(model.eval())
    assert report.replaced[0].folded == ("2", "3", "5", "6")
    assert type(model[1]) is nn.Dropout
    assert_same(model, original, normal(1, CHANNELS, STEPS))


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.1}, {"momentum": None}], ids=str)
def test_kinds_of_normalisations(options):
    model = pair(padding=1)
    model.append(norm(FILTERS, **options))
    original, report = replaced(model.eval())
    assert report.replaced[0].folded == ("1", "2")
    assert_same(model, original, normal(1, CHANNELS, STEPS))


def test_random_pairs_against_torch():
    """Any combination in one go, in float64, where nothing hides."""
    rng = np.random.default_rng(5)
    for _ in range(3):
        kernel, dilation, stride = (int(rng.integers(1, high)) for high in (6, 3, 3))
        padding = "same" if stride == 1 and rng.random() < 0.5 else int(rng.integers(0, 4))
        norms = " ".join(place for place in ("between", "after") if rng.random() < 0.5)
        bias = (bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        multiplier = int(rng.integers(1, 3))
        model = pair(kernel, stride, dilation, multiplier, bias, norms, padding).double()
        original, _ = replaced(model)
        assert_same(model, original, normal(2, CHANNELS, 30, dtype=torch.float64), 1e-12)


def test_the_layer_in_keras_words():
    original, report = replaced(pair(4, norms="after", padding="same", multiplier=2))
    layer = report.replaced[0].module.as_layer("block.conv")
    assert layer.name == "block.conv" and layer.get_config()["padding"] == "same"
    assert (layer.config.depth_multiplier, layer.config.data_format) == (2, "channels_first")
    x = normal(1, CHANNELS, STEPS)
    right = reference.separable_conv1d(x.numpy(), *layer.get_weights(), layer.config)
    with torch.no_grad():
        np.testing.assert_allclose(right, original(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(dtype):
    model = pair(padding=1, norms="after").to(dtype)
    original, report = replaced(model)
    assert report.replaced[0].module.depthwise_weight.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float64: 1e-12}[dtype]
    assert_same(model, original, normal(1, CHANNELS, STEPS, dtype=dtype), tolerance)


LAYOUTS = {
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other step": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "inside": lambda x: nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every other sample": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "unbatched": lambda x: x[0],
    "empty": lambda x: x[:0],
    "inference": lambda x: torch.inference_mode()(x.clone)(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout):
    original, _ = replaced(model := pair(padding=1))
    x = LAYOUTS[layout](normal(3, CHANNELS, STEPS))
    assert layout != "negated" or x.is_neg()
    assert_same(model, original, x)


def test_contiguous_inputs_are_not_copied(monkeypatch):
    model = pair(padding=1)
    interop.from_torch(model)
    x = nn.functional.pad(normal(3, CHANNELS, STEPS), (3, 2))[..., 3:-2]
    with torch.no_grad():
        y = model(x)
        monkeypatch.setattr(torch.Tensor, "contiguous", None)
        assert torch.equal(model(x), y)
