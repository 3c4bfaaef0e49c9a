"""Contestants made up for tests, in the real worker: ``python bench_worker.py KEY CPUS``.

Each computes the layer in NumPy and misbehaves in the way that its key says.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from tvm_sepconv import reference
from tvm_sepconv.bench import worker
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Contestant, Prepared


class Fake(Contestant):
    """A contestant whose key is what it does."""

    def prepare(self, case: Case, threads: int) -> list[Prepared]:
        behave = _PREPARING.get(self.key)
        if behave is not None:
            behave()
        bias = case.weights[2] if case.config.use_bias else None

        def right(x: np.ndarray) -> np.ndarray:
            y = reference.separable_conv1d(x, *case.weights[:2], bias, case.config)
            return y.astype(np.float32)

        kept = np.empty(case.expected.shape, np.float32)

        def call(x: np.ndarray) -> np.ndarray:
            if self.key == "slow":
                time.sleep(0.06)
            if self.key == "overwriting":
                kept[...] = right(x)
                return kept
            return right(x) * np.float32(1.01 if self.key == "wrong" else 1)

        def restore(y: np.ndarray) -> np.ndarray:
            return y[:, 1:] if self.key == "short" else y

        forms = [Prepared("plain", call, case.x, restore)]
        if self.key == "two-forms":
            slow = lambda x: [time.sleep(0.02), right(x)][1]  # noqa: E731
            forms = [Prepared("slower", slow, case.x, restore), *forms]
        if self.key == "one-form-wrong":
            forms.append(Prepared("doubled", lambda x: 2 * right(x), case.x, restore))
        if self.key == "seeing":  # says which inputs it was given, and what it holds on to
            log = Path(os.environ["SEEN"])

            def noted(x: np.ndarray) -> np.ndarray:
                y = right(x)
                with log.open("a") as file:
                    aligned = x.ctypes.data % 64
                    file.write(f"{x.ctypes.data} {y.ctypes.data} {aligned}\n")
                return y

            forms = [Prepared("noted", noted, case.x, restore)]
        return forms


def _refuse() -> None:
    raise ValueError("no form of\nthis layer")


def _chatter() -> None:
    print('{"forms": []}', flush=True)
    os.write(1, b"straight to the descriptor\n")


def _last_words() -> None:
    print("the sky is falling", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


_PREPARING = {
    "crash": _last_words,
    "hang": lambda: time.sleep(600),
    "refusing": _refuse,
    "chattering": _chatter,
}
KEYS = (
    "right", "wrong", "short", "crash", "crash-in-turn", "hang", "refusing", "chattering",
    "overwriting", "slow", "two-forms", "one-form-wrong", "seeing",
)  # fmt: skip
FAKES = tuple(Fake(key, key, "none.none", None, (), ("numpy",)) for key in KEYS)

if __name__ == "__main__":
    worker.CONTESTANTS = FAKES
    if sys.argv[1] == "crash-in-turn":
        worker.Session.turn = lambda *given, **named: os._exit(3)
    worker.main(sys.argv[1:])
