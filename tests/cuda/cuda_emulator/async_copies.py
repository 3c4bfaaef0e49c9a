"""TVM's helpers round cp.async, taken out of CUDA C so that the emulator's own can stand in."""

from __future__ import annotations

import re

_DEFINITION = re.compile(
    r"^__forceinline__ __device__ \w+ (?:ptx_cp_async_legacy|tvm_builtin_ptx_cp_async)\w*\(.*?^}$",
    re.MULTILINE | re.DOTALL,
)


def redefined(source: str) -> str:
    """Return the source without TVM's definitions; `async_copies.h` has all of them."""
    return _DEFINITION.sub("", source)
