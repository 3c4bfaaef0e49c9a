"""The layer as a function of JAX: under `jit`, `vmap` and `grad`, on the CPU.

>>> import jax, jax.numpy as jnp
>>> from tvm_sepconv.interop.jax import separable_conv1d
>>> params = jnp.ones((3, 4, 1)), jnp.ones((1, 4, 2)), jnp.zeros(2)
>>> apply = jax.jit(lambda params, x: separable_conv1d(x, *params, padding="same"))
>>> apply(params, jnp.ones((8, 100, 4))).shape
(8, 100, 2)

XLA reaches the kernel through the package jax-tvm-ffi if it is installed (Python 3.11 or newer, JAX
0.7.2 or newer), else by a callback of JAX. Both were measured, and jax-tvm-ffi is faster: it hands
over XLA's buffers and the kernel writes into the result, where a callback wraps its arguments for
Python and its result is copied. On two cores with AVX-512 a jitted call of 64 → 64 channels and 9
taps on 100 steps takes 40 µs through jax-tvm-ffi, 74 µs by a callback, and 0.35 ms in `jax.lax`.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import activations, jit, tensors
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop import jax_native, jax_primitive
from tvm_sepconv.runtime import CompiledLayer

Array = npt.NDArray[Any]

_PACKED = 128  # layers whose packed weights are kept, over all configurations
_SAMPLES = 16  # elements of a weight by which it is looked up


def separable_conv1d(
    x: Any,
    depthwise_kernel: Any,
    pointwise_kernel: Any,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    data_format: str | None = None,
    dilation_rate: Any = 1,
    activation: str | Callable[[Any], Any] | None = None,
) -> Any:
    """Compute ``activation(pointwise(depthwise(x)) + bias)`` by one compiled kernel.

    It can be used under ``jax.jit``, ``jax.vmap`` and every kind of ``jax.grad``. Gradients, and
    the outputs computed along with them, are those of `jax.lax`'s own convolutions. ``vmap`` over
    `x` makes one call with a larger batch; over weights, one call after the other.

    Weights are packed when they are first seen. A call compares them with those that its kernel
    holds, which takes a few per cent of its time, so they may be arguments of a jitted function.

    Parameters
    ----------
    x
        (batch, steps, channels), or (batch, channels, steps) for channels_first, of a floating
        dtype, which is the result's too.
    depthwise_kernel
        (kernel_size, channels, depth_multiplier); all weights are rounded to the dtype of `x`.
    pointwise_kernel
        (1, channels * depth_multiplier, filters).
    bias
        (filters,), or None.
    padding
        "valid", "same" or (left, right), zeros put around the steps.
    data_format
        "channels_last" or "channels_first"; None is what the user's keras.json says, as for the
        layer, and "channels_last" without one.
    activation
        A name of Keras's that applies to each element alone, which the kernel computes; or a
        function of JAX arrays, which is applied afterwards.

    Returns
    -------
    jax.Array
        (batch, output steps, filters), or (batch, filters, output steps) for channels_first.

    Raises
    ------
    TypeError
        For a dtype that is not floating-point.
    ValueError
        For shapes that do not fit, other arguments that the layer does not take, and a computation
        for another device than the CPU.
    ImportError
        Without JAX, naming the extra.
    RuntimeError
        Without the compiler.
    """
    jax = _jax()
    name, afterwards = _activation(activation)
    arrays = {"x": x, "depthwise_kernel": depthwise_kernel, "pointwise_kernel": pointwise_kernel}
    if bias is not None:
        arrays["bias"] = bias
    for argument, value in arrays.items():
        if not isinstance(value, jax.Array):
            arrays[argument] = jax.numpy.asarray(value)
        tensors.check_float(arrays[argument], argument, "float32")
    _check_shapes({argument: array.shape for argument, array in arrays.items()})
    x, *weights = arrays.values()
    kernel = _kernel(
        *weights[0].shape, weights[1].shape[2], bias is not None, x.dtype.name,
        *map(_hashable, (strides, padding, data_format, dilation_rate)), name,
    )  # fmt: skip
    kernel.config.check_input_shape(x.shape, kernel.channels)
    # Not even asked for, the conversion of arrays outside `jit` takes longer than a small kernel.
    y = kernel.function(x, *(w if w.dtype == x.dtype else w.astype(x.dtype) for w in weights))
    return y if afterwards is None else afterwards(y)


def _jax() -> Any:
    try:
        import jax
    except ImportError as error:
        raise ImportError(
            "`tvm_sepconv.interop.jax` needs JAX, which is not installed. Install the extra: "
            "pip install 'tvm-sepconv[jax]'"
        ) from error
    return jax


def _activation(activation: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """Return the name for the kernel, and what is applied after it."""
    fn = activations.get(activation)
    name = activations.name_of(fn)
    if name is None:
        return "linear", fn
    if name not in activations.ELEMENTWISE:
        raise ValueError(
            "The `activation` argument must be a name that applies to each element alone, one of "
            f"{sorted(activations.ELEMENTWISE)}, or a function of JAX arrays, such as "
            f"`jax.nn.softmax`. Received: activation={activation!r}"
        )
    return name, None


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    def need(argument: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"The `{argument}` argument must be of shape {expected}. "
                f"Received: {argument}.shape={shapes[argument]}"
            )

    depthwise, pointwise = shapes["depthwise_kernel"], shapes["pointwise_kernel"]
    need("x", len(shapes["x"]) == 3, "(batch, steps, channels) or (batch, channels, steps)")
    fits = len(depthwise) == 3 and 0 not in depthwise
    need("depthwise_kernel", fits, "(kernel_size, channels, depth_multiplier)")
    between = depthwise[1] * depthwise[2]
    fits = len(pointwise) == 3 and pointwise[:2] == (1, between) and pointwise[2] > 0
    need("pointwise_kernel", fits, f"(1, channels * depth_multiplier = {between}, filters)")
    if "bias" in shapes:
        need("bias", shapes["bias"] == pointwise[2:], f"(filters,) = {pointwise[2:]}")


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _kernel(
    kernel_size: int, channels: int, depth_multiplier: int, filters: int, use_bias: bool,
    dtype: str, strides: Any, padding: Any, data_format: Any, dilation_rate: Any, activation: str,
) -> _Kernel:  # fmt: skip
    config = SepConvConfig.parse(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        data_format=data_format,
        dilation_rate=dilation_rate,
        depth_multiplier=depth_multiplier,
        activation=activation,
        use_bias=use_bias,
        name="separable_conv1d",
        dtype=dtype,
    )
    return _Kernel(config, channels)


class _Kernel:
    """A configuration's kernel as a function of JAX arrays."""

    def __init__(self, config: SepConvConfig, channels: int) -> None:
        self.config = config
        self.channels = channels
        self._files: tuple[Path, Path] | None = None
        self._number = jax_primitive.add_in_place(self._run_in_place)
        self.function = jax_native.differentiable(config, self._compiled)

    def _compiled(self, x: Any, *weights: Any) -> Any:
        from jax.core import ShapedArray

        self._library()  # while it is traced: errors raised in XLA's threads lose their kind
        shape = self.config.compute_output_shape(x.shape)
        wide = (weight.astype(self.config.accumulation_dtype) for weight in weights)
        aval = ShapedArray(shape, x.dtype)
        return jax_primitive.bind(self._run, aval, (x, *wide), self._number)

    def _library(self) -> tuple[Path, Path]:
        if self._files is None or not self._files[0].exists():
            self._files = jit.library(self.config.kernel_config(self.channels))
        return self._files

    def _run(self, x: Array, *weights: Array) -> Array:
        shape: Any = self.config.compute_output_shape(x.shape)
        y = np.empty(shape, x.dtype)
        layer = self._layer(weights)
        layer.run(tensors.with_rows(x, x.dtype), y, 1 if self.config.channel_axis == -1 else 2)
        return y

    def _run_in_place(self, x: Any, *tensors: Any) -> None:
        *weights, y = tensors
        layer = self._layer([np.from_dlpack(weight) for weight in weights])
        layer.runtime.check(layer.call(layer.handle, x, y))

    def _layer(self, weights: Sequence[Array]) -> CompiledLayer:
        return _packed.get(
            id(self), weights, lambda *kept: CompiledLayer(*self._library(), self.config, *kept)
        )


class _Packed:
    """Layers by some elements of their weights; all are compared before a layer is used.

    XLA has no names for weights, and their addresses tell nothing: those of a callback's arguments
    are of copies, and freed memory comes to hold others' weights.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[Any, tuple[list[Array], CompiledLayer]]
        self._kept = collections.OrderedDict()

    def get(
        self, kernel: int, weights: Sequence[Array], pack: Callable[..., CompiledLayer]
    ) -> CompiledLayer:
        steps = (max(weight.size // _SAMPLES, 1) for weight in weights)
        samples = (w.reshape(-1)[::step].tobytes() for w, step in zip(weights, steps, strict=True))
        key = kernel, *samples
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or not all(map(_equal, weights, found[0])):
                copies = [weight.copy() for weight in weights]  # nothing may hold XLA's buffers
                found = copies, pack(*[*copies, None][:3])
            self._kept[key] = found
            if len(self._kept) > _PACKED:
                self._kept.popitem(last=False)  # the one not used for longest
            return found[1]


_packed = _Packed()


def _equal(weight: Array, kept: Array) -> bool:
    """Compare arrays of one shape, in a third of the time of NumPy's `array_equal`."""
    return bool((weight == kept).all())
