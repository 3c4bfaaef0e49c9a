"""What is built beforehand and what is measured, in which order; plain values in ``manifest.json``.

A library is of one kernel at one precision; an item is what one worker does at a time. Items are
done in the order of `STEPS`, each once; what one of them found is a line of ``results.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvm_sepconv import workloads
from tvm_sepconv.bench.report import NOT_OF_THE_20
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.kernel_config import KernelConfig

STEPS = ("correctness", "frameworks", "rest", "comparison", "tuning", "compilers")
PRECISIONS = ("float32", "tf32", "float16")
BATCHES = (1, 32)
NAMED = ("QN-B1", "QN-B5", "CN-21", "MB-1", "TN-15", "CT-d128")
# (layer, batch, steps) beside the table's: the size that the roofline is quoted for.
LARGE = (("QN-B1", 32, 1024),)
DEFAULT, TWO_KERNELS, CANDIDATE, FORM = "default", "two kernels", "candidate", "form"
FINALISTS = "finalists"  # of tuning, in turns
COMPILERS = ("torch.compile", "JAX")
FRAMEWORKS = ("arrays", "PyTorch", "CuPy", "JAX")
REST = ("bandwidth", "matrix products", "call overhead")
MANIFEST, RESULTS, LIBRARIES = "manifest.json", "results.jsonl", "libraries.tar.xz"


@dataclass(frozen=True)
class Library:
    """A library to build and to measure.

    Parameters
    ----------
    kind
        `DEFAULT` as it would be shipped, `TWO_KERNELS` instead of one, a `CANDIDATE` of tuning, or
        another `FORM` that is only checked.
    decisions
        Of its only variant; None if it has those that the records and defaults give it.
    """

    name: str
    layer: str
    precision: str
    kind: str
    decisions: dict[str, Any] | None = None
    data_format: str = "channels_last"

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.name}.so"

    @property
    def allow_tf32(self) -> bool:
        """Whether float32 is multiplied as TF32."""
        return self.precision == "tf32"

    @property
    def config(self) -> SepConvConfig:
        """The layer."""
        return layer_config(self.layer, self.precision, self.data_format)

    @property
    def kernel(self) -> KernelConfig:
        """What it is compiled for."""
        return self.config.kernel_config(workloads.workloads()[self.layer].channels)


def layer_config(layer: str, precision: str, data_format: str = "channels_last") -> SepConvConfig:
    """A layer of the workload table, in the dtype that a precision stores."""
    dtype = "float32" if precision == "tf32" else precision
    return workloads.workloads()[layer].config(dtype=dtype, data_format=data_format)


def rows() -> list[str]:
    """The layers that everybody is compared on: the 20."""
    return [name for name in workloads.workloads() if name not in NOT_OF_THE_20]


@dataclass(frozen=True)
class Item:
    """What a worker does at a time.

    Parameters
    ----------
    what
        A library's name; of a comparison the layer's; else one of `FRAMEWORKS` or `REST`.
    precision, batch, steps
        Of what is compared or tuned.
    contestants
        Whom a comparison is with, "" being all that need no compiler; or `FINALISTS`.
    """

    step: str
    what: str
    precision: str = ""
    batch: int = 0
    steps: int = 0
    contestants: str = ""

    @property
    def key(self) -> str:
        """Its name in the results."""
        parts = [self.step, self.what, self.precision, self.contestants]
        size = f"{self.batch}x{self.steps}" if self.batch else ""
        return "/".join(part for part in (*parts, size) if part)


def items(libraries: Iterable[Library]) -> Iterator[Item]:
    """All there is to do with these libraries, in order."""
    every = list(libraries)
    for library in every:
        if library.kind != CANDIDATE:
            yield Item("correctness", library.name)
    for what in FRAMEWORKS:
        yield Item("frameworks", what)
    for what in REST:  # what the GPU can do: seconds, and every other figure is compared with it
        yield Item("rest", what)
    shipped = {(one.layer, one.precision) for one in every if one.kind == DEFAULT}
    for layer, batch, steps in _sizes():
        for precision in PRECISIONS:
            if (layer, precision) in shipped:
                yield Item("comparison", layer, precision, batch, steps)
    for layer, precision in dict.fromkeys(
        (one.layer, one.precision) for one in every if one.kind == CANDIDATE
    ):
        steps = workloads.workloads()[layer].steps
        for batch in BATCHES:
            for one in every:
                if (one.layer, one.precision, one.kind) == (layer, precision, CANDIDATE):
                    yield Item("tuning", one.name, precision, batch, steps)
            yield Item("tuning", layer, precision, batch, steps, FINALISTS)
    for layer in NAMED:
        steps = workloads.workloads()[layer].steps
        for batch in BATCHES:
            for precision in PRECISIONS:
                if (layer, precision) in shipped:
                    for name in COMPILERS:
                        yield Item("compilers", layer, precision, batch, steps, name)


def _sizes() -> Iterator[tuple[str, int, int]]:
    yield from LARGE  # first: the figures the roofline is quoted for
    for batch in BATCHES:
        for layer in rows():
            yield layer, batch, workloads.workloads()[layer].steps


@dataclass(frozen=True)
class Plan:
    """A prepared folder.

    Parameters
    ----------
    rejected
        Why candidates were not built or kept, and how many.
    """

    folder: Path
    arch: str
    tvm: str
    date: str
    libraries: tuple[Library, ...]
    rejected: dict[str, int]

    def save(self) -> None:
        """Write the manifest."""
        values = {**asdict(self), "folder": None}
        (self.folder / MANIFEST).write_text(json.dumps(values, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read the manifest.

        Raises
        ------
        FileNotFoundError
            If the folder was not prepared.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no prepared folder, it has no {MANIFEST}. Make one on a machine with "
                f"nvcc, no GPU is needed there: tvm-sepconv gpu prepare {folder}"
            )
        values = json.loads(path.read_text())
        libraries = tuple(Library(**one) for one in values.pop("libraries"))
        return cls(**{**values, "folder": folder, "libraries": libraries})

    def items(self) -> list[Item]:
        """All there is to do."""
        return list(items(self.libraries))

    def library(self, layer: str, precision: str, kind: str) -> Library | None:
        """The one of that kind, if there is one."""
        wanted = (layer, precision, kind, "channels_last")
        found = (
            o for o in self.libraries if (o.layer, o.precision, o.kind, o.data_format) == wanted
        )
        return next(found, None)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What was found so far, by the items' keys; a line that was cut off does not count."""
    found = {}
    path = folder / "results" / RESULTS
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            found[values["key"]] = values
        except (ValueError, KeyError):
            continue
    return found
