"""A Python of 64-bit ARM on any Debian or Ubuntu: its files in a folder, run by QEMU.

Nothing of the system changes: packages are downloaded and unpacked, wheels are installed by this
Python's pip. Both are kept, by version.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm_sepconv
from tvm_sepconv.compiler.tuning.modelled.tools import tools

CORE = "cortex-a76"
_PACKAGES = ("python3", "libstdc++6", "libgomp1", "libffi8")
# Some frameworks choose their kernels by what Linux says of the processor, and end without it.
_CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 "
    "atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n"
)
_GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17")  # of wheels, newest first
_LIMIT_SECS = 600


@dataclass(frozen=True)
class EmulatedPython:
    """An interpreter and the folder of its packages.

    Parameters
    ----------
    launcher
        Runs it on this machine, as `sys.executable` does.
    site
        Where its packages are; ours is always there.
    """

    launcher: Path
    site: Path

    def run(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str] | None = None,
        timeout_secs: float = _LIMIT_SECS,
    ) -> subprocess.CompletedProcess[str]:
        """Run it with `arguments`.

        Raises
        ------
        RuntimeError
            If it fails; has the end of what it said.
        """
        try:
            done = subprocess.run(
                [str(self.launcher), *arguments], env=self.environment(variables),
                capture_output=True, text=True, timeout=timeout_secs,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"The emulated Python had not ended after {timeout_secs:.0f} s"
            ) from None
        if done.returncode:
            raise RuntimeError(
                f"The emulated Python ended with status {done.returncode}: {done.stderr[-2000:]}"
            )
        return done

    def environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of its processes."""
        kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
        return {**kept, "PYTHONPATH": str(self.site), "PYTHONNOUSERSITE": "1", **(variables or {})}


def emulated_python(folder: Path, requirements: Sequence[str]) -> EmulatedPython:
    """Return the emulated Python with these packages and ours, made unless `folder` has it.

    Raises
    ------
    RuntimeError
        If something is missing or cannot be downloaded; names what.
    """
    emulator = tools("aarch64").emulator
    for command in ("apt-get", "dpkg-deb"):
        if shutil.which(command) is None:
            raise RuntimeError(f"An emulated Python needs {command}, of Debian or Ubuntu")
    root = _kept(folder / f"python-{_release()}", _unpack)
    (interpreter,) = (root / "usr/bin").glob("python3.??")
    version = interpreter.name.removeprefix("python")
    key = hashlib.sha256("\n".join(sorted(requirements)).encode()).hexdigest()[:12]
    site = _kept(
        folder / f"site-{version}-{key}", lambda place: _install(place, version, requirements)
    )
    link = site / "tvm_sepconv"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(tvm_sepconv.__file__).parent)
    launcher = root / "launcher"
    launcher.write_text(
        f'#!/bin/sh\nexec {emulator} -cpu {CORE} -L "{root}" "{interpreter}" "$@"\n'
    )
    launcher.chmod(0o755)
    # Programs start others of their kind by it.
    (site / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(launcher)!r}\n")
    return EmulatedPython(launcher, site)


def _kept(path: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made under another name first, so that nobody sees half of it."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            make(made)
            if not path.is_dir():
                made.rename(path)
    return path


def _unpack(root: Path) -> None:
    """Fill `root` with Debian's packages; apt works on folders of its own."""
    apt = root.parent / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt,
        "Dir::State::lists": apt / "lists", "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache", "APT::Install-Recommends": "0", "APT::Sandbox::User": "root",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _run(["apt-get", *words, "-qq", "update"])
    _run(["apt-get", *words, "-qq", "-y", "--download-only", "install", *_PACKAGES])
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(_CPUINFO)


def _install(site: Path, version: str, requirements: Sequence[str]) -> None:
    platforms = [f"manylinux_{glibc}_aarch64" for glibc in _GLIBC] + ["manylinux2014_aarch64"]
    words = [word for platform in platforms for word in ("--platform", platform)]
    words += ["--implementation", "cp", "--python-version", version, "--only-binary", ":all:"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(site)]
    _run([*pip, *words, *requirements])


def _release() -> str:
    """The system's release, such as "debian-12"."""
    lines = Path("/etc/os-release").read_text().splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return "-".join(fields.get(name, "").strip('"') for name in ("ID", "VERSION_ID"))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECS)
    if done.returncode:
        raise RuntimeError(
            f"No emulated Python, since this command failed:\n  {' '.join(command)}\n"
            f"{(done.stderr or done.stdout).strip()[-2000:]}"
        )
