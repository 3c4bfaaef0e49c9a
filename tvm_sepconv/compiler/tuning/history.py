"""What a search measured, one JSON line a trial: ``history.jsonl`` in the search's folder.

The first line says what was searched and where; the last one, once the search was over, what was
measured in alternation at its end. Where the first line has a core that was ``modelled``, cycles
stand in the place of seconds. Every line is written as soon as its trial is over, so a search
that is killed loses no more than the line it was writing.

Nothing here imports TVM.
"""

from __future__ import annotations

import errno
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tvm_sepconv.compiler.tuning.records import MODEL_HZ

NAME = "history.jsonl"
VERSION = 1
OWN_SPACE = "tvm_sepconv"
_SAME = ("config", "target", "batch", "steps", "threads", "space")
_CYCLES = {"secs": "cycles", "default_secs": "default_cycles", "best_secs": "best_cycles"}


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Parameters
    ----------
    decisions
        By name; None where a space has no names for them.
    secs
        Samples of the seconds of one call, of a modelled core with a clock of `MODEL_HZ`; None if
        it failed.
    error
        Why it failed, None if it did not.
    elapsed_secs
        Since the search began; a search that was resumed goes on counting.
    """

    trial: int
    decisions: Mapping[str, Any] | None
    secs: Sequence[float] | None
    error: str | None
    elapsed_secs: float

    @property
    def median_secs(self) -> float:
        """Infinite if it failed."""
        return median(self.secs) if self.secs else math.inf


@dataclass(frozen=True)
class History:
    """A whole file; ``final`` is None unless the search came to its end after the last trial."""

    path: Path
    header: Mapping[str, Any]
    trials: Sequence[Trial] = field(default_factory=list)
    final: Mapping[str, Any] | None = None

    @property
    def elapsed_secs(self) -> float:
        """How long the search has taken."""
        return self.trials[-1].elapsed_secs if self.trials else 0.0


def folder(work_dir: Path, target: str, key: str, space: str) -> Path:
    """Where a search of the kernel called `key` leaves its history and its candidates."""
    return work_dir / target / (key if space == OWN_SPACE else f"{key}.{space}")


def read_history(path: Path) -> History:
    """Read a search's history; a damaged line is named in a warning and skipped.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If its first line does not say what was searched.
    """
    lines = path.read_bytes().decode(errors="replace").split("\n")
    try:
        header = json.loads(lines[0])
        if header["history"] != VERSION:
            raise ValueError(f"version {header['history']!r}, expected {VERSION}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not begin as a search's history does ({error}). Search anew, without it"
        ) from error
    trials: list[Trial] = []
    final = None
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if header.get("modelled"):
                values = _in_secs(values)
            if "final" in values:
                final = dict(values["final"])
            else:
                trials.append(_trial(values))
                final = None
        except (TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"{path}, line {number}, is no trial ({what}); skipped", stacklevel=2)
    return History(path, header, trials, final)


def replayable(path: Path, key: str, header: Mapping[str, Any]) -> History:
    """Read the history at `path`, a file, its folder or the work folder it is in under `key`.

    Raises
    ------
    ValueError
        If it is no history, or that of a search with another `header`.
    """
    if path.is_dir():
        usual = folder(path, header["target"], key, header["space"])
        path = next((f for f in (usual, path) if (f / NAME).is_file()), usual) / NAME
    found = read_history(path)
    _check_same(found, header, _SAME, "replayed")
    return found


def earlier(path: Path, header: Mapping[str, Any]) -> History | None:
    """Read the history to go on with; None if there is none.

    Raises
    ------
    ValueError
        If it is that of a search with another `header`, or on another machine.
    """
    if not path.is_file():
        return None
    found = read_history(path)
    _check_same(found, header, (*_SAME, "machine", "tvm"), "resumed: search anew, without it")
    return found


def _check_same(
    found: History, header: Mapping[str, Any], names: Sequence[str], cannot: str
) -> None:
    for name in names:
        if found.header.get(name) != header[name]:
            raise ValueError(
                f"{found.path} is of another search and cannot be {cannot}. It has {name}="
                f"{found.header.get(name)!r}. Received: {name}={header[name]!r}"
            )


def best_at(path: Path, counts: Iterable[int]) -> dict[int, float]:
    """Return the best median, in seconds, among the first so many trials of a history.

    A count beyond the last trial is left out; infinite if all up to there failed.
    """
    trials = read_history(path).trials
    last = max((trial.trial for trial in trials), default=0)
    return {
        count: min((t.median_secs for t in trials if t.trial <= count), default=math.inf)
        for count in counts
        if count <= last
    }


class Writer:
    """Writes a history line by line.

    Parameters
    ----------
    header
        What the first line says besides the version; None to go on with the file that is there.

    Raises
    ------
    OSError
        Here and in `trial` and `final`, if the file cannot be written; says what is kept.
    """

    def __init__(self, path: Path, header: Mapping[str, Any] | None) -> None:
        self.path = path
        if header is None:
            text = path.read_bytes()
            self._modelled = bool(json.loads(text.partition(b"\n")[0]).get("modelled"))
            self.file = path.open("ab", buffering=0)
            if not text.endswith(b"\n"):  # a search that was killed may have left half a line
                self._write(b"\n")
        else:
            self._modelled = bool(header.get("modelled"))
            self.file = path.open("wb", buffering=0)
            self._line({"history": VERSION, **header})

    def trial(self, trial: Trial) -> None:
        """Add a trial."""
        self._line(self._named(vars(trial)))

    def final(self, **values: Any) -> None:
        """Add what the alternation at the end measured."""
        self._line({"final": self._named(values)})

    def _named(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values as they are written: modelled ones are cycles."""
        if not self._modelled:
            return values
        return {_CYCLES.get(n, n): _cycles(v) if n in _CYCLES else v for n, v in values.items()}

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        self._write(json.dumps(values).encode() + b"\n")

    def _write(self, text: bytes) -> None:
        try:
            written = self.file.write(text)
            if written != len(text):  # the disk took a part of it
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise OSError(
                error.errno,
                f"The search cannot go on: {error.strerror}. All trials before are kept; make "
                "room, or move the folder to a disk that has some (--work-dir), and go on from "
                "there with --resume",
                str(self.path),
            ) from error


