"""`from_torch` on blocks as NeMo writes them: QuartzNet, Citrinet, MatchboxNet."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from torch import nn
from torch_pairs import CHANNELS, FILTERS, STEPS, norm, normal, replaced

from tvm_sepconv.interop import torch as interop


class MaskedConv1d(nn.Module):
    """A convolution that sets steps beyond each sample's length to zero before."""

    def __init__(
        self, inputs, outputs, kernel, stride=1, padding=0, groups=1, bias=False, heads=-1
    ):
        super().__init__()
        self.heads, self.use_mask, self.pad_layer = heads, True, None
        if isinstance(padding, tuple):
            self.pad_layer, padding = nn.ConstantPad1d(padding, 0.0), 0
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)

    def get_seq_len(self, lens):
        conv = self.conv
        pads = self.pad_layer.padding if self.pad_layer else (conv.padding[0], conv.padding[0])
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
        return torch.div(lens + sum(pads) - reach, conv.stride[0], rounding_mode="trunc") + 1

    def forward(self, x, lens):
        if self.use_mask:
            if x.size(2) < int(lens.max()):
                raise ValueError("lens")
            x = x.masked_fill(torch.arange(x.size(2))[None, None] >= lens[:, None, None], 0)
        lens = self.get_seq_len(lens)
        return self.conv(x if self.pad_layer is None else self.pad_layer(x)), lens


class JasperBlock(nn.Module):
    """The layout of a QuartzNet block: `mconv`, a residual branch, `mout`."""

    def __init__(self, inputs, outputs, repeat=2, kernel=5, masked=True, **options):
        super().__init__()
        make = MaskedConv1d if masked else nn.Conv1d
        padding = options.pop("padding", kernel // 2)
        self.mconv, channels = nn.ModuleList(), inputs
        for i in range(repeat):
            depthwise = make(
                channels, channels, kernel, padding=padding, groups=channels, **options
            )
            self.mconv.extend([depthwise, make(channels, outputs, 1, bias=False), norm(outputs)])
            if i < repeat - 1:
                self.mconv.extend([nn.ReLU(), nn.Dropout(0.1)])
            channels = outputs
        self.res = nn.ModuleList([nn.ModuleList([make(inputs, outputs, 1, bias=False)])])
        self.mout = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))

    def forward(self, input_):
        xs, lens = input_[0], input_[1] if len(input_) == 2 else None
        out, res, res_lens = xs[-1], xs[-1], lens
        for module in self.mconv:
            if isinstance(module, MaskedConv1d):
                out, lens = module(out, lens)
            else:
                out = module(out)
        for module in self.res[0]:
            res = module(res, res_lens)[0] if isinstance(module, MaskedConv1d) else module(res)
        return [self.mout(out + res)], lens


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(2)
        self.encoder = nn.Sequential(
            JasperBlock(CHANNELS, FILTERS, 1, **options), JasperBlock(FILTERS, FILTERS, **options)
        )

    def forward(self, x, lens):
        outputs, lens = self.encoder(([x], lens))
        return outputs[-1], lens


def assert_same_everywhere(model, original):
    x, lens = normal(2, CHANNELS, STEPS), torch.tensor([STEPS, 30])
    with torch.no_grad():
        y, right = model(x, lens), original.double()(x.double(), lens)
    torch.testing.assert_close(y[0].double(), right[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(y[1], right[1])


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        ("masked", "symmetric"),
        ("masked", "causal"),
        ("mask off", "symmetric"),
        ("mask off", "causal"),
        ("plain", "symmetric"),  # a plain Conv1d has no causal padding
    ],
)
def test_nemo_blocks(kind, padding):
    options = {"padding": (4, 0)} if padding == "causal" else {}
    model = Encoder(masked=kind != "plain", **options).eval()
    for module in model.modules():
        if isinstance(module, MaskedConv1d):
            module.use_mask = kind == "masked"
    original, report = replaced(model)
    own = "" if kind == "plain" else ".conv"
    names = [f"encoder.{place}{own}" for place in ("0.mconv.0", "1.mconv.0", "1.mconv.5")]
    assert [one.name for one in report.replaced] == names and not report.refused
    if kind == "masked":  # exact beyond the lengths too
        assert report.replaced[1].folded == ("encoder.1.mconv.1.conv",)
        assert "encoder.1.mconv.2 (BatchNorm1d), since a mask lies before it" in str(report)
    else:
        folded = (f"encoder.1.mconv.1{own}", "encoder.1.mconv.2", "encoder.1.mconv.3")
        assert report.replaced[1].folded == folded
    assert_same_everywhere(model, original)


def test_nemo_blocks_that_are_left():
    model = Encoder().eval()
    model.encoder[0].mconv[1].conv.bias = nn.Parameter(torch.ones(FILTERS))
    model.encoder[1].mconv[0].heads = FILTERS
    report = interop.from_torch(model)
    assert [one.name for one in report.replaced] == ["encoder.1.mconv.5.conv"]
    assert "masks its input and has a bias" in report.refused["encoder.0.mconv.0.conv"]
    assert "cannot trace encoder.1" in report.refused["encoder.1.mconv.0.conv"]
