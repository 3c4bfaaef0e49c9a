"""nvcc: where it is, and how a library is built with it.

A library holds its own copy of CUDA's runtime, so that a device needs nothing but NVIDIA's driver.
What of the host's C and C++ libraries it takes is shared: this machine's versions or newer ones.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm_ffi.libinfo

from tvm_sepconv import targets

TOOLKITS = Path("/usr/local")
MISSING = (
    "Building for CUDA needs nvcc, which was not found in $CUDA_HOME, on the PATH, in "
    f"{TOOLKITS}/cuda* or from pip. Install NVIDIA's CUDA toolkit, or the packages that carry "
    "nvcc: pip install 'tvm-sepconv[cuda]'"
)
_EXPORTS = "{ global: __tvm_ffi_*; local: *; };\n"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture.

    ``shared_bytes`` is what it takes by itself, without what its launch adds; ``spill_bytes`` are
    read and written by each thread because the registers do not suffice.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    threads: int


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that was found."""

    path: Path

    @functools.cached_property
    def toolkit(self) -> Path:
        """The folder of its ``include`` and libraries, asked of it: it may be a script elsewhere.

        Raises
        ------
        RuntimeError
            If it does not run.
        """
        command = [str(self.path), "--dryrun", "-x", "cu", "-E", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.+)$", done.stdout + done.stderr, re.MULTILINE)
        if done.returncode or found is None:
            raise RuntimeError(
                f"{self.path} does not run: {(done.stderr or done.stdout).strip()}. Name another "
                "toolkit with CUDA_HOME"
            )
        return Path(found[1]).resolve()

    @property
    def runtime_version(self) -> int:
        """Of CUDA's runtime that libraries get, such as 13000."""
        header = self.toolkit / "include" / "cuda_runtime_api.h"
        found = re.search(r"#define CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
        return int(found[1]) if found else 0

    @property
    def release(self) -> str:
        """CUDA's, such as "CUDA 13.0"."""
        return f"CUDA {self.runtime_version // 1000}.{self.runtime_version % 1000 // 10}"

    def library(
        self,
        source: str,
        output: Path,
        archs: Sequence[str],
        host: str,
        fast_math: bool = False,
    ) -> dict[str, Resources]:
        """Compile CUDA C++ into a shared library: machine code for `archs`, PTX of the last.

        Parameters
        ----------
        host
            The processor it is for, such as "aarch64".

        Returns
        -------
        dict
            What each kernel takes, by "<arch>/<kernel>".

        Raises
        ------
        RuntimeError
            If nvcc fails, or cannot build for that host.
        """
        with tempfile.TemporaryDirectory() as folder:
            unit, made = Path(folder, "library.cu"), Path(folder, "library.so")
            exports = Path(folder, "exports")
            unit.write_text(source)
            exports.write_text(_EXPORTS)
            flags = ["-shared", "-std=c++17", "-w", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
            # Nothing of it is seen by other libraries of the process but what they may call.
            flags += ["-Xlinker", f"-s,--version-script={exports}"]
            flags += ["--threads", str(min(len(archs), os.cpu_count() or 1))]
            flags += ["--use_fast_math"] * fast_math
            for number in (re.sub(r"\D", "", arch) for arch in archs):
                flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            newest = re.sub(r"\D", "", archs[-1])
            flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
            include = {tvm_ffi.libinfo.find_include_path()}
            include.add(tvm_ffi.libinfo.find_dlpack_include_path())
            flags += [f"-I{path}" for path in sorted(include)]
            command = [str(self.path), *flags, *self._host_flags(host), str(unit), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                way_out = (
                    f"If nvcc does not know an architecture of {', '.join(archs)} or the host's "
                    "compiler, install a newer toolkit: pip install 'tvm-sepconv[cuda]'"
                )
                if shutil.which("g++") is None:
                    way_out = "nvcc needs a C++ compiler, and there is no g++: apt install g++"
                raise RuntimeError(
                    f"This command failed:\n  {' '.join(command)}\n"
                    f"{done.stdout.strip()}\n{done.stderr.strip()}\n{way_out}"
                )
            new = output.with_name(f".{output.name}.new")  # the old one may be mapped
            shutil.copyfile(made, new)
            new.replace(output)
        return _resources(done.stdout + done.stderr, source)

    def _host_flags(self, host: str) -> list[str]:
        if host == targets.machine():
            # The packages of pip have a lib where nvcc looks for a lib64.
            return ["-cudart", "static", f"-L{self.toolkit / 'lib'}"]
        compiler = f"{host}-linux-gnu-g++"
        if shutil.which(compiler) is None:
            raise RuntimeError(
                f"Building CUDA libraries for {host} machines here needs {compiler}: apt install "
                f"g++-{host.replace('_', '-')}-linux-gnu. Or build on such a machine"
            )
        include = self.toolkit / "include"
        runtime = [str(self._cross_runtime(host)), "-lrt", "-lpthread", "-ldl"]
        return [
            "-ccbin",
            compiler,
            f"-I{include}",
            f"-I{include / 'cccl'}",
            "-cudart",
            "none",
            *runtime,
        ]

    def _cross_runtime(self, host: str) -> Path:
        """CUDA's static runtime for another processor, from the toolkit or where pip put it."""
        name = "libcudart_static.a"
        folders = [f"{host}-linux", *(["sbsa-linux"] if host == "aarch64" else [])]
        place = cross_folder(host)
        there = [self.toolkit / "targets" / folder / "lib" / name for folder in folders]
        for path in (*there, *sorted(place.glob(f"nvidia/*/lib/{name}"))):
            if path.is_file():
                return path
        raise RuntimeError(
            f"Building CUDA libraries for {host} machines here needs their {name}. Install the "
            f"CUDA toolkit's cross-compilation package (cuda-cross-{host}), or: "
            f"pip install --no-deps --target {place} --platform manylinux2014_{host} "
            f"--only-binary=:all: 'nvidia-cuda-runtime=={self.release.removeprefix('CUDA ')}.*'"
        )


def find() -> Nvcc:
    """Find nvcc: in $CUDA_HOME, on the PATH, the newest of /usr/local, or the one from pip.

    Raises
    ------
    RuntimeError
        If there is none, naming both ways to get one.
    """
    for path in _places():
        if os.access(path, os.X_OK) and path.is_file():
            return Nvcc(path)
    raise RuntimeError(MISSING)


def _places() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield from sorted(TOOLKITS.glob("cuda*/bin/nvcc"), key=_version, reverse=True)
    for folder in _pip():
        yield from sorted(folder.glob("cu*/bin/nvcc"), reverse=True)


def _version(path: Path) -> tuple[int, ...]:
    """Of /usr/local/cuda-13.0/bin/nvcc (13, 0); a plain ``cuda`` is a link to the one in use."""
    numbers = tuple(map(int, re.findall(r"\d+", path.parent.parent.name)))
    return numbers or (10**6,)


def _pip() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]


def cross_folder(host: str) -> Path:
    """Where pip is told to put CUDA's runtime of another processor: beside this user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "tvm_sepconv-cuda", host)


def _resources(report: str, source: str) -> dict[str, Resources]:
    """Read what ptxas says of each kernel."""
    threads = {
        name: int(count)
        for count, name in re.findall(r"__launch_bounds__\((\d+)[^)]*\) (\w+)\(", source)
    }
    found = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for kernel, arch, stores, loads, registers, rest in entry.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[f"{arch}/{kernel.removesuffix('_kernel')}"] = Resources(
            registers=int(registers),
            shared_bytes=int(shared[1]) if shared else 0,
            spill_bytes=int(stores) + int(loads),
            threads=threads.get(kernel, 1024),
        )
    return found
