"""What a test run has done with CUDA kernels, counted where it happens and told at its end."""

from __future__ import annotations

from collections import Counter

DONE: Counter[str] = Counter()
"""Since the last test: kernels "emulated" on this CPU, kernels "compiled" by nvcc."""


def add(what: str, number: int = 1) -> None:
    """Count kernels; called by what emulates or compiles them."""
    DONE[what] += number


def taken() -> dict[str, int]:
    """The counts since the last call."""
    done = dict(DONE)
    DONE.clear()
    return done
