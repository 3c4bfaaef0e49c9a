"""Tuning logs: what the search found, one readable JSON line a record, in ``<target>.jsonl``.

They are read from, in this order, the folders of ``$TVM_SEPCONV_LOGS`` (separated as in PATH),
the user's ``$XDG_DATA_HOME/tvm_sepconv/tuning_logs`` or ``~/.local/share/…``, and the package. New
records go to the first that can be written; in a checkout, without the variable, to its
``tuning_logs/``.

Nothing here imports TVM; see `records`.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler.schedules import cuda
from tvm_sepconv.compiler.schedules.cpu import fits, legal
from tvm_sepconv.compiler.tuning.log_writing import write as write
from tvm_sepconv.compiler.tuning.records import LONG as LONG
from tvm_sepconv.compiler.tuning.records import (
    TF32,
    UNITS,
    Line,
    kernel_name,
    lines,
    survivors,
    warn_once,
    workload_id,
)
from tvm_sepconv.compiler.tuning.records import Record as Record
from tvm_sepconv.compiler.tuning.records import read as read
from tvm_sepconv.config import KernelConfig

VARIABLE = "TVM_SEPCONV_LOGS"
THREADS = 1  # kernels are serial: threads share tiles, so one thread's record serves any number

# How much a factor of two counts; sizes that a tile is made of most, the taps' spacing least.
_WEIGHTS = {
    "channels": 1.0, "filters": 1.0, "depth_multiplier": 1.0, "strides": 1.0, "kernel_size": 0.5,
    "dilation_rate": 0.25,
}  # fmt: skip
_EPILOGUE = 0.1  # another activation, or a bias more or less
MAX_DISTANCE = 2.0

log = logging.getLogger("tvm_sepconv")
_announced: set[str] = set()


@dataclass(frozen=True)
class Match:
    """The record that applies to a kernel, and its line; its own one if `distance` is 0."""

    record: Record
    tiling: Any
    distance: float
    line: Line

    @property
    def origin(self) -> str:
        """What manifests call it."""
        modelled = ", modelled" if self.record.modelled is not None else ""
        return ("transferred" if self.distance else "tuned") + modelled

    @property
    def secs(self) -> float | None:
        """What was measured; None if it was modelled."""
        return self.record.median_secs if self.record.modelled is None else None


def distance(a: KernelConfig, b: KernelConfig) -> float:
    """Return how far apart two kernels are: Σ weight · |log2 of the ratio| over their sizes.

    Channels, filters, multiplier and stride count 1 a factor of two, the kernel size 0.5, the
    dilation 0.25, another activation or bias 0.1. Another layout or dtype is infinitely far.
    """
    if any(getattr(a, n) != getattr(b, n) for n in ("data_format", "dtype", "accumulation_dtype")):
        return math.inf
    sizes = sum(w * abs(math.log2(getattr(a, n) / getattr(b, n))) for n, w in _WEIGHTS.items())
    return sizes + _EPILOGUE * ((a.activation != b.activation) + (a.use_bias != b.use_bias))


def lookup(
    config: KernelConfig,
    target: str,
    threads: int = THREADS,
    besides: KernelConfig | None = None,
    variant: str = LONG,
) -> Match | None:
    """Find the record that applies to a variant of a kernel on a target.

    Its own record, from the first folder that has one the schedule can still follow, a measured one
    before a modelled one; else the nearest of the same target within `MAX_DISTANCE` whose decisions
    fit this kernel.
    Of those in one folder, the one measured with `threads` threads, else with the nearest number;
    of several of one key, the `best`. Another target's records are never used.

    Parameters
    ----------
    target
        A CPU target's full name, or that of one CUDA architecture: cuda-sm_90.
    besides
        A kernel whose records are passed over: what would be transferred to it, had it none.
    variant
        Of CUDA's, with `records.TF32` where that is allowed.
    """
    ranked = sorted(_records(target), key=lambda item: _rank(config, threads, *item))
    for _, line, record in ranked:
        far = distance(config, record.config)
        if far > MAX_DISTANCE:
            return None
        if record.config == besides:
            continue
        if line.tiling is None:
            line.name()
            continue
        if record.variant == variant and _serves(config, target, line.tiling, variant, not far):
            return Match(record, line.tiling, far, line)
    return None


def _serves(config: KernelConfig, target: str, tiling: Any, variant: str, own: bool) -> bool:
    """Whether the decisions of a record, perhaps the kernel's own, can be used and are worth it."""
    if target.startswith("cuda-"):
        arch = target.removeprefix("cuda-")
        return own or not cuda.refusal(config, variant.endswith(TF32), arch, tiling)
    unit = UNITS[target.partition("@")[0]]
    # Of another kernel's decisions: listing all that are worth having would take too long.
    return own or (fits(config, unit, tiling) and legal(config, unit, tiling))


