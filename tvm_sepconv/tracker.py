"""TVM's RPC tracker: where it is, which servers it knows, and whose turn it is. No TVM needed.

The protocol is TVM's (``tvm.rpc.tracker``): a magic number each way, then messages of a length and
JSON. TVM's own client waits a minute for a tracker that is not there, and for a server for ever.
"""

from __future__ import annotations

import ipaddress
import json
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

MAGIC = 0x2F271  # RPC_TRACKER_MAGIC of tvm.rpc.base, as the codes below; a test compares them
REQUEST, SUMMARY = 4, 6
ANSWER_SECS = 5.0  # a tracker that says nothing for so long is none
POLL_SECS = 0.5


@dataclass(frozen=True)
class Address:
    """Where a tracker or a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "9190", "host:9190" or "[::1]:9190"; without a host it is this machine.

        Raises
        ------
        ValueError
            If `text` is none of these.
        """
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(
                f"`--rpc` must be the tracker's port or host:port, as in 9190. Received: {text}"
            )
        return cls(host.strip("[]") or "127.0.0.1", int(port))

    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def warning(self) -> str | None:
        """Say what is wrong with an address that others can reach; None for a loopback one."""
        if self.is_loopback():
            return None
        return (
            f"{self} is reached over the network, and TVM's RPC lets anyone who reaches it run "
            "anything there: it has no passwords and no encryption. Let tracker and servers listen "
            "on 127.0.0.1 only and come through SSH: "
            f"ssh -N -L 9190:127.0.0.1:9190 -L 9090:127.0.0.1:9090 {self.host}, then --rpc 9190"
        )


@dataclass(frozen=True)
class Server:
    """A server that the tracker lent; ``matchkey`` opens one session."""

    address: Address
    matchkey: str


class Tracker:
    """A connection to a tracker.

    Raises
    ------
    ConnectionError
        If nothing answers there within ANSWER_SECS, or something else than a tracker does.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        start = time.monotonic()
        try:
            self._socket = socket.create_connection((address.host, address.port), ANSWER_SECS)
        except OSError as error:
            waited = time.monotonic() - start
            raise ConnectionError(
                f"No RPC tracker answers at {address}: {error.strerror or error} (after "
                f"{waited:.1f} s). Start one there (python -m tvm.exec.rpc_tracker --host "
                f"127.0.0.1 --port {address.port}), or look at the tunnel that leads to it."
            ) from error
        try:
            self._socket.sendall(struct.pack("<i", MAGIC))
            magic = struct.unpack("<i", self._receive(4))[0]
        except OSError:
            magic = None
        if magic != MAGIC:
            self.close()
            raise ConnectionError(
                f"What listens at {address} is no RPC tracker (or a tunnel to none): it did not "
                f"answer as one within {ANSWER_SECS:.0f} s. A server's port is not the tracker's."
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a request that still waits is withdrawn."""
        self._socket.close()

    def servers(self) -> dict[str, list[Address]]:
        """The servers, free and taken, by key."""
        result: dict[str, list[Address]] = {}
        for entry in self._summary()["server_info"]:
            host, port = entry["addr"]
            result.setdefault(entry["key"].partition(":")[2], []).append(Address(host, port))
        return result

    def free(self, key: str) -> int:
        """How many servers under `key` wait for somebody."""
        return int(self._summary()["queue_info"].get(key, {}).get("free", 0))

    def request(self, key: str, give_up: Callable[[], str | None]) -> Server:
        """Wait for a server.

        Parameters
        ----------
        give_up
            Asked every POLL_SECS; a text ends the waiting.

        Raises
        ------
        TimeoutError
            With the text of `give_up`.
        ConnectionError
            If the tracker goes.
        """
        self._send([REQUEST, key, "", 1])
        while not select.select([self._socket], [], [], POLL_SECS)[0]:
            if reason := give_up():
                raise TimeoutError(reason)
        host, port, matchkey = self._answer()
        return Server(Address(host, port), matchkey)

    def _summary(self) -> dict[str, Any]:
        self._send([SUMMARY])
        result: dict[str, Any] = self._answer()
        return result

    def _send(self, message: list[Any]) -> None:
        data = json.dumps(message).encode()
        self._socket.sendall(struct.pack("<i", len(data)) + data)

    def _answer(self) -> Any:
        (size,) = struct.unpack("<i", self._receive(4))
        return json.loads(self._receive(size))[1]

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError(f"The RPC tracker at {self.address} closed the connection.")
            data += part
        return data


def need_key(tracker: Tracker, key: str) -> list[Address]:
    """Return the servers under `key`.

    Raises
    ------
    ValueError
        If there are none; it names the keys there are.
    """
    known = tracker.servers()
    if key in known:
        return known[key]
    keys = ", ".join(f"{name} ({len(found)})" for name, found in sorted(known.items()))
    raise ValueError(
        f"The RPC tracker at {tracker.address} has no server under the key {key!r}. "
        f"Keys and their servers: {keys or 'none at all'}. Start one on the board: python -m "
        f"tvm.exec.rpc_server --host 127.0.0.1 --tracker {tracker.address} --key {key}"
    )
