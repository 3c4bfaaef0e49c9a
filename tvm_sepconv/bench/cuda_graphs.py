"""Launches timed on a GPU: captured into a CUDA graph, replayed between two events.

A launch from Python takes longer than many kernels do; a graph's launches follow each other as the
GPU can take them. All of it goes through the driver's own library, so that neither a framework nor
the CUDA toolkit is needed. Kernels that the CUDA runtime launches run in the same context, the
device's primary one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_void_p
from typing import Any

DRIVER = "libcuda.so.1"
_THREAD_LOCAL = 1  # of capture modes: other threads may go on
_L2_BYTES = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE

Launch = Callable[[], object]


def machine() -> str:
    """The name of this machine's first GPU and its driver's version, for records."""
    gpu = Gpu()
    major, minor = divmod(gpu.driver_version // 10, 100)
    return f"{gpu.name}, driver for CUDA {major}.{minor}"


class Gpu:
    """A GPU's primary context in this thread, and a stream of its own.

    Parameters
    ----------
    index
        Of the device, as CUDA counts them.

    Raises
    ------
    OSError
        If there is no driver.
    RuntimeError
        Here and in every method, if the driver refuses, in its words.
    """

    def __init__(self, index: int = 0) -> None:
        self._index, self._driver = index, ctypes.CDLL(DRIVER)
        self._call("cuInit", 0)
        self._device = c_int()
        self._call("cuDeviceGet", byref(self._device), index)
        context, stream = c_void_p(), c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", byref(stream), 0)
        self._stream = stream
        self._events = (c_void_p(), c_void_p())
        for event in self._events:
            self._call("cuEventCreate", byref(event), 0)

    @property
    def index(self) -> int:
        """Of the device."""
        return self._index

    @property
    def stream(self) -> int:
        """What is captured and replayed runs on it."""
        return int(self._stream.value or 0)

    @property
    def name(self) -> str:
        """As the driver calls it, such as "NVIDIA H200"."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def l2_bytes(self) -> int:
        """The size of the last cache."""
        return self._attribute(_L2_BYTES)

    @property
    def driver_version(self) -> int:
        """The newest CUDA that the driver knows, such as 13000."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return version.value

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """Capture what `launches` put on the stream; return what replays it, without waiting.

        What it returns keeps the launches, and so the memory whose addresses are in the graph.
        """
        graph, instance = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            for launch in launches:
                launch()
        except BaseException:  # a stream that goes on capturing could not be used again
            self._driver.cuStreamEndCapture(self._stream, byref(graph))
            raise
        self._call("cuStreamEndCapture", self._stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(instance), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        return _Replay(instance, self, tuple(launches))

    def seconds(self, action: Launch) -> float:
        """Time what `action` puts on the stream, from its start on the GPU to its end there.

        It is done twice. The first one warms caches and clocks, and keeps the GPU busy until the
        second is there, else the time would be that from the processor's launch on.
        """
        start, end = self._events
        action()
        self._call("cuEventRecord", start, self._stream)
        action()
        self._call("cuEventRecord", end, self._stream)
        self._call("cuEventSynchronize", end)
        elapsed_ms = c_float()
        self._call("cuEventElapsedTime", byref(elapsed_ms), start, end)
        return elapsed_ms.value / 1e3

    def synchronize(self) -> None:
        """Wait for the stream; what went wrong on the GPU is raised here."""
        self._call("cuStreamSynchronize", self._stream)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), number, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._driver, name)(*arguments):
            text = c_char_p()
            self._driver.cuGetErrorString(status, byref(text))
            words = (text.value or b"").decode() or "unknown"
            raise RuntimeError(f"{name} of the CUDA driver failed: {words} (error {status})")


class _Replay:
    """A graph, for as long as somebody may launch it."""

    def __init__(self, instance: c_void_p, gpu: Gpu, launches: tuple[Launch, ...]) -> None:
        self._instance, self._gpu, self._launches = instance, gpu, launches

    def __call__(self) -> None:
        self._gpu._call("cuGraphLaunch", self._instance, self._gpu._stream)

    def __del__(self) -> None:
        # A context that a kernel has broken refuses everything: there is nothing left to free.
        self._gpu._driver.cuGraphExecDestroy(self._instance)
