"""A tuning record, and the log it is a line of; `tuning_logs/record.schema.json` says the same.

Nothing here imports TVM: a process that finds its library in the cache must know which record the
library was built from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tvm_sepconv import workloads
from tvm_sepconv.compiler.schedules import arm, cuda, x86
from tvm_sepconv.compiler.schedules.cpu import Tiling, legal
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.targets import CUDA_ARCHS

LONG = "long"  # the variant that is tuned; the shorter ones are derived from the target's constants
TF32 = "+tf32"  # added to a variant of CUDA's where that is allowed: it is another kernel then
UNITS = {**x86.UNITS, **arm.UNITS}
_MOST = 1e6  # seconds, or times their median: what is more is no measurement
# A modelled core has this clock, so that its cycles are compared and searched as times are; what is
# written and shown is cycles.
MODEL_HZ = 1e6
_COSTS = {"median_secs": "median_cycles", "default_secs": "default_cycles"}

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "Mapping[str, Any]": (dict,),
    "str | None": (str, type(None)),
}  # fmt: skip
_DECISIONS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "tuple[int, int]": lambda value: (
        isinstance(value, (list, tuple)) and [type(number) for number in value] == [int, int]
    ),
}
_named: set[str] = set()  # what was warned of, once a process


@dataclass(frozen=True)
class Record:
    """The best decisions found for one kernel.

    Parameters
    ----------
    config, variant, target, threads
        The key: a log has one record for it.
    batch, steps
        The measured input.
    decisions
        By name, as the schedule's `Tiling` takes them.
    median_secs, default_secs
        Of one call of the library, and of one with the default decisions measured in alternation;
        if `modelled`, of a core with a clock of `MODEL_HZ`.
    noise
        The samples' interquartile range as a share of their median.
    trials
        Candidates measured to find it.
    date
        ISO, with the time zone.
    modelled
        The core that its cycles were modelled for; None for what was measured.
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
    modelled: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a log has one record for."""
        return self.config, self.variant, self.target, self.threads

    @property
    def secs_a_step(self) -> float:
        """Comparable between inputs of other lengths."""
        return self.median_secs / (self.batch * self.steps)

    @property
    def when(self) -> datetime:
        """The date, comparable between time zones."""
        return datetime.fromisoformat(self.date)

    def shown(self, secs: float) -> str:
        """Say one of the record's two times; of a modelled one it is cycles."""
        if self.modelled is None:
            return f"{secs * 1e6:.4g} µs"
        return f"{secs * MODEL_HZ:.4g} modelled cycles"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; cycles where they are modelled."""
        values = {**vars(self), "config": self.config.to_dict(), "decisions": dict(self.decisions)}
        if self.modelled is None:
            del values["modelled"]
            return values
        return {
            _COSTS.get(name, name): round(value * MODEL_HZ) if name in _COSTS else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Undo `to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a value is missing, unknown, of a wrong kind, or no count, time or date.
        """
        config = KernelConfig.from_dict(values["config"])
        if not isinstance(config.use_bias, bool):
            raise TypeError(f"`use_bias` must be true or false. Received: {config.use_bias!r}")
        record = cls(**{**_in_secs(values), "config": config})
        for field in dataclasses.fields(cls):
            kinds = _KINDS.get(str(field.type), (object,))
            value = getattr(record, field.name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"`{field.name}` must be {field.type}. Received: {value!r}")
        for name in ("threads", "batch", "steps", "trials"):
            if not 1 <= getattr(record, name) < 2**63:
                raise ValueError(f"`{name}` must be at least 1. Received: {getattr(record, name)}")
        for name in ("median_secs", "default_secs"):
            if not 0 < getattr(record, name) < _MOST:
                raise ValueError(f"`{name}` must be positive. Received: {getattr(record, name)}")
        if not 0 <= record.noise < _MOST:
            raise ValueError(f"`noise` must not be negative. Received: {record.noise}")
        if record.when.tzinfo is None:
            raise ValueError(f"`date` must have a time zone. Received: {record.date}")
        return record


@dataclass(frozen=True)
class Line:
    """A line of a log.

    ``record`` is None if it holds none. ``tiling`` is what the schedule makes of its decisions, and
    None if it cannot be used: then ``problem`` says why.
    """

    path: Path
    number: int
    text: str
    record: Record | None
    tiling: Any
    problem: str

    @property
    def foreign(self) -> bool:
        """Whether it is no record of the target that the log is named after."""
        return self.record is None or f"{self.record.target}.jsonl" != self.path.name

    def name(self) -> None:
        """Warn of the problem, once a process."""
        warn_once(f"{self.where}, is skipped: {self.problem}")

    @property
    def where(self) -> str:
        """The place, and what is there."""
        place = f"{self.path}, line {self.number}"
        if self.record is None:
            return place
        return f"{place}, {kernel_name(self.record.config)} of {self.record.date[:10]}"


def warn_once(message: str) -> None:
    """Warn, once a process: a log is read for every kernel."""
    if message not in _named:
        _named.add(message)
        warnings.warn(message, stacklevel=5)


