"""The process side: one runtime library, compiled layers made from libraries, threads.

The runtime library owns the threads and the scratch memory, so a process loads exactly one: the
first wins, whichever bundle or cache entry it came from, and every later one must have its ABI.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.config import SepConvConfig

ABI = 2  # TVM_SEPCONV_ABI of native/tvm_sepconv.h; a test compares them
ERROR_MEMORY, ERROR_ARGUMENT, ERROR_TENSOR, ERROR_OVERLAP = 3, 4, 5, 6
_ERRORS: dict[int, type[Exception]] = {ERROR_MEMORY: MemoryError, ERROR_ARGUMENT: ValueError}
_MOST_THREADS = 2**31 - 1  # an int of C; the runtime knows its own limit
_PADDINGS = {"valid": 0, "same": 1}

_lock = threading.Lock()
_loaded: _Runtime | None = None
_threads: int | None = None  # asked for before a runtime was loaded

Array = npt.NDArray[Any]


class _View(ctypes.Structure):
    """tvm_sepconv_view: data, and strides in elements of batch and rows."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, array: Array) -> _View:
        batch, row = (stride // array.itemsize for stride in array.strides[:2])
        return cls(array.__array_interface__["data"][0], batch, row)


def _declines(handle: int, x: Any, out: Any) -> int:
    """In the place of tvm-ffi's call: refuses, so that the layer goes its other way, NumPy's."""
    return ERROR_TENSOR


def _itself(array: Array) -> Any:
    return array


class _Runtime:
    """A loaded runtime library: the C API, and its one function for tensors where tvm-ffi is.

    ``run`` takes ``at(array)`` for an array: its address where it can be read there.
    """

    def __init__(self, path: Path) -> None:
        c = ctypes.CDLL(str(path))
        c.tvm_sepconv_last_error.restype = ctypes.c_char_p
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        c.tvm_sepconv_layer_create.argtypes = (
            ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int, size, size,
            ctypes.POINTER(pointer),
        )  # fmt: skip
        c.tvm_sepconv_layer_destroy.argtypes = (pointer,)
        c.tvm_sepconv_run.argtypes = (pointer, size, size, _View, _View)
        self.c = c
        self.path = path
        self.run: Callable[[int, Any, Any], int] = _declines
        self.at: Callable[[Array], Any] = _itself
        with contextlib.suppress(ModuleNotFoundError):  # it has no wheel for 32-bit ARM and musl
            import tvm_ffi  # here, so that importing the package loads no native code

            module = tvm_ffi.load_module(str(path))
            self.run = module["run"]
            self.at = _address_or_itself(module)

    def check(self, status: int) -> None:
        """Raise what a status of the C API means."""
        if status:
            text = self.c.tvm_sepconv_last_error().decode(errors="replace")
            raise _ERRORS.get(status, RuntimeError)(text)


def _address_or_itself(module: Any) -> Callable[[Array], Any]:
    """How to hand arrays to the runtime: by address if what it reads there is an array.

    It knows the fields that NumPy's binary interface fixes. DLPack's way to the same takes 0.2 µs.
    """
    probe = np.zeros((4, 3, 2), np.float32)[1:, ::2]
    frozen = probe.view()
    frozen.flags.writeable = False
    # The runtime library of an older bundle has no such function; elsewhere ids are no addresses.
    if sys.implementation.name != "cpython" or not module.implements_function("reads_arrays"):
        return _itself
    return id if module["reads_arrays"](id(probe), id(frozen), probe) else _itself


def start(path: Path) -> _Runtime:
    """Load the runtime library at `path` unless the process already has one."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _Runtime(path.resolve())
            if _threads is not None:
                _loaded.c.tvm_sepconv_set_num_threads(min(_threads, _MOST_THREADS))
        return _loaded


def set_num_threads(threads: int | None) -> None:
    """Set how many threads one call may use, the calling one included.

    Parameters
    ----------
    threads
        None restores the default: ``$TVM_SEPCONV_NUM_THREADS``, else the smaller of the CPUs this
        process may run on and its control group's quota.

    Raises
    ------
    ValueError
        If `threads` is not a positive integer.
    """
    global _threads
    if isinstance(threads, np.integer):
        threads = int(threads)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise ValueError(
            f"The `threads` argument must be an integer. Received: threads={threads!r}"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"The `threads` argument must be at least 1. Received: threads={threads}")
    with _lock:
        _threads = threads
        if _loaded is not None:
            _loaded.c.tvm_sepconv_set_num_threads(min(threads or 0, _MOST_THREADS))


def num_threads() -> int | None:
    """Threads a call may use now; None before the first compiled layer if none were set."""
    return _threads if _loaded is None else int(_loaded.c.tvm_sepconv_num_threads())


class CompiledLayer:
    """A library with weights: immutable, so any number of threads may run it at once.

    Parameters
    ----------
    library, runtime
        Shared libraries for this machine.
    depthwise, pointwise, bias
        In Keras's shapes; copied and packed.
    """

    def __init__(
        self,
        library: Path,
        runtime: Path,
        config: SepConvConfig,
        depthwise: Array,
        pointwise: Array,
        bias: Array | None,
    ) -> None:
        self.runtime = start(runtime)
        left, right = config.padding if not isinstance(config.padding, str) else (0, 0)
        padding = _PADDINGS.get(config.padding, 2) if isinstance(config.padding, str) else 2
        arrays = [
            None if a is None else np.ascontiguousarray(a, config.accumulation_dtype)
            for a in (depthwise, pointwise, bias)
        ]
        handle = ctypes.c_void_p()
        status = self.runtime.c.tvm_sepconv_layer_create(
            os.fsencode(library),
            *(None if a is None else a.ctypes.data for a in arrays),
            padding, left, right, ctypes.byref(handle),
        )  # fmt: skip
        self.runtime.check(status)
        self.handle = int(handle.value or 0)
        self.call, self.at = self.runtime.run, self.runtime.at

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.runtime.c.tvm_sepconv_layer_destroy(self.handle)

    def run(self, x: Array, out: Array, steps_axis: int) -> None:
        """Run on arrays that were checked before: dtype, shapes, contiguous rows.

        This is the way for arrays that DLPack refuses, such as read-only ones.
        """
        batch, steps = x.shape[0], x.shape[steps_axis]
        status = self.runtime.c.tvm_sepconv_run(
            self.handle, batch, steps, _View.of(x), _View.of(out)
        )
        self.runtime.check(status)
