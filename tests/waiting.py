"""Waiting in tests for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_SECS = 300  # a machine may be busy with other things, or stand still for a while

T = TypeVar("T")


def until(found: Callable[[], T], what: str) -> T:
    """Wait until `found` returns something true; a connection that is refused is not yet there."""
    end = time.monotonic() + LIMIT_SECS
    while time.monotonic() < end:
        try:
            if result := found():
                return result
        except ConnectionError:
            pass
        time.sleep(0.02)
    raise TimeoutError(f"no sign of {what} after {LIMIT_SECS} s")
