"""Whether this machine has an NVIDIA GPU, asked of the driver itself: no CUDA toolkit needed."""

from __future__ import annotations

import ctypes

_DRIVER = "libcuda.so.1"


def missing() -> str | None:
    """Say why no GPU can be used here; None if one can."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"the driver's library {_DRIVER} is not installed"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the driver reports error {status}"
    return None if count.value else "the driver finds none"