def _records(target: str) -> list[tuple[int, Line, Record]]:
    """The target's records with the number of their folder; lines that are none are named."""
    result = []
    for number, folder in enumerate(folders()):
        try:
            log = lines(folder / f"{target}.jsonl")
        except OSError as error:
            warn_once(f"The tuning log cannot be read and is skipped: {error}")
            continue
        stay = survivors(log)
        for line in log:
            if line.record is None or line.foreign:
                line.name()
            elif line.problem or stay[line.record.key] == line.record:
                result.append((number, line, line.record))
    return result


def _rank(
    config: KernelConfig, threads: int, folder: int, line: Line, record: Record
) -> tuple[float, ...]:
    apart = abs(math.log2(record.threads / threads))
    unusable = line.tiling is None
    far, modelled = distance(config, record.config), record.modelled is not None
    return far, modelled, folder, apart, record.threads, unusable


def announce(
    config: KernelConfig, target: str, match: Match | None, compiling: bool = False
) -> None:
    """Log once a process where a kernel's decisions are from; `compiling` is worth a warning."""
    text = f"{kernel_name(config)} for {target}"
    origin = described(config, match)
    if compiling:
        log.warning("compiling %s, once: %s", text, origin)
    elif f"{text}: {origin}" not in _announced:
        log.info("%s: %s", text, origin)
    _announced.add(f"{text}: {origin}")


def described(config: KernelConfig, match: Match | None) -> str:
    """Say where a kernel's decisions are from: tuned, transferred or default."""
    if match is None:
        known = workload_id(config)
        how = f"tvm-sepconv tune --workloads {known}" if known else "tvm-sepconv tune"
        return f"default decisions; `{how}` can search better ones"
    record = match.record
    if match.distance:
        modelled = ", modelled" if record.modelled is not None else ""
        source = kernel_name(record.config)
        return f"transferred from {source} (distance {match.distance:.2g}{modelled})"
    threads = f" on {record.threads} threads" if record.threads != THREADS else ""
    return f"tuned ({record.shown(record.median_secs)}{threads}, {record.date[:10]})"


def folders() -> list[Path]:
    """Where logs are read from, in order."""
    return [*_chosen(), _user(), packaged()]


def _chosen() -> list[Path]:
    return [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]


def _user() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base, "tvm_sepconv", "tuning_logs")


def packaged() -> Path:
    """The folder of the logs that come with the package; in a checkout `tuning_logs/`."""
    return Path(str(files("tvm_sepconv.compiler.tuning_logs")))


def checkout() -> Path | None:
    """The root of the checkout this package runs from, if it does."""
    root = packaged().parent
    return root if (root / "pyproject.toml").is_file() else None


def writable() -> Path:
    """Return the folder that new records go to, made if need be.

    Raises
    ------
    OSError
        If none can be written; of folders named by the user, if the first cannot.
    """
    chosen = _chosen()[:1]
    problems = []
    for folder in chosen or [*([packaged()] if checkout() else []), _user(), packaged()]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(f"{folder} is a file" if folder.is_file() else str(error))
    raise OSError(
        f"No folder for tuning records can be written ({'; '.join(problems)}). Name one with "
        f"--logs or {VARIABLE}"
    )
