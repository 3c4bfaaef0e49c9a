"""Which machine a figure is from, and which versions made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
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
    """What all other programs use of the processors from here on; steal time is among it.

    Processes that this one started, and those that they started, are not others.
    """

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
        return busy_secs - own_secs(), time.perf_counter()


def own_secs() -> float:
    """Processor time of this process and its descendants, of those that ended too, in seconds."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + _descendants_secs()


def _descendants_secs() -> float:
    """Processor time of the descendants alive, and of the children that they have waited for."""
    children: dict[int, list[tuple[int, int]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may have spaces: state, parent, …; user and system time, and
            # those of children waited for, are the twelfth to fifteenth.
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks = sum(map(int, words[11:15]))
        children.setdefault(int(words[1]), []).append((int(path.parent.name), ticks))
    total, parents = 0, [os.getpid()]
    while parents:
        for pid, ticks in children.get(parents.pop(), []):
            total += ticks
            parents.append(pid)
    return total / os.sysconf("SC_CLK_TCK")
