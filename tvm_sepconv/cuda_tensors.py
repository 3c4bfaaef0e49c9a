"""A layer called with tensors on a GPU: the caller's memory and stream, the same kind back.

PyTorch's and CuPy's tensors are computed with on the stream that is current there, as their own
operations are. Frameworks that keep their streams to themselves, JAX among them, make a stream of
ours wait for the input by DLPack's hand-shake, and the call returns when the output is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sepconv import bundle, gpu, tensors
from tvm_sepconv.cuda_runtime import CudaLayer, Library
from tvm_sepconv.options import BuildOptions

if TYPE_CHECKING:
    from tvm_sepconv.layer import SeparableConv1D

_DEFAULT_STREAM = 1  # "legacy default", in DLPack's numbering and as CUDA's handle


class _Framework:
    """What a call needs of the framework its tensors are from; this one knows DLPack only."""

    has_current_stream = False  # to compute on, and so that the call need not wait for the output

    def stream(self, index: int) -> int:
        """The stream to compute on."""
        return _DEFAULT_STREAM

    def plain(self, x: Any) -> Any:
        """`x` as memory that holds what it shows."""
        return x

    def export(self, x: Any, stream: int) -> Any:
        """`x` as tvm-ffi's tensor, which work on `stream` may use."""
        import tvm_ffi

        return tvm_ffi.from_dlpack(x.__dlpack__(stream=stream))

    def empty(self, library: Library, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory beside `like`, in tvm-ffi's or the framework's own form."""
        import tvm_ffi

        return library.empty(tvm_ffi.Shape(shape), dtype, like.__dlpack_device__()[1])

    def back(self, y: Any, like: Any) -> Any:
        """What `empty` gave, as the caller knows tensors."""
        return y if self.has_current_stream else tensors.way_back(like)(y)

    def fitting(self, x: Any, dtype: str) -> Any:
        """`x` compact and of `dtype`, on its GPU."""
        raise TypeError(
            f"Tensors on a GPU that are not PyTorch's, CuPy's or JAX's must have dtype {dtype} and "
            f"contiguous rows. Received: a {type(x).__name__} of shape {tuple(x.shape)} and dtype "
            f"{x.dtype}; convert it there"
        )

    def assign(self, out: Any, y: Any) -> None:
        """Copy `y` into `out`, whose rows are not contiguous or whose values NumPy computed."""
        out[...] = y


class _Jax(_Framework):
    def fitting(self, x: Any, dtype: str) -> Any:
        return x.astype(dtype)  # always compact


class _TvmFfi(_Framework):
    has_current_stream = True

    def stream(self, index: int) -> int:
        import tvm_ffi

        return int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", index)))

    def export(self, x: Any, stream: int) -> Any:
        return x


class _CuPy(_Framework):
    has_current_stream = True

    def stream(self, index: int) -> int:
        # Zero means the default stream to CUDA and nothing to DLPack.
        return sys.modules["cupy"].cuda.get_current_stream().ptr or _DEFAULT_STREAM

    def empty(self, library: Library, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        with like.device:
            return sys.modules["cupy"].empty(shape, dtype)

    def fitting(self, x: Any, dtype: str) -> Any:
        with x.device:
            return x.astype(dtype, order="C")


class _Torch(_Framework):
    has_current_stream = True

    def stream(self, index: int) -> int:
        return int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)

    def plain(self, x: Any) -> Any:
        x = x.resolve_neg().resolve_conj()  # views that torch changes when it reads them
        return x.detach() if x.requires_grad else x

    def export(self, x: Any, stream: int) -> Any:
        import tvm_ffi

        return tvm_ffi.from_dlpack(x.detach())

    def empty(self, library: Library, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))

    def fitting(self, x: Any, dtype: str) -> Any:
        return x.to(getattr(sys.modules["torch"], dtype)).contiguous()


_FRAMEWORKS: dict[str, _Framework] = {
    "cupy": _CuPy(), "jax": _Jax(), "jaxlib": _Jax(), "torch": _Torch(), "tvm_ffi": _TvmFfi(),
}  # fmt: skip


def ready(layer: SeparableConv1D, index: int) -> CudaLayer:
    """Return `layer` as its CUDA library runs it, with the weights on GPU `index`.

    The library is the bundle's that the layer was loaded from, else one from the cache of compiled
    layers, built for that GPU if it is not there.

    Raises
    ------
    RuntimeError, ValueError, MemoryError
        See `CudaLayer.on` and `tvm_sepconv.jit.cuda_library`.
    BundleError
        If the bundle has no CUDA library, or a damaged one.
    """
    with layer._lock:
        if layer._cuda is None:
            layer._cuda = compiled(layer, index)
        layer._cuda.on(index)
        return layer._cuda


def bundle_target(path: str | Path, index: int) -> str:
    """Return the target of the bundle at `path` whose libraries GPU `index` runs.

    Raises
    ------
    RuntimeError, ValueError
        If there is no such GPU.
    BundleError
        If the bundle has nothing for it.
    """
    gpu.need(index)
    opened = bundle.Bundle(Path(path).absolute(), bundle.read_manifest(Path(path)))
    return bundle.cuda_target(opened, gpu.capability(index), gpu.driver_version())


def compiled(layer: SeparableConv1D, index: int, options: BuildOptions | None = None) -> CudaLayer:
    """Load the CUDA library of `layer` for GPU `index`, see `ready`; with `options` the cache's."""
    from tvm_sepconv import jit  # here: its imports cost more than all of the package's others

    if options is None and layer._origin is not None:
        path, target, name = layer._origin
        if not target.startswith("cuda"):
            target = bundle_target(path, index)
        opened, target = bundle.open_bundle(path, target)
        library = opened.libraries(target)[1][name]
    else:
        assert layer._channels is not None
        config = layer.config.kernel_config(layer._channels)
        library = jit.cuda_library(config, index, options or layer._options)
    return CudaLayer(library, *layer._arrays())


def call(layer: SeparableConv1D, x: Any, out: Any) -> Any:
    """Apply `layer` to `x` on the GPU it lies on; see `SeparableConv1D.__call__`.

    Raises
    ------
    TypeError, ValueError
        As for arrays; and for tensors that lie on another device than they must.
    RuntimeError, MemoryError
        See `tvm_sepconv.cuda_runtime`; also if the layer has no CUDA library and gets none.
    """
    compiled = layer._cuda
    # The short way, for torch's tensors that need no conversion. The library checks what it is
    # given before it touches it, and tvm-ffi asks torch for its stream.
    if compiled is not None and layer._plain and type(x).__module__ == "torch":
        shape = x.shape
        if len(shape) == 3 and not x.is_neg() and compiled.library.workspace is None:
            final, left = layer._geometry(shape)
            try:
                weights = compiled.there[x.get_device()]
                if out is None:
                    y = x.new_empty(final)
                    compiled.library.run(x, *weights, left, y)
                    return y
                if type(out).__module__ == "torch" and out.shape == final and not out.is_neg():
                    compiled.library.run(x, *weights, left, out)
                    return out
            except (BufferError, KeyError, TypeError, ValueError):
                pass  # another dtype, strided rows, a GPU that has no weights yet …
    return _call_any(layer, x, out)


def _call_any(layer: SeparableConv1D, x: Any, out: Any) -> Any:
    import tvm_ffi

    framework = _FRAMEWORKS.get(type(x).__module__.partition(".")[0], _Framework())
    index = int(x.__dlpack_device__()[1])
    if layer._gpu not in (None, index):
        raise ValueError(
            f"The `inputs` argument must be on cuda:{layer._gpu}, where the weights of layer "
            f"'{layer.name}' are. Received: a tensor on cuda:{index}; move it, or load the layer "
            f"with device='cuda:{index}'"
        )
    stream, given = framework.stream(index), x
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", index), stream):
        x = framework.plain(x)
        tensors.check_float(x, "inputs", layer.dtype)
        view = framework.export(x, stream)
        if not layer.built:
            layer.build(view.shape)
        shape, left = layer._geometry(view.shape)
        if out is not None:
            whole = shape if layer._plain else layer.compute_output_shape(view.shape)
            _check_out(out, whole, layer.dtype, index)
        compiled = ready(layer, index)
        library, weights = compiled.library, compiled.there[index]
        if str(view.dtype) != layer.dtype or not _has_rows(view):
            view = framework.export(framework.fitting(x, layer.dtype), stream)
        y = into = None
        if out is not None and layer._plain:
            into = framework.export(out, stream)
        direct = into is not None and _has_rows(into)
        if not direct:
            y = framework.empty(library, given, shape, layer.dtype)
            into = framework.export(y, stream)
        if 0 not in shape:
            size = compiled.workspace_bytes(shape, index)
            space = framework.empty(library, given, (size,), "uint8") if size else None
            library.run(view, *weights, left, into, space)
        if not layer._plain:
            array = layer._finish(compiled.download(into, index))
            y = framework.empty(library, given, array.shape, layer.dtype)
            compiled.upload(array, framework.export(y, stream), index)
        if out is not None and not direct:
            framework.assign(out, y)
        if not framework.has_current_stream:
            library.synchronize(index)
    return framework.back(y, given) if out is None else out


def _has_rows(view: Any) -> bool:
    """Whether a kernel takes the strides of tvm-ffi's tensor `view`: contiguous rows, upwards."""
    batch, row, element = view.strides
    return bool(batch >= 0 and row >= 0 and (element == 1 or view.shape[2] <= 1))


def _check_out(out: Any, shape: tuple[int | None, ...], dtype: str, index: int) -> None:
    """Refuse an `out` that outputs of `shape` and `dtype` on GPU `index` cannot be written to.

    Raises
    ------
    TypeError
        If it is no tensor, or of another dtype.
    ValueError
        If it is of another shape or device, or never changes.
    """
    if not hasattr(out, "__dlpack_device__"):
        raise TypeError(
            f"The `out` argument must be a tensor on cuda:{index}, as the inputs are. "
            f"Received: {type(out)}"
        )
    kind, place = (int(number) for number in out.__dlpack_device__())
    if (kind, place) != (tensors.CUDA, index):
        raise ValueError(
            f"The `out` argument must be on cuda:{index}, as the inputs are. Received: a "
            f"{type(out).__name__} on DLPack device type {kind}, index {place}"
        )
    if str(out.dtype).rpartition(".")[2] != dtype:
        raise TypeError(
            f"The `out` argument must be a tensor of dtype {dtype}. "
            f"Received: {type(out)} of dtype {out.dtype}"
        )
    if tuple(out.shape) != shape:
        raise ValueError(
            f"The `out` argument must have the output's shape {shape}. "
            f"Received: out.shape={tuple(out.shape)}"
        )
    if tensors.is_immutable(out):
        raise ValueError(
            f"The `out` argument must be writable. Received: a read-only {type(out).__name__}"
        )
    if tensors.is_lazily_negated(out):
        raise ValueError(
            "The `out` argument must be plain memory. Received: a tensor that torch negates when "
            "it is read (`is_neg()`), such as `z.conj().imag`; pass an empty one"
        )
