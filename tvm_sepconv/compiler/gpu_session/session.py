"""Measure a prepared folder: items in order, results as they come, on where it stopped."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tvm_sepconv import gpu
from tvm_sepconv.compiler.gpu_session.child import Child, ItemError
from tvm_sepconv.compiler.gpu_session.plan import LIBRARIES, MANIFEST, RESULTS, Item, Plan, results

MINUTES = 8.0  # of one run
AGAIN = 75  # the exit status while something is left to do
LIMIT_SECS = {"correctness": 30.0, "compilers": 150.0}  # a kernel that hangs costs all of it
USUAL_LIMIT_SECS = 60.0


def run(
    folder: Path,
    minutes: float = MINUTES,
    retry: bool = False,
    child: Callable[[list[str], Path], Child] = Child,
    show: Callable[[str], None] = print,
) -> int:
    """Do what is left of a prepared folder, for so many minutes.

    Parameters
    ----------
    retry
        Do what failed once more.

    Returns
    -------
    int
        0 if all is done, else `AGAIN`.

    Raises
    ------
    FileNotFoundError
        If the folder was not prepared.
    RuntimeError
        If no GPU can be used here, or the process that measures does not start.
    ValueError
        For no time at all.
    """
    if not minutes > 0:
        raise ValueError(f"`--minutes` must be positive. Received: {minutes}")
    plan = Plan.load(folder)
    if reason := gpu.missing():
        raise RuntimeError(
            f"Measuring needs an NVIDIA GPU, and this machine has none to use: {reason}. Copy the "
            f"folder {folder} to a machine with one and run it there: python3 {folder.name}"
        )
    if (here := f"sm_{gpu.capability(0)}") != plan.arch:
        raise RuntimeError(
            f"{folder} was prepared for an {plan.arch}, and this machine's GPU is an {here}: "
            f"tvm-sepconv gpu prepare {folder} --arch {here}"
        )
    unpack(folder)
    end = time.monotonic() + 60 * minutes
    done = results(folder)
    if retry:
        done = {key: values for key, values in done.items() if "error" not in values}
    left = [item for item in plan.items() if item.key not in done]
    log = folder / "results" / "worker.log"
    log.parent.mkdir(exist_ok=True)
    for step in dict.fromkeys(item.step for item in left):
        todo = [item for item in left if item.step == step]
        show(f"{step}: {len(todo)} to do")
        with closing(child([str(folder.absolute()), step], log)) as one:
            _greet(one, log)
            for number, item in enumerate(todo, 1):
                if not _do(one, item, folder, end - time.monotonic()):
                    show(f"Time is over, {len(todo) - number + 1} of {step} are left: run it again")
                    return AGAIN
                _tell(number, todo, show)
    return 0


def _greet(child: Child, log: Path) -> None:
    """Have the worker start, lest what is wrong with the machine becomes every item's failure."""
    try:
        child.ask("", USUAL_LIMIT_SECS)
    except ItemError as error:
        raise RuntimeError(
            f"The process that measures does not work here: {error}. What it said is in {log}"
        ) from error


def unpack(folder: Path) -> None:
    """Unpack the libraries, if that is still to be done."""
    packed, place = folder / LIBRARIES, folder / "libraries"
    stamp = place / MANIFEST  # of the preparation that they are from
    manifest = (folder / MANIFEST).read_bytes()
    if packed.is_file() and not (stamp.is_file() and stamp.read_bytes() == manifest):
        place.mkdir(exist_ok=True)
        with tarfile.open(packed) as archive:
            kinds = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(place, **kinds)  # type: ignore[arg-type]
        stamp.write_bytes(manifest)


def _do(child: Child, item: Item, folder: Path, left_secs: float) -> bool:
    """Do an item and write down what it came to; False if there is no time for it."""
    limit_secs = LIMIT_SECS.get(item.step, USUAL_LIMIT_SECS)
    if left_secs <= 0:
        return False
    start = time.monotonic()
    values: dict[str, Any]
    try:
        values = {"found": child.ask(item.key, min(limit_secs, left_secs))}
    except ItemError as error:
        # Stopped by the end of this run and by nothing else, it is tried again in the next one.
        if time.monotonic() - start >= left_secs:
            return False
        values = {"error": str(error)}
    line = {"key": item.key, **values, "secs": round(time.monotonic() - start, 2)}
    with open(folder / "results" / RESULTS, "ab+") as file:
        file.seek(max(file.seek(0, 2) - 1, 0))
        whole = file.read(1) in (b"", b"\n")  # whoever was killed may have left half a line
        file.write(b"\n" * (not whole) + json.dumps(line).encode() + b"\n")
    return True


def _tell(number: int, todo: list[Item], show: Callable[[str], None]) -> None:
    if number == len(todo) or (sys.stdout.isatty() or number % 10 == 0):
        show(f"  {number}/{len(todo)} {todo[number - 1].key}")
