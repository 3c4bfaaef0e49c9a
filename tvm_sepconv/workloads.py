"""The benchmark layers, by id: shapes of published models, in workloads.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
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
