"""The programs that modelled cycles come from, found or named with the way to get them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from tvm_sepconv import targets
from tvm_sepconv.compiler.link import toolchain

LLVM_VERSION = "19"  # the first with -skip-unsupported-instructions; others model other cycles
TRIPLES = {"aarch64": "aarch64-linux-gnu", "armv7": "arm-linux-gnueabihf"}
FEATURES = {  # what LLVM reads: more than our code uses, for other people's
    "aarch64": "+v8.2a,+fullfp16,+dotprod,+lse,+rcpc,+aes,+sha2",
    "armv7": "+neon,+vfp4",
}
_EMULATORS = {"aarch64": "qemu-aarch64", "armv7": "qemu-arm"}
_INSTALL = (
    "Install them (apt install qemu-user llvm-19 gcc-{triple}), or name a board: "
    "--rpc HOST:PORT --key KEY"
)


@dataclass(frozen=True)
class Tools:
    """Commands for one architecture, such as "aarch64"."""

    arch: str
    emulator: str
    disassembler: str
    analyser: str
    compiler: str

    @property
    def features(self) -> str:
        """What LLVM's programs are told that the code may use."""
        return f"-mattr={FEATURES[self.arch]}"

    @property
    def sysroot(self) -> str:
        """Where the emulator looks for the C library."""
        return f"/usr/{TRIPLES[self.arch]}"

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Of what decides counts and cycles, beside TVM."""
        gcc = _output([self.compiler, "-dumpfullversion"]).strip()  # compiles the runtime
        return {"llvm": _version(self.analyser), "qemu": _version(self.emulator), "gcc": gcc}


@functools.cache
def tools(arch: str) -> Tools:
    """Find the commands for `arch`.

    Raises
    ------
    RuntimeError
        If one is missing or of another version; names all that are, and what to install.
    ValueError
        If `arch` is none that is emulated.
    """
    if arch not in TRIPLES:
        raise ValueError(f"Emulated are {' and '.join(TRIPLES)}. Received: {arch}")
    triple = TRIPLES[arch]
    names = {
        "emulator": (_EMULATORS[arch], "-static has no plugins"),
        "disassembler": (_llvm("llvm-mc"), f"of LLVM {LLVM_VERSION}"),
        "analyser": (_llvm("llvm-mca"), f"of LLVM {LLVM_VERSION}"),
        "compiler": (f"{triple}-gcc", "with its C library"),
    }
    lacking = [f"{n} ({what})" for n, what in names.values() if shutil.which(n) is None]
    if lacking:
        what = ", ".join(lacking)
        raise RuntimeError(
            f"Modelled cycles for {arch} need {what}. {_INSTALL.format(triple=triple)}"
        )
    return Tools(arch, **{field: name for field, (name, _) in names.items()})


def build_plugin(found: Tools, output: Path) -> None:
    """Compile the counter for this machine, and try it.

    Raises
    ------
    RuntimeError
        If it does not compile, or the emulator does not take it.
    """
    host = toolchain(f"{targets.machine()}-linux-gnu")
    with tempfile.TemporaryDirectory() as folder, as_file(files(__package__)) as here:
        compiled = Path(folder, "counter.o")
        host.object_file(here / "counter.c", compiled)
        host.shared_library([compiled], output)
    plugin = f"{output},out={output.with_suffix('.probe')}"
    done = subprocess.run([found.emulator, "-plugin", plugin, "/"], capture_output=True, text=True)
    if "plugin" in done.stderr:
        raise RuntimeError(
            f"{found.emulator} {found.versions['qemu']} does not load plugins: "
            f"{done.stderr.strip().splitlines()[0]}. " + _INSTALL.format(triple=TRIPLES[found.arch])
        )


def build_caller(found: Tools, runtime: Path, output: Path) -> None:
    """Compile the program that calls libraries, against the runtime that it will load.

    Raises
    ------
    RuntimeError
        If it does not compile.
    """
    mode = ("-marm",) if found.arch == "armv7" else ()  # the marks are no Thumb instructions
    with (
        as_file(files(__package__)) as here,
        as_file(files("tvm_sepconv") / "native") as native,
    ):
        sources = [f"-I{native}", str(here / "caller.c"), str(runtime)]
        flags = ["-std=gnu99", "-O2", "-Wall", "-Wextra", *mode]
        libraries = [f"-Wl,-rpath,{runtime.absolute().parent}", "-ldl", "-lpthread"]
        _run([found.compiler, *flags, *sources, *libraries, "-o", str(output)])


def build_marks(found: Tools, output: Path) -> None:
    """Compile the marks as a library for programs that are not C."""
    with as_file(files(__package__)) as here:
        shared = ["-shared", "-fPIC", "-O2", str(here / "marks.c")]
        _run([found.compiler, *shared, "-o", str(output)])


def _llvm(name: str) -> str:
    """The command of the wanted version, by its own name in Debian or by the plain one."""
    versioned = f"{name}-{LLVM_VERSION}"
    if shutil.which(versioned) is not None or shutil.which(name) is None:
        return versioned
    return name if _version(name).partition(".")[0] == LLVM_VERSION else versioned


@functools.cache
def _version(command: str) -> str:
    found = re.search(r"version (\d[\d.]*\d)", _output([command, "--version"]))
    return found[1] if found else "unknown"


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"This command failed:\n  {' '.join(command)}\n{done.stderr.strip()}")
