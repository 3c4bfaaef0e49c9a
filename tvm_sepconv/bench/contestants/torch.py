"""The layer in PyTorch, eager and compiled by Inductor with frozen weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import activations
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared

Array = npt.NDArray[Any]
_ACTIVATIONS = ("linear", "relu", "elu", "silu")
# Two axes allow channels_last memory, for which oneDNN has other kernels; there the pointwise
# convolution may be a linear layer as well, which has less to prepare in a call.
FORMS = ("conv1d", "conv2d of height 1, channels_last", "conv2d and linear, channels_last")


def eager(case: Case, threads: int) -> list[Prepared]:
    """Return PyTorch's own operators."""
    import torch

    torch.set_num_threads(threads)
    return [_prepared(case, form, network(case, form)) for form in FORMS]


def compiled(case: Case, threads: int) -> list[Prepared]:
    """Return the same, compiled by Inductor.

    Raises
    ------
    ValueError
        If no C++ compiler is there.
    """
    if shutil.which("g++") is None:
        raise ValueError("torch.compile needs a C++ compiler, g++: sudo apt-get install g++")
    import torch
    import torch._inductor.config

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True  # weights become constants, packed once
    torch._dynamo.reset()
    networks = {form: torch.compile(network(case, form), dynamic=False) for form in FORMS}
    return [_prepared(case, form, network) for form, network in networks.items()]


def _prepared(case: Case, form: str, network: Callable[[Any], Any]) -> Prepared:
    import torch

    if form == FORMS[0]:

        def run(x: Array) -> Array:
            with torch.inference_mode():
                return network(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

        return Prepared(form, run, case.channels_first(case.x), case.from_channels_first)

    def run_last(x: Array) -> Array:
        with torch.inference_mode():
            y = network(torch.from_numpy(x).permute(0, 3, 1, 2))
            return y.permute(0, 2, 3, 1).numpy()  # type: ignore[no-any-return]

    return Prepared(form, run_last, case.channels_last(case.x)[:, None], case.from_channels_last)


def network(case: Case, form: str) -> Any:
    """The layer as a module in evaluation mode, taking and giving channels first."""
    import torch
    from torch import nn

    config, flat = case.config, form != FORMS[0]
    left, right = config.pad_amounts(case.steps)
    mid = case.channels * config.depth_multiplier
    conv: Any = nn.Conv2d if flat else nn.Conv1d

    def sizes(steps: int, height: int) -> Any:
        return (height, steps) if flat else steps

    even = left if left == right else 0  # a convolution pads alike on both sides
    first = conv(
        case.channels, mid, sizes(config.kernel_size, 1), stride=sizes(config.strides, 1),
        dilation=sizes(config.dilation_rate, 1), padding=sizes(even, 0), groups=case.channels,
        bias=False,
    )  # fmt: skip
    linear = form == FORMS[2]
    bias = config.use_bias
    second = (
        nn.Linear(mid, config.filters, bias) if linear else conv(mid, config.filters, 1, bias=bias)
    )
    with torch.no_grad():
        _fill(first.weight, case.weights[0].transpose(1, 2, 0))
        _fill(second.weight, case.weights[1].transpose(2, 1, 0))
        if bias:
            _fill(second.bias, case.weights[2])
    modules = [first, second, *_activation(case)]
    if linear:
        modules = [first, _moved(0, 2, 3, 1), second, *_activation(case), _moved(0, 3, 1, 2)]
    if left != right:
        modules = [nn.ConstantPad1d((left, right), 0.0), *modules]
    network = nn.Sequential(*modules).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last) if flat else network


def _fill(parameter: Any, values: Array) -> None:
    import torch

    parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(parameter.shape))


def _moved(*axes: int) -> Any:
    """A module that permutes axes, which changes no memory."""
    from torch import nn

    class Moved(nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x.permute(axes)

    return Moved()


def _activation(case: Case) -> list[Any]:
    from torch import nn

    name = activations.name_of(case.config.activation)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"The `activation` of a layer in PyTorch must be one of {list(_ACTIVATIONS)} here. "
            f"Received: activation={name}"
        )
    modules = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
    return [modules[name](inplace=True)] if name in modules else []
