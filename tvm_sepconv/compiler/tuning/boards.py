"""Measure candidates on boards, through TVM's RPC tracker and servers.

Every measurement is a session of its own on one server, which may be any of those under the key: a
board that dies costs what ran there, and others can use the boards in between.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tvm_sepconv.compiler.targets import CpuTarget, CudaTarget
from tvm_sepconv.compiler.tuning.board import (
    CONNECT_SECS,
    Board,
    CandidateError,
    Identity,
    brief,
    session,
    within,
)
from tvm_sepconv.compiler.tuning.cpu_board import CpuBoard
from tvm_sepconv.compiler.tuning.cuda_board import CudaBoard
from tvm_sepconv.compiler.tuning.measure import RunnerError, Task
from tvm_sepconv.tracker import Address, Server, Tracker, need_key

WAIT_SECS = 60.0  # for a server that others have
RUN_LIMIT_SECS = 60.0  # a library
TRIES = 2  # servers that may be lost over one measurement


class Boards:
    """The servers under one key of a tracker, taken to be alike, as a place to measure.

    Any number of threads may measure at once; `workers` of them find a server of their own.
    ``machine`` is the name of a board.

    Parameters
    ----------
    target
        Of a processor or a GPU; "cuda" becomes the target of the GPU that is found.
    threads
        That one call may use there.
    wait_secs
        How long to wait for a server when others have all.

    Raises
    ------
    ConnectionError
        If there is no tracker at `address`, or the server it names cannot be reached.
    ValueError
        If it has no server under `key`, or that cannot run the target's libraries.
    TimeoutError
        If others have all servers under `key`.
    """

    def __init__(
        self,
        address: Address,
        key: str,
        target: CpuTarget | CudaTarget,
        threads: int = 1,
        wait_secs: float = WAIT_SECS,
    ) -> None:
        self.address, self.key, self.target = address, key, target
        self.threads, self.wait_secs = threads, wait_secs
        self._measuring = 0  # sessions of ours
        self._lock = threading.Lock()
        with Tracker(address) as tracker:
            self.workers = len(need_key(tracker, key))
        self._kind = _kind(target)
        with tempfile.TemporaryDirectory() as folder:
            native = Path(folder, "board.so")
            self._kind.native(target, native)
            self._native = native.read_bytes()
        _, (self.machine, self.target) = self.visit()

    def __enter__(self) -> Boards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing: no server is held between measurements."""

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        """As `Runner.measure` says, all libraries on one server.

        Raises
        ------
        RuntimeError
            If a library is wrong, crashes or hangs, or TRIES servers were lost over it.
        RunnerError
            If no server is left, or its GPU is another than the first one's.
        """
        data, limit = Task(str(task)), RUN_LIMIT_SECS * len(libraries)
        lost = []

        def sample() -> list[list[float]]:
            with session(server, self._kind, self._native, limit) as board:
                self._need_same(server, board)
                return board.sample(data, libraries, rounds, self.threads)

        for _ in range(TRIES):
            try:
                server = self._lent()
            except OSError as error:
                raise RunnerError(f"{error} What was measured so far is kept.") from error
            self._count(1)
            try:
                return within(limit + CONNECT_SECS, sample)
            except CandidateError as error:
                raise RuntimeError(str(error)) from None
            except RunnerError:
                raise
            except Exception as error:
                lost.append(f"{server.address}: {brief(error)}")
            finally:
                self._count(-1)
        raise RuntimeError(f"{TRIES} RPC servers were lost over it ({'; '.join(lost)})")

    def _need_same(self, server: Server, board: Board) -> None:
        """Times of one GPU say nothing of another's, and a library may well run on both."""
        if isinstance(self.target, CpuTarget):
            return
        try:
            found = board.identity(self.target).machine
        except CandidateError as error:
            found = str(error)
        if found != self.machine:
            raise RunnerError(
                f"The boards under the key {self.key!r} are not alike: the search began on "
                f"{self.machine}, and of {server.address} it is said: {found}. Give each kind a "
                "key of its own."
            )

    def _count(self, change: int) -> None:
        with self._lock:
            self._measuring += change

    def visit(self) -> tuple[Address, Identity]:
        """Look at a board that is free, and return where and what it is.

        Raises
        ------
        ConnectionError, ValueError, TimeoutError
            As the constructor does.
        """
        server = self._lent()
        where = f"The RPC server at {server.address}, under the key {self.key!r},"

        def identity() -> Identity:
            with session(server, self._kind, self._native, CONNECT_SECS) as board:
                return board.identity(self.target)

        try:
            return server.address, within(2 * CONNECT_SECS, identity)
        except CandidateError as error:
            raise ValueError(
                f"{where} cannot run what is built for {self.target.name}: {error}."
            ) from error
        except Exception as error:
            raise ConnectionError(
                f"{where} does not answer as it should: {brief(error)}. A tunnel must have the "
                "server's port at both ends; a firewall must let it through."
            ) from None

    def _lent(self) -> Server:
        """A server for one session, as soon as one is free."""
        start = time.monotonic()

        def give_up() -> str | None:
            where = f"under the key {self.key!r} of the RPC tracker at {self.address}"
            with Tracker(self.address) as asked:
                count = len(asked.servers().get(self.key, []))
            if not count:
                return f"No server is left {where}."
            waited = time.monotonic() - start
            if self._measuring or waited < self.wait_secs:  # our own sessions end
                return None
            return (
                f"All servers ({count}) {where} are taken, after {waited:.0f} s of waiting. Come "
                "again when whoever has them is done, start another, or restart one that hangs."
            )

        with Tracker(self.address) as tracker:
            return tracker.request(self.key, give_up)


def _kind(target: CpuTarget | CudaTarget) -> type[Board]:
    return CpuBoard if isinstance(target, CpuTarget) else CudaBoard
