"""Builds a whole CUDA library for this CPU: the very source nvcc would get, over a fake runtime."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_counts
import tvm_ffi

from cuda_emulator import prepared

HERE = Path(__file__).parent
# What the source includes, read before the emulator's macros give `alignas` another meaning.
_FIRST = ("tvm/ffi/tvm_ffi.h", "tvm/ffi/extra/c_env_api.h", "algorithm", "cmath", "cstdint",
          "cstdio", "cstdlib", "cstring", "map", "mutex", "set", "sstream", "string",
          "vector")  # fmt: skip
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w")


def build_library(source: str, output: Path) -> None:
    """Compile the CUDA C++ `source` of a library to the shared library `output`, with g++."""
    includes = [f"#include <{name}>" for name in (*_FIRST, "cuda_runtime.h")]
    _compile("\n".join([*includes, prepared(source)]), output)


def build_driver(output: Path) -> None:
    """Compile what stands for libcuda.so.1, found by libraries under a name of its own."""
    _compile("#include <driver.h>\n", output, "-Wl,-soname,libfake_cuda.so")


def _compile(source: str, output: Path, *more: str) -> None:
    unit = output.with_name(f"{output.name}.cpp")
    unit.write_text(source)
    folders = (
        HERE,
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
    )
    command = ["g++", *_FLAGS, *(f"-I{folder}" for folder in folders), "-shared", str(unit), *more]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Nvcc:
    """In the place of `tvm_sepconv.compiler.nvcc.Nvcc`: what it builds runs on this CPU."""

    runtime_version = 13000

    def library(
        self, source: str, output: Path, archs: Sequence[str], host: str, fast_math: bool = False
    ) -> dict[str, Any]:
        build_library(source, output)
        cuda_counts.add("emulated", source.count("__global__"))
        return {}


class Machine:
    """The fake machine below one emulated library: what it is like, and what was done on it."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.fake_cuda_log.restype = ctypes.c_char_p
        self._library.fake_cuda_set.argtypes = (ctypes.c_char_p, ctypes.c_int64)

    def set(self, **settings: int) -> None:
        """Change the machine; the names and what it starts with are in cuda_runtime.h."""
        for name, value in settings.items():
            self._library.fake_cuda_set(name.encode(), value)

    def reset(self) -> None:
        """Make it the usual machine again and forget what was done."""
        self._library.fake_cuda_reset()

    def log(self) -> list[str]:
        """What was done since the last call, a line each."""
        return self._library.fake_cuda_log().decode().splitlines()
