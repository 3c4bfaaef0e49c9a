"""More draws of the argument space against the reference, until the time is over.

    make fuzz MINUTES=10                         new draws each time; ends with 1 if any is wrong
    python tests/kernels/fuzz.py --seed 1234     those of one seed again, in this process

Each seed is a process of its own, so that a crash is one seed's failure as well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import tvm_sepconv

CASES = 10  # of a seed, all for one target: one bundle


def run(seed: int) -> bool:
    """Compile and check the cases of a seed; whether all are right."""
    from conformance_cases import TARGETS, drawn_cases
    from test_conformance import bundle_contents, check

    from tvm_sepconv.compiler.package import write_bundle

    target = TARGETS[seed % len(TARGETS)]
    cases = [replace(case, target=target) for case in drawn_cases(CASES, seed)]
    right = True
    with tempfile.TemporaryDirectory(prefix="tvm-sepconv-fuzz-") as folder:
        write_bundle(bundle_contents(cases), Path(folder, "drawn"), [target])
        layers = tvm_sepconv.load(Path(folder, "drawn"), target)
        for case in cases:
            try:
                check(case, layers)
            except Exception as error:
                right = False
                print(f"{target} {case.name}, {case.config.padding}:\n  {error!r}", flush=True)
    return right


def run_alone(seed: int) -> bool:
    """The same in a process of its own, whose words are shown if anything is wrong."""
    command = [sys.executable, __file__, "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{done.stdout}seed {seed}: exit {done.returncode}; again: {' '.join(command)}")
    return not done.returncode


def run_until(end: float, seeds: Iterator[int], workers: int) -> tuple[int, int]:
    """Seeds that were run until `end`, of `time.monotonic`, and how many of them failed."""

    def some(_: int) -> list[bool]:
        found = []
        while time.monotonic() < end:
            found.append(run_alone(next(seeds)))
        return found

    with ThreadPoolExecutor(workers) as threads:
        found = [right for group in threads.map(some, range(workers)) for right in group]
    return len(found), found.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="draw on for that long, on all processors")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**6 % 10**9)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.minutes is None:
        return 0 if run(options.seed) else 1
    workers = len(os.sched_getaffinity(0))
    end = time.monotonic() + 60 * options.minutes
    ran, wrong = run_until(end, itertools.count(options.seed), workers)
    print(f"{ran} seeds of {CASES} layers: {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
