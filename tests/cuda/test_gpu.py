"""Whether there is a GPU to use."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tvm_sepconv import gpu


@pytest.mark.parametrize(
    ("status", "count", "expected"),
    [(100, 0, "reports error 100"), (0, 0, "finds none"), (0, 2, None)],
)
def test_the_driver_is_asked_for_gpus(
    status: int, count: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuInit(self, flags: int) -> int:
            return status

        def cuDeviceGetCount(self, result: Any) -> int:
            result._obj.value = count
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    message = gpu.missing()
    assert message is None if expected is None else expected in str(message)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "libcuda.so.1 is not installed" in str(gpu.missing())
