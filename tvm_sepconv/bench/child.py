"""A process that answers lines with JSON: started when it is first asked, again after it died."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHARACTERS = 200  # of what a process said last


class Child:
    """A process, as its parent sees it.

    Parameters
    ----------
    variables
        All of its environment.
    log
        What it writes to its standard error stream.
    folder
        Where it runs; None is this process's own.
    """

    failure: type[RuntimeError] = RuntimeError  # what is raised where there is no answer

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> None:
        self._command, self._variables = list(command), dict(variables)
        self._log, self._folder = log, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def exchange(self, request: str, limit_secs: float, start_secs: float) -> dict[str, Any]:
        """Send a line and return the object that comes back.

        Parameters
        ----------
        start_secs
            What it may take longer if it has to be started first.

        Raises
        ------
        RuntimeError
            `failure`, if the process died or did not answer in time; it is ended then.
        """
        if self._process is None:
            self._start()
            limit_secs += start_secs
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None
        reply: dict[str, Any] = json.loads(self._line(limit_secs))
        return reply

    def _start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=self._variables, cwd=self._folder, start_new_session=True,
            )  # fmt: skip
        self._received = b""

    def _line(self, limit_secs: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        stream, end = self._process.stdout.fileno(), time.monotonic() + limit_secs
        while b"\n" not in self._received:
            if not select.select([stream], [], [], max(end - time.monotonic(), 0))[0]:
                self.close()
                raise self.failure(f"no result after {limit_secs:.0f} s")
            if not (received := os.read(stream, 1 << 16)):
                raise self._dead()
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _dead(self) -> RuntimeError:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines = self._log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return self.failure(f"its process ended with {how}: {last[:_CHARACTERS]}")

    def close(self) -> None:
        """End the process and those it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that it did not read
                pipe.close()
        self._process = None
