"""A GPU that is this processor: launches run where they are called, and time is what they say."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

from tvm_sepconv.bench.cuda_graphs import Launch


class HostClock:
    """In the place of `cuda_graphs.Gpu`: a graph calls its launches one after the other."""

    index, stream, l2_bytes = 0, 0, 1 << 12
    name = "no GPU"

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """Replay by calling."""

        def replay() -> None:
            for launch in launches[:2]:  # emulated ones take long
                launch()

        return replay

    def seconds(self, action: Launch) -> float:
        """By the host's clock."""
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


class Driver:
    """In the place of the driver's library: it notes the calls, and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, list[str]()
        self.elapsed_ms = 4.0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.failing:
                return 719
            first = getattr(arguments[0], "_obj", None) if arguments else None
            if name == "cuDeviceGetAttribute":
                first.value = {38: 50 << 20}[arguments[1]]
            elif name == "cuDriverGetVersion":
                first.value = 13010
            elif name == "cuEventElapsedTime":
                first.value = self.elapsed_ms
            elif name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA H200"
            elif name == "cuGetErrorString":
                arguments[1]._obj.value = b"unspecified launch failure"
            elif isinstance(first, ctypes.c_void_p):
                first.value = 1 << 40 | len(self.calls)
            return 0

        return call
