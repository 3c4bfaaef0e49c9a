"""The process side of CUDA libraries: loading, weights on GPUs, arrays that live on the CPU.

A library loads with tvm-ffi alone and carries its own copy of CUDA's runtime, so a device needs a
driver and no toolkit. Nothing here allocates or waits in a call whose tensors lie on the GPU, once
the weights are there: such a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import gpu, targets

Array = npt.NDArray[Any]

_PTX = 2  # what `targets.cuda_code` calls code that the driver has yet to compile


def index_of(device: Any) -> int | None:
    """Return the GPU that `device` names: None for "cpu", 0 for "cuda", 1 for "cuda:1".

    Raises
    ------
    ValueError
        For any other name; whether there is such a GPU is not asked.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(device))  # torch.device prints so, too
    if found is None:
        raise ValueError(
            "The `device` argument must be 'cpu', 'cuda' or 'cuda:<index>'. "
            f"Received: device={device!r}"
        )
    return None if found[0] == "cpu" else int(found[1] or 0)


class Library:
    """A loaded CUDA library: its functions for tensors, and what it says of itself.

    Parameters
    ----------
    path
        The library, built for this machine's processor.

    Raises
    ------
    RuntimeError
        If tvm-ffi is not installed or the file does not load.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tvm_ffi  # here, so that importing the package loads no native code
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "CUDA libraries are loaded by tvm-ffi, which is not installed: "
                "pip install apache-tvm-ffi. It has no wheel for 32-bit ARM and musl"
            ) from error
        self.path = path
        module = tvm_ffi.load_module(str(path))
        names = ("run", "prepare", "empty", "pinned", "copy", "synchronize")
        self.run, self.prepare, self.empty, self.pinned, self.copy, self.synchronize = (
            module[name] for name in names
        )
        self.was_captured = module["was_captured"]
        self.description: dict[str, Any] = json.loads(module["describe"]())
        # Of (batch, output steps, GPU), in bytes; kernels that keep all to themselves need none.
        self.workspace = module["workspace"] if self.description["workspace"] else None

    def check(self, index: int) -> None:
        """Find out whether the library runs on GPU `index`, before CUDA says so less clearly.

        Raises
        ------
        RuntimeError
            If no GPU can be used, the driver is too old, or the GPU's architecture is not among
            the library's, naming those.
        ValueError
            If there is no GPU `index`.
        """
        gpu.need(index)
        built, driver, here = self.description["cuda"], gpu.driver_version(), gpu.capability(index)
        archs, ptx = self.description["archs"], self.description["ptx"]
        code = targets.cuda_code(archs, ptx, here)
        if code is None:
            raise RuntimeError(
                f"{self.path} has code for {', '.join(archs)}, and for all newer than {ptx}; GPU "
                f"cuda:{index} is an sm_{here}. Build it for the target cuda-sm_{here}, or for "
                "all: cuda"
            )
        if driver // 1000 < built // 1000 or (code == _PTX and driver < built):
            needs = _release(built if code == _PTX else built // 1000 * 1000)
            raise RuntimeError(
                f"{self.path} needs a driver for CUDA {needs}; this machine's is for "
                f"{_release(driver)}. Update the NVIDIA driver, or build the library with an older "
                f"CUDA toolkit for the target cuda-sm_{here}"
            )


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def pack(
    packing: Mapping[str, Any], depthwise: Array, pointwise: Array, bias: Array | None
) -> tuple[Array, Array, Array | None]:
    """Lay weights out as the kernels of a library read them.

    Parameters
    ----------
    packing
        ``{"lanes", "channels", "dtype"}`` of the library's description.
    depthwise, pointwise, bias
        ``(kernel, channels, m)``, ``(1, channels * m, filters)`` and ``(filters,)``, as in Keras.

    Returns
    -------
    tuple
        ``(kernel, m, channels')`` and ``(filters',)`` in float32, ``(filters' / lanes, m *
        channels', lanes)`` in the packing's dtype between them; primes are rounded up with zeros.
    """
    lanes, lined = packing["lanes"], packing["channels"]
    taps, channels, multiplier = depthwise.shape
    filters = pointwise.shape[-1]
    panels = -(-filters // lanes)
    first = np.zeros((taps, multiplier, lined), np.float32)
    first[..., :channels] = depthwise.swapaxes(1, 2)
    second = np.zeros((multiplier, lined, panels * lanes), packing["dtype"])
    rows = pointwise.reshape(channels, multiplier, filters)
    second[:, :channels, :filters] = rows.swapaxes(0, 1)
    second = second.reshape(multiplier * lined, panels, lanes).swapaxes(0, 1)
    if bias is not None:
        bias = np.pad(bias.astype(np.float32), (0, panels * lanes - filters))
    return first, np.ascontiguousarray(second), bias


@dataclass
class _Staging:
    """Memory through which one call's arrays go to GPU `index` and back."""

    index: int
    shapes: tuple[tuple[int, ...], ...]  # of x and y, as everything below
    pinned: tuple[Any, ...]  # where the GPU's copies may reach them
    arrays: tuple[Array, ...]  # the same memory
    device: tuple[Any, ...]
    workspace: Any


class CudaLayer:
    """A CUDA library with weights, which go to each GPU when it is first used there.

    Any number of threads may run one.

    Parameters
    ----------
    path
        The library.
    depthwise, pointwise, bias
        In Keras's shapes, rounded to the dtype that is computed with.
    """

    def __init__(self, path: Path, depthwise: Array, pointwise: Array, bias: Array | None) -> None:
        self.library = Library(path)
        kernel = self.library.description["kernel"]
        self.dtype: str = kernel["dtype"]
        self._steps_axis = 1 if kernel["data_format"] == "channels_last" else 2
        self._weights = pack(self.library.description["packing"], depthwise, pointwise, bias)
        self.there: dict[int, tuple[Any, ...]] = {}  # the weights by GPU, complete or absent
        self._idle: list[_Staging] = []
        self._lock = threading.Lock()

    def on(self, index: int) -> tuple[Any, ...]:
        """Return the weights on GPU `index`, copied there before the first call on it.

        Raises
        ------
        RuntimeError, ValueError
            See `Library.check`; and a RuntimeError while a CUDA graph is captured.
        MemoryError
            If the GPU has no room for them.
        """
        with self._lock:
            if index not in self.there:
                library = self.library
                library.check(index)
                try:
                    library.prepare(index)
                    self.there[index] = tuple(
                        None if w is None else self._put(w, index) for w in self._weights
                    )
                    library.synchronize(index)  # whatever stream the calls will come on
                except RuntimeError as error:
                    if "Capture" not in str(error):
                        raise
                    raise RuntimeError(
                        "A layer's first call on a GPU copies its weights there, which cannot be "
                        "captured into a CUDA graph. Call it once before the capture begins"
                    ) from error
            return self.there[index]

    def was_captured(self) -> bool:
        """Whether a CUDA graph was captured with these weights, so that replays read them."""
        there = list(self.there.values())  # other threads may add to it
        return any(self.library.was_captured(pointwise) for _, pointwise, _ in there)

    def _put(self, array: Array, index: int) -> Any:
        import tvm_ffi

        tensor = self.library.empty(tvm_ffi.Shape(array.shape), array.dtype.name, index)
        self.library.copy(tvm_ffi.from_dlpack(array.view(np.uint8)), tensor)
        return tensor

    def workspace_bytes(self, shape: tuple[int, ...], index: int) -> int:
        """Memory on the GPU that a call with an output of `shape` works in, beside it."""
        workspace = self.library.workspace
        return 0 if workspace is None else int(workspace(shape[0], shape[self._steps_axis], index))

    def download(self, tensor: Any, index: int) -> Array:
        """Return a copy of a compact tensor on GPU `index` as an array, once it is computed."""
        shape, dtype = tuple(tensor.shape), np.dtype(str(tensor.dtype))
        pinned, array = self._pinned(shape, dtype)
        self.library.copy(tensor, pinned)
        self.library.synchronize(index)
        return np.array(array)  # a copy: pinned memory is scarce

    def upload(self, array: Array, tensor: Any, index: int) -> None:
        """Copy `array` into a compact tensor of its shape and dtype on GPU `index`."""
        pinned, there = self._pinned(array.shape, array.dtype)
        np.copyto(there, array)
        self.library.copy(pinned, tensor)
        self.library.synchronize(index)  # the pinned memory goes

    def run_arrays(self, index: int, x: Array, left: int, y: Array) -> None:
        """Run on GPU `index` for arrays on the CPU, of any strides; `x` is cast to the dtype."""
        weights, shapes = self.on(index), (x.shape, y.shape)
        if not y.size:
            return
        # Allocating takes longer than most kernels; the next call is often of the same shape.
        with self._lock:
            staging = self._idle.pop() if self._idle else None
        if staging is None or (staging.index, staging.shapes) != (index, shapes):
            del staging  # before more is asked for
            staging = self._stage(index, shapes)
        with np.errstate(over="ignore"):  # becomes infinite, as in Keras's cast
            np.copyto(staging.arrays[0], x, casting="same_kind")
        library, (there, back) = self.library, staging.device
        library.copy(staging.pinned[0], there)
        library.run(there, *weights, left, back, staging.workspace)
        library.copy(back, staging.pinned[1])
        library.synchronize(index)
        np.copyto(y, staging.arrays[1])
        self._idle = [staging]

    def _stage(self, index: int, shapes: tuple[tuple[int, ...], ...]) -> _Staging:
        import tvm_ffi

        dtype = np.dtype(self.dtype)
        pinned, arrays = zip(*(self._pinned(shape, dtype) for shape in shapes), strict=True)
        device = [self.library.empty(tvm_ffi.Shape(s), self.dtype, index) for s in shapes]
        size = self.workspace_bytes(shapes[1], index)
        workspace = self.library.empty(tvm_ffi.Shape((size,)), "uint8", index) if size else None
        return _Staging(index, shapes, pinned, arrays, tuple(device), workspace)

    def _pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Array]:
        import tvm_ffi

        # As bytes, because NumPy's DLPack has no bfloat16 and calls older tensors read-only.
        size = math.prod(shape) * dtype.itemsize
        tensor = self.library.pinned(tvm_ffi.Shape((size,)), "uint8")
        memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr()) if size else bytearray()
        return tensor, np.frombuffer(memoryview(memory), dtype).reshape(shape)
