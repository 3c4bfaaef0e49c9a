"""`from_torch` on blocks as NeMo builds them: QuartzNet, Citrinet, MatchboxNet.

What matters of NeMo's own: its encoder gives *one* activation to all blocks, arguments of
convolutions are lists, a block is called with lists of tensors and lengths, convolutions that mask
keep a range of steps as long as the longest batch so far, and a block may end in squeeze-and-excite
and add, or take the larger of, the branches.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from torch import nn
from torch_pairs import CHANNELS, STEPS, norm, normal, replaced

from tvm_sepconv.interop import torch as interop


def mask(steps, lens):
    return steps[None, None] < lens[:, None, None]


class MaskedConv1d(nn.Module):
    """A convolution that sets steps beyond each sample's length to zero before."""

    def __init__(
        self, inputs, outputs, kernel, stride=(1,), dilation=(1,), padding=0, groups=1, heads=-1
    ):
        super().__init__()
        self.heads, self.real_out_channels, self.use_mask = heads, outputs, True
        if heads != -1:
            inputs = outputs = groups = heads
        self._padding, self.pad_layer = padding, None
        if isinstance(padding, tuple):
            self.pad_layer, padding = nn.ConstantPad1d(padding, value=0.0), 0
        self.conv = nn.Conv1d(
            inputs, outputs, kernel, stride, padding, dilation, groups=groups, bias=False
        )
        self.max_len = self.lens = torch.tensor(0)

    def get_seq_len(self, lens):
        conv, pads = self.conv, 2 * self.conv.padding[0]
        pads = pads if self.pad_layer is None else sum(self._padding)
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
        return torch.div(lens + pads - reach, conv.stride[0], rounding_mode="trunc") + 1

    def forward(self, x, lens):
        if self.use_mask:
            if x.size(2) > self.max_len:
                self.lens, self.max_len = torch.arange(x.size(2)), torch.tensor(x.size(2))
            x = x * mask(self.lens[: x.size(2)], lens)
        lens = self.get_seq_len(lens)
        x = x if self.pad_layer is None else self.pad_layer(x)
        if self.heads == -1:
            return self.conv(x), lens
        out = self.conv(x.view(-1, self.heads, x.size(2)))
        return out.view(x.size(0), self.real_out_channels, -1), lens


class SqueezeExcite(nn.Module):
    """Scales the channels by what their means say, over the steps within each length."""

    def __init__(self, channels, activation):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, 2, bias=False), activation, nn.Linear(2, channels, bias=False)
        )
        self.gap = nn.AdaptiveAvgPool1d(1)

    def forward(self, x, lens):
        inside = mask(torch.arange(x.size(2)), lens)
        x = x.masked_fill(~inside, 0.0)
        means = x.sum(-1) / inside.sum(-1)
        return x * torch.sigmoid(self.fc(means))[..., None], lens


class JasperBlock(nn.Module):
    """`mconv`, a residual branch, and `mout` after their sum."""

    def __init__(
        self, inputs, outputs, activation, repeat=2, kernel=5, stride=1, dilation=1, heads=-1,
        conv_mask=True, future_context=-1, se=False, residual=True, residual_mode="add",
    ):  # fmt: skip
        super().__init__()
        self.residual_mode, self.conv_mask = residual_mode, conv_mask
        padding = dilation * (kernel - 1) // 2
        if future_context >= 0:
            padding = (kernel - 1 - future_context, future_context)
        self.mconv, channels = nn.ModuleList(), inputs
        for i in range(repeat):
            strides = [stride if i == repeat - 1 else 1]  # NeMo's `stride_last`
            options = {"stride": strides, "dilation": [dilation], "padding": padding}
            self.mconv.append(
                self.conv(channels, channels, [kernel], groups=channels, heads=heads, **options)
            )
            self.mconv.extend([self.conv(channels, outputs, 1), norm(outputs, eps=1e-3)])
            if i < repeat - 1:
                self.mconv.extend([activation, nn.Dropout(0.1)])
            channels = outputs
        if se:
            self.mconv.append(SqueezeExcite(outputs, activation))
        branch = [self.conv(inputs, outputs, 1, stride=strides), norm(outputs, eps=1e-3)]
        self.res = nn.ModuleList([nn.ModuleList(branch)]) if residual else None
        self.mout = nn.Sequential(activation, nn.Dropout(0.1))

    def conv(self, inputs, outputs, kernel, heads=-1, **options):
        if self.conv_mask:
            return MaskedConv1d(inputs, outputs, kernel, heads=heads, **options)
        return nn.Conv1d(inputs, outputs, kernel, bias=False, **options)

    def through(self, modules, x, lens):
        for module in modules:
            if isinstance(module, (MaskedConv1d, SqueezeExcite)):
                x, lens = module(x, lens)
            else:
                x = module(x)
        return x, lens

    def forward(self, input_):
        xs, before = input_ if len(input_) == 2 else (input_[0], None)
        out, lens = self.through(self.mconv, xs[-1], before)
        for branch in self.res or ():
            other, _ = self.through(branch, xs[-1], before)
            out = torch.max(out, other) if self.residual_mode == "max" else out + other
        return [self.mout(out)], lens