def lines(path: Path) -> list[Line]:
    """Read a log's lines that are not empty; no file is an empty log.

    The name of a log is its records' target.

    Raises
    ------
    OSError
        If there is a file that cannot be read: to whoever writes, it must not look empty.
    """
    try:
        texts = path.read_bytes().decode(errors="surrogateescape").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [_line(path, n, text) for n, text in enumerate(texts, 1) if text.strip()]


def _line(path: Path, number: int, text: str) -> Line:
    record = None
    try:
        record = Record.from_dict(json.loads(text, parse_constant=_no_json))
        if f"{record.target}.jsonl" != path.name:
            raise ValueError(f"it is of target {record.target}, which the log is not named after")
        return Line(path, number, text, record, tiling_of(record), "")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = str(error) if record else f"it is no record ({type(error).__name__}: {error})"
        return Line(path, number, text, record, None, problem)


def _in_secs(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record's values, with the times that its cycles would be."""
    if "modelled" not in values:
        return dict(values)
    result = dict(values)
    for secs, cycles in _COSTS.items():
        count = result.pop(cycles)
        if type(count) is not int or secs in result:
            raise TypeError(f"`{cycles}` must be int, without `{secs}`. Received: {count!r}")
        result[secs] = count / MODEL_HZ
    return result


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def tiling_of(record: Record) -> Any:
    """Return the schedule's `Tiling` with a record's decisions.

    Raises
    ------
    ValueError
        If there is no such schedule, it has not these decisions, or they do not fit the layer.
    """
    if record.target.startswith("cuda-"):
        return _cuda_tiling(record)
    unit = UNITS.get(record.target.partition("@")[0])
    if unit is None or record.variant != LONG:
        what = f"the {record.variant} variant for {record.target}"
        raise ValueError(f"there is no schedule with decisions of {what}")
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Tiling)}
    if unknown := sorted(set(record.decisions) - set(kinds)):
        raise ValueError(f"the schedule has no decision {', '.join(unknown)} (any more)")
    if missing := sorted(set(kinds) - set(record.decisions)):
        raise ValueError(f"it lacks the schedule's decision {', '.join(missing)}")
    for name, kind in kinds.items():
        value = record.decisions[name]
        if not _DECISIONS[kind](value):
            raise ValueError(f"its decision {name} must be {kind}, and is {value!r}")
    tiling = Tiling.from_dict(dict(record.decisions))
    if not legal(record.config, unit, tiling):
        raise ValueError("its decisions do not fit the layer")
    return tiling


def _cuda_tiling(record: Record) -> Any:
    variant = record.variant.removesuffix(TF32)
    arch = record.target.removeprefix("cuda-")
    if variant not in cuda.VARIANTS or arch not in CUDA_ARCHS:
        what = f"the {record.variant} variant for {record.target}"
        raise ValueError(f"there is no schedule with decisions of {what}")
    tiling = cuda.tiling_from_dict(record.decisions)
    if why := cuda.refusal(record.config, variant != record.variant, arch, tiling):
        raise ValueError(f"its decisions do not fit the layer: {why}")
    return tiling


def read(path: Path) -> list[Record]:
    """Read a log; a line that is no record of its target is named and skipped."""
    result = []
    for line in lines(path):
        if line.record is None or line.foreign:
            line.name()
        else:
            result.append(line.record)
    return result


def best(records: Iterable[Record]) -> Record:
    """Return which of several records of one key stays.

    What was measured stays before what was modelled. Times of different machines do not compare: of
    one machine's records the fastest a step stays, of what is left of several machines the newest.
    """
    everything = list(records)
    records = [record for record in everything if record.modelled is None] or everything
    fastest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (-r.secs_a_step, r.when)):
        fastest[record.machine] = record
    return max(fastest.values(), key=lambda r: (r.when, r.machine))


def survivors(lines: Iterable[Line]) -> dict[tuple[Any, ...], Record]:
    """Return, by key, which of a log's records that can be used stays."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for line in lines:
        if line.record is not None and not line.problem:
            groups.setdefault(line.record.key, []).append(line.record)
    return {key: best(group) for key, group in groups.items()}


def kernel_name(config: KernelConfig) -> str:
    """Name a kernel for people: its id in the workload table, if it is there, and its shape."""
    words = [config.sizes]
    if known := workload_id(config):
        words.insert(0, known)
    else:
        words += [config.activation] * (config.activation != "linear")
        words += ["without bias"] * (not config.use_bias)
        words += [config.dtype] * (config.dtype != "float32")
    return " ".join([*words, *["channels_first"] * (config.data_format == "channels_first")])


def workload_id(config: KernelConfig) -> str:
    """Return the first workload that has the kernel, in either data format; "" if none has."""
    return _workload_ids().get(dataclasses.replace(config, data_format="channels_last"), "")


@functools.cache
def _workload_ids() -> dict[KernelConfig, str]:
    table = reversed(workloads.workloads().values())
    return {w.config().kernel_config(w.channels): w.id for w in table}
