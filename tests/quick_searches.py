"""Parts of a search that need no other processes, each of which would have to import TVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest


class Here:
    """In the place of a builder's processes: whatever is submitted is done at once."""

    def submit(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


@pytest.fixture
def builds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches build in this process."""
    from tvm_sepconv.compiler import default_space
    from tvm_sepconv.compiler.tuning import builder

    for module in (builder, default_space):
        monkeypatch.setattr(module, "processes", Here)


class Inventing:
    """A runner that knows without measuring."""

    workers, machine = 2, "an invented one"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        assert task.is_file()
        assert all(Path(library).is_file() for library in libraries)
        self.asked.append([Path(library).name for library in libraries])
        return [[1e-5 + 1e-8 * i] * rounds for i, _ in enumerate(libraries)]
