"""SeparableConv1D: the Keras layer for inference, running compiled kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import empty, ndarray  # by name: every call looks them up

from tvm_sepconv import activations, cuda_tensors, tensors
from tvm_sepconv.bundle import Bundle, BundleError, open_bundle
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.cuda_runtime import CudaLayer
from tvm_sepconv.options import BuildOptions, checked
from tvm_sepconv.runtime import CompiledLayer
from tvm_sepconv.variable import Variable
from tvm_sepconv.weights import WEIGHTS, Weights

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]


class SeparableConv1D(Weights):
    """Depthwise convolution along the steps, then a pointwise one that mixes the channels.

    ``y = activation(pointwise(depthwise(x)) + bias)``, as one compiled kernel. The arguments, their
    defaults and their checks are those of ``keras.layers.SeparableConv1D`` in Keras 3.15; see
    `SepConvConfig.parse` for the two extensions, ``padding=(left, right)`` and ``seed``.

    A call takes ``(batch, steps, channels)``, or ``(batch, channels, steps)`` for channels_first,
    of any floating-point dtype, as a NumPy array or a DLPack tensor on the CPU or an NVIDIA GPU,
    and returns the same kind, on the same device, in the layer's compute dtype; a nested list gives
    an array. Threads may share a layer. PyTorch's and CuPy's tensors on a GPU are computed with on
    their current stream; after the first call there, calls can be captured into a CUDA graph, which
    keeps to the weights it was captured with: capture again after `set_weights`, and keep the layer
    for as long as the graph.
    """

    # The arguments are spelled out once, where they are parsed.
    __signature__ = inspect.signature(SepConvConfig.parse).replace(
        return_annotation=inspect.Signature.empty
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up(SepConvConfig.parse(*args, **kwargs))

    def _set_up(self, config: SepConvConfig) -> None:
        if "bfloat16" in config.dtype:
            tensors.need_bfloat16()
        self.config = config
        self.name = config.name
        self.trainable = config.trainable
        self.dtype = config.compute_dtype
        self.depthwise_kernel: Variable | None = None
        self.pointwise_kernel: Variable | None = None
        self.bias: Variable | None = None
        self._channels: int | None = None
        self._options = BuildOptions()
        self._library: tuple[Path, Path] | None = None
        self._origin: tuple[Path, str, str] | None = None  # the bundle that the library is from
        self._compiled: CompiledLayer | None = None
        self._cuda: CudaLayer | None = None
        self._captured: list[CudaLayer] = []  # with weights that a CUDA graph goes on reading
        self._gpu: int | None = None  # where arrays are computed, and nothing elsewhere
        self._activity_loss: Any = None
        self._lock = threading.RLock()
        fused = activations.name_of(config.activation) in activations.ELEMENTWISE
        self._afterwards: Callable[[Array], Array] | None = None if fused else config.activation
        self._plain = fused and config.activity_regularizer is None
        self._last_shapes: tuple[tuple[int, ...] | None, tuple[int, ...], int] = (None, (), 0)
        self._native_dtype: np.dtype[Any] | None = None

    def _weights_changed(self) -> None:
        with self._lock:  # after a thread that is packing the old ones
            self._compiled = None
            self._replace_cuda(None)

    def _replace_cuda(self, new: CudaLayer | None) -> None:
        if self._cuda is not None and self._cuda.was_captured():
            self._captured.append(self._cuda)
        self._cuda = new

    # ---- configuration -----------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as Keras's layer does, JSON-able; a padding pair is a ValueError."""
        return {**self.config.keras_config(), "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SeparableConv1D:
        """Make a layer from the `get_config` of this class or of Keras's."""
        return cls._of(SepConvConfig.from_dict(config))

    @classmethod
    def _of(cls, config: SepConvConfig) -> SeparableConv1D:
        layer = cls.__new__(cls)
        layer._set_up(config)
        return layer

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Return the output's shape; None stays None."""
        self.config.check_input_shape(input_shape, self._channels)
        return self.config.compute_output_shape(input_shape)

    # ---- compiling and saving ----------------------------------------------------------------

    def compile(self, options: BuildOptions | None = None) -> None:
        """Compile now rather than at the first call, or find the library in the cache.

        Raises
        ------
        TypeError
            If `options` are no `BuildOptions`.
        ValueError
            If the layer is not built or the options do not fit this machine.
        RuntimeError
            If the compiler is not installed, naming the extra, or there is no linker.
        """
        self._need_built("compile")
        options = checked(options)
        with self._lock:
            if (options.target or "").startswith("cuda"):
                self._replace_cuda(cuda_tensors.compiled(self, 0, options))
                self._gpu = 0
                self._library = None
            else:
                self._library, self._gpu = self._find_library(options.target), None
                self._replace_cuda(None)
            self._options, self._compiled, self._origin = options, None, None
            if self._gpu is None:
                self._ready()

    def _find_library(self, target: str | None) -> tuple[Path, Path]:
        from tvm_sepconv import jit  # here: its imports cost more than all of the package's others

        assert self._channels is not None
        return jit.library(self.config.kernel_config(self._channels), target)

    def _arrays(self) -> tuple[Array, Array, Array | None]:
        depthwise, pointwise, *bias = (v.numpy().astype(self.dtype) for v in self.weights)
        return depthwise, pointwise, bias[0] if bias else None

    def _ready(self) -> CompiledLayer:
        with self._lock:
            if self._compiled is None:
                cached = self._origin is None  # … and the cache may have been cleared since
                if self._library is None or (cached and not self._library[0].is_file()):
                    self._library = self._find_library(self._options.target)
                self._native_dtype = np.dtype(self.dtype)
                library, runtime = self._library
                self._compiled = CompiledLayer(library, runtime, self.config, *self._arrays())
            return self._compiled

    def save(
        self,
        path: str | Path,
        targets: Sequence[str] | None = None,
        with_c: bool = False,
        options: BuildOptions | None = None,
    ) -> None:
        """Write a bundle of this layer to the folder `path`; see `tvm_sepconv.save`."""
        from tvm_sepconv.saving import save  # which imports this module

        save({self.name: self}, path, targets, with_c, options)

    def _content(self) -> tuple[SepConvConfig, dict[str, Array]]:
        """What a bundle keeps of the layer."""
        config = dataclasses.replace(self.config, trainable=self.trainable)
        return config, {v.name: v.numpy() for v in self.weights}

    # ---- calling -----------------------------------------------------------------------------

    def __call__(self, inputs: Any, out: Any = None, *, training: bool | None = None) -> Any:
        """Apply the layer, building and compiling it first if need be.

        Parameters
        ----------
        inputs
            See the class.
        out
            An array to write into: the output's shape and dtype, writable, no memory in common with
            the inputs. It is returned.
        training
            As in Keras, makes no difference to this layer.

        Raises
        ------
        TypeError
            For a dtype that is not floating-point.
        ValueError
            For a shape that does not fit, and an `out` that does not.
        RuntimeError
            If the layer has to be compiled and cannot be.
        """
        compiled, array = self._compiled, type(inputs) is ndarray
        if not array and tensors.on_gpu(inputs):
            return cuda_tensors.call(self, inputs, out)
        shape = inputs.shape if array else tensors.shape_of(inputs)
        known, expected, _ = self._last_shapes  # most calls are of one shape
        if compiled is None or not self._plain:
            return self._call_any(inputs, out)
        if shape != known:
            if len(shape) != 3:
                return self._call_any(inputs, out)
            expected, _ = self._geometry(shape)
        # The short way, for what needs no conversion: the runtime checks both tensors and runs. All
        # that it does not take, wrong or merely unusual, goes the long way: explained or converted.
        at = compiled.at
        try:
            x = at(inputs) if array else inputs
            if out is None:
                y = empty(expected, self._native_dtype)
                if compiled.call(compiled.handle, x, at(y)) == 0:
                    return y if array else tensors.way_back(inputs)(y)
            else:
                y = at(out) if type(out) is ndarray else tensors.writable(out)
                if y is not None and compiled.call(compiled.handle, x, y) == 0:
                    return out
        except (BufferError, TypeError, ValueError, RuntimeError):
            pass  # DLPack refuses read-only arrays, foreign byte orders, objects …
        return self._call_any(inputs, out)

    call = __call__

    def _geometry(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The kernel's output shape and the zeros to the left, for inputs of `shape`."""
        last = self._last_shapes  # most calls are of one shape, and checking takes microseconds
        if shape != last[0]:
            config = self.config
            config.check_input_shape(shape, self._channels)
            steps = shape[1 if config.channel_axis == -1 else 2]
            rows = (config.out_steps(steps), config.filters)
            rows = rows if config.channel_axis == -1 else rows[::-1]
            last = self._last_shapes = shape, (shape[0], *rows), config.pad_amounts(steps)[0]
        return last[1:]

    def _call_any(self, inputs: Any, out: Any) -> Any:
        config = self.config
        x, back = tensors.to_numpy(inputs)
        tensors.check_float(x, "inputs", config.compute_dtype)
        if not self.built:
            self.build(x.shape)
        shape, left = self._geometry(x.shape)
        final = shape if self._afterwards is None else self.compute_output_shape(x.shape)
        target = None if out is None else tensors.check_out(out, final, self.dtype, x)
        dtype = np.dtype(self.dtype)
        y = target if self._plain else None
        if self._gpu is not None:
            y = np.empty(shape, dtype) if y is None else y
            cuda_tensors.ready(self, self._gpu).run_arrays(self._gpu, x, left, y)
        else:
            compiled = self._ready()
            x = tensors.with_rows(x, dtype)
            if y is None or tensors.with_rows(y, dtype) is not y:
                y = np.empty(shape, dtype)
            if y.size:
                compiled.run(x, y, 1 if config.channel_axis == -1 else 2)
        y = self._finish(y)
        if target is None:
            return back(y)
        if y is not target:
            np.copyto(target, y)
        return out

    def _finish(self, y: Array) -> Array:
        """Apply to the kernel's output what NumPy computes: an activation, the penalty."""
        if self._afterwards is not None:
            y = np.asarray(self._afterwards(y)).astype(self.dtype, copy=False)
        if self.config.activity_regularizer is not None:
            self._activity_loss = self.config.activity_regularizer(y) / max(len(y), 1)
        return y

    # ---- copying -----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "channels": self._channels,
            "weights": self.get_weights(),
            "origin": self._origin,
            "gpu": self._gpu,
            "options": self._options,
            "trainable": self.trainable,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(state["config"])
        self._options, self.trainable = state["options"], state["trainable"]
        self._gpu = state["gpu"]
        if state["channels"] is not None:
            self._restore(state["channels"], state["weights"])
        if state["origin"] is not None:
            # Unpickled elsewhere or later, the bundle may be gone or of no use: compile then.
            with contextlib.suppress(BundleError):
                self._use_bundle(*state["origin"])

    def _restore(self, channels: int, weights: Sequence[Array]) -> None:
        """Become built with these weights, without drawing initial ones."""
        for name, value in zip(WEIGHTS, weights, strict=False):
            setattr(self, name, Variable(name, value, self._weights_changed))
        self._channels = channels

    def _use_bundle(self, path: Path, target: str, name: str) -> None:
        """Run the library that the layer `name` of a bundle has for `target`; verifies it."""
        bundle, chosen = open_bundle(path, target)
        assert self._channels is not None
        wanted = self.config.kernel_config(self._channels).key
        entry = bundle.manifest["layers"].get(name, {})
        if entry.get("library") != wanted:  # saved anew since: its library is of other shapes
            raise BundleError(f"{path} no longer has a layer '{name}' with the kernel {wanted}")
        self._take_library(bundle, chosen, name)

    def _take_library(self, bundle: Bundle, target: str, name: str) -> None:
        runtime, libraries = bundle.libraries(target)
        self._library = None if runtime is None else (libraries[name], runtime)
        self._origin = bundle.path, target, name

    def __repr__(self) -> str:
        return f"<SeparableConv1D name={self.name}, built={self.built}>"
