"""A look at the tracker and the boards behind it, before they are relied on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tvm_sepconv import targets
from tvm_sepconv.compiler import build, cuda
from tvm_sepconv.compiler.targets import CpuTarget, CudaTarget, of
from tvm_sepconv.compiler.tuning import cuda_measure, measure
from tvm_sepconv.compiler.tuning.boards import Boards
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.doctor import NOTE, OK, PROBLEM, WARNING, Finding
from tvm_sepconv.options import BuildOptions
from tvm_sepconv.tracker import Address, Tracker, need_key

WAIT_SECS = 5.0
CONFIG = KernelConfig(channels=4, filters=5, kernel_size=3, activation="relu")
STEPS = 37


def examine(address: Address, key: str | None, target: str | None) -> Iterator[Finding]:
    """Examine the tracker and the servers under `key`, whether they run what `target` names.

    Parameters
    ----------
    key
        None to see which there are.
    target
        None for this machine's best, and to see whether there is a GPU.
    """
    if warning := address.warning():
        yield Finding(WARNING, "tracker", warning)
    try:
        with Tracker(address) as tracker:
            yield Finding(OK, "tracker", f"a tracker answers at {address}")
            if key is None:
                known = [f"{name} ({len(found)})" for name, found in tracker.servers().items()]
                text = f"keys and their servers: {', '.join(known) or 'none at all'}"
                yield Finding(NOTE, "boards", text, "Look at one with --key")
                return
            servers, free = need_key(tracker, key), tracker.free(key)
    except (ConnectionError, ValueError) as error:
        yield _problem("tracker", error)
        return
    text = f"{len(servers)} under the key {key!r}, of which {free} free"
    yield Finding(OK if free else WARNING, "boards", text)
    for server in servers:
        if warning := server.warning():
            yield Finding(WARNING, "boards", warning)
    try:
        name = target or targets.runnable()[0]
        yield from _measured(Boards(address, key, of(name), wait_secs=WAIT_SECS), free)
        if target is None:
            yield _gpu(address, key)
    except (OSError, ValueError, RuntimeError) as error:
        yield _problem("boards", error)


def _measured(boards: Boards, free: int) -> Iterator[Finding]:
    """Visit those that are free, and let one run a layer."""
    for _ in range(free):
        where, (machine, target) = boards.visit()
        yield Finding(OK, "boards", f"{where}: {machine}; can run {target.name}")
    with tempfile.TemporaryDirectory() as folder:
        task, library = Path(folder, "task.npz"), Path(folder, "layer.so")
        _build_layer(boards.target, task, library)
        ((secs,),) = boards.measure(task, [str(library)], 1)
    text = f"a layer built for {boards.target.name} is right there, and takes {secs * 1e6:.1f} µs"
    yield Finding(OK, "boards", text)


def _build_layer(target: CpuTarget | CudaTarget, task: Path, library: Path) -> None:
    if isinstance(target, CpuTarget):
        measure.write_task(task, CONFIG, 1, STEPS)
        build.build_library(CONFIG, target, library, build.variants(CONFIG, target))
    else:
        cuda_measure.write_task(task, CONFIG, 1, STEPS)
        options = BuildOptions()
        found = cuda.variants(CONFIG, target, options)
        cuda.build_library(CONFIG, target, library, found, options)


def _gpu(address: Address, key: str) -> Finding:
    """Whether a board beside a processor like this one has a GPU."""
    try:
        found = Boards(address, key, CudaTarget("cuda"), wait_secs=WAIT_SECS)
    except ValueError as error:
        return Finding(NOTE, "boards", str(error.__cause__ or error).partition(". ")[0])
    remedy = f"Look at it, and tune for it, with --target {found.target.name}"
    return Finding(NOTE, "boards", f"a GPU too: {found.machine}", remedy)


def _problem(subject: str, error: Exception) -> Finding:
    """An error of ours as a finding: its first sentence, and the way out that follows."""
    text, _, remedy = str(error).partition(". ")
    return Finding(PROBLEM, subject, text, remedy or None)
