"""What a session found, for the terminal and as a page; what was not measured prints as missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from tvm_sepconv import workloads
from tvm_sepconv.bench.document import cells_table, document
from tvm_sepconv.compiler.gpu_session import plan
from tvm_sepconv.compiler.gpu_session.cells import OURS
from tvm_sepconv.compiler.gpu_session.peers import CHANNELS_LAST, EAGER
from tvm_sepconv.compiler.gpu_session.plan import (
    BATCHES,
    COMPILERS,
    PRECISIONS,
    TWO_KERNELS,
    Item,
    Plan,
)
from tvm_sepconv.kernel_config import DTYPE_BYTES

PEERS = (EAGER, CHANNELS_LAST, *COMPILERS)
MISSING = "missing"
HEAD = ("layer", "size", "precision", OURS, TWO_KERNELS, *PEERS, "best peer", "ratio", "× floor")

Found = Mapping[str, Mapping[str, Any]]
Cells = list[tuple[str, str]]  # (class, words)


@dataclass(frozen=True)
class Cell:
    """A layer at one size and precision: everybody's µs, the fastest form of each.

    ``planned`` are those that were to be measured here.
    """

    item: Item
    planned: frozenset[str]
    us: Mapping[str, float]
    floor_us: float | None

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        there = [name for name in PEERS if name in self.us]
        return min(there, key=self.us.__getitem__) if there else None

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours; None without one of the two."""
        if self.best is None or OURS not in self.us:
            return None
        return self.us[self.best] / self.us[OURS]

    def words(self) -> Cells:
        """A row of the table."""
        size = f"{self.item.batch}×{self.item.steps}"
        row: Cells = [("", self.item.what), ("", size), ("", self.item.precision)]
        for name in (OURS, TWO_KERNELS, *PEERS):
            row.append(("", _number(self.us.get(name)) if name in self.planned else "–"))
        verdict = "" if self.ratio is None else "won" if self.ratio >= 1 else "lost"
        row += [("", self.best or MISSING), (verdict, _times(self.ratio))]
        ours = self.us.get(OURS)
        floor = ours / self.floor_us if ours and self.floor_us else None
        return [*row, ("", _times(floor))]


def cells(made: Plan, found: Found) -> list[Cell]:
    """Every comparison there is, measured or not."""
    same: dict[Item, list[Item]] = {}
    for one in made.items():
        if one.step in ("comparison", "compilers"):
            same.setdefault(replace(one, step="comparison", contestants=""), []).append(one)
    return [
        Cell(item, _planned(made, some), _us(found, some), _floor_us(made, found, item))
        for item, some in same.items()
    ]


def _planned(made: Plan, items: Sequence[Item]) -> frozenset[str]:
    two = made.library(items[0].what, items[0].precision, TWO_KERNELS)
    names = {OURS, EAGER, CHANNELS_LAST} | ({TWO_KERNELS} if two else set())
    return frozenset(names | {one.contestants for one in items})


def _us(found: Found, items: Sequence[Item]) -> dict[str, float]:
    result: dict[str, float] = {}
    for one in items:
        for form, us in found.get(one.key, {}).get("found", {}).get("us", {}).items():
            name = form.partition(":")[0]
            if one.step == "comparison" or name != OURS:  # ours counts where all take turns
                result[name] = min(us, result.get(name, math.inf))
    return result


def _floor_us(made: Plan, found: Found, item: Item) -> float | None:
    """The least time that bandwidth and multiply-adds leave one fused kernel; None if not known."""
    memory = _rest(found, "bandwidth").get("bytes_a_second")
    flops = _rest(found, "matrix products").get("flops", {}).get(item.precision)
    library = made.library(item.what, item.precision, plan.DEFAULT)
    if not memory or not flops or library is None:
        return None
    kernel, out_steps = library.kernel, library.config.out_steps(item.steps)
    weights = kernel.mid_channels * (kernel.kernel_size + kernel.filters)
    ends = item.batch * (item.steps * kernel.channels + out_steps * kernel.filters)
    moved = DTYPE_BYTES[kernel.dtype] * (ends + weights)
    return float(1e6 * max(moved / memory, kernel.flops(item.batch, out_steps) / flops))


def _rest(found: Found, what: str) -> Mapping[str, Any]:
    values: Mapping[str, Any] = found.get(Item("rest", what).key, {}).get("found", {})
    return values


