"""``tvm-sepconv deploy``."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tvm_sepconv import bundle, targets
from tvm_sepconv.bundle import Bundle, BundleError

HELP = "copy what a device can use of a bundle to it, over ssh"
DESCRIPTION = (
    "Copy a bundle to a device with the system's rsync, or with ssh and tar where one side has no "
    "rsync: only the libraries that the device would load, into a new folder, which takes the "
    "place of the old one when it is complete. Which libraries these are the device is asked. The "
    "folder c is not copied: it is for compiling C programs."
)
EPILOG = "Ports, keys and names of hosts are ssh's own business: ~/.ssh/config."

SSH = ("ssh", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
QUESTION = (
    "echo machine: $(uname -m); echo bits: $(getconf LONG_BIT); "
    "grep -m 1 -E '^(flags|Features)' /proc/cpuinfo"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("bundle", type=Path, help="a folder that `layer.save` wrote")
    parser.add_argument("place", metavar="user@host:folder", help="the bundle's folder over there")
    parser.add_argument(
        "--target", action="append", metavar="T", help="copy the libraries of this target, without "
        "asking the device; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="run the self-test there, with the tvm-sepconv that "
        "is installed there, before the old folder goes",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the commands, change nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    place = Place.parse(options.place)
    opened = Bundle(options.bundle.absolute(), bundle.read_manifest(options.bundle))
    chosen = _named(opened, options.target) if options.target else _asked(opened, place)
    with tempfile.TemporaryDirectory(prefix="tvm_sepconv-") as folder:
        sizes = stage(opened, chosen, Path(folder))
        total = f"{len(sizes)} files, {sum(sizes.values()) / 1e3:.0f} kB"
        print(f"{options.bundle} -> {place}: {', '.join(chosen)}; {total}", flush=True)
        if options.dry_run:
            _show(place, folder, sizes, options.verify)
        else:
            _copy(place, folder, options.verify)
    return 0


# ---- where to ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A folder on a host, and the names beside it that a copy needs for a while."""

    host: str
    folder: PurePosixPath
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``[user@]host:folder``; a relative folder is below the user's home."""
        match = re.fullmatch(r"((?:[^@:]*@)?(?:\[[^]]+\]|[^:/\[]+)):(.+)", text)
        folder = PurePosixPath(match[2].removeprefix("~/")) if match else PurePosixPath()
        if match is None or text.startswith("-") or folder.name in ("", "~", ".", ".."):
            raise ValueError(
                "The place to deploy to must be user@host:folder, the folder being the bundle's "
                f"own. Received: {text}"
            )
        return cls(match[1], folder)

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}"

    def beside(self, state: str) -> str:
        """Return the quoted name of a hidden folder beside the bundle's."""
        name = f".{self.folder.name}.{state}-{self.token}"
        return shlex.quote(str(self.folder.parent / name))

    @property
    def ssh_host(self) -> str:
        """The host as ssh wants it: an IPv6 address without its brackets."""
        return self.host.replace("[", "").replace("]", "")

    def prepare(self) -> list[str]:
        """Make the new folder; never beside something of that name that is not a bundle."""
        folder, parent = shlex.quote(str(self.folder)), shlex.quote(str(self.folder.parent))
        return [*SSH, self.ssh_host, (
            f"if [ -e {folder} ] && ! grep -q format_version {folder}/manifest.json; "
            f"then echo it is there and is no bundle >&2; exit 1; fi; "
            f"mkdir -p {parent} && mkdir {self.beside('new')} && "
            "if command -v rsync > /dev/null; then echo has rsync; fi"
        )]  # fmt: skip

    def rsync(self, source: str) -> list[str]:
        """Fill the new folder."""
        new = f"{self.host}:{shlex.split(self.beside('new'))[0]}/"
        how = ["--recursive", "--times", "--perms", "--protect-args", "--rsh", shlex.join(SSH)]
        return ["rsync", *how, f"{source}/", new]

    def tar(self, source: str) -> list[str]:
        """Fill the new folder where there is no rsync."""
        unpack = [*SSH, self.ssh_host, f"tar -C {self.beside('new')} -xof -"]
        return ["sh", "-c", f"tar -C {shlex.quote(source)} -cf - . | {shlex.join(unpack)}"]

    def verify(self) -> list[str]:
        """Run the self-test in the new folder."""
        return [*SSH, self.ssh_host, f"tvm-sepconv verify {self.beside('new')}"]

    def finish(self) -> list[str]:
        """Put the new folder in the place of the old one, or leave that as it is."""
        folder, old, new = shlex.quote(str(self.folder)), self.beside("old"), self.beside("new")
        return [*SSH, self.ssh_host, (
            f"sync; if [ ! -e {folder} ]; then mv {new} {folder}; "
            f"elif mv {folder} {old} && mv {new} {folder}; then rm -rf {old}; "
            f"else mv {old} {folder}; exit 1; fi"
        )]  # fmt: skip

    def give_up(self) -> list[str]:
        """Remove the new folder."""
        return [*SSH, self.ssh_host, f"rm -rf {self.beside('new')}"]


