"""Tensors that say they lie on a GPU: DLPack over memory of the CPU, in the manner of frameworks.

Each records the streams it is asked for. The module's name is that of a framework of no known kind,
with a `from_dlpack` of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
OFFSET = 48  # bytes from what DLPack calls the data to the first element
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("index", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _DLTensor),
    )  # fmt: skip


_alive: dict[int, Any] = {}  # exported tensors, by the address of what was handed out


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _alive.pop(address)


def _exported(tensor: Tensor, kind: Any) -> Any:
    """A managed tensor of DLPack that lives until its deleter is called."""
    array, dtype = tensor.array, np.dtype(tensor.array.dtype)
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
    managed = kind(deleter=ctypes.cast(_delete, ctypes.c_void_p).value)
    code = _CODES[dtype.name.rstrip("0123456789")]
    managed.tensor = _DLTensor(
        array.ctypes.data - OFFSET, CUDA, tensor.index, array.ndim, code, 8 * array.itemsize, 1,
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), OFFSET,
    )  # fmt: skip
    _alive[ctypes.addressof(managed)] = managed, shape, strides, tensor
    return managed


class Tensor:
    """A framework that knows DLPack only."""

    def __init__(self, array: Any, index: int = 0) -> None:
        self.array, self.index = np.asarray(array), index
        self.streams: list[Any] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.index

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(_exported(self, _Managed)), b"dltensor", None)


def from_dlpack(tensor: Any) -> Tensor:
    """Take over what another framework computed: here, a copy of tvm-ffi's memory."""
    assert tensor.__dlpack_device__()[0] == CUDA
    size = int(np.prod(tensor.shape)) * np.dtype(str(tensor.dtype)).itemsize
    data = ctypes.string_at(tensor.data_ptr(), size)
    array = np.frombuffer(data, str(tensor.dtype)).reshape(tensor.shape).copy()
    return Tensor(array, tensor.__dlpack_device__()[1])


class Jax(Tensor):
    __module__ = "jaxlib._jax"

    def astype(self, dtype: str) -> Jax:
        return Jax(self.array.astype(dtype, order="C"), self.index)

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda y: Jax(from_dlpack(y).array, self.index))


# ---- frameworks with a current stream -----------------------------------------------------------


class CuPy(Tensor):
    __module__ = "cupy"

    def astype(self, dtype: str, order: str) -> CuPy:
        return CuPy(self.array.astype(dtype, order=order), self.index)

    @property
    def device(self) -> Any:
        return contextlib.nullcontext()

    def __setitem__(self, key: Any, value: CuPy) -> None:
        self.array[key] = value.array


def cupy_module(stream: int) -> Any:
    """The module `cupy` with this current stream."""
    current = SimpleNamespace(ptr=stream)
    return SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: current),
        empty=lambda shape, dtype: CuPy(np.full(shape, np.nan).astype(dtype)),
    )


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p), ("from_py", ctypes.c_void_p), ("to_py", ctypes.c_void_p),
        ("borrow", ctypes.c_void_p), ("current", ctypes.c_void_p),
    )  # fmt: skip


STREAM = [5]  # the current stream of what stands for PyTorch


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
def _from_py(tensor: Any, out: Any) -> int:
    out[0] = ctypes.addressof(_exported(tensor, _Versioned))
    return 0


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def _current(device_type: int, index: int, out: Any) -> int:
    out[0] = STREAM[0]
    return 0


_exchange = _Exchange(
    1, 2, None, None, ctypes.cast(_from_py, ctypes.c_void_p).value, None, None,
    ctypes.cast(_current, ctypes.c_void_p).value,
)  # fmt: skip


class Torch(Tensor):
    """A tensor of PyTorch: hands tvm-ffi its memory and its stream through a table of functions."""

    __module__ = "torch"
    __dlpack_c_exchange_api__ = ctypes.addressof(_exchange)
    is_cuda = True

    def __init__(
        self, array: Any, index: int = 0, requires_grad: bool = False, negated: bool = False
    ) -> None:
        super().__init__(array, index)
        self.requires_grad, self.negated = requires_grad, negated

    @property
    def dtype(self) -> Any:
        return f"torch.{self.array.dtype.name}"

    @property
    def device(self) -> Any:
        return SimpleNamespace(index=self.index)

    def get_device(self) -> int:
        return self.index

    def stride(self, axis: int) -> int:
        return self.array.strides[axis] // self.array.itemsize

    def is_neg(self) -> bool:
        return self.negated

    def resolve_neg(self) -> Torch:
        return Torch(-self.array, self.index) if self.negated else self

    def resolve_conj(self) -> Torch:
        return self

    def detach(self) -> Torch:
        return Torch(self.array, self.index)

    def new_empty(self, shape: Any, dtype: Any = None) -> Torch:
        return Torch(np.full(shape, 99).astype(dtype or self.array.dtype), self.index)

    def to(self, dtype: str) -> Torch:
        return Torch(self.array.astype(dtype), self.index)

    def contiguous(self) -> Torch:
        return Torch(np.ascontiguousarray(self.array), self.index)

    def __setitem__(self, key: Any, value: Torch) -> None:
        self.array[key] = value.array


def torch_module() -> Any:
    """The module `torch`, as far as a layer asks it."""
    names = ("float16", "bfloat16", "float32", "float64", "uint8")
    streams = SimpleNamespace(current_stream=lambda index: SimpleNamespace(cuda_stream=STREAM[0]))
    return SimpleNamespace(cuda=streams, **{name: name for name in names})
