"""A real RPC tracker and real servers on this machine, for the tests of measuring on boards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tvm_sepconv.tracker import Address, Tracker

START_SECS = 60
KEY = "board"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """One of TVM's RPC programs, with all that it starts."""

    def __init__(self, module: str, port: int, log: Path, *arguments: str) -> None:
        self.port, self.log = port, log
        one = ("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1))
        command = [sys.executable, "-m", f"tvm.exec.{module}", *one, *arguments]
        with log.open("w") as file:  # a session, so that one signal reaches everything
            self.process = subprocess.Popen(command, stderr=file, start_new_session=True)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process.returncode is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def sessions(self) -> int:
        return self.log.read_text().count("start serving")


class Fleet:
    """A tracker, and as many servers under KEY as a test needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = Address("127.0.0.1", free_port())
        self.tracker = Process("rpc_tracker", self.address.port, folder / "tracker.log")
        self.servers: list[Process] = []

    def need(self, count: int) -> list[Process]:
        """Return so many servers that are alive and free, started where there are too few."""
        self.wait(lambda: True, "the tracker")
        self.servers = [server for server in self.servers if server.process.poll() is None]
        while len(self.servers) < count:
            port = free_port()
            named = ("--tracker", str(self.address), "--key", KEY)
            self.servers.append(Process("rpc_server", port, self.folder / f"{port}.log", *named))
        ports = {server.port for server in self.servers}
        self.wait(lambda: self.registered() == (ports, len(ports)), f"{count} servers")
        return self.servers

    def registered(self) -> tuple[set[int], int]:
        """The servers' ports, and how many of them are free."""
        with Tracker(self.address) as tracker:
            ports = {address.port for address in tracker.servers().get(KEY, [])}
            return ports, tracker.free(KEY)

    def close(self) -> None:
        for process in [self.tracker, *self.servers]:
            process.kill()

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_SECS
        while time.monotonic() < end:
            try:
                with Tracker(self.address):
                    pass
                if ready():
                    return
            except ConnectionError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"no sign of {what} after {START_SECS} s")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet for the tests of one file, which names it: ``fleet = rpc_fleet.fleet``."""
    one = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        yield one
    finally:
        one.close()
