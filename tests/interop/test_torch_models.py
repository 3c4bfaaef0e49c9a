"""`from_torch` on models: what it finds wherever it is, under the names that it has."""

from __future__ import annotations

import doctest
import subprocess
import sys

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
    normal,
    pair,
    replaced,
)

from tvm_sepconv.interop import torch as interop

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")


# ---- forward of one's own -----------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, CHANNELS, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.back = nn.Conv1d(FILTERS, CHANNELS, 1)
        self.head = nn.Linear(FILTERS, 2)

    def forward(self, x, lengths=None):
        x = self.stem(x)
        x = x + self.back(self.blocks[0](x))
        x = self.blocks[1](x)
        if lengths is not None:
            x = x * lengths
        return self.head(x.mean(dim=2)), x.shape[2]


def test_forward_of_any_kind_keeps_names():
    model = Network().eval()
    original, report = replaced(model)
    assert [one.name for one in report.replaced] == ["blocks.0.depthwise", "blocks.1.depthwise"]
    assert report.replaced[0].folded == tuple(
        f"blocks.0.{name}" for name in ("pointwise", "norm", "relu")
    )
    keys = {key.rpartition(".")[0] for key in model.state_dict()}
    assert keys == {"stem", "back", "head", "blocks.0.depthwise", "blocks.1.depthwise"}
    x = normal(2, 3, STEPS)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))
        torch.testing.assert_close(model(x, 2.0)[0], original(x, 2.0)[0])
    text = str(report)
    assert "2 replaced, 0 left" in text and "blocks.1.depthwise: 5→7, kernel 3, relu\n" in text
    assert "with blocks.1.pointwise, blocks.1.norm, blocks.1.relu" in text


def test_the_order_is_that_of_forward_not_of_the_names():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.pointwise, self.depthwise = reversed([*pair(padding=1)])

        def forward(self, x):
            return torch.relu(self.pointwise(self.depthwise(x)))

    original, report = replaced(model := Reversed().eval())
    assert report.replaced[0].kept == "`relu` in forward"
    assert_same(model, original, normal(1, CHANNELS, STEPS))


class Flagged(Block):
    """One that torch.fx traces only with the default of its flag."""

    def forward(self, x, features=False):
        y = super().forward(x)
        return (y, x) if features else y


def test_a_flag_takes_its_default():
    original, report = replaced(model := Flagged().eval())
    assert len(report.replaced) == 1
    assert_same(model, original, normal(1, CHANNELS, STEPS))


class Keeping(Block):
    """Keeps what it computed, which in a trace is no tensor."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_tracing_leaves_nothing_behind():
    model = Keeping().eval()
    interop.from_torch(model)
    assert not hasattr(model, "last")


def test_containers_around_what_cannot_be_traced():
    inner = pair(padding=1, norms="after")
    model = nn.Sequential(
        Untraceable(), nn.Sequential(inner[0]), inner[1:], nn.ReLU(), Untraceable()
    )
    original, report = replaced(model.eval())
    assert (report.replaced[0].name, report.replaced[0].folded) == ("1.0", ("2.1", "2.2", "3"))
    assert_same(model, original, normal(1, CHANNELS, STEPS))


def test_hooks_on_containers_are_not_passed_over():
    first, second = pair(padding=1)
    model = nn.Sequential(Untraceable(), nn.Sequential(first), second).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match=r"1.0: no Conv1d.* follows"):
        interop.from_torch(model)


def test_models_converted_before_are_searched_for_the_rest():
    model = nn.Sequential(pair(padding=1), nn.Conv1d(FILTERS, CHANNELS, 1), Block()).eval()
    interop.from_torch(model[0])
    original, report = replaced(model)
    assert [one.name for one in report.replaced] == ["2.depthwise"]
    with torch.no_grad():
        torch.testing.assert_close(model(x := normal(1, CHANNELS, STEPS)), original(x))


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "must be a torch.nn.Module. Received: <class 'NoneType'>"),
        (torch.zeros(3), TypeError, "must be a torch.nn.Module"),
        (nn.Sequential(nn.Linear(3, 4)).eval(), ValueError, "Received: module=Sequential$"),
        (nn.Conv1d(3, 3, 3, groups=3).eval(), ValueError, "Received: module=Conv1d$"),
        (pair().train(), ValueError, r"in eval mode.*Call `module.eval\(\)` first"),
    ],
    ids=["None", "tensor", "no convolutions", "a convolution", "training"],
)
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        interop.from_torch(given)


def test_a_compiled_model_is_refused():
    compiled = torch.compile(pair(), backend="eager")
    with pytest.raises(TypeError, match="not compiled yet: call `from_torch` first"):
        interop.from_torch(compiled)


def test_the_example_of_the_documentation():
    results = doctest.DocTestRunner().run(
        doctest.DocTestFinder().find(interop.from_torch, "from_torch", module=interop)[0]
    )
    assert results == (0, 5)


def test_without_torch_the_extra_is_named():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    import tvm_sepconv.interop.torch\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tvm-sepconv[torch]'" in run.stdout