# ---- what to copy --------------------------------------------------------------------------------


def _named(opened: Bundle, names: Sequence[str]) -> list[str]:
    chosen = [targets.resolve(name) for name in names]
    if absent := [name for name in chosen if name not in opened.targets]:
        raise BundleError(
            f"{opened.path} has no library for {', '.join(absent)}; it has "
            f"{', '.join(opened.targets)}"
        )
    return list(dict.fromkeys(chosen))


def _asked(opened: Bundle, place: Place) -> list[str]:
    arch, flags = machine_of(_run(place, [*SSH, place.ssh_host, QUESTION]))
    sets = [isa for isa, needed in reversed(targets.FEATURES.items())
            if isa.split("-")[0] == arch and flags.issuperset(needed)]  # fmt: skip
    able = bundle.usable(opened.targets, sets)
    if not able:
        runs = f"runs {', '.join(sets)}" if sets else "runs no instruction set known here"
        raise BundleError(
            f"{place.host} ({arch or 'of unknown architecture'}) {runs}; {opened.path} has "
            f"libraries for {', '.join(opened.targets)}. Save the layers with a target it runs"
        )
    return able[:1]  # which is what it would load


def machine_of(answer: str) -> tuple[str, set[str]]:
    """Return the architecture and CPU flags from a device's answer to `QUESTION`."""
    lines = dict(
        (key.strip(), value.strip())
        for key, colon, value in (line.partition(":") for line in answer.splitlines())
        if colon
    )
    name = lines.get("machine", "").lower()
    arch = targets.MACHINES.get(name, name)
    flags = {*lines.get("flags", "").split(), *lines.get("Features", "").split()}
    if lines.get("bits") == "32" and arch == "aarch64":  # 32-bit programs under a 64-bit kernel
        return "armv7", flags | ({"neon", "vfpv4"} if "asimd" in flags else set())
    return arch, flags


def stage(opened: Bundle, chosen: Sequence[str], folder: Path) -> dict[str, int]:
    """Write the bundle with the targets `chosen` alone to `folder`.

    Returns
    -------
    dict
        The size in bytes of each file, by its name in the bundle.

    Raises
    ------
    BundleError
        If one of its files is missing, truncated or altered.
    """
    whole: dict[str, Any] = opened.manifest
    archs = dict.fromkeys(name.split("-")[0] for name in chosen if not bundle.is_cuda(name))
    part = {
        **whole,
        "libraries": {name: whole["libraries"][name] for name in chosen},
        "runtimes": {arch: whole["runtimes"][arch] for arch in archs},
    }
    entries = [*part["runtimes"].values(), *part["files"].values()]
    entries += [entry for group in part["libraries"].values() for entry in group.values()]
    (folder / bundle.MANIFEST).write_text(bundle.manifest_text(part), encoding="utf-8")
    for name, expected in ((entry["path"], entry["sha256"]) for entry in entries):
        bundle.verify(opened.path, name, expected)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(opened.path / name, folder / name)
    folder.chmod(0o755)  # a temporary folder is its owner's alone, and so would be the copy
    names = [bundle.MANIFEST, *(entry["path"] for entry in entries)]
    return {name: (folder / name).stat().st_size for name in names}


# ---- doing it ------------------------------------------------------------------------------------


def _show(place: Place, source: str, sizes: dict[str, int], verify: bool) -> None:
    for name, size in sizes.items():
        print(f"  {size:8} {name}")
    fill = place.rsync(source) if shutil.which("rsync") else place.tar(source)
    steps = [place.prepare(), fill, *([place.verify()] if verify else []), place.finish()]
    print("Nothing is copied; without --dry-run these commands would be run:")
    for command in steps:
        print(f"  {command[2] if command[0] == 'sh' else shlex.join(command)}")


def _copy(place: Place, source: str, verify: bool) -> None:
    both = "has rsync" in _run(place, place.prepare()) and shutil.which("rsync")
    try:
        _run(place, place.rsync(source) if both else place.tar(source))
        if verify:
            print(_run(place, place.verify()), end="", flush=True)
        _run(place, place.finish())
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it may be the connection that is gone
            _run(place, place.give_up())
        raise


def _run(place: Place, command: list[str]) -> str:
    """Return what `command` prints, or raise a RuntimeError that says what failed over there."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(
            "Deploying needs the ssh client, which is not installed: apt install openssh-client"
        ) from error
    if done.returncode == 0:
        return done.stdout
    said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
    if done.returncode == 255:
        way_out = f"cannot be reached or logged into. Try: ssh {place.ssh_host}"
    elif re.search("No space left|Disk quota|Wrote only", said):  # the last in GNU tar's words
        way_out = "has no space left; what is there stays as it was. Make room and deploy again"
    elif "Permission denied" in said or "Read-only file system" in said:
        way_out = "does not let this user write there. Name another folder or user"
    elif "tvm-sepconv verify" in command[-1]:
        way_out = "failed the self-test, or has no tvm-sepconv on its PATH; nothing was replaced"
    else:
        way_out = "failed"
    raise RuntimeError(f"{place}: {place.host} {way_out} ({said})")
