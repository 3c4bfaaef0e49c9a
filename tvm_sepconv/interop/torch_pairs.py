"""Which convolutions of a PyTorch model are a pair that one kernel can stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  # this module is imported only by what is made for PyTorch
from torch import nn  # noqa: TID253

from tvm_sepconv.interop import folding, torch_operator
from tvm_sepconv.interop.torch_chains import Chain, Found, Step
from tvm_sepconv.interop.torch_module import SeparableConv1d, activation_name, computes_as

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class NotTakenError(ValueError):
    """Why a pair stays as it is."""


@dataclass(frozen=True)
class Replaced:
    """A layer that was put into a model.

    Attributes
    ----------
    name
        Its place, which was the depthwise convolution's.
    folded
        The modules that became part of it, by name, in their order; each is a `Folded` now.
    kept
        Why the modules after them did not.
    """

    name: str
    module: SeparableConv1d
    folded: tuple[str, ...]
    kept: str


def match(name: str, depthwise: Any, found: Found) -> Replaced:
    """Return what replaces `depthwise` and those after it, or raise why nothing does."""
    if not isinstance(depthwise, nn.Conv1d):
        raise NotTakenError(f"it is a {type(depthwise).__name__}; only Conv1d is replaced")
    if depthwise.groups != depthwise.in_channels:
        raise NotTakenError(
            f"it is grouped but not depthwise: groups={depthwise.groups}, "
            f"in_channels={depthwise.in_channels}"
        )
    _check_conv("it", Step(name, depthwise), found)
    chain = found.chains.get(name)
    if chain is None:
        raise NotTakenError(_why_unknown(name, found))
    between, pointwise, after = _split(chain, found)
    _check_pointwise(depthwise, pointwise, found)
    normal, activation, kept = _take_after(after, pointwise.masks, chain.end, found)
    module = _fused(depthwise, between, pointwise.module, normal, activation)
    steps = [*between, pointwise, *normal, *activation]
    return Replaced(name, module, tuple(step.name for step in steps), kept)


def _why_unknown(name: str, found: Found) -> str:
    owners = [owner for owner in found.untraced if not owner or name.startswith(owner + ".")]
    if not owners:
        return "forward does not call it"
    owner = max(owners, key=len)
    return f"torch.fx cannot trace {owner or 'the model'} ({found.untraced[owner]})"


def _check_conv(called: str, step: Step, found: Found) -> None:
    conv = step.module
    if torch.nn.utils.parametrize.is_parametrized(conv):
        raise NotTakenError(
            f"{called} is parametrized: torch.nn.utils.parametrize.remove_parametrizations("
            "conv, 'weight') first"
        )
    if hasattr(conv, "weight_g"):
        raise NotTakenError(
            f"{called} is weight-normed: torch.nn.utils.remove_weight_norm(conv) first"
        )
    if type(conv) is not nn.Conv1d:
        raise NotTakenError(f"{called} is of the class {type(conv).__name__}, not a plain Conv1d")
    if step.name in found.tied:
        raise NotTakenError(f"{called} cannot be replaced: {found.tied[step.name]}")
    if conv.padding_mode != "zeros":
        raise NotTakenError(f"{called} has padding_mode={conv.padding_mode!r}, not zeros")
    if conv.weight.dtype not in torch_operator.DTYPES or conv.weight.device.type != "cpu":
        raise NotTakenError(
            f"{called} has weights of {conv.weight.dtype} on {conv.weight.device}; kernels are "
            "for floating-point numbers, and from_torch reads them on the CPU: call it before the "
            "model is moved to a GPU"
        )


def _split(chain: Chain, found: Found) -> tuple[list[Step], Step, list[Step]]:
    """Return the normalisations before the pointwise convolution, it, and all that is after it."""
    between: list[Step] = []
    for i, step in enumerate(chain.steps[1:], 1):
        if isinstance(step.module, nn.Conv1d):
            return between, step, list(chain.steps[i + 1 :])
        if activation_name(step.module) not in (None, "linear"):
            raise NotTakenError(
                f"{step.name} ({type(step.module).__name__}) is an activation between the two "
                "convolutions, which the fused kernel has no place for"
            )
        if not _does_nothing(step.module):
            if reason := _why_not_folded(step, found):
                raise NotTakenError(f"{step.name} lies between the two convolutions: {reason}")
            between.append(step)
    raise NotTakenError(f"no Conv1d(kernel_size=1) follows, but {chain.end}")


def _does_nothing(module: Any) -> bool:
    dropout = not module.training and any(computes_as(module, kind) for kind in _DROPOUTS)
    return dropout or computes_as(module, nn.Identity)


def _why_not_folded(step: Step, found: Found) -> str:
    module = step.module
    if type(module) is not nn.BatchNorm1d:
        return f"a {type(module).__name__}"
    if module.training or module.running_mean is None:
        return "a BatchNorm1d that takes its statistics from each batch"
    return found.tied.get(step.name, "")


def _check_pointwise(depthwise: Any, step: Step, found: Found) -> None:
    _check_conv(step.name, step, found)
    conv = step.module
    same = ((conv.kernel_size, (1,)), (conv.stride, (1,)), (_pads(conv), (0, 0)), (conv.groups, 1))
    if any(got != wanted for got, wanted in same):
        raise NotTakenError(
            f"{step.name} follows, which is not pointwise: kernel_size={conv.kernel_size}, stride="
            f"{conv.stride}, padding={conv.padding}, groups={conv.groups}"
        )
    if conv.weight.dtype != depthwise.weight.dtype:
        raise NotTakenError(f"{step.name} has another dtype, {conv.weight.dtype}")
    if step.masks and conv.bias is not None:
        raise NotTakenError(f"{step.name} masks its input and has a bias: the bias is not masked")


def _take_after(
    steps: Sequence[Step], masks: bool, end: str, found: Found
) -> tuple[list[Step], list[Step], str]:
    """Return the normalisations and the activation to fold, and what follows those."""
    normal: list[Step] = []
    for step in steps:
        what = f"{step.name} ({type(step.module).__name__})"
        if masks:  # what masks a sum commutes with the pointwise convolution, not with constants
            return normal, [], f"{what}, since a mask lies before it"
        if activation_name(step.module) not in (None, "linear"):
            tied = found.tied.get(step.name)
            return (normal, [], f"{what}: {tied}") if tied else (normal, [step], "")
        if not _does_nothing(step.module):
            if reason := _why_not_folded(step, found):
                return normal, [], f"{step.name}, {reason}"
            normal.append(step)
    return normal, [], end


# ---- fusing --------------------------------------------------------------------------------------


def _fused(
    depthwise: Any, between: Sequence[Step], pointwise: Any, after: Sequence[Step],
    activation: Sequence[Step],
) -> SeparableConv1d:  # fmt: skip
    weights = folding.fold(
        _array(depthwise.weight)[:, 0],
        _array(depthwise.bias),
        [_affine(step.module) for step in between],
        _array(pointwise.weight)[..., 0],
        _array(pointwise.bias),
        [_affine(step.module) for step in after],
    )
    dtype = depthwise.weight.dtype
    new = (weights.depthwise[:, None], weights.pointwise[..., None], weights.bias)
    try:
        return SeparableConv1d(
            *(None if a is None else torch.from_numpy(a.copy()).to(dtype) for a in new),
            in_channels=depthwise.in_channels,
            stride=depthwise.stride[0],
            padding=_pads(depthwise),
            dilation=depthwise.dilation[0],
            activation=str(activation_name(activation[0].module)) if activation else "linear",
        )
    except ValueError as error:
        raise NotTakenError(str(error)) from error


def _array(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().to(torch.float64).numpy()


def _affine(norm: Any) -> folding.Affine:
    gamma, beta = _array(norm.weight), _array(norm.bias)
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    return folding.batch_norm(gamma, beta, mean, variance, norm.eps)


def _pads(conv: Any) -> tuple[int, int]:
    """Return the zeros to the left and right; of torch's "same" the larger half is to the right."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = (conv.kernel_size[0] - 1) * conv.dilation[0]
        return total // 2, total - total // 2
    return conv.padding[0], conv.padding[0]