class Encoder(nn.Module):
    def __init__(self, activation=None, **options):
        super().__init__()
        torch.manual_seed(2)
        activation = activation or nn.ReLU(inplace=True)
        self.encoder = nn.Sequential(
            # As wide as each other, to have few kernels to compile.
            JasperBlock(CHANNELS, CHANNELS, activation, 1, **{**options, "residual": False}),
            JasperBlock(CHANNELS, CHANNELS, activation, **options),
        )
        self.max_audio_length = 0

    def forward(self, audio_signal, length):
        if audio_signal.size(2) > self.max_audio_length:
            self.max_audio_length = audio_signal.size(2)
        outputs, length = self.encoder(([audio_signal], length))
        return outputs[-1], length


def without_mask(model):
    """As NeMo does for its export."""
    for module in model.modules():
        if isinstance(module, MaskedConv1d):
            module.use_mask = False
    return model


def assert_same_everywhere(model, original):
    with torch.no_grad():
        for steps, shorter in ((STEPS, 30), (STEPS + 9, 8)):
            x, lens = normal(2, CHANNELS, steps), torch.tensor([steps, shorter])
            y, right = model(x, lens), original.double()(x.double(), lens)
            torch.testing.assert_close(y[0].double(), right[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(y[1], right[1])


LAYOUTS = {
    "QuartzNet": {},
    "strided": {"stride": 2, "residual_mode": "stride_add"},
    "the larger": {"residual_mode": "max"},
    "Citrinet": {"se": True},
    "causal": {"future_context": 0, "residual": False},
    "some future": {"future_context": 1, "se": True},
}


@pytest.mark.parametrize("masks", ["masked", "mask off", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nemo_blocks(layout, masks):
    if masks == "plain" and "future_context" in LAYOUTS[layout]:
        pytest.skip("a plain Conv1d has no causal padding, in NeMo neither")
    model = Encoder(conv_mask=masks != "plain", **LAYOUTS[layout]).eval()
    original, report = replaced(without_mask(model) if masks == "mask off" else model)
    own = "" if masks == "plain" else ".conv"
    names = [f"encoder.{place}{own}" for place in ("0.mconv.0", "1.mconv.0", "1.mconv.5")]
    assert [one.name for one in report.replaced] == names and not report.refused
    folded, last = (one.folded for one in report.replaced[1:])
    if masks == "masked":  # exact beyond the lengths too
        assert folded == ("encoder.1.mconv.1.conv",)
        assert "encoder.1.mconv.2 (BatchNorm1d), since a mask lies before it" in str(report)
    else:  # the activation too, though it is the same module everywhere
        assert folded == (f"encoder.1.mconv.1{own}", "encoder.1.mconv.2", "encoder.1.mconv.3")
        assert last == (f"encoder.1.mconv.6{own}", "encoder.1.mconv.7")
    assert_same_everywhere(model, original)


class Swish(nn.SiLU):
    """NeMo's name of it."""


class Louder(nn.SiLU):
    """Another function."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("activation", "fused"),
    [(Swish(), "silu"), (nn.SELU(), "selu"), (nn.Hardtanh(0.0, 20.0), None), (Louder(), None)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_activations_of_nemo(activation, fused):
    """None is applied twice, or lost."""
    model = without_mask(Encoder(activation).eval())
    original, report = replaced(model)
    assert report.replaced[1].module.activation == (fused or "linear")
    assert (type(model.encoder[1].mconv[3]) is interop.Folded) == (fused is not None)
    for place in (model.encoder[0].mout, model.encoder[1].mout):
        assert place[0] is activation  # after the branches' sum, where nothing is folded
    assert_same_everywhere(model, original)


def test_nemo_blocks_that_are_left():
    model = Encoder().eval()
    model.encoder[0].mconv[1].conv.bias = nn.Parameter(torch.ones(CHANNELS))
    model.encoder[1].mconv[0] = MaskedConv1d(
        CHANNELS, CHANNELS, 5, padding=2, groups=CHANNELS, heads=1
    )
    original, report = replaced(model.eval())
    assert [one.name for one in report.replaced] == ["encoder.1.mconv.5.conv"]
    assert "masks its input and has a bias" in report.refused["encoder.0.mconv.0.conv"]
    assert_same_everywhere(model, original)


def test_zeros_between_the_convolutions_are_as_good_as_a_mask():
    model = without_mask(Encoder().eval())
    model.encoder[0].mconv[1].pad_layer = nn.ConstantPad1d((2, 1), 0.0)
    model.encoder[0].mconv[1]._padding = (2, 1)
    original, report = replaced(model)
    assert report.replaced[0].folded == ("encoder.0.mconv.1.conv",)
    assert_same_everywhere(model, original)
