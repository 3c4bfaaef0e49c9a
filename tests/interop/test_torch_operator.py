"""The PyTorch operator and the module around it: gradients, torch.compile, copies, dtypes."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("tvm")

import torch
from torch import nn
from torch.nn import functional

from tvm_sepconv.interop.torch import SeparableConv1d
from tvm_sepconv.interop.torch_operator import separable_conv1d

CHANNELS, FILTERS, KERNEL = 5, 6, 3

# What PyTorch 2.13 warns of in its own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


def normal(*shape: int, dtype=torch.float32, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def weights(dtype=torch.float32, bias: bool = True):
    shapes = ((CHANNELS, 1, KERNEL), (FILTERS, CHANNELS, 1), (FILTERS,))
    made = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes, 1)]
    return made if bias else [*made[:2], None]


def layer(dtype=torch.float32, **options) -> SeparableConv1d:
    options = {"in_channels": CHANNELS, "padding": (2, 1), "activation": "relu", **options}
    return SeparableConv1d(*weights(dtype), **options)


def composed(x, depthwise, pointwise, bias, stride=1, padding=(2, 1), dilation=1):
    """The layer by torch's own convolutions."""
    x = functional.pad(x, padding)
    x = functional.conv1d(x, depthwise, None, stride, 0, dilation, x.shape[1])
    return functional.conv1d(x, pointwise, bias)


X = (2, CHANNELS, 20)


# ---- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_opcheck(gradients):
    tensors = [normal(*X), *weights(bias=not gradients)]
    tensors = [t if t is None else t.requires_grad_(gradients) for t in tensors]
    activation = "linear" if gradients else "relu"
    torch.library.opcheck(separable_conv1d, (*tensors, 1, [2, 1], 1, activation))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients_are_those_of_torchs_convolutions(bias, stride):
    ours = [t if t is None else t.requires_grad_() for t in (normal(*X), *weights(bias=bias))]
    theirs = [t if t is None else t.detach().double().requires_grad_() for t in ours]
    y = separable_conv1d(*ours, stride, [2, 1], 1, "linear")
    right = composed(*theirs, stride)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    right.square().sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        if own is not None:
            torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_gradients_numerically():
    tensors = [t.double().requires_grad_() for t in (normal(1, CHANNELS, 4), *weights())]

    def run(*given):
        return separable_conv1d(*given, 1, [2, 1], 1, "linear")

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_an_activation_with_gradients_is_refused():
    x = normal(*X).requires_grad_()
    with pytest.raises(ValueError, match=r"gradients for the activation 'linear' only.*'relu'"):
        separable_conv1d(x, *weights(), 1, [2, 1], 1, "relu")


