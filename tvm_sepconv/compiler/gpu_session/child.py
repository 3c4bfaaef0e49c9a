"""The worker's process, as its parent sees it: a kernel that breaks a context ends no more."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm_sepconv

START_SECS = 60.0  # frameworks' imports
_CHARACTERS = 300  # of what a process said last


class ItemError(RuntimeError):
    """An item that failed, in one line."""


class Child:
    """A process that does items; started when it is first asked, and again after it died.

    Parameters
    ----------
    arguments
        Of ``python -m tvm_sepconv.compiler.gpu_session.worker``.
    log
        What it writes to its standard error stream.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._command = [
            sys.executable,
            "-m",
            "tvm_sepconv.compiler.gpu_session.worker",
            *arguments,
        ]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def ask(self, key: str, limit_secs: float) -> Any:
        """Have an item done and return what was found.

        Raises
        ------
        ItemError
            If it failed, the process died, or there was no answer in time.
        """
        if self._process is None:
            self._start()
            limit_secs += START_SECS
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(key.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None
        reply = json.loads(self._line(limit_secs))
        if "error" in reply:
            if reply["broken"]:
                self.close()
            raise ItemError(reply["error"])
        return reply["found"]

    def _start(self) -> None:
        root = str(Path(tvm_sepconv.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else three quarters of the memory
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **variables, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        self._received = b""

    def _line(self, limit_secs: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        stream, end = self._process.stdout.fileno(), time.monotonic() + limit_secs
        while b"\n" not in self._received:
            if not select.select([stream], [], [], max(end - time.monotonic(), 0))[0]:
                self.close()
                raise ItemError(f"no result after {limit_secs:.0f} s")
            if not (received := os.read(stream, 1 << 16)):
                raise self._dead()
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _dead(self) -> ItemError:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines = self._log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return ItemError(f"its process ended with {how}: {last[:_CHARACTERS]}")

    def close(self) -> None:
        """End the process and those it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # an item that it did not read
                pipe.close()
        self._process = None
