"""The worker's process, as its parent sees it: a kernel that breaks a context ends no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm_sepconv
from tvm_sepconv.bench import child

START_SECS = 60.0  # frameworks' imports


class ItemError(RuntimeError):
    """An item that failed, in one line."""


class Child(child.Child):
    """A process that does items; started when it is first asked, and again after it died.

    Parameters
    ----------
    arguments
        Of ``python -m tvm_sepconv.compiler.gpu_session.worker``, paths absolute.
    log
        What it writes to its standard error stream.
    """

    failure = ItemError

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        module = "tvm_sepconv.compiler.gpu_session.worker"
        root = Path(tvm_sepconv.__file__).parent.parent
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else three quarters of the memory
        super().__init__(
            [sys.executable, "-m", module, *arguments],
            {**os.environ, **variables, "PYTHONPATH": path},
            log,
            root,  # Python looks for modules in its folder first, which may be a checkout's
        )

    def ask(self, key: str, limit_secs: float) -> Any:
        """Have an item done and return what was found.

        Raises
        ------
        ItemError
            If it failed, the process died, or there was no answer in time.
        """
        reply = self.exchange(key, limit_secs, START_SECS)
        if "error" in reply:
            if reply["broken"]:
                self.close()
            raise ItemError(reply["error"])
        return reply["found"]
