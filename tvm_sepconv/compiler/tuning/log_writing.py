"""Writing tuning logs: one record, those of other logs, and what nobody can use taken out.

A log is replaced as a whole, so a reader or a crash never sees half a line, and writers wait for
each other.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from tvm_sepconv.compiler.tuning.records import Line, Record, best, lines, survivors

# What file systems without locks say. NFS asks for a descriptor open for writing, which no folder
# has.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@dataclass(frozen=True)
class Change:
    """What became of a record in a log.

    It was "added", it "replaced" `other`, or `other` was "kept".
    """

    path: Path
    record: Record
    outcome: str
    other: Record | None = None


def write(record: Record, folder: Path, replacing: Record | None = None) -> Path:
    """Put `record` into its target's log in `folder` and return the log's path.

    A record of the same key that appeared meanwhile stays if `best` says so.

    Parameters
    ----------
    replacing
        The record that the new one was measured against and may replace whatever it says.

    Raises
    ------
    ValueError
        If it is none that `Record.from_dict` would take.
    OSError
        If it cannot be written; the message has the line, for it may have cost an hour.
    """
    text = json.dumps(record.to_dict())
    Record.from_dict(json.loads(text))
    path = folder / f"{record.target}.jsonl"
    try:
        with _locked(path) as log:
            kept, (change,) = _with(log, [record], replacing)
            if change.outcome != "kept":
                log.replace(kept)
    except OSError as error:
        raise OSError(
            f"The record could not be written to {path}, which is as it was: {error}. Make room, "
            "or name another folder with --logs; to keep this record put the following line into "
            f"a file of that name and `tvm-sepconv logs merge` it\n{text}"
        ) from error
    return path


def merge(records: Sequence[Record], path: Path, dry_run: bool = False) -> list[Change]:
    """Put `records`, all of one target, into the log at `path`.

    Of one key the `best` stays. Lines that cannot be used stay too: somebody may repair them.
    """
    if dry_run:
        return _with(_Log(path, False), records)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as log:
        kept, changes = _with(log, records)
        if any(change.outcome != "kept" for change in changes):
            log.replace(kept)
    return changes


def prune(path: Path, older_than_days: float | None = None, dry_run: bool = False) -> list[Line]:
    """Take out of a log what is never used, and return it, each with its ``problem``.

    Damaged lines, records of another target, records that the schedule cannot follow, all but the
    `best` of a key, and what is older than `older_than_days`. It goes to ``<path>.removed``.
    """
    if dry_run:
        return _unused(lines(path), older_than_days)
    with _locked(path) as log:
        everything = log.lines()
        unused = _unused(everything, older_than_days)
        if unused:
            with open(f"{log.path}.removed", "ab") as file:  # first: a crash must lose nothing
                file.write(_bytes(line.text for line in unused))
                file.flush()
                os.fsync(file.fileno())
            numbers = {line.number for line in unused}
            log.replace(line.text for line in everything if line.number not in numbers)
    return unused


def _unused(everything: Sequence[Line], older_than_days: float | None) -> list[Line]:
    stay = survivors(everything)
    result = []
    for line in everything:
        record, why = line.record, line.problem
        if record is not None and not why:
            if stay.get(record.key) != record:
                why = "another record of its kernel stays"
            else:
                del stay[record.key]  # the same record a second time is one too many
                if older_than_days is not None and _age_days(record) > older_than_days:
                    why = f"it is older than {older_than_days:g} days"
        if why:
            result.append(dataclasses.replace(line, problem=why))
    return result


def _age_days(record: Record) -> float:
    return (datetime.now(timezone.utc) - record.when) / timedelta(days=1)


@dataclass(frozen=True)
class _Log:
    """A log's file, locked or not."""

    path: Path
    locked: bool

    def lines(self) -> list[Line]:
        return lines(self.path)

    def replace(self, texts: Iterable[str]) -> None:
        """Write the log anew, all of it or nothing."""
        prefix = f".{self.path.name}."
        if self.locked:  # whoever left these was killed in the middle
            for left in self.path.parent.glob(f"{prefix}*"):
                left.unlink()
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=prefix, delete=False) as file:
            try:
                file.write(_bytes(texts))
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise


def _bytes(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode(errors="surrogateescape")


def _with(
    log: _Log, records: Sequence[Record], replacing: Record | None = None
) -> tuple[list[str], list[Change]]:
    """Return the lines of the log with `records` in it, and what became of each."""
    entries: list[tuple[str, Record | None, bool]] = [
        (line.text, line.record, not line.problem) for line in log.lines()
    ]
    changes = []
    for record in records:
        same = [r for _, r, usable in entries if usable and r is not None and r.key == record.key]
        others = [r for r in same if r != replacing]
        if record in same or (others and best([record, *others]) != record):
            changes.append(Change(log.path, record, "kept", best(same)))
            continue
        # A record of this kernel that the schedule cannot follow any more has served its time.
        entries = [e for e in entries if e[1] is None or e[1].key != record.key]
        entries.append((json.dumps(record.to_dict()), record, True))
        outcome = "replaced" if same else "added"
        changes.append(Change(log.path, record, outcome, best(same) if same else None))
    return [text for text, _, _ in entries], changes


@contextmanager
def _locked(path: Path) -> Iterator[_Log]:
    """Give the log behind `path`, which may be a link, to this writer alone."""
    path = path.resolve()
    # The folder itself is locked: a lock file would stay behind.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        yield _Log(path, _lock(descriptor, path.parent))
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {folder} has no locks ({error.strerror}): let one process at a "
            "time write there, or a record may get lost",
            stacklevel=5,
        )
        return False
