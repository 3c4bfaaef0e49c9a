"""One board, for the length of a session: what it is, whether a library is right there, how fast.

The board's process calls the candidate through the runtime library, as a device does, and TVM's
time evaluator takes the time there: no network in between. It needs no compiler.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm.runtime
from tvm import rpc

from tvm_sepconv import targets
from tvm_sepconv.bundle import RUNTIME
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning.measure import SAMPLE_SECS, Array, Case, Task
from tvm_sepconv.tracker import Server

CONNECT_SECS = 15.0
CALL_LIMIT_SECS = 20  # a library's first call
FILE_BYTES = 1 << 16
_SAME = 1  # the padding of every task
_SIGALRM = -14
# Arm's part numbers in /proc/cpuinfo, of the cores that targets name.
_PARTS = {
    "0xd03": "cortex-a53",
    "0xd05": "cortex-a55",
    "0xd08": "cortex-a72",
    "0xd0b": "cortex-a76",
    "0xd0c": "neoverse-n1",
}

T = TypeVar("T")


class CandidateError(Exception):
    """The fault is the library's, or the target's: another board would say the same."""


@contextmanager
def session(server: Server, runtime: bytes, limit_secs: float) -> Iterator[Board]:
    """Open the session that the tracker granted; the server ends it after `limit_secs`.

    Raises
    ------
    CandidateError
        If the runtime library does not load there.
    Exception
        Of TVM's, if the server cannot be reached or goes.
    """
    where, remote = server.address, None
    try:
        connect = partial(rpc.connect, where.host, where.port, server.matchkey, limit_secs)
        remote = within(CONNECT_SECS, connect)
        remote.upload(bytearray(runtime), RUNTIME)
        yield Board(remote)
    finally:
        if remote is not None:  # at once: a tensor in some traceback would keep it from others
            with suppress(Exception):
                remote.get_function("CloseRPCConnection")()


class Board:
    """An open session whose server has loaded the runtime library."""

    def __init__(self, remote: Any) -> None:
        self._remote, self._device = remote, remote.cpu(0)
        try:
            self._runtime = remote.load_module(RUNTIME)
        except Exception as error:
            raise CandidateError(
                "the runtime library does not load there. Perhaps the board is of another "
                f"architecture: choose another --target or --key (its loader says: {brief(error)})"
            ) from None

    def description(self, target: CpuTarget) -> str:
        """Return the board's name and processors.

        Raises
        ------
        CandidateError
            If its processor is another than the target's.
        """
        lines = (line.partition(":") for line in self._file("/proc/cpuinfo").splitlines())
        fields = [(key.strip(), text.strip()) for key, _, text in lines]
        flags = {f for key, text in fields if key in ("flags", "Features") for f in text.split()}
        if lacking := sorted(set(targets.FEATURES[target.isa]) - flags):
            raise CandidateError(
                f"its processor lacks {', '.join(lacking)}, which {target.name} uses. Choose "
                "another --target or --key"
            )
        cores = {_PARTS.get(text, "") for key, text in fields if key == "CPU part"}
        core = target.name.partition("@")[2]
        if core and cores and not cores & {core, ""}:
            raise CandidateError(
                f"its cores are {', '.join(sorted(cores))}, and what is measured there would be "
                f"recorded for {target.name}. Choose another --target or --key"
            )
        model = self._file("/proc/device-tree/model").strip("\0\n ")
        names = [model, *(text for key, text in fields if key == "model name"), target.name]
        count = sum(key == "processor" for key, _ in fields)
        return f"{next(filter(None, names))}, {count} processors"

    def sample(
        self, data: Task, libraries: Sequence[str], rounds: int, threads: int
    ) -> list[list[float]]:
        """Verify libraries, then time them in alternation: `rounds` samples of one call each.

        Raises
        ------
        CandidateError
            If a library is wrong, crashes or hangs.
        """
        self._runtime["set_num_threads"](threads)
        wide = data.kernel.accumulation_dtype
        weights = [None if a is None else self._tensor(a.astype(wide)) for a in data.weights]
        layers = [
            self._layer(f"{index}.so", library, weights) for index, library in enumerate(libraries)
        ]
        for case in reversed(data.cases):  # the measured one, which comes first, stays on the board
            operands = self._tensor(case.x), self._tensor(_nothing(case))
            for layer in layers:
                self._verify(layer, *operands, case)
        timers = [self._timer(layer, *operands) for layer in layers]
        samples: list[list[float]] = [[] for _ in layers]
        for _ in range(rounds):
            for timer, times in zip(timers, samples, strict=True):
                times.append(timer())
        return samples

    def _layer(self, name: str, library: str, weights: Sequence[Any]) -> int:
        """Upload a library, under a name of its own: a process keeps what it has opened."""
        self._remote.upload(bytearray(Path(library).read_bytes()), name)
        path = self._remote.get_function("tvm.rpc.server.workpath")(name)
        layer: int = self._runtime["create"](path, *weights, _SAME, 0, 0)
        if not layer:
            text = self._tensor(np.zeros(FILE_BYTES, np.uint8))
            size = self._runtime["last_error"](text)
            raise CandidateError(text.numpy()[:size].tobytes().decode(errors="replace"))
        return layer

    def _verify(self, layer: int, x: Any, y: Any, case: Case) -> None:
        status = self._runtime["try_run"](layer, x, y, CALL_LIMIT_SECS)
        if status == _SIGALRM:
            raise CandidateError(f"no result after {CALL_LIMIT_SECS} s")
        if status < 0:
            raise CandidateError(f"the call crashes: signal {-status}")
        y.copyfrom(_nothing(case))
        status = status or self._runtime["run"](layer, x, y)
        if status:
            raise CandidateError(f"the call fails with status {status} of the runtime library")
        try:
            case.check(y.numpy())
        except ValueError as error:
            raise CandidateError(str(error)) from None

    def _timer(self, layer: int, x: Any, y: Any) -> Callable[[], float]:
        """What takes one sample: a call that is not timed, and so many that are."""

        def seconds(calls: int) -> float:
            evaluator = self._runtime.time_evaluator("run", self._device, number=calls)
            return float(evaluator(layer, x, y).mean)

        calls = max(1, round(SAMPLE_SECS / max(seconds(3), 1e-9)))
        return lambda: seconds(calls)

    def _tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._device)

    def _file(self, path: str) -> str:
        """The beginning of a text file, "" if it cannot be read."""
        text = self._tensor(np.zeros(FILE_BYTES, np.uint8))
        size = self._runtime["read_file"](path, text)
        return str(text.numpy()[: max(size, 0)].tobytes().decode(errors="replace"))


def _nothing(case: Case) -> Array:
    return np.full(case.expected.shape, np.nan, case.x.dtype)


def brief(error: Exception) -> str:
    """Say in one line what TVM's RPC reports, in pages."""
    text = str(error).strip() or type(error).__name__
    if "code=kShutdown" in text:
        return "the server's process ended"
    return re.sub(r"^Check failed: \(.*?\) is false: ", "", text.splitlines()[-1])[:300]


def within(limit_secs: float, action: Callable[[], T]) -> T:
    """Return what `action` does; TVM's RPC itself waits for ever for a board without power.

    Raises
    ------
    TimeoutError
        If it takes longer; it goes on in a thread that ends with the process at the latest.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_secs)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_secs:.0f} s")
    return results[0]
