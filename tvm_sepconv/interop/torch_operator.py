"""The PyTorch operator ``tvm_sepconv::separable_conv1d``: a compiled kernel on torch's tensors.

::

    torch.ops.tvm_sepconv.separable_conv1d(
        x, depthwise, pointwise, bias, stride, padding, dilation, activation)

``x`` (batch, channels, steps); ``depthwise`` (channels * multiplier, 1, kernel_size), ``pointwise``
(filters, channels * multiplier, 1), ``bias`` (filters,) or None: torch's own layouts, of the dtype
of ``x``, or float32 beside a 16-bit ``x``, as under autocast. ``padding`` is (left, right).

It has implementations for the CPU, for NVIDIA's GPUs (on the current stream; capturable into a CUDA
graph after the first call), for tensors without data (shapes for torch.compile and torch.export)
and for gradients, which torch's own convolutions compute; those ask for the
activation "linear". Weights are packed once and again after they were changed, by an operation in
place or by ``load_state_dict``; a change through ``weight.data`` is seen only where gradients are
asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch  # noqa: TID253  # this module is imported only by what is made for PyTorch

from tvm_sepconv import jit
from tvm_sepconv.config import KernelConfig, SepConvConfig
from tvm_sepconv.cuda_runtime import CudaLayer
from tvm_sepconv.interop import folding
from tvm_sepconv.options import BuildOptions
from tvm_sepconv.runtime import CompiledLayer

NAME = "tvm_sepconv::separable_conv1d"
SCHEMA = (
    "(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias, int stride, int[2] padding, "
    "int dilation, str activation) -> Tensor"
)
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_libraries: dict[KernelConfig, tuple[Path, Path]] = {}
_cuda_libraries: dict[tuple[KernelConfig, int], Path] = {}


def config_of(
    depthwise: Any, pointwise: Any, bias: Any, dtype: Any, channels: int, stride: int,
    padding: tuple[int, int], dilation: int, activation: str,
) -> SepConvConfig:  # fmt: skip
    """Return the configuration of the layer that these arguments of the operator describe.

    Parameters
    ----------
    dtype
        Torch's, of the inputs.
    """
    policy = DTYPES[dtype] if depthwise.dtype == dtype else f"mixed_{DTYPES[dtype]}"
    taps = depthwise.shape[2]
    return SepConvConfig.parse(
        pointwise.shape[0],
        taps,
        strides=stride,
        padding=folding.padding(*padding, taps, stride, dilation),
        data_format="channels_first",
        dilation_rate=dilation,
        depth_multiplier=depthwise.shape[0] // channels,
        activation=activation,
        use_bias=bias is not None,
        dtype=policy,
    )


def keras_weights(channels: int, depthwise: Any, pointwise: Any, bias: Any) -> list[Any]:
    """Return the weights in Keras's layouts, as NumPy arrays; 16-bit ones become float32."""
    wide = torch.float64 if depthwise.dtype == torch.float64 else torch.float32
    depthwise, pointwise, bias = (
        None if weight is None else weight.detach().to("cpu", wide).numpy()
        for weight in (depthwise, pointwise, bias)
    )
    return folding.Weights(depthwise[:, 0], pointwise[..., 0], bias).keras(channels)


# ---- weights packed once -------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A compiled layer, and what tells whether its weights are still these."""

    state: tuple[Any, ...]
    owners: tuple[Any, ...]  # weak references: the entry goes when the first weight does
    memory: tuple[Any, ...]  # the values, or what keeps an address in `state` from another's use
    layer: CompiledLayer | CudaLayer


_packed: dict[tuple[Any, ...], _Packed] = {}


def _layer_of(weights: Sequence[Any], arguments: tuple[Any, ...]) -> Any:
    present = [weight for weight in weights if weight is not None]
    key = (*map(id, weights), *arguments)
    state = tuple(map(_state, present))
    found = _packed.get(key)
    if found is None or found.state != state or not all(map(_is_value, present, found.memory)):
        owners = tuple(weakref.ref(w, lambda _: _packed.pop(key, None)) for w in present)
        memory = tuple(w.detach().clone() if _changes(w) else w.detach() for w in present)
        found = _packed[key] = _Packed(state, owners, memory, _pack(weights, *arguments))
    return found.layer


def _changes(weight: Any) -> bool:
    """Whether `weight` is compared by value: in training it changes, an inference tensor untold."""
    return bool(weight.requires_grad or weight.is_inference())


def _is_value(weight: Any, kept: Any) -> bool:
    return not _changes(weight) or torch.equal(weight, kept)


def _state(weight: Any) -> tuple[Any, ...]:
    return (True,) if _changes(weight) else (weight._version, weight.data_ptr())


def _pack(
    weights: Sequence[Any], dtype: Any, channels: int, *options: Any
) -> CompiledLayer | CudaLayer:
    depthwise, pointwise, bias = weights
    config = config_of(depthwise, pointwise, bias, dtype, channels, *options)
    rounded = (None if weight is None else weight.detach().to(dtype) for weight in weights)
    arrays = [*keras_weights(channels, *rounded), None][:3]
    kernel = config.kernel_config(channels)
    if depthwise.is_cuda:
        layer = CudaLayer(_cuda_library(kernel, depthwise.device.index), *arrays)
        layer.on(depthwise.device.index)
        return layer
    return CompiledLayer(*_library(kernel), config, *arrays)


def _library(config: KernelConfig) -> tuple[Path, Path]:
    # Training packs weights every step, and looking into the cache takes longer than that.
    found = _libraries.get(config)
    if found is None or not found[0].exists():
        found = _libraries[config] = jit.library(config)
    return found