def means(every: Sequence[Cell]) -> Iterator[tuple[str, Cells]]:
    """The geometric means over the 20 layers, by batch and precision."""
    table = workloads.workloads()
    for batch in BATCHES:
        for precision in PRECISIONS:
            some = [
                cell
                for cell in every
                if (cell.item.batch, cell.item.precision) == (batch, precision)
                and cell.item.steps == table[cell.item.what].steps
            ]
            ratios = [cell.ratio for cell in some if cell.ratio is not None]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            lost = [c.item.what for c in some if c.ratio is not None and c.ratio < 1]
            verdict = f"lost: {', '.join(lost)}" if lost else "none lost" if ratios else MISSING
            yield (
                f"batch {batch}, {precision}",
                [
                    ("", _times(mean)),
                    ("", f"{len(ratios)} of {len(plan.rows())} measured"),
                    ("lost" * bool(lost), verdict),
                ],
            )


def notes(made: Plan, found: Found) -> Iterator[str]:
    """What else there is to know, a line each: what is missing first."""
    items = made.items()
    for step in plan.STEPS:
        some = [item for item in items if item.step == step]
        done = [item for item in some if item.key in found]
        failed = [item for item in done if "error" in found[item.key]]
        words = "" if len(done) == len(some) else f" INCOMPLETE, {len(some) - len(done)} missing"
        yield f"{step}: {len(done) - len(failed)} of {len(some)}, {len(failed)} failed{words}"
        yield from _failures((item.key, found[item.key]["error"]) for item in failed)
    yield from _failures(
        (f"{name} in {item.key}", why)
        for item in items
        for name, why in found.get(item.key, {}).get("found", {}).get("errors", {}).items()
    )
    for why, count in made.rejected.items():
        yield f"rejected before they ran: {count}, {why}"
    yield from _machine(found)
    for item in items:
        gain = found.get(item.key, {}).get("found", {}).get("gain")
        if gain:
            yield f"tuned: {item.what} {item.precision} batch {item.batch}: {gain:.2f}×"


def _failures(failed: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Who failed and why, equal words once."""
    groups: dict[str, list[str]] = {}
    for name, why in failed:
        groups.setdefault(why, []).append(name)
    for why, names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"  FAILED {names[0]}{more}: {why}"


def _machine(found: Found) -> Iterator[str]:
    memory = _rest(found, "bandwidth")
    yield f"machine: {memory.get('machine') or MISSING}"
    rate = memory.get("bytes_a_second")
    yield f"memory, read and written: {f'{rate / 1e12:.2f} TB/s' if rate else MISSING}"
    flops = _rest(found, "matrix products").get("flops", {})
    for name in PRECISIONS:
        peak = f"{flops[name] / 1e12:.0f} TFLOP/s" if name in flops else MISSING
        yield f"matrix products, {name}: {peak}"
    calls = _rest(found, "call overhead")
    for name, words in (("new", "a new output"), ("out", "`out=`")):
        yield f"call from Python, torch, {words}: {_number(calls.get(f'{name}_us'))} µs"


def text(made: Plan, found: Found) -> str:
    """The report for a terminal."""
    every = cells(made, found)
    rows = [[words for _, words in cell.words()] for cell in every]
    table = [list(HEAD), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            word.ljust(width) if number < 3 else word.rjust(width)
            for number, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    summary = [f"{name}: {', '.join(words for _, words in row)}" for name, row in means(every)]
    title = f"{made.arch}, libraries of {made.date}; medians in µs; the best peer's time over ours"
    return "\n".join([title, "", *lines, "", *summary, "", *notes(made, found)]) + "\n"


def html(made: Plan, found: Found) -> str:
    """The same as a page."""
    every = cells(made, found)
    rows: list[Cells] = [[("", name), *row] for name, row in means(every)]
    parts = [
        "<h1>tvm_sepconv on a GPU, beside its peers</h1>",
        f'<p class="soft">{escape(made.arch)}, libraries of {escape(made.date)}. Medians of CUDA '
        "graphs' replays, in µs; JAX, which cannot be captured, on the host's clock.</p>",
        "<h2>The best peer's time over ours, geometric means</h2>",
        cells_table(["", "ratio", "rows", ""], rows, left=(0, 2, 3)),
        "<h2>Every layer</h2>",
        cells_table(HEAD, (cell.words() for cell in every), left=(0, 1, 2)),
        "<h2>What was done</h2>",
        "".join(f"<p>{escape(line)}</p>" for line in notes(made, found)),
    ]
    return document("tvm_sepconv on a GPU", parts)


def _number(us: float | None) -> str:
    return MISSING if us is None else f"{us:.{2 if us < 100 else 1}f}"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}×"
