"""Runs emitted CUDA C on a CPU, to check its numbers and its barriers where there is no GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import cuda_counts
import numpy as np

from cuda_emulator.async_copies import redefined

ORDERS = range(3)
"""Orders of a block's threads: forward, backward, shuffled; correct kernels do not notice."""

_SCALARS = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64}
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
_FLAGS += ["-Wno-attributes", "-fsanitize=bounds"]


_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def prepared(source: str) -> str:
    """CUDA C for the emulator: dynamic shared memory is an array of the emulator's own."""
    source = redefined(source)
    return _DYNAMIC.sub(r"\1* const \2 = (\1*)emulator::dynamic_shared;", source)


class EmulationError(Exception):
    """The kernel did what a GPU forbids or leaves undefined."""


class Kernel:
    """The one kernel of a CUDA C translation unit, compiled for this CPU in `folder`.

    `old` is for what it does on a GPU before sm_80, such as an sm_75.
    """

    def __init__(self, source: str, folder: Path, old: bool = False) -> None:
        ((name, parameters),) = re.findall(
            r"__global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(([^)]*)\)\s*{", source
        )
        self.parameters = {
            p.split()[-1]: None if "*" in p else _SCALARS[p.split()[0]]
            for p in parameters.split(",")
        }
        (folder / "kernel.cpp").write_text(
            f"{prepared(source)}\n"
            'extern "C" __attribute__((visibility("default"))) const char* launch('
            "void** arguments, const unsigned* grid, const unsigned* block, unsigned order, "
            "size_t shared) {\n  emulator::dynamic_bytes = shared;\n"
            f"  return emulator::launch({name}, arguments, {{grid[0], grid[1], grid[2]}}, "
            "{block[0], block[1], block[2]}, order);\n}\n"
        )
        flags = ["g++", *_FLAGS, f"-I{Path(__file__).parent}", *["-D__CUDA_ARCH__=750"] * old]
        version = subprocess.run(
            ["g++", "-dumpversion"], capture_output=True, text=True, check=True
        )
        if int(version.stdout.split(".")[0]) >= 12:  # no variable happens to be zero
            flags.append("-ftrivial-auto-var-init=pattern")
        # Linked apart, without the sanitizer's library: the emulator has the one function it needs.
        for command in (
            [*flags, "-c", "kernel.cpp", "-o", "kernel.o"],
            ["g++", "-shared", "kernel.o", "-o", "kernel.so"],
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        cuda_counts.add("emulated")
        self._launch = ctypes.CDLL(str(folder / "kernel.so")).launch
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Mapping[str, np.ndarray | int],
        order: int = 0,
        shared_bytes: int = 0,
    ) -> None:
        """Run the kernel on arguments by name, which it writes to; `order` is one of `ORDERS`.

        `shared_bytes` is the dynamic shared memory of a block.
        """
        assert set(arguments) >= set(self.parameters), self.parameters
        values = [
            ctypes.c_void_p(arguments[name].ctypes.data) if kind is None else kind(arguments[name])
            for name, kind in self.parameters.items()
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        report = self._launch(
            addresses,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            order,
            ctypes.c_size_t(shared_bytes),
        )
        if report:
            raise EmulationError(report.decode())
