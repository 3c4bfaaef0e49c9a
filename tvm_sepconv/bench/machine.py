"""Which machine a figure is from, and which versions made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import tvm_sepconv


def cpu_name() -> str:
    """The processor's model name as Linux reports it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def where(threads: int) -> str:
    """Say which machine, how many threads, and when."""
    count = f"{threads} thread" + "s" * (threads != 1)
    today = datetime.date.today().isoformat()
    return f"{cpu_name()}, {os.cpu_count()} processors, {count}, {today}"


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the version of Python, of this package and of each distribution that is installed."""
    found = {"python": platform.python_version(), "tvm_sepconv": tvm_sepconv.__version__}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class OthersWork:
    """What all other programs use of the processors from here on; steal time is among it."""

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float:
        """Return how many processors they kept busy on average since the beginning."""
        busy, elapsed = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(busy / elapsed, 0.0)

    @staticmethod
    def _now() -> tuple[float, float]:
        # /proc/stat's first line: user nice system idle iowait irq softirq steal …, in ticks.
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        busy_secs = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return busy_secs - time.process_time(), time.perf_counter()
