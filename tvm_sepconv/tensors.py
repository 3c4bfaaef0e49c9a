"""Arrays and tensors in, the same kind out: NumPy arrays, lists, and DLPack tensors on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
CUDA = 2  # kDLCUDA
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_WIDEST_ROW = 2**16  # elements from row to row: kernels index a tile of rows with 32 bits
# Exact up to this effort, "yes" beyond: views may be interleaved without sharing an element.
_OVERLAP_WORK: Any = 10_000


def to_numpy(value: Any, name: str = "inputs") -> tuple[Array, Callable[[Array], Any]]:
    """Return `value` as an array, without a copy where it is one, and how to go back.

    Raises
    ------
    TypeError
        If it is neither array, nested list of numbers, nor a tensor that speaks DLPack.
    ValueError
        For a tensor on another device, naming the way out, and for ragged lists.
    """
    if isinstance(value, np.ndarray):
        return value, lambda y: y
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, name)
    if isinstance(value, (list, tuple, float, int)) or hasattr(value, "__array__"):
        try:
            return np.asarray(value), lambda y: y
        except ValueError as error:
            raise ValueError(
                f"The `{name}` argument must be a rectangular array. Received nested lists of "
                "different lengths; pad them, or call the layer once for each length"
            ) from error
    raise TypeError(
        f"The `{name}` argument must be a NumPy array, a nested list of floats, or a tensor with "
        f"`__dlpack__`. Received: {type(value)}"
    )


def _from_dlpack(value: Any, name: str) -> tuple[Array, Callable[[Array], Any]]:
    device, index = value.__dlpack_device__()
    if int(device) not in _CPU_DEVICES:
        place = "CPU, as the inputs are" if name == "out" else "CPU or an NVIDIA GPU"
        raise ValueError(
            f"The `{name}` argument must be on the {place}. Received: a {type(value).__name__} "
            f"on DLPack device type {int(device)}, index {index}; move it to the CPU first"
        )
    back = way_back(value)
    if is_lazily_negated(value):
        if name == "out":
            raise ValueError(
                "The `out` argument must be plain memory. Received: a tensor that torch negates "
                "when it is read (`is_neg()`), such as `z.conj().imag`; pass an empty one"
            )
        value = value.resolve_neg()
    if hasattr(value, "resolve_conj"):  # complex numbers: refused later, by their dtype
        value = value.resolve_conj()
    if getattr(value, "requires_grad", False):
        value = value.detach()  # inference: torch exports no tensor that still records gradients
    if str(getattr(value, "dtype", None)) == "torch.bfloat16":  # which NumPy's DLPack lacks
        need_bfloat16()
        integers = value.view(sys.modules["torch"].int16)  # of the same 16 bits
        return np.from_dlpack(integers).view("bfloat16"), back
    try:
        return np.from_dlpack(value), back
    except (BufferError, RuntimeError, TypeError):
        # NumPy's DLPack has no bfloat16; JAX hands one out as an array of ml_dtypes all the same.
        if not hasattr(value, "__array__"):
            raise
    try:
        return np.asarray(value), back
    except TypeError as error:
        raise TypeError(
            f"The `{name}` argument must have a dtype that NumPy has. Received: a "
            f"{type(value).__name__} of {getattr(value, 'dtype', 'unknown dtype')}; convert it to "
            "float32 first"
        ) from error


def way_back(value: Any) -> Callable[[Array], Any]:
    """Return the `from_dlpack` of the framework that `value` is from."""
    if isinstance(value, np.ndarray):  # a subclass of it: outputs are plain arrays
        return lambda y: y
    if type(value).__module__ == "torch":
        return _to_torch
    if hasattr(value, "__array_namespace__"):
        namespace = value.__array_namespace__()
        # ml_dtypes' bfloat16, which is of this kind to NumPy, is not in its DLPack.
        return lambda y: (
            namespace.asarray(y, device=value.device)
            if getattr(y.dtype, "kind", None) == "V"
            else namespace.from_dlpack(y)
        )
    root = sys.modules[type(value).__module__.partition(".")[0]]
    if root.__name__ == "tensorflow":
        # Its from_dlpack takes a capsule, and NumPy makes none of bfloat16.
        return lambda y: (
            root.constant(y)
            if y.dtype.kind == "V"
            else root.experimental.dlpack.from_dlpack(y.__dlpack__())
        )
    if hasattr(root, "from_dlpack"):
        return root.from_dlpack  # type: ignore[no-any-return]
    return lambda y: y


def _to_torch(y: Array) -> Any:
    torch = sys.modules["torch"]
    if y.dtype.kind == "V":  # bfloat16, which torch knows and NumPy does not
        return torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(y)  # half the time of its from_dlpack


def is_lazily_negated(value: Any) -> bool:
    """Whether `value` is a view that torch negates when it reads it: DLPack knows no such thing."""
    is_neg = getattr(value, "is_neg", None)
    return is_neg is not None and bool(is_neg())


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor whose memory DLPack exports as it is, else ()."""
    shape = getattr(value, "shape", None) if hasattr(value, "__dlpack__") else None
    return shape if isinstance(shape, tuple) and not is_lazily_negated(value) else ()