def _cycles(secs: float | Sequence[float] | None) -> Any:
    if secs is None:
        return None
    if isinstance(secs, Sequence):
        return [round(one * MODEL_HZ) for one in secs]
    return round(secs * MODEL_HZ)


def _in_secs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what `Writer` does to modelled values."""
    if "final" in values:
        return {"final": _in_secs(values["final"])}
    names = {cycles: secs for secs, cycles in _CYCLES.items()}
    return {names.get(n, n): _secs(v) if n in names else v for n, v in values.items()}


def _secs(cycles: Any) -> Any:
    if isinstance(cycles, list):
        return [one / MODEL_HZ for one in cycles]
    return cycles if cycles is None else cycles / MODEL_HZ


def _trial(values: Mapping[str, Any]) -> Trial:
    trial = Trial(**values)
    kinds = {"trial": int, "decisions": (dict, type(None)), "error": (str, type(None)),
             "secs": (list, type(None)), "elapsed_secs": (int, float)}  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(getattr(trial, name), kind):  # type: ignore[arg-type]
            raise TypeError(f"`{name}` is {getattr(trial, name)!r}")
    if (trial.error is None) == (trial.secs is None):
        raise ValueError("either `secs` or `error` must be null")
    secs = trial.secs
    if secs is not None and not (secs and all(isinstance(s, float) and s > 0 for s in secs)):
        raise ValueError(f"`secs` is {trial.secs!r}")
    return trial