def _cuda_library(config: KernelConfig, index: int) -> Path:
    found = _cuda_libraries.get((config, index))
    if found is None or not found.exists():
        found = _cuda_libraries[config, index] = jit.cuda_library(config, index, BuildOptions())
    return found


# ---- the operator --------------------------------------------------------------------------------


def _check(x: Any, depthwise: Any) -> None:
    """Refuse inputs that no kernel here takes: another device, dtype or rank."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            "The `input` argument must be on the CPU or an NVIDIA GPU: tvm_sepconv has no kernels "
            f"for PyTorch on other devices. Received: input.device={x.device}. Move both with "
            "`module.cpu()` and `input.cpu()`"
        )
    if x.device != depthwise.device:
        raise ValueError(
            f"The `input` argument must be on {depthwise.device}, as the weights are. Received: "
            f"input.device={x.device}. Move one of the two with `.to(device)`"
        )
    narrow = depthwise.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    if x.dtype not in DTYPES or not (narrow or x.dtype == depthwise.dtype):
        raise TypeError(
            f"The `input` argument must have the weights' dtype {depthwise.dtype}. Received: "
            f"input.dtype={x.dtype}. Convert one of the two with `.to(dtype)`"
        )
    if x.dim() != 3 or x.shape[1] < 1 or depthwise.shape[0] % x.shape[1]:
        raise ValueError(
            "The `input` argument must be (batch, channels, steps), where the channels divide the "
            f"{depthwise.shape[0]} rows of the depthwise weight. Received: "
            f"input.shape={tuple(x.shape)}"
        )


def _empty_output(
    x: Any, depthwise: Any, pointwise: Any, stride: int, padding: Any, dilation: int
) -> Any:
    _check(x, depthwise)
    reach = (depthwise.shape[2] - 1) * dilation + 1
    padded = x.shape[2] + sum(padding)
    if padded < reach:
        raise ValueError(
            f"The `input` argument must have at least the kernel's {reach} steps, {sum(padding)} "
            f"of padding included. Received: input.shape={tuple(x.shape)}"
        )
    return x.new_empty((x.shape[0], pointwise.shape[0], (padded - reach) // stride + 1))


def _shape_alone(
    x: Any, depthwise: Any, pointwise: Any, bias: Any, stride: int, padding: Any, dilation: int,
    activation: str,
) -> Any:  # fmt: skip
    return _empty_output(x, depthwise, pointwise, stride, padding, dilation)


def _run(
    x: Any, depthwise: Any, pointwise: Any, bias: Any, stride: int, padding: Any, dilation: int,
    activation: str,
) -> Any:  # fmt: skip
    y = _empty_output(x, depthwise, pointwise, stride, padding, dilation)
    if y.numel() == 0:
        return y
    arguments = (x.dtype, x.shape[1], stride, tuple(padding), dilation, activation)
    layer = _layer_of((depthwise, pointwise, bias), arguments)
    if x.is_neg():  # torch negates such a view only when somebody reads it, which a kernel does not
        x = x.resolve_neg()
    if x.is_cuda:
        _run_cuda(layer, x, padding[0], y)
    elif layer.call(layer.handle, x, y):  # strides or an alignment that kernels do not take
        layer.runtime.check(layer.call(layer.handle, x.contiguous().clone(), y))
    return y


def _run_cuda(layer: CudaLayer, x: Any, left: int, y: Any) -> None:
    index = x.device.index
    size = layer.workspace_bytes(y.shape, index)
    workspace = x.new_empty(size, dtype=torch.uint8) if size else None
    if x.stride(2) != 1:  # a kernel takes any other strides
        x = x.contiguous()
    layer.library.run(x, *layer.there[index], left, y, workspace)  # tvm-ffi asks torch's stream


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, depthwise, pointwise, _, stride, padding, dilation, activation = inputs
    if activation != "linear":
        raise ValueError(
            f"{NAME} has gradients for the activation 'linear' only: apply another to its output. "
            f"Received: activation={activation!r}"
        )
    ctx.save_for_backward(x, depthwise, pointwise)
    ctx.options = stride, padding, dilation


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    depthwise, pointwise = (weight.to(x.dtype) for weight in weights)
    stride, (left, right), dilation = ctx.options
    options = {"stride": stride, "dilation": dilation, "groups": x.shape[1]}
    padded = torch.nn.functional.pad(x, (left, right))
    between = torch.nn.functional.conv1d(padded, depthwise, **options)
    grad_between = torch.nn.grad.conv1d_input(between.shape, pointwise, grad)
    grads = [None, None, None, None]
    if ctx.needs_input_grad[0]:
        of_padded = torch.nn.grad.conv1d_input(padded.shape, depthwise, grad_between, **options)
        grads[0] = of_padded[..., left : left + x.shape[2]]
    if ctx.needs_input_grad[1]:
        of = torch.nn.grad.conv1d_weight(padded, depthwise.shape, grad_between, **options)
        grads[1] = of.to(weights[0].dtype)
    if ctx.needs_input_grad[2]:
        of = torch.nn.grad.conv1d_weight(between, pointwise.shape, grad)
        grads[2] = of.to(weights[1].dtype)
    if ctx.needs_input_grad[3]:
        grads[3] = grad.sum((0, 2)).to(weights[1].dtype)
    return (*grads, None, None, None, None)


torch.library.define(NAME, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(NAME, ("cpu", "cuda"), _run)
torch.library.register_fake(NAME, _shape_alone)
torch.library.register_autograd(NAME, _backward, setup_context=_save)
separable_conv1d = torch.ops.tvm_sepconv.separable_conv1d.default
