"""What `from_torch` puts into a model: the fused layer, and what holds the others' places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch  # noqa: TID253  # this module is imported only by what is made for PyTorch
from torch import nn  # noqa: TID253

from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop import torch_operator
from tvm_sepconv.layer import SeparableConv1D

_CAST_BY_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)
# Torch's modules that are one of the functions which a kernel applies, by Keras's name.
ACTIVATIONS: dict[str, Any] = {
    "linear": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "log_sigmoid": nn.LogSigmoid(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "hard_silu": nn.Hardswish(),
    "tanh": nn.Tanh(),
    "hard_tanh": nn.Hardtanh(),
    "tanh_shrink": nn.Tanhshrink(),
    "softsign": nn.Softsign(),
    "soft_shrink": nn.Softshrink(),
    "hard_shrink": nn.Hardshrink(),
}


def activation_name(module: Any) -> str | None:
    """Return Keras's name of the activation `module`, None if a kernel has no such function."""
    for name, own in ACTIVATIONS.items():
        if computes_as(module, type(own)) and _options(own) == _options(module):
            return name
    return None


def computes_as(module: Any, kind: Any) -> bool:
    """Whether `module` is of the class `kind`, or of one made from it that computes the same."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _options(module: Any) -> dict[str, Any]:
    private = ("training", "inplace")
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in private}


class SeparableConv1d(nn.Module):  # type: ignore[misc]
    """A depthwise and a pointwise convolution, bias and activation as one compiled kernel.

    Takes and returns tensors ``(batch, channels, steps)`` or ``(channels, steps)`` on the CPU or an
    NVIDIA GPU as ``torch.nn.Conv1d`` does, without copying a contiguous one. The weights are
    parameters that do not ask for gradients; with ``requires_grad_()`` they can be trained, through
    torch's own convolutions backwards. They may be changed in place, by ``load_state_dict`` and by
    ``to``; not through ``weight.data``, of which nobody is told, unless they ask for gradients.

    Parameters
    ----------
    depthwise_weight
        (channels * depth_multiplier, 1, kernel_size), as in ``Conv1d(groups=channels)``.
    pointwise_weight
        (filters, channels * depth_multiplier, 1).
    bias
        (filters,), or None.
    padding
        Zeros to the left and to the right.
    activation
        Keras's name of an element-wise function.

    Raises
    ------
    ValueError
        For weights that do not fit each other, and for arguments that `SeparableConv1D` refuses.
    """

    def __init__(
        self,
        depthwise_weight: torch.Tensor,
        pointwise_weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        in_channels: int,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        dilation: int = 1,
        activation: str = "linear",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"The `activation` argument must be one of {sorted(ACTIVATIONS)}. "
                f"Received: activation={activation!r}"
            )
        weights = (depthwise_weight, pointwise_weight, bias)
        _check_weights(*weights, in_channels)
        names = ("depthwise_weight", "pointwise_weight", "bias")
        with torch.inference_mode(False):  # whose tensors could not be trained or saved by others
            for name, weight in zip(names, weights, strict=True):
                copy = None if weight is None else weight.detach().clone()
                parameter = None if copy is None else nn.Parameter(copy, requires_grad=False)
                self.register_parameter(name, parameter)
        # Conv1d's names and forms: code that asks a convolution about itself gets its answers.
        self.in_channels, self.out_channels = in_channels, pointwise_weight.shape[0]
        self.kernel_size = (depthwise_weight.shape[2],)
        self.stride, self.padding, self.dilation = (stride,), tuple(padding), (dilation,)
        self.activation = activation
        self.config(self.depthwise_weight.dtype).kernel_config(in_channels)

    def config(self, dtype: torch.dtype) -> SepConvConfig:
        """Return the layer's configuration in Keras's words for inputs of `dtype`."""
        weights = (self.depthwise_weight, self.pointwise_weight, self.bias)
        options = self._options()
        return torch_operator.config_of(*weights, dtype, self.in_channels, *options)

    def as_layer(self, name: str | None = None) -> SeparableConv1D:
        """Return a `tvm_sepconv.SeparableConv1D` of these weights, to save into a bundle."""
        weights = (self.depthwise_weight, self.pointwise_weight, self.bias)
        config = self.config(self.depthwise_weight.dtype)
        layer = SeparableConv1D._of(config if name is None else replace(config, name=name))
        layer.build((None, self.in_channels, None))
        layer.set_weights(torch_operator.keras_weights(self.in_channels, *weights))
        return layer

    def _options(self) -> tuple[Any, Any, Any, Any]:
        return self.stride[0], self.padding, self.dilation[0], self.activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Raises
        ------
        ValueError
            For another rank, number of channels or device, and for too few steps.
        TypeError
            For another dtype than the weights'; under autocast inputs are cast.
        """
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise ValueError(
                "The `input` argument must be (batch, channels, steps) or (channels, steps) with "
                f"{self.in_channels} channels. Received: input.shape={tuple(input.shape)}"
            )
        if input.dim() == 2:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        kind = "cuda" if input.is_cuda else "cpu"
        if torch.is_autocast_enabled(kind) and input.dtype in _CAST_BY_AUTOCAST:
            input = input.to(torch.get_autocast_dtype(kind))
        weights = (self.depthwise_weight, self.pointwise_weight, self.bias)
        *options, activation = self._options()
        if not torch.is_grad_enabled() or not any(
            tensor is not None and tensor.requires_grad for tensor in (input, *weights)
        ):
            return torch_operator.separable_conv1d(input, *weights, *options, activation)
        y = torch_operator.separable_conv1d(input, *weights, *options, "linear")
        return ACTIVATIONS[activation](y)

    def extra_repr(self) -> str:
        """Describe the layer as Conv1d describes itself."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"stride={self.stride}", f"padding={self.padding}", f"dilation={self.dilation}"]
        return ", ".join(
            [*parts, f"bias={self.bias is not None}", f"activation={self.activation!r}"]
        )


class Folded(nn.Identity):  # type: ignore[misc]
    """Holds the place of a module that has become part of the layer `into`: gives its input back.

    To code that asks, it is a convolution of one tap.
    """

    kernel_size, stride, padding, dilation = (1,), (1,), (0,), (1,)

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def extra_repr(self) -> str:
        """Name the layer."""
        return f"into {self.into!r}"


def _check_weights(depthwise: Any, pointwise: Any, bias: Any, channels: int) -> None:
    fits = (
        depthwise.dim() == pointwise.dim() == 3
        and depthwise.shape[1] == pointwise.shape[2] == 1
        and pointwise.shape[1] == depthwise.shape[0]
        and depthwise.shape[0] % channels == 0
        and (bias is None or tuple(bias.shape) == tuple(pointwise.shape[:1]))
        and depthwise.dtype in torch_operator.DTYPES
        and all(w is None or w.dtype == depthwise.dtype for w in (pointwise, bias))
    )
    if not fits:
        shapes = [
            None if w is None else (tuple(w.shape), w.dtype) for w in (depthwise, pointwise, bias)
        ]
        raise ValueError(
            "The weights must be of one floating-point dtype and of the shapes (channels * "
            "depth_multiplier, 1, kernel_size), (filters, channels * depth_multiplier, 1), "
            f"(filters,) for {channels} channels. Received: {shapes}"
        )
