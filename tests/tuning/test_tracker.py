"""The tracker's address and protocol, and what is said when there is none."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tvm.rpc.base
from rpc_fleet import nobody

from tvm_sepconv import tracker
from tvm_sepconv.tracker import Address, Tracker


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("9190", "127.0.0.1", 9190, "127.0.0.1:9190"),
        (":9190", "127.0.0.1", 9190, "127.0.0.1:9190"),
        ("pi.local:91", "pi.local", 91, "pi.local:91"),
        ("[::1]:9190", "::1", 9190, "[::1]:9190"),
    ],
)
def test_an_address_is_a_port_with_or_without_a_host(
    text: str, host: str, port: int, shown: str
) -> None:
    address = Address.parse(text)
    assert address == Address(host, port)
    assert str(address) == shown


@pytest.mark.parametrize("text", ["", "pi.local", "pi.local:", "pi:0", "pi:65536", "pi:-1", "x:²"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`--rpc` must be the tracker's port or host:port"):
        Address.parse(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_is_not_warned_of(host: str) -> None:
    assert Address(host, 9190).warning() is None


@pytest.mark.parametrize("host", ["pi.local", "192.168.0.7", "0.0.0.0", "fe80::1"])
def test_the_network_is_and_the_way_out_is_a_tunnel(host: str) -> None:
    warning = Address(host, 9190).warning()
    assert warning is not None
    assert "ssh -N -L 9190:127.0.0.1:9190" in warning
    assert host in warning


def test_the_protocol_is_tvms() -> None:
    assert tracker.MAGIC == tvm.rpc.base.RPC_TRACKER_MAGIC
    codes = tvm.rpc.base.TrackerCode
    assert (tracker.REQUEST, tracker.SUMMARY) == (codes.REQUEST, codes.SUMMARY)


@contextmanager
def listening(*answers: bytes) -> Iterator[Address]:
    """Something that takes a connection, and says this when it is told something."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for answer in answers:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                stop.wait()

        stop = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Address("127.0.0.1", server.getsockname()[1])
        stop.set()
        thread.join()


def test_no_tracker_is_said_at_once() -> None:
    with nobody() as address, pytest.raises(ConnectionError) as raised:
        Tracker(address)
    message = str(raised.value)
    assert f"No RPC tracker answers at {address}: Connection refused" in message
    assert f"python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {address.port}" in message


@pytest.mark.parametrize("answers", [(), (b"HTTP/1.1 400 Bad Request\r\n",)], ids=["silent", "web"])
def test_what_is_no_tracker_is_called_so(
    answers: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "ANSWER_SECS", 300 if answers else 0.2)
    with listening(*answers) as address, pytest.raises(ConnectionError, match="is no RPC tracker"):
        Tracker(address)


def test_a_tracker_that_goes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "ANSWER_SECS", 300)
    with listening(struct.pack("<i", tracker.MAGIC)) as address, Tracker(address) as one:
        one._socket.shutdown(socket.SHUT_RD)  # as if the other end had closed
        with pytest.raises(ConnectionError, match=f"tracker at {address} closed the connection"):
            one.servers()
