"""No cliff: kernels of irregular shapes beside the next regular one, for many channels and filters.

A regular shape has whole vectors of channels and of filters; the next one is what a shape becomes
when both are padded with zeros. It computes more for the same answer, so two comparisons say
different things: of times (below 1, padding by hand would be faster) and of rates (operations that
count, a second; a shape that fills a tenth of its vectors can hardly have more than a tenth).
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import bundle, jit, runtime
from tvm_sepconv.bench import machine
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.limits import Peak
from tvm_sepconv.bench.timing import interleave
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.subjects import Subject

FORMAT = 1  # of the JSON; others are refused
TARGET_RATE = 0.6  # of the next regular shape's
POINT_SECS = 0.02  # for the turns of a shape

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Point:
    """One shape, measured: our kernel alone, one thread; the median of its turns."""

    channels: int
    filters: int
    depth_multiplier: int
    strides: int
    kernel_us: float
    flops: int

    @property
    def shape(self) -> Shape:
        """What tells it from other points of a sweep."""
        return self.channels, self.filters, self.depth_multiplier, self.strides

    @property
    def gflops(self) -> float:
        """Its rate in GFLOP/s."""
        return self.flops / self.kernel_us / 1e3


@dataclass(frozen=True)
class Grid:
    """The shapes to measure: all combinations, and the regular ones next to them."""

    channels: tuple[int, ...] = tuple(range(1, 34))
    filters: tuple[int, ...] = (1, 3, 15, 17, 33)
    depth_multipliers: tuple[int, ...] = (1, 2, 4)
    strides: tuple[int, ...] = (1, 2)

    def shapes(self, lanes: int) -> list[Shape]:
        """Return them in order, each once."""
        rest = (self.depth_multipliers, self.strides)
        asked = list(itertools.product(self.channels, self.filters, *rest))
        return list(dict.fromkeys([*asked, *(_regular(shape, lanes) for shape in asked)]))


@dataclass(frozen=True)
class Sweep:
    """A sweep over shapes.

    Parameters
    ----------
    grid
        What was asked for; regular shapes next to it are among the points too.
    lanes
        float32 elements of a vector.
    peak_gflops
        One core's, in the same run.
    """

    command: str
    where: str
    target: str
    data_format: str
    steps: int
    kernel_size: int
    lanes: int
    peak_gflops: float
    others_processors: float
    versions: dict[str, str]
    grid: Grid
    points: tuple[Point, ...]

    @property
    def asked(self) -> list[Point]:
        """The points of the grid."""
        names = ("channels", "filters", "depth_multipliers", "strides")
        allowed = [getattr(self.grid, name) for name in names]
        return [
            point
            for point in self.points
            if all(value in values for value, values in zip(point.shape, allowed, strict=True))
        ]

    def regular(self, point: Point) -> Point:
        """The point with whole vectors of channels and filters next to one."""
        return self._by_shape[_regular(point.shape, self.lanes)]

    @functools.cached_property
    def _by_shape(self) -> dict[Shape, Point]:
        return {point.shape: point for point in self.points}

    def relative_rate(self, point: Point) -> float:
        """A point's GFLOP/s over the next regular one's."""
        return point.gflops / self.regular(point).gflops

    def relative_speed(self, point: Point) -> float:
        """The next regular point's time over this one's: below 1, padding by hand is faster."""
        return self.regular(point).kernel_us / point.kernel_us

    def worst(self, number: int, measure: Callable[[Point], float]) -> list[Point]:
        """Return the points of the grid with the least of a measure, worst first."""
        return sorted(self.asked, key=measure)[:number]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"sweep_format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sweep:
        """Undo `to_dict`.

        Raises
        ------
        ValueError
            If it is no sweep, or one of another version.
        """
        names = {field.name for field in fields(cls)}
        if plain.get("sweep_format") != FORMAT or not names <= plain.keys():
            raise ValueError(
                "A sweep must be what `tvm-sepconv bench --sweep --json` of this version wrote, "
                f"sweep_format {FORMAT}. Received: sweep_format={plain.get('sweep_format')!r}. "
                "Measure again"
            )
        kept = {name: plain[name] for name in names}
        kept["grid"] = Grid(**{name: tuple(values) for name, values in plain["grid"].items()})
        kept["points"] = tuple(Point(**point) for point in plain["points"])
        return cls(**kept)

    def name(self, point: Point) -> str:
        """A point in a few characters: channels→filters, and what else is not 1."""
        rare = {"s": point.strides, "m": point.depth_multiplier}
        words = [f"{letter}{n}" for letter, n in rare.items() if n > 1]
        return " ".join([f"{point.channels}→{point.filters}", *words])

    def text(self) -> str:
        """Return a summary for the terminal: how many shapes fall behind, and the worst by name."""
        behind = sum(self.relative_rate(point) < TARGET_RATE for point in self.asked)
        slower = sum(self.relative_speed(point) < 1 for point in self.asked)
        share = f"{100 * TARGET_RATE:.0f} %"
        return "\n".join(
            [
                f"{len(self.asked)} shapes, {self.steps} steps, kernel size {self.kernel_size}, "
                f"{self.data_format}, {self.target}, one thread",
                self.where,
                f"$ {self.command}",
                f"Peak of one core: {self.peak_gflops:.1f} GFLOP/s",
                "",
                f"Below {share} of the rate of the next regular shape: {behind}; the least:",
                *self._lines(self.relative_rate),
                f"Slower than the next regular shape: {slower}; the least speed over its:",
                *self._lines(self.relative_speed),
                "",
            ]
        )

    def _lines(self, measure: Callable[[Point], float]) -> Iterable[str]:
        for point in self.worst(5, measure):
            both = "   ".join(
                f"{self.name(p):14}{p.kernel_us:8.2f} µs{p.gflops:8.1f} GFLOP/s"
                for p in (point, self.regular(point))
            )
            yield f"  {both}   {100 * measure(point):.0f} %"


def _regular(shape: Shape, lanes: int) -> Shape:
    channels, filters, multiplier, strides = shape
    return -(-channels // lanes) * lanes, -(-filters // lanes) * lanes, multiplier, strides


def measure_sweep(
    target: str,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
    grid: Grid | None = None,
    data_format: str = "channels_last",
    steps: int = 256,
    kernel_size: int = 3,
) -> Sweep:
    """Compile, verify and time the shapes of a grid: a thousand by default, in minutes.

    Parameters
    ----------
    target
        An instruction set of this machine, such as "x86_64-avx512".
    progress
        Is told what is being done; at the end an empty text.

    Raises
    ------
    AssertionError
        If an output is not the layer's.
    RuntimeError
        If a layer cannot be compiled.
    """
    jit.need_compiler()
    grid = grid or Grid()
    peak = Peak(target)
    shapes = grid.shapes(peak.lanes)
    layers = [_layer(shape, kernel_size, data_format) for shape in shapes]
    points, best_us = [], []
    with tempfile.TemporaryDirectory(prefix="tvm_sepconv_sweep_") as folder:
        kernels = [
            config.kernel_config(shape[0]) for shape, config in zip(shapes, layers, strict=True)
        ]
        libraries = _compiled(kernels, target, Path(folder), progress)
        others = machine.OthersWork()
        runtime.set_num_threads(1)
        try:
            for number, (shape, config, library) in enumerate(
                zip(shapes, layers, libraries, strict=True)
            ):
                progress(f"measuring {number + 1} of {len(shapes)}")
                subject = Subject(library.stem, config, shape[0], batch=1, steps=steps)
                kernel_us, peak_us = _timed(Case.of_subject(subject, target), library, peak)
                flops = config.flops(1, steps, shape[0])
                points.append(Point(*shape, kernel_us, flops))
                best_us.append(peak_us)
        finally:
            runtime.set_num_threads(None)
        progress("")
    return Sweep(
        command=command, where=machine.where(1), target=target, data_format=data_format,
        steps=steps, kernel_size=kernel_size, lanes=peak.lanes,
        peak_gflops=peak.flops / min(best_us) / 1e3, others_processors=others.processors(),
        versions=machine.versions(("numpy", "apache-tvm")), grid=grid, points=tuple(points),
    )  # fmt: skip


def _layer(shape: Shape, kernel_size: int, data_format: str) -> SepConvConfig:
    _, filters, multiplier, strides = shape
    return SepConvConfig.parse(
        filters, kernel_size, strides=strides, padding="same", data_format=data_format,
        depth_multiplier=multiplier, name="sweep",
    )  # fmt: skip


def _compiled(
    kernels: Iterable[KernelConfig],
    target: str,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Path]:
    """Return each kernel's library, all compiled side by side; the runtime lies beside them."""
    kernels = list(kernels)
    libraries = [folder / f"{kernel.key}.so" for kernel in kernels]
    # A fresh process for each worker: TVM has threads, which do not survive a fork.
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fresh) as pool:
        jobs = [
            pool.submit(_compile, kernel, target, library)
            for kernel, library in zip(kernels, libraries, strict=True)
        ]
        try:
            for number, job in enumerate(concurrent.futures.as_completed(jobs)):
                progress(f"compiling {number + 1} of {len(jobs)}")
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    build, cpu = _compiler(target)
    build.build_runtime(cpu, folder / bundle.RUNTIME)
    return libraries


def _compile(kernel: KernelConfig, target: str, library: Path) -> None:
    build, cpu = _compiler(target)
    build.build_library(kernel, cpu, library, build.variants(kernel, cpu))


def _compiler(target: str) -> tuple[Any, Any]:
    targets = jit.compiler("tvm_sepconv.compiler.targets")
    return jit.compiler("tvm_sepconv.compiler.build"), targets.cpu(target)


def _timed(case: Case, library: Path, peak: Peak) -> tuple[float, float]:
    """Return the kernel's median time and the peak loop's best, in µs, after verifying it."""
    depthwise, pointwise, *bias = case.weights
    layer = runtime.CompiledLayer(
        library, library.parent / bundle.RUNTIME, case.config, depthwise, pointwise,
        bias[0] if bias else None,
    )  # fmt: skip
    out = np.empty(case.expected.shape, np.float32)
    call, handle, x, y = layer.call, layer.handle, layer.at(case.x), layer.at(out)
    layer.runtime.check(call(handle, x, y))
    check(library.stem, out, case.expected, case.allowed)
    times = interleave({"kernel": lambda: call(handle, x, y), "peak": peak.run}, POINT_SECS)
    return times["kernel"].median_us, times["peak"].best_us
