"""The benchmark layers, by id: shapes of published models, in workloads.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from tvm_sepconv.config import SepConvConfig


@dataclass(frozen=True)
class Workload:
    """A layer of a published model with the input it is measured on."""

    id: str
    model: str
    source: str
    batch: int
    steps: int
    out_steps: int
    channels: int
    layer: dict[str, Any]

    def config(self, **changes: Any) -> SepConvConfig:
        """The layer, with arguments such as ``data_format`` changed."""
        return SepConvConfig.parse(**{**self.layer, "name": self.id, **changes})

    def input_shape(self, data_format: str = "channels_last") -> tuple[int, int, int]:
        """The measured input's shape in that layout."""
        if data_format == "channels_last":
            return self.batch, self.steps, self.channels
        return self.batch, self.channels, self.steps


@functools.cache
def workloads() -> dict[str, Workload]:
    """All of them, in the order of the file."""
    names = ("id", "model", "source", "batch", "steps", "out_steps", "channels")
    rows = json.loads((files("tvm_sepconv") / "workloads.json").read_text())
    return {
        row["id"]: Workload(
            **{n: row[n] for n in names}, layer={k: v for k, v in row.items() if k not in names}
        )
        for row in rows
    }


def select(patterns: Iterable[str]) -> list[Workload]:
    """Return the workloads that ids or patterns name, in the table's order.

    Parameters
    ----------
    patterns
        Each is one, or several with commas between them: ``QN-B1,CN-*``. None at all name all.

    Raises
    ------
    ValueError
        If one names no workload, or all are empty; naming those that there are.
    """
    table = workloads()
    patterns = list(patterns)
    words = [word.strip() for pattern in patterns for word in pattern.split(",") if word.strip()]
    if patterns and not words:
        raise ValueError(f"A layer must be named. There are {', '.join(table)}")
    chosen: set[str] = set()
    for word in words:
        found = [name for name in table if fnmatchcase(name, word)]
        if not found:
            raise ValueError(f"No layer is called {word!r}. There are {', '.join(table)}")
        chosen.update(found)
    return [workload for name, workload in table.items() if name in chosen or not patterns]
