"""C compilers and linkers: the system's where there is one, else the one that pip installs.

Shared libraries are linked without a C library: their symbols are resolved against whatever libc
the process has, so one build serves old and new systems, and nothing is looked for at link time.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tvm_sepconv import targets

NO_UNWIND_TABLES = ("-fno-unwind-tables", "-fno-asynchronous-unwind-tables")


@dataclass(frozen=True)
class Toolchain:
    """The commands that compile one C file and link objects for one triple.

    ``helpers`` is the compiler's own static library, where the generated code may call into it.
    """

    name: str
    compile: tuple[str, ...]
    link: tuple[str, ...]
    helpers: tuple[str, ...] = ()

    def object_file(self, source: Path, output: Path, include: tuple[Path, ...] = ()) -> None:
        """Compile `source`, C99 with the GNU C library's names."""
        flags = ("-c", "-std=gnu99", "-O2", "-fPIC", "-Wall", "-Wextra")
        # What distributions switch on by default would call functions that other C libraries lack.
        plain = ("-fno-stack-protector", "-U_FORTIFY_SOURCE", *NO_UNWIND_TABLES)
        search = [f"-I{folder}" for folder in include]
        _run([*self.compile, *flags, *plain, *search, str(source), "-o", str(output)])

    def shared_library(self, objects: list[Path], output: Path) -> None:
        """Link `objects`, stripped: TVM's carry debug information ten times their code.

        Their names are bound among themselves (-Bsymbolic), so that nothing else in the process
        that has a symbol of the same name comes between.
        """
        _run([*self.link, "-shared", "-s", *map(str, objects), *self.helpers, "-o", str(output)])


@functools.cache
def toolchain(triple: str) -> Toolchain:
    """Find what compiles and links for `triple`.

    Raises
    ------
    RuntimeError
        If there is neither a C compiler for it nor the `[cross]` extra; names both ways out.
    """
    native = triple.split("-")[0] == targets.machine()
    command = "cc" if native else f"{triple}-gcc"
    if shutil.which(command):
        # GCC calls atomics (aarch64) and divisions (armv7) out of line; x86-64 needs nothing.
        helpers = () if triple.startswith("x86_64") else ("-lgcc",)
        # A read-only part after relocation would pad an aarch64 library to a page of 64 KB.
        link = (command, "-nostdlib", "-Wl,-Bsymbolic", "-Wl,-z,norelro")
        return Toolchain(command, (command,), link, helpers)
    if importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        return Toolchain("zig", (*zig, "cc", "-target", triple), (*zig, "ld.lld", "-Bsymbolic"))
    package = "gcc" if native else f"gcc-{triple.replace('x86_64', 'x86-64')}"
    raise RuntimeError(
        f"No C compiler and linker for {triple} was found. Install the system's (apt install "
        f"{package}) or the one that comes with pip (pip install 'tvm-sepconv[cross]')."
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"This command failed:\n  {' '.join(command)}\n{done.stderr.strip()}\n"
            "If it lacks the C library's headers: apt install libc6-dev, or for another "
            "architecture libc6-dev-<it>-cross."
        )
