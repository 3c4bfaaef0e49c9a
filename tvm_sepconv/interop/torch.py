"""PyTorch models with every depthwise-separable pair of convolutions as one compiled kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

try:
    import torch  # this module is imported only when it is asked for
except ImportError as error:
    raise ImportError(
        "`from_torch` needs PyTorch, which is not installed: pip install 'tvm-sepconv[torch]'"
    ) from error
from torch import nn  # noqa: TID253

from tvm_sepconv.interop import torch_chains
from tvm_sepconv.interop.torch_module import Folded, SeparableConv1d
from tvm_sepconv.interop.torch_pairs import NotTakenError, Replaced, match

__all__ = ["Folded", "Replaced", "Report", "SeparableConv1d", "from_torch"]


@dataclass(frozen=True)
class Report:
    """What `from_torch` did; `print` shows it.

    Attributes
    ----------
    refused
        Why a grouped convolution was left as it was, by name.
    """

    replaced: tuple[Replaced, ...]
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.refused)} left as they were"]
        for one in self.replaced:
            lines.append(f"  {one.name}: {_in_short(one.module)}")
            then = f"; followed by {one.kept}" if one.kept else ""
            lines.append(f"    with {', '.join(one.folded)}{then}")
        lines += [f"  {name} left: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def _in_short(module: SeparableConv1d) -> str:
    parts = [f"{module.in_channels}→{module.out_channels}", f"kernel {module.kernel_size[0]}"]
    parts += [f"stride {module.stride[0]}"] * (module.stride[0] > 1)
    parts += [f"dilation {module.dilation[0]}"] * (module.dilation[0] > 1)
    parts += [module.activation] * (module.activation != "linear")
    return ", ".join(parts)


def from_torch(module: nn.Module) -> Report:
    """Replace each ``Conv1d(groups=in_channels)`` with the ``Conv1d(kernel_size=1)`` after it.

    The model is changed in place: a `SeparableConv1d` stands where the depthwise convolution was,
    under its name, and `Folded` where the others were. A ``BatchNorm1d`` between the two, and one
    and an element-wise activation after them, become part of the layer; what they compute stays the
    same but for rounding. Nothing is changed if an error is raised.

    Which module follows which is read by torch.fx, as ``forward`` runs with the defaults of its
    arguments; parts that torch.fx cannot trace are searched for ``nn.Sequential`` and for blocks of
    NeMo's kind (QuartzNet, Citrinet, MatchboxNet). There a pointwise convolution that masks its
    input keeps its BatchNorm1d: set ``use_mask = False``, as for NeMo's export, to have it folded.

    Parameters
    ----------
    module
        In eval mode, on the CPU.

    Returns
    -------
    Report
        What was replaced and what was not, with reasons.

    Raises
    ------
    TypeError
        If `module` is no ``nn.Module``, or one that is compiled already.
    ValueError
        If it is in training mode, or no pair in it can be replaced; the message says why.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(
    ...     nn.Conv1d(8, 8, 5, padding="same", groups=8), nn.Conv1d(8, 16, 1), nn.ReLU()
    ... ).eval()
    >>> print(from_torch(model))
    1 replaced, 0 left as they were
      0: 8→16, kernel 5, relu
        with 1, 2
    >>> model(torch.zeros(1, 8, 100)).shape
    torch.Size([1, 16, 100])
    """
    _check_model(module)
    found = torch_chains.find(module)
    replaced: list[Replaced] = []
    refused: dict[str, str] = {}
    for name, conv in module.named_modules():
        if name and torch_chains.is_grouped(conv):
            try:
                replaced.append(match(name, conv, found))
            except NotTakenError as reason:
                if conv.groups > 1:  # with one input channel and nothing after it, an ordinary one
                    refused[name] = str(reason)
    if not replaced:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            "`from_torch` found no Conv1d(groups=in_channels) with a Conv1d(kernel_size=1) after "
            f"it that it can replace. Received: module={type(module).__name__}{reasons}"
        )
    for one in replaced:
        _put(module, one.name, one.module)
        for name in one.folded:
            _put(module, name, Folded(one.name))
    return Report(tuple(replaced), refused)


def _check_model(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"The `module` argument must be a torch.nn.Module. Received: {type(module)}"
        )
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        raise TypeError(
            "The `module` argument must be a model that is not compiled yet: call `from_torch` "
            f"first, then torch.compile or torch.jit.script. Received: {type(module)}"
        )
    if module.training:
        raise ValueError(
            "The `module` argument must be in eval mode: what BatchNorm1d does in training cannot "
            "be folded. Received: module.training=True. Call `module.eval()` first"
        )


def _put(root: Any, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module.eval())