WRONG = {
    "rank": (normal(CHANNELS, 20), ValueError, r"\(batch, channels, steps\).*shape=\(5, 20\)"),
    "channels": (normal(2, 4, 20), ValueError, r"divide the 5 rows.*shape=\(2, 4, 20\)"),
    "no channels": (normal(2, 0, 20), ValueError, r"divide the 5 rows"),
    "steps": (normal(2, CHANNELS, 1), ValueError, "at least the kernel's 3 steps, 1 of padding"),
    "wider": (normal(*X, dtype=torch.float64), TypeError, "weights' dtype torch.float32. Received: "
              "input.dtype=torch.float64. Convert one"),
    "integers": (torch.zeros(X, dtype=torch.int64), TypeError, "input.dtype=torch.int64"),
    "complex": (torch.zeros(X, dtype=torch.complex64), TypeError, "input.dtype=torch.complex64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_inputs_of_the_operator(kind, device):
    x, error, message = WRONG[kind]
    given = [tensor.to(device) for tensor in (x, *weights())]
    with pytest.raises(error, match=message):
        separable_conv1d(*given, 1, [0, 1], 1, "linear")


def test_devices_of_inputs_and_weights():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # tensors that say they are elsewhere, where there is no such place
        x, *given = (tensor.to("cuda:0") for tensor in (torch.zeros(X), *weights()))
        y = separable_conv1d(x, *given, 1, [0, 1], 1, "linear")
        assert y.device == x.device and y.shape == (2, FILTERS, 19)
        with pytest.raises(ValueError, match=r"on cuda:0, as the weights are. .*device=cuda:1"):
            separable_conv1d(x.to("cuda:1"), *given, 1, [0, 1], 1, "linear")
        x, *given = (tensor.to("xpu:0") for tensor in (x, *given))
        with pytest.raises(ValueError, match=r"CPU or an NVIDIA GPU.*input.device=xpu:0. Move both "
                           r"with `module.cpu\(\)`"):  # fmt: skip
            separable_conv1d(x, *given, 1, [0, 1], 1, "linear")


# ---- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_through_the_module(training):
    module = layer(activation="gelu").train(training)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.requires_grad_()
    theirs = [p.detach().double().requires_grad_() for p in module.parameters()]
    x = normal(*X).requires_grad_()
    other = x.detach().double().requires_grad_()
    module(x).sin().sum().backward()
    functional.gelu(composed(other, *theirs)).sin().sum().backward()
    for own, right in zip((x, *module.parameters()), (other, *theirs), strict=True):
        torch.testing.assert_close(own.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_training_changes_what_the_module_computes():
    module = layer(activation="linear").requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    x, losses = normal(*X), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


CHANGES = {
    "in place": lambda module: module.bias.add_(1),
    "load_state_dict": lambda module: module.load_state_dict(
        {name: value * 2 for name, value in module.state_dict().items()}
    ),
    "assigned": lambda module: module.load_state_dict(
        {name: value * 2 for name, value in module.state_dict().items()}, assign=True
    ),
    "there and back": lambda module: module.half().float(),
    "a new parameter": lambda module: setattr(module, "bias", nn.Parameter(module.bias + 1)),
    "inference": lambda module: torch.inference_mode()(lambda: module.bias.add_(1))(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(change):
    module, x = layer(activation="linear"), normal(*X)
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        y = module(x)
        right = composed(x, *module.parameters())
    assert not torch.equal(y, before)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        given, x = weights(), normal(*X)
        for _ in range(2):
            y = separable_conv1d(x, *given, 1, [2, 1], 1, "linear")
            torch.testing.assert_close(y, composed(x, *given), rtol=1e-5, atol=1e-5)
            given[2].add_(1)
        assert not layer().bias.is_inference()


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = SeparableConv1d(
        *(torch.zeros_like(w) for w in weights()), in_channels=5, padding=(2, 1), activation="relu"
    )
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file])
def test_copies(way):
    module, x = layer(), normal(*X)
    other = way(module)
    assert list(other.state_dict()) == ["depthwise_weight", "pointwise_weight", "bias"]
    with torch.no_grad():
        y = module(x)
        torch.testing.assert_close(other(x), y, rtol=0, atol=0)
        other.bias.add_(100)
        assert not torch.equal(other(x), y) and torch.equal(module(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_conversion_round_as_torch_does(dtype):
    module, x = layer(activation="linear"), normal(*X)
    rounded = [w.to(dtype).double() for w in (x, *module.parameters())]
    with torch.no_grad():
        right = composed(*rounded)
        with torch.autocast("cpu", dtype=dtype):
            y = module(x)
            assert module.double()(x.double()).dtype == torch.float64  # which autocast leaves alone
        z = layer(dtype, activation="linear")(x.to(dtype))
    assert y.dtype == z.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), right, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(z, y)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (normal(20), ValueError, r"with 5 channels. Received: input.shape=\(20,\)"),
        (normal(1, 2, CHANNELS, 20), ValueError, r"input.shape=\(1, 2, 5, 20\)"),
        (normal(2, 10, 20), ValueError, r"\(2, 10, 20\)"),
        (normal(*X, dtype=torch.float16), None, ""),
        (normal(*X, dtype=torch.float64), TypeError, "weights' dtype torch.float32"),
    ],
    ids=["rank 1", "rank 4", "channels", "narrower", "wider"],
)
def test_wrong_inputs_of_the_module(x, error, message):
    if error is None:
        with torch.no_grad():
            assert layer()(x).dtype == x.dtype  # the outputs have the inputs' dtype
        return
    with pytest.raises(error, match=message):
        layer()(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "softmax"}, "`activation` argument must be one of.*'softmax'"),
        ({"in_channels": 4}, "of the shapes .channels .* for 4 channels"),
        ({"stride": 0}, "`strides` argument must be"),
        ({"padding": (-1, 0)}, "`padding` argument must be"),
        ({"dilation": 2**24}, "reach too far for a compiled kernel"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_module(change, message):
    with pytest.raises(ValueError, match=message):
        layer(**change)


# ---- torch.compile ------------------------------------------------------------------------------


def test_torch_compile():
    module, x = nn.Sequential(nn.Tanh(), layer(), nn.Tanh()), normal(*X)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        torch.testing.assert_close(before, module(x))
        module[1].bias.add_(1)
        torch.testing.assert_close(compiled(x), module(x))
        assert not torch.equal(compiled(x), before)


def test_torch_compile_of_any_number_of_steps_and_under_autocast():
    module = nn.Sequential(nn.Tanh(), layer())
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for steps in (20, 33):
            x = normal(2, CHANNELS, steps)
            torch.testing.assert_close(compiled(x), module(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), module(x))


def test_torch_compile_with_gradients():
    module = nn.Sequential(nn.Tanh(), layer().requires_grad_())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (module, compiled):
        x = normal(*X).requires_grad_()
        module.zero_grad()
        run(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(*grads)


def test_torch_export():
    x = normal(*X)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(layer(), (x,), dynamic_shapes=dynamic)
        other = normal(3, CHANNELS, 31)
        torch.testing.assert_close(program.module()(other), layer()(other))