def writable(out: Any) -> Any:
    """Return what the runtime may write `out` through, or None if `out` does not change that way.

    Raises
    ------
    TypeError, ValueError, BufferError or RuntimeError
        If its memory is not exported as it is.
    """
    if type(out).__module__ == "torch":  # none of its tensors is read-only: no need to ask NumPy
        return None if is_lazily_negated(out) else out
    if not hasattr(out, "__dlpack__") or is_immutable(out):
        return None
    array = np.from_dlpack(out)
    return array if array.flags.writeable else None


def is_immutable(value: Any) -> bool:
    """Whether `value` is of a framework whose tensors never change, whatever DLPack says."""
    return type(value).__module__.partition(".")[0] in ("jax", "jaxlib", "tensorflow")


def on_gpu(value: Any) -> bool:
    """Whether `value` is a tensor in the memory of an NVIDIA GPU."""
    found = getattr(value, "is_cuda", None)  # torch's, which takes a tenth of the time
    if found is None and hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) == CUDA
    return bool(found)


def check_float(array: Any, name: str, dtype: str) -> None:
    """Refuse what would have to be converted silently: integers, bool, complex, objects.

    Raises
    ------
    TypeError
        Naming the dtype and `.astype`.
    """
    found = array.dtype
    # NumPy has floats beyond these; other frameworks' dtypes are known by their last name.
    own = str(found).rpartition(".")[2]
    if getattr(found, "kind", None) != "f" and own not in _FLOATS:
        raise TypeError(
            f"The `{name}` argument must have a floating-point dtype. Received: "
            f"{name}.dtype={found}. Convert it with `.astype('{dtype}')` if that is meant"
        )


def check_out(out: Any, shape: tuple[int | None, ...], dtype: str, x: Array) -> Array:
    """Return `out` as an array to write outputs of `shape` and `dtype` into, computed from `x`.

    Raises
    ------
    TypeError
        If it is no array or tensor, or of another dtype.
    ValueError
        If it is of another shape, read-only, or overlaps `x` in memory.
    """
    array, _ = to_numpy(out, "out")
    if isinstance(out, (list, tuple)) or array.dtype != np.dtype(dtype):
        raise TypeError(
            f"The `out` argument must be an array of dtype {dtype}. "
            f"Received: {type(out)} of dtype {array.dtype}"
        )
    if array.shape != shape:
        raise ValueError(
            f"The `out` argument must have the output's shape {shape}. "
            f"Received: out.shape={array.shape}"
        )
    if not array.flags.writeable or is_immutable(out):
        raise ValueError(
            f"The `out` argument must be writable. Received: a read-only {type(out).__name__}"
        )
    if np.may_share_memory(array, x, max_work=_OVERLAP_WORK):
        raise ValueError(
            "The `out` argument must not overlap the inputs in memory: outputs are written "
            "while inputs are still read. Pass an array of its own"
        )
    return array


def with_rows(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` as kernels take it: native `dtype`, aligned, contiguous along the last axis.

    A copy is made only when one of these does not hold already.
    """
    size = array.itemsize
    fits = (
        array.dtype == dtype
        and array.dtype.isnative
        and array.flags.aligned
        and (array.strides[2] == size or array.shape[2] <= 1)
        and all(stride >= 0 and stride % size == 0 for stride in array.strides[:2])
        and array.strides[1] <= max(_WIDEST_ROW, array.shape[2]) * size
    )
    if fits:
        return array
    # Values beyond the narrower type become infinite, which is what Keras's cast gives too.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype)


def need_bfloat16() -> None:
    """Give NumPy the dtype bfloat16, or raise an ImportError that names the package it is in."""
    try:
        importlib.import_module("ml_dtypes")  # gives NumPy the dtype
    except ImportError as error:
        raise ImportError(
            "The dtype bfloat16 needs a package that adds it to NumPy: pip install ml_dtypes"
        ) from error
