"""`from_torch` on models: what it leaves as it is, and why."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from torch import nn
from torch_pairs import (
    CHANNELS,
    FILTERS,
    STEPS,
    Block,
    Untraceable,
    assert_same,
    norm,
    normal,
    pair,
    replaced,
)

from tvm_sepconv.interop import torch as interop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]


def edited(place: int, **attributes):
    model = pair(padding=1, norms="after")
    for name, value in attributes.items():
        setattr(model[place], name, value)
    return model


def inserted(place: int, module: nn.Module, **options):
    model = pair(padding=1, **options)
    model.insert(place, module)
    return model


def parametrized(place: int):
    model = pair(padding=1)
    nn.utils.parametrizations.weight_norm(model[place])
    return model


def weight_normed():
    model = pair(padding=1)
    nn.utils.weight_norm(model[0])
    return model


def hooked(place: int):
    model = pair(padding=1)
    model[place].register_forward_hook(lambda module, inputs, output: output)
    return model


class Optional(Block):
    """What lies between its convolutions depends on an argument."""

    def forward(self, x, gain=None):
        y = self.depthwise(x)
        return self.pointwise(torch.relu(y) if gain is None else y)


class Doubled(nn.Module):
    """Uses a module in a second way."""

    def __init__(self, use):
        super().__init__()
        self.first, self.second = pair(padding=1)
        self.use = use

    def forward(self, x):
        return self.use(self, self.first(x), x)


class Own(nn.Conv1d):
    """A convolution with more to it."""


def own():
    model = pair(padding=1)
    model[0] = Own(CHANNELS, CHANNELS, 3, groups=CHANNELS)
    return model


def shared():
    model = pair(padding=1)
    return nn.ModuleDict({"one": model, "two": nn.Sequential(model[0])})


def batch_statistics():
    return inserted(1, nn.BatchNorm1d(CHANNELS, track_running_stats=False))


def training_norm():
    model = pair(padding=1, norms="between").eval()
    model[1].train()
    return model


LEFT = {
    "nothing after": (lambda: pair()[:1], "0: no Conv1d.* follows, but the output"),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, groups=2), nn.Conv1d(6, 4, 1)),
        "0: it is grouped but not depthwise: groups=2, in_channels=6",
    ),
    "2-D": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (1, 3), groups=4), nn.Conv2d(4, 2, 1)),
        "0: it is a Conv2d; only Conv1d is replaced",
    ),
    "reflect": (lambda: edited(0, padding_mode="reflect"), "0: it has padding_mode='reflect'"),
    "wide": (lambda: edited(1, kernel_size=(3,)), r"1 follows, which is not pointwise: kernel_s"),
    "strided": (lambda: edited(1, stride=(2,)), r"1 follows, which is not pointwise.*stride=\(2"),
    "padded": (lambda: edited(1, padding=(1,)), r"1 follows, which is not pointwise.*ing=\(1"),
    "grouped after": (lambda: edited(1, groups=5), "1 follows, which is not pointwise.*groups=5"),
    "parametrized": (
        lambda: parametrized(0),
        r"0: it is parametrized: torch.nn.utils.parametrize.remove_parametrizations\(conv, ",
    ),
    "parametrized pointwise": (lambda: parametrized(1), "1 is parametrized"),
    "weight norm": (weight_normed, r"0: it is weight-normed: torch.nn.utils.remove_weight_norm"),
    "hooks": (lambda: hooked(1), "1 cannot be replaced: it has hooks"),
    "another class": (own, "0: it is of the class Own, not a plain Conv1d"),
    "shared": (shared, "it is registered more than once, as one.0, two.0"),
    "activation": (
        lambda: inserted(1, nn.ReLU()),
        r"1 \(ReLU\) is an activation between the two convolutions",
    ),
    "another norm": (lambda: inserted(1, nn.GroupNorm(1, 5)), "1 lies between.*a GroupNorm"),
    "batch statistics": (batch_statistics, "1 lies between.*statistics from each batch"),
    "training norm": (training_norm, "1 lies between.*statistics from each batch"),
    "dtypes": (lambda: edited(1, weight=nn.Parameter(torch.zeros(7, 5, 1, dtype=torch.float64))),
               "1 has another dtype, torch.float64"),
    "meta": (lambda: pair().to("meta"), "0: it has weights of torch.float32 on meta"),
    "too far": (lambda: edited(0, dilation=(2**24,)), "0: .*reach too far for a compiled kernel"),
    "used twice": (
        lambda: Doubled(lambda self, y, x: self.second(y) + y.sum()),
        "first: no Conv1d.* follows, but 2 uses of its output",
    ),
    "called twice": (
        lambda: Doubled(lambda self, y, x: self.second(y) + self.second(x)),
        "second cannot be replaced: it is called 2 times",
    ),
    "weight used": (
        lambda: Doubled(lambda self, y, x: self.second(y) * self.first.weight.sum()),
        "first: it cannot be replaced: `first.weight` is used by itself",
    ),
    "a function between": (
        lambda: Doubled(lambda self, y, x: self.second(torch.relu(y))),
        "first: no Conv1d.* follows, but `relu` in forward",
    ),
    "optional": (Optional, "depthwise: no Conv1d.* follows, but what depends on optional argu"),
    "untraceable": (
        lambda: Doubled(lambda self, y, x: self.second(y) if y.sum() > 0 else y),
        r"first: torch.fx cannot trace the model \(TraceError: ",
    ),
    "not called": (lambda: NotCalled(), "unused: forward does not call it"),
}  # fmt: skip


class NotCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.used = pair(padding=1)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_and_why(kind):
    make, message = LEFT[kind]
    model = make()
    for module in model.modules():
        module.training = kind == "training norm" and type(module) is nn.BatchNorm1d
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"(?s)`from_torch` found no Conv1d\(groups.*{message}"):
        interop.from_torch(model)
    assert dict(model.named_modules()) == before
    # Beside a pair that is replaced, the reason stands in the report.
    both = nn.ModuleDict({"left": model, "taken": pair(padding=1)})
    both.training = False
    report = interop.from_torch(both)
    assert [one.name for one in report.replaced] == ["taken.0"] and report.refused
    assert f"left: {next(iter(report.refused.values()))}" in str(report)


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        (lambda: [norm(FILTERS).train()], "statistics from each batch"),
        (lambda: [nn.GroupNorm(1, FILTERS)], "2, a GroupNorm"),
        (lambda: [norm(FILTERS).eval(), nn.MaxPool1d(2)], "3, a MaxPool1d"),
    ],
    ids=["training norm", "another norm", "pooling"],
)
def test_what_follows_and_is_not_folded(after, kept):
    model = pair(padding=1).eval()
    model.extend(after())
    report = interop.from_torch(model)
    assert kept in report.replaced[0].kept and kept in str(report)
    assert type(model[-1]) is not interop.Folded


def test_an_activation_that_is_used_elsewhere_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = pair(padding=1)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.first(self.relu(x))))

    original, report = replaced(model := Model().eval())
    assert "relu (ReLU): it is called 2 times" in str(report)
    assert_same(model, original, normal(1, CHANNELS, STEPS))


def in_a_block(activation):
    block = pair(padding=1)
    block.append(activation)
    return nn.Sequential(Untraceable(), block, nn.Conv1d(FILTERS, CHANNELS, 1))


@pytest.mark.parametrize("places", ["sequence", "untraced"])
def test_an_activation_in_many_places_is_folded_in_each(places):
    gelu = nn.GELU()
    if places == "sequence":
        model = nn.Sequential(*pair(padding=1), gelu, nn.Conv1d(FILTERS, CHANNELS, 1),
                              *pair(padding=1), gelu, gelu)  # fmt: skip
        folded = [("1", "2"), ("5", "6")]
    else:
        model = nn.Sequential(in_a_block(gelu), in_a_block(gelu), gelu)
        folded = [("0.1.1", "0.1.2"), ("1.1.1", "1.1.2")]
    original, report = replaced(model.eval())
    assert [one.folded for one in report.replaced] == folded
    assert model[-1] is gelu
    assert_same(model, original, normal(1, CHANNELS, STEPS))


def test_an_activation_in_a_container_in_many_places_stays():
    class Block(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.first, self.second = pair(padding=1)
            self.shared, self.back = shared, nn.Conv1d(FILTERS, CHANNELS, 1)

        def forward(self, x):
            return self.back(self.shared(self.second(self.first(x))))

    shared = nn.Sequential(nn.GELU())
    model = nn.Sequential(Untraceable(), Block(shared), shared, Block(shared)).eval()
    original, report = replaced(model)
    assert [one.name for one in report.replaced] == ["1.first", "3.first"]
    assert type(shared[0]) is nn.GELU and "it is registered more than once" in str(report)
    assert_same(model, original, normal(1, CHANNELS, STEPS))


class AlwaysDropout(nn.Dropout):
    """In inference too."""

    def forward(self, input):
        return nn.functional.dropout(input, self.p, training=True)


@pytest.mark.parametrize(
    "dropout", [AlwaysDropout(), nn.Dropout().train()], ids=["own", "training"]
)
def test_dropout_that_drops_between_the_convolutions_is_refused(dropout):
    block = pair(padding=1)
    block.insert(1, dropout)
    model = nn.Sequential(Untraceable(), block)
    model.training = False
    with pytest.raises(ValueError, match=r"1.1 lies between the two convolutions: a \w*Dropout"):
        interop.from_torch(model)
