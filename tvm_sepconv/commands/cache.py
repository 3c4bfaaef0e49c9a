"""``tvm-sepconv cache``: what layers compiled on first use take, and removing it."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_sepconv import jit

HELP = "show and clear the libraries that were compiled on first use"
DESCRIPTION = (
    "Layers that are called without having been saved are compiled into a cache, a library for "
    "each kernel, target and tuning record. TVM_SEPCONV_CACHE moves it."
)
EPILOG = None

_KEY = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"(new|old)-")
# A process that has just been given a library's path may not have opened it yet, and no compilation
# takes an hour.
_IN_USE_SECS, _ABANDONED_SECS = 60, 3600


@dataclass(frozen=True)
class Entry:
    """A library in the cache, with the runtime and the description beside it."""

    path: Path
    target: str
    size_bytes: int
    used: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("show", help="where it is, and what it holds")
    clear = actions.add_parser(
        "clear", help="remove libraries, also while processes use them",
        description="Remove libraries but those of the last minute. A process that uses one keeps "
        "it until it ends; the next call of such a layer compiles it again.",
    )  # fmt: skip
    clear.add_argument(
        "--older-than", type=float, metavar="DAYS", help="only what was not used for so long"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    root = jit.users_cache()
    return _show(root) if options.action == "show" else _clear(root, options.older_than)


def _show(root: Path) -> int:
    found = entries(root)
    print(f"{root}: {_amount(found)}")
    for target in sorted({entry.target for entry in found}):
        group = [entry for entry in found if entry.target == target]
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(e.used for e in group)))
        print(f"  {target}: {_amount(group)}, last used {last}")
    known = {entry.path for entry in found}
    if others := sorted(p.name for p in root.iterdir() if p not in known and p.is_dir()):
        print(f"also there, and left by `clear`: {', '.join(others)}")
    return 0


def _clear(root: Path, older_than_days: float | None) -> int:
    if older_than_days is not None and not older_than_days >= 0:
        raise ValueError(f"`--older-than` must be a number of days. Received: {older_than_days}")
    idle_secs = max(_IN_USE_SECS, (older_than_days or 0) * 86400)
    found, now = entries(root), time.time()
    chosen = [entry for entry in found if now - entry.used > idle_secs]
    for entry in chosen:
        _remove(entry.path)
    for path in root.iterdir():  # what a killed process left
        if _UNFINISHED.match(path.name) and now - _mtime(path) > _ABANDONED_SECS:
            shutil.rmtree(path, ignore_errors=True)
    print(f"{root}: removed {_amount(chosen)}")
    if kept := [entry for entry in found if entry not in chosen]:
        span = f"{older_than_days:g} days" if older_than_days else "minute"
        print(f"kept {_amount(kept)}, used in the last {span}")
    return 0


def entries(root: Path) -> list[Entry]:
    """Return the libraries in the cache at `root`; what vanishes meanwhile is left out."""
    result = []
    for path in sorted(root.iterdir()):
        if _KEY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                size_bytes = sum(file.stat().st_size for file in path.iterdir())
                result.append(Entry(path, _target(path), size_bytes, path.stat().st_mtime))
    return result


def _target(path: Path) -> str:
    try:
        return str(json.loads((path / jit.ENTRY).read_text())["target"])
    except (KeyError, OSError, TypeError, ValueError, RecursionError):
        return "damaged, or of an earlier version"


def _remove(path: Path) -> None:
    """Move an entry aside as a whole, then delete it: nobody must find half of one."""
    gone = contextlib.suppress(FileNotFoundError)  # somebody else clears as well
    with gone, tempfile.TemporaryDirectory(dir=path.parent, prefix="old-") as aside:
        path.rename(Path(aside, "entry"))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _amount(found: Sequence[Entry]) -> str:
    size = sum(entry.size_bytes for entry in found)
    noun = "library" if len(found) == 1 else "libraries"
    return f"{len(found)} {noun}, {size / 1e6:.1f} MB"
