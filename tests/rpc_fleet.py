"""A real RPC tracker and real servers on this machine, for the tests of measuring on boards."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import until

from tvm_sepconv.tracker import Address, Tracker

KEY = "board"
PORTS = 100


def free_port() -> int:
    """Where to begin to look for one: until it is taken it may become somebody else's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def nobody() -> Iterator[Address]:
    """An address that refuses connections and that nobody else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        yield Address("127.0.0.1", bound.getsockname()[1])


# What `tvm.exec.rpc_tracker` and `rpc_server` start, without the process that starts it.
TRACKER = """if True:
    import sys
    from tvm.rpc.tracker import PopenTrackerServerState
    host, first, last = sys.argv[1:]
    PopenTrackerServerState(host, int(first), int(last)).thread.join()
"""
SERVER = """if True:
    import sys
    from tvm.rpc.server import PopenRPCServerState
    host, first, last, tracker, key = sys.argv[1:]
    tracker = host, int(tracker)
    PopenRPCServerState(host, int(first), int(last), tracker_addr=tracker, key=key).thread.join()
"""


class Process:
    """One of TVM's RPC programs, with all that it starts."""

    def __init__(
        self, code: str, log: Path, *arguments: object, variables: Mapping[str, str] | None = None
    ) -> None:
        self.log, first = log, free_port()
        command = [sys.executable, "-c", code, "127.0.0.1", first, first + PORTS, *arguments]
        with log.open("w") as file:  # a session, so that one signal reaches everything
            self.process = subprocess.Popen(
                list(map(str, command)),
                stderr=file,
                start_new_session=True,
                env={**os.environ, **(variables or {})},
            )

    @functools.cached_property
    def port(self) -> int:
        """The one that it took, as it says itself."""
        bound = re.compile(r"bind to 127\.0\.0\.1:(\d+)\n")
        return int(until(lambda: bound.search(self.log.read_text()), self.log.name)[1])

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process.returncode is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def sessions(self) -> int:
        return self.log.read_text().count("start serving")


class Fleet:
    """A tracker, and as many servers under KEY as a test needs, with environment `variables`."""

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self.folder, self.variables = folder, variables
        self.tracker = Process(TRACKER, folder / "tracker.log")
        self.servers: list[Process] = []
        self._numbers = itertools.count()

    @functools.cached_property
    def address(self) -> Address:
        return Address("127.0.0.1", self.tracker.port)

    def need(self, count: int) -> list[Process]:
        """Return so many servers that are alive and free, started where there are too few."""
        self.servers = [server for server in self.servers if server.process.poll() is None]
        until(lambda: [self.registered()], "the tracker")
        for _ in range(count - len(self.servers)):
            log = self.folder / f"server{next(self._numbers)}.log"
            arguments = (self.address.port, KEY)
            self.servers.append(Process(SERVER, log, *arguments, variables=self.variables))
        ports = {server.port for server in self.servers}
        until(lambda: self.registered() == (ports, len(ports)), f"{count} servers")
        return self.servers

    def registered(self) -> tuple[set[int], int]:
        """The servers' ports, and how many of them are free."""
        with Tracker(self.address) as tracker:
            ports = {address.port for address in tracker.servers().get(KEY, [])}
            return ports, tracker.free(KEY)

    def close(self) -> None:
        for process in [self.tracker, *self.servers]:
            process.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet for the tests of one file, which names it: ``fleet = rpc_fleet.fleet``."""
    one = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        yield one
    finally:
        one.close()
