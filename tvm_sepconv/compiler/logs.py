"""Tuning logs: what the search found, one readable JSON line a record, in ``<target>.jsonl``.

They are read from, in this order, the folders of ``$TVM_SEPCONV_LOGS`` (separated as in PATH),
the user's ``$XDG_DATA_HOME/tvm_sepconv/tuning_logs`` or ``~/.local/share/…``, and the package. New
records go to the first that can be written; in a checkout, without the variable, to its
``tuning_logs/``.

Nothing here imports TVM: a process that finds its library in the cache must know which record the
library was built from.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler.schedules import arm, x86
from tvm_sepconv.compiler.schedules.cpu import Tiling, candidates, legal
from tvm_sepconv.config import KernelConfig

VARIABLE = "TVM_SEPCONV_LOGS"
LONG = "long"  # the variant that is tuned; the shorter ones are derived from the target's constants
THREADS = 1  # kernels are serial: threads share tiles, so one thread's record serves any number

# How much a factor of two counts; sizes that a tile is made of most, the taps' spacing least.
_WEIGHTS = {
    "channels": 1.0, "filters": 1.0, "depth_multiplier": 1.0, "strides": 1.0, "kernel_size": 0.5,
    "dilation_rate": 0.25,
}  # fmt: skip
_EPILOGUE = 0.1  # another activation, or a bias more or less
MAX_DISTANCE = 2.0

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "Mapping[str, Any]": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """The best decisions found for one kernel.

    Parameters
    ----------
    config, variant, target, threads
        The key: a newer record replaces one with the same.
    batch, steps
        The measured input.
    decisions
        By name, as the schedule's `Tiling` takes them.
    median_secs, default_secs
        Of one call of the library, and of one with the default decisions measured in alternation.
    noise
        The samples' interquartile range as a share of their median.
    trials
        Candidates measured to find it.
    date
        ISO, UTC.
    """

    config: KernelConfig
    variant: str
    target: str
    threads: int
    batch: int
    steps: int
    decisions: Mapping[str, Any]
    median_secs: float
    default_secs: float
    noise: float
    trials: int
    machine: str
    tvm: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a log has one record for."""
        return self.config, self.variant, self.target, self.threads

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "config": self.config.to_dict(), "decisions": dict(self.decisions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Undo `to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a value is missing, unknown or of a wrong kind.
        """
        record = cls(**{**values, "config": KernelConfig.from_dict(values["config"])})
        for field in dataclasses.fields(cls):
            kinds = _KINDS.get(str(field.type), (object,))
            value = getattr(record, field.name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"`{field.name}` must be {field.type}. Received: {value!r}")
        return record


@dataclass(frozen=True)
class Match:
    """The record that applies to a kernel; its own one if `distance` is 0."""

    record: Record
    tiling: Tiling
    distance: float

    @property
    def origin(self) -> str:
        """What manifests call it."""
        return "transferred" if self.distance else "tuned"


def distance(a: KernelConfig, b: KernelConfig) -> float:
    """Return how far apart two kernels are: Σ weight · |log2 of the ratio| over their sizes.

    Channels, filters, multiplier and stride count 1 a factor of two, the kernel size 0.5, the
    dilation 0.25, another activation or bias 0.1. Another layout or dtype is infinitely far.
    """
    if any(getattr(a, n) != getattr(b, n) for n in ("data_format", "dtype", "accumulation_dtype")):
        return math.inf
    sizes = sum(w * abs(math.log2(getattr(a, n) / getattr(b, n))) for n, w in _WEIGHTS.items())
    return sizes + _EPILOGUE * ((a.activation != b.activation) + (a.use_bias != b.use_bias))


def lookup(config: KernelConfig, target: str) -> Match | None:
    """Find the record that applies to a kernel on a target.

    Its own record, from the first folder that has one the schedule can still follow; else the
    nearest of the same target within `MAX_DISTANCE` whose decisions are candidates of this kernel.

    Parameters
    ----------
    target
        A CPU target's full name.
    """
    records = [
        record
        for folder in folders()
        for record in read(folder / f"{target}.jsonl")
        if (record.variant, record.target, record.threads) == (LONG, target, THREADS)
    ]
    unit = {**x86.UNITS, **arm.UNITS}[target.partition("@")[0]]
    ranked = sorted(records, key=lambda record: distance(config, record.config))
    space: set[Tiling] = set()
    for record in ranked:
        far = distance(config, record.config)
        if far > MAX_DISTANCE:
            return None
        tiling = _tiling(record)
        if tiling is None:
            continue
        if far:  # the default of the other kernel may be no candidate of this one
            space = space or set(candidates(config, unit))
            if tiling in space:
                return Match(record, tiling, far)
        elif legal(config, unit, tiling):
            return Match(record, tiling, far)
        else:
            _skip(record, "its decisions do not fit the layer")
    return None


def _tiling(record: Record) -> Tiling | None:
    try:
        tiling = Tiling.from_dict(dict(record.decisions))
        for pair in (tiling.register_tile, tiling.depthwise_block):
            if [type(number) for number in pair] != [int, int]:
                raise ValueError(f"expected pairs of integers, received {pair}")
        return tiling
    except (TypeError, ValueError) as error:
        _skip(record, str(error))
        return None


def _skip(record: Record, why: str) -> None:
    warnings.warn(
        f"The tuning record of {record.config.key} for {record.target}, {record.date}, is skipped: "
        f"{why}. Tune again to replace it",
        stacklevel=4,
    )


def read(path: Path) -> list[Record]:
    """Read a log; no file is an empty one, a line that is no record is named and skipped."""
    return [record for _, record in _lines(path) if record is not None]


def _lines(path: Path) -> list[tuple[str, Record | None]]:
    try:
        lines = path.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        return []
    result: list[tuple[str, Record | None]] = []
    for number, line in enumerate(lines, 1):
        record = None
        try:
            record = Record.from_dict(json.loads(line)) if line.strip() else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"{path}, line {number}, is no record ({what}); skipped", stacklevel=4)
        result.append((line, record))
    return result


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
            problems.append(str(error))
    raise OSError(
        f"No folder for tuning records can be written ({'; '.join(problems)}). Name one with "
        f"--logs or {VARIABLE}"
    )


def write(record: Record, folder: Path, replacing: Record | None = None) -> Path:
    """Put `record` into its target's log in `folder` and return the log's path.

    The log is replaced as a whole, so a reader or a crash never sees half a line, and writers wait
    for each other. A record of the same key that appeared meanwhile stays if it is faster a step.

    Parameters
    ----------
    replacing
        The record that the new one was measured against and may replace whatever it says.
    """
    path = folder / f"{record.target}.jsonl"
    with _locked(folder):
        lines = _lines(path)
        same = [r for _, r in lines if r is not None and r.key == record.key]
        if any(r != replacing and _secs_a_step(r) < _secs_a_step(record) for r in same):
            return path
        # Lines that are no records stay: somebody may be able to repair them.
        kept = [line for line, r in lines if line.strip() and (r is None or r.key != record.key)]
        text = "".join(f"{line}\n" for line in [*kept, json.dumps(record.to_dict())])
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                file.write(text.encode(errors="surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    return path


def _secs_a_step(record: Record) -> float:
    return record.median_secs / (record.batch * record.steps)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: a lock file would stay behind
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
