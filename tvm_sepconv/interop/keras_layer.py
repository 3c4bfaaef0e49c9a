"""The Keras layer whose inference runs the compiled kernel, on Keras's JAX, TensorFlow and torch.

Called for training, while a model is exported, or where the kernel cannot run (a GPU, integers),
it is `keras.layers.SeparableConv1D` itself. Gradients of an inference call are always those of the
native layer, computed by it.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

import keras  # noqa: TID253  # this module is imported only by what is made for Keras
import numpy as np

from tvm_sepconv import activations, layer, tensors
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop import jax_primitive

# Keras gives no sign that a call is traced for a file, so the callers are looked at.
_EXPORTERS = ("keras.src.export", "jax.experimental.jax2tf", "torch.onnx", "tf2onnx")


@keras.saving.register_keras_serializable("tvm_sepconv")
class SeparableConv1D(keras.layers.SeparableConv1D):  # type: ignore[misc]
    """Keras's SeparableConv1D, with inference by the compiled kernel.

    Arguments, weights, configuration and training are those of ``keras.layers.SeparableConv1D``.
    A model file that holds it needs this module imported before ``keras.saving.load_model``.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel = _Kernel()
        if keras.backend.backend() == "tensorflow":
            self.supports_jit = False  # XLA cannot call back; Keras's jit_compile="auto" asks this

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Apply the layer to ``(batch, steps, channels)``, or as `data_format` has it."""
        floating = keras.backend.standardize_dtype(inputs.dtype) == self.compute_dtype
        if training or not floating or len(inputs.shape) != 3 or _is_exporting():
            return super().call(inputs)
        variables = (self.depthwise_kernel, self.pointwise_kernel, self.bias)
        weights = [keras.ops.convert_to_tensor(v) for v in variables if v is not None]
        outputs = _on_backend()(self, inputs, *weights)
        return outputs if self._fused != "linear" else self.activation(outputs)

    @property
    def compiled_calls(self) -> int:
        """How often the compiled kernel has run."""
        return self._kernel.calls

    @property
    def _fused(self) -> str:
        """The activation that the kernel applies; "linear" leaves it to Keras."""
        name = getattr(self.activation, "__name__", "")
        own = getattr(keras.activations, name, None) is self.activation
        return name if own and name in activations.ELEMENTWISE else "linear"

    def _native(self, x: Any, depthwise: Any, pointwise: Any, *bias: Any) -> Any:
        """What the kernel computes, by Keras's own operations."""
        y = keras.ops.separable_conv(
            x,
            depthwise,
            pointwise,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        if bias:
            last = self.data_format == "channels_last"
            y = y + keras.ops.reshape(bias[0], (1, 1, -1) if last else (1, -1, 1))
        return y if self._fused == "linear" else self.activation(y)

    def _run(self, x: Any, *weights: Any) -> Any:
        """Run the kernel on concrete tensors; the same kind comes back, with no copy by DLPack."""
        return self._kernel.run(self._config, x, weights)

    def _config(self) -> SepConvConfig:
        return SepConvConfig.parse(
            self.filters,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
            depth_multiplier=self.depth_multiplier,
            activation=self._fused,
            use_bias=self.use_bias,
            name=self.name,
            dtype=self.compute_dtype,
        )


class _Kernel:
    """The compiled layer of a Keras layer, with the weights it was last called with."""

    def __init__(self) -> None:
        self.calls = 0
        self._layer: layer.SeparableConv1D | None = None
        self._weights: tuple[Any, ...] = ()
        self._arrays: list[Any] = []
        self._lock = threading.Lock()

    def run(self, config: Callable[[], SepConvConfig], x: Any, weights: tuple[Any, ...]) -> Any:
        with self._lock:
            if self._layer is None:
                self._layer = layer.SeparableConv1D._of(config())
            if not self._holds(weights):
                # Copies: TensorFlow and torch change their variables in place.
                self._arrays = [np.array(tensors.to_numpy(w)[0]) for w in weights]
                self._weights = weights
                self._layer._restore(self._arrays[0].shape[1], self._arrays)
                self._layer._weights_changed()
            self.calls += 1
        return self._layer(x)

    def _holds(self, weights: tuple[Any, ...]) -> bool:
        if len(weights) != len(self._weights):
            return False
        if keras.backend.backend() == "jax" and all(map(operator.is_, weights, self._weights)):
            return True  # JAX's arrays never change
        arrays = [tensors.to_numpy(w)[0] for w in weights]
        return all(map(np.array_equal, arrays, self._arrays))


def _is_exporting() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_EXPORTERS):
            return True
        frame = frame.f_back
    return False


def _on_backend() -> Callable[..., Any]:
    backends = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
    return backends.get(keras.backend.backend(), SeparableConv1D._native)


def _jax(own: SeparableConv1D, x: Any, *weights: Any) -> Any:
    import jax

    if not any(isinstance(t, jax.core.Tracer) for t in (x, *weights)):
        on_cpu = all(device.platform == "cpu" for device in x.devices())
        if not on_cpu:
            return own._native(x, *weights)
        return own._run(x, *weights)
    if jax.default_backend() != "cpu":
        return own._native(x, *weights)

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def compiled(*tensors: Any) -> Any:
        out = jax.eval_shape(own._native, *tensors)
        aval = jax.core.ShapedArray(out.shape, out.dtype)
        return jax_primitive.bind(own._run, aval, tensors)

    compiled.defjvp(lambda primals, tangents: jax.jvp(own._native, primals, tangents))
    return compiled(x, *weights)


def _tensorflow(own: SeparableConv1D, x: Any, *weights: Any) -> Any:
    import tensorflow as tf

    if "GPU" in x.device:
        return own._native(x, *weights)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def compiled(*tensors: Any) -> Any:
        if tf.executing_eagerly():
            y = tf.convert_to_tensor(own._run(*(t.numpy() for t in tensors)))
        else:
            y = tf.numpy_function(own._run, tensors, x.dtype)
            y.set_shape(own.compute_output_shape(x.shape))

        def gradient(upstream: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                native = own._native(*tensors)
            return tape.gradient(native, tensors, upstream)

        return y, gradient

    return compiled(*map(tf.convert_to_tensor, (x, *weights)))


def _torch(own: SeparableConv1D, x: Any, *weights: Any) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    away = x.device.type != "cpu" or x.dtype == torch.bfloat16  # which NumPy's DLPack lacks
    if tracing or away or isinstance(x, FakeTensor):
        return own._native(x, *weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return _torch_function().apply(own, x, *weights)
    return own._run(x.detach(), *weights)


@functools.cache
def _torch_function() -> Any:
    import torch

    class Compiled(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, own: SeparableConv1D, *tensors: Any) -> Any:
            ctx.own = own
            ctx.save_for_backward(*tensors)
            return own._run(*(t.detach() for t in tensors))

        @staticmethod
        def backward(ctx: Any, upstream: Any) -> Any:
            with torch.enable_grad():
                copies = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                native = ctx.own._native(*copies)
            return None, *torch.autograd.grad(native, copies, upstream)

    return Compiled
