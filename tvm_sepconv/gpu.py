"""What the NVIDIA driver says of this machine's GPUs, asked of itself: no CUDA toolkit needed."""

from __future__ import annotations

import ctypes

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


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


def need(index: int) -> None:
    """Raise an error if this process has no GPU `index`.

    Raises
    ------
    RuntimeError
        If no GPU can be used at all.
    ValueError
        If there are others.
    """
    if reason := missing():
        raise RuntimeError(
            f"No NVIDIA GPU can be used here: {reason}. Run this on a machine with one, or with "
            "arrays on the CPU and a library for it"
        )
    count = _ask("cuDeviceGetCount")
    if index >= count:
        raise ValueError(
            f"The device must be one of this machine's {count} GPUs, cuda:0 to cuda:{count - 1}. "
            f"Received: cuda:{index}"
        )


def driver_version() -> int:
    """The newest CUDA the driver runs, 12040 for 12.4."""
    return _ask("cuDriverGetVersion")


def capability(index: int) -> int:
    """The compute capability of GPU `index`, 90 for sm_90."""
    major, minor = (_ask("cuDeviceGetAttribute", which, index) for which in (_MAJOR, _MINOR))
    return 10 * major + minor


def _ask(name: str, *arguments: int) -> int:
    driver, answer = ctypes.CDLL(_DRIVER), ctypes.c_int(0)
    status = driver.cuInit(0) or getattr(driver, name)(ctypes.byref(answer), *arguments)
    if status:
        raise RuntimeError(
            f"The NVIDIA driver answers error {status} to {name}{arguments}. `nvidia-smi` shows "
            "whether it works at all"
        )
    return answer.value
