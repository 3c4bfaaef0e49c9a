"""One board, for the length of a session: what all boards have in common.

Every board loads a native library of ours, by whose functions it is measured there: no network in
between. It needs no compiler.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tvm.runtime
from tvm import rpc

from tvm_sepconv.compiler.tuning.measure import Array, Case, Task
from tvm_sepconv.tracker import Server

CONNECT_SECS = 15.0
CALL_LIMIT_SECS = 20  # a library's first call
TEXT_BYTES = 1 << 16
_NATIVE = "board.so"

T = TypeVar("T")
B = TypeVar("B", bound="Board")


class CandidateError(Exception):
    """The fault is the library's, or the target's: another board would say the same."""


class Identity(NamedTuple):
    """A board's name, for records, and the target that is measured there."""

    machine: str
    target: Any


@contextmanager
def session(server: Server, kind: type[B], native: bytes, limit_secs: float) -> Iterator[B]:
    """Open the session that the tracker granted; the server ends it after `limit_secs`.

    Parameters
    ----------
    kind, native
        Of the board, and what its `native` wrote.

    Raises
    ------
    CandidateError
        If the native library does not load there.
    Exception
        Of TVM's, if the server cannot be reached or goes.
    """
    where, remote = server.address, None
    try:
        connect = partial(rpc.connect, where.host, where.port, server.matchkey, limit_secs)
        remote = within(CONNECT_SECS, connect)
        remote.upload(bytearray(native), _NATIVE)
        yield kind(remote)
    finally:
        if remote is not None:  # at once: a tensor in some traceback would keep it from others
            with suppress(Exception):
                remote.get_function("CloseRPCConnection")()


class Board(ABC):
    """An open session whose server has loaded the native library."""

    others = ""  # targets that a wrong architecture may call for

    def __init__(self, remote: Any) -> None:
        self._remote, self._cpu = remote, remote.cpu(0)
        try:
            self._native = remote.load_module(_NATIVE)
        except Exception as error:
            remote.get_function("tvm.rpc.server.workpath")  # a server that has gone raises here
            raise CandidateError(
                "the runtime library does not load there. Perhaps the board is of another "
                f"architecture: choose another --target{self.others} or --key (its loader says: "
                f"{brief(error)})"
            ) from None

    @staticmethod
    @abstractmethod
    def native(target: Any, output: Path) -> None:
        """Write the native library for boards of `target`."""

    @abstractmethod
    def identity(self, target: Any) -> Identity:
        """Say what the board is.

        Raises
        ------
        CandidateError
            If it is none of `target`.
        """

    @abstractmethod
    def sample(
        self, data: Task, libraries: Sequence[str], rounds: int, threads: int
    ) -> list[list[float]]:
        """Verify libraries, then time them in alternation: `rounds` samples of one call each.

        Raises
        ------
        CandidateError
            If a library is wrong, crashes or hangs.
        """

    def _sent(self, library: str, name: str) -> str:
        """Upload a library, under a name of its own: a process keeps what it has opened."""
        self._remote.upload(bytearray(Path(library).read_bytes()), name)
        return str(self._remote.get_function("tvm.rpc.server.workpath")(name))

    def _tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._cpu)

    def _text(self, function: str, *arguments: Any) -> str | None:
        """The text that a native function writes; None if it returns less than 0."""
        text = self._tensor(np.zeros(TEXT_BYTES, np.uint8))
        size = self._native[function](*arguments, text)
        return None if size < 0 else text.numpy()[:size].tobytes().decode(errors="replace")

    def _error(self) -> CandidateError:
        return CandidateError(self._text("last_error"))


def check(case: Case, y: Any) -> None:
    """Raise a CandidateError if a tensor there is not the case's answer."""
    try:
        case.check(y.numpy())
    except ValueError as error:
        raise CandidateError(str(error)) from None


def nothing(case: Case) -> Array:
    """An output in which nothing was written yet."""
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
