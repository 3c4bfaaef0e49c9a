"""Our own calls by themselves: what Python adds to a kernel, and what threads take away.

A kernel is the runtime's call on arrays that are there: no output is made, nothing is looked up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tvm_sepconv
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.contestants import ours
from tvm_sepconv.bench.timing import Samples, aligned_copies, interleave
from tvm_sepconv.subjects import Subject

ROW_SECS = 1.0
LARGE_MFLOP = 20.0  # from here on threads are worth counting: 0.2 ms on one core of 100 GFLOP/s


@dataclass(frozen=True)
class Calls:
    """One layer's calls: kernel and whole calls with one thread, the kernel with all."""

    id: str
    shape: str
    flops: int
    kernel: Samples
    call: Samples
    call_out: Samples
    threaded: Samples | None
    alone: Samples  # the kernel with one thread, in turns with `threaded`

    @property
    def overhead_us(self) -> float:
        """What a whole call with a new output takes beyond its kernel."""
        return self.call.median_us - self.kernel.median_us

    @property
    def overhead_out_us(self) -> float:
        """What a whole call with ``out=`` takes beyond its kernel."""
        return self.call_out.median_us - self.kernel.median_us

    @property
    def speedup(self) -> float:
        """How many times faster all threads are than one; NaN with one."""
        return self.alone.median_us / self.threaded.median_us if self.threaded else math.nan


def measure(
    subjects: Sequence[Subject],
    target: str,
    threads: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Calls]:
    """Verify and time the calls of each layer, in turns.

    Raises
    ------
    RuntimeError
        If a layer cannot be compiled.
    AssertionError
        If an output is not the reference's.
    """
    rows = []
    try:
        for number, subject in enumerate(subjects):
            progress(f"{number + 1} of {len(subjects)}, {subject.id}")
            rows.append(_row(subject, target, threads))
    finally:
        tvm_sepconv.set_num_threads(None)
        progress("")
    return rows


def _row(subject: Subject, target: str, threads: int) -> Calls:
    case = Case.of_subject(subject, target)
    (prepared,) = ours.prepare(case, 1)
    layer: Callable[..., Any] = prepared.call
    kernel = prepared.kernel
    assert kernel is not None  # ours has one
    (x,), (out,) = aligned_copies(case.x, 1), aligned_copies(case.expected.astype(np.float32), 1)
    out.fill(np.nan)
    check(subject.id, layer(x, out=out), case.expected, case.allowed)
    calls: dict[str, Callable[[], object]] = {
        "kernel": lambda: kernel(x, out),
        "call": lambda: layer(x),
        "call_out": lambda: layer(x, out=out),
    }
    one = interleave(calls, ROW_SECS)
    counts = dict.fromkeys((1, threads))
    turns = {
        str(count): functools.partial(_with_threads, count, calls["kernel"]) for count in counts
    }
    several = interleave(turns, ROW_SECS, settle=True) if threads > 1 else {"1": one["kernel"]}
    return Calls(
        id=subject.id,
        shape=f"{subject.batch}×{subject.steps} {subject.sizes}",
        flops=subject.config.flops(subject.batch, subject.steps, subject.channels),
        threaded=several.get(str(threads)) if threads > 1 else None,
        alone=several["1"],
        **one,
    )


def _with_threads(count: int, call: Callable[[], object]) -> None:
    tvm_sepconv.set_num_threads(count)  # under a microsecond; it counts for both
    call()


def summary(rows: Sequence[Calls], threads: int) -> str:
    """Return the table as text, the largest overheads and the speedup of the large rows below."""
    lines = [
        f"{'layer':10} {'shape':28} {'kernel µs':>10} {'+ call':>7} {'+ out=':>7}"
        + (f" {threads:>4} threads µs {'gain':>6}" if threads > 1 else "")
    ]
    for row in rows:
        line = f"{row.id:10} {row.shape:28} {row.kernel.median_us:10.1f} "
        line += f"{row.overhead_us:7.2f} {row.overhead_out_us:7.2f}"
        if row.threaded:
            line += f" {row.threaded.median_us:15.1f} {row.speedup:5.2f}×"
        lines.append(line)
    small = [row for row in rows if row.flops < LARGE_MFLOP * 1e6]
    if small:  # of a long call the noise is larger than what Python adds to it
        worst = max(small, key=lambda row: row.overhead_us)
        with_out = max(row.overhead_out_us for row in small)
        lines.append(
            f"\nPython adds at most {worst.overhead_us:.2f} µs ({worst.id}) to the calls of less "
            f"than {LARGE_MFLOP:.0f} MFLOP, {with_out:.2f} µs with out="
        )
    large = [row.speedup for row in rows if row.flops >= LARGE_MFLOP * 1e6 and row.threaded]
    if large:
        mean = math.exp(sum(map(math.log, large)) / len(large))
        lines.append(
            f"{threads} threads over one, the {len(large)} layers from {LARGE_MFLOP:.0f} MFLOP "
            f"on: {mean:.2f}× in the geometric mean, {min(large):.2f}× at least"
        )
    return "\n".join(lines)
