"""Reports made up for tests: what a run might have measured, and no more than that."""

from __future__ import annotations

import numpy as np

from tvm_sepconv.bench.limits import Limits
from tvm_sepconv.bench.report import BESIDE, OURS, REQUIRED, Report, Row
from tvm_sepconv.bench.roofline import Traffic, traffic
from tvm_sepconv.bench.sweep import Grid, Point, Sweep
from tvm_sepconv.bench.timing import Samples
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.workloads import Workload, workloads

PEERS = (*REQUIRED, "Keras on JAX", "Keras on TensorFlow")
LIMITS = Limits(
    peak_gflops={"x86_64-avx512": 118.1, "x86_64-avx2": 118.0, "x86_64-sse42": 59.0},
    bandwidth={"L1": 217.0, "L2": 114.0, "L3": 98.0, "DRAM": 31.0},
    cache_bytes={"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20},
    steadiness=0.97,
)
TILING = {"step_tile": 64, "register_tile": [4, 4], "depthwise_block": [8, 1]}
SMALL = Grid(channels=(1, 3), filters=(3,), depth_multipliers=(2,), strides=(1, 2))
# Somewhat like the frameworks are: times of our kernel, and microseconds a call.
_SPEEDS = {
    "PyTorch": (5.0, 40.0),
    "torch.compile": (3.0, 60.0),
    "ONNX Runtime": (1.35, 9.0),
    "OpenVINO": (1.2, 25.0),
    "LiteRT": (1.6, 3.0),
    "Keras on JAX": (20.0, 30.0),
    "Keras on TensorFlow": (4.0, 90.0),
    "two kernels": (1.15, 1.5),
    "dense Conv1D": (8.0, 1.0),
    "MetaSchedule": (1.3, 1.0),
}


def samples(median_us: float) -> Samples:
    """Times about a median."""
    return Samples(median_us, 0.97 * median_us, 1.06 * median_us, 0.96 * median_us, 40)


def row(
    name: str, ours_us: float | None, kernel_us: float = 100.0, flops: int = 8_000_000,
    moved: Traffic | None = None, failures: dict[str, str] | None = None, **others_us: float,
) -> Row:  # fmt: skip
    """A row with these medians; underscores in peers' names stand for spaces."""
    times = {name.replace("_", " "): us for name, us in others_us.items()}
    times = times if ours_us is None else {OURS: ours_us, **times}
    moved = moved or Traffic({"L2": 2_000_000, "L3": 10_000, "DRAM": 0}, 500_000, "L3")
    whole_call = {name: samples(us) for name, us in times.items()}
    forms = dict.fromkeys(times, "frozen")
    return Row(
        id=name, shape="1×9 2→3 k2", flops=flops, whole_call=whole_call, forms=forms,
        failures=failures or {}, kernel=samples(kernel_us), traffic=moved,
    )  # fmt: skip


def report(
    *rows: Row, missing: dict[str, str] | None = None, others: float = 0.0,
    target: str = "x86_64-avx512", cold: bool = False, limits: Limits = LIMITS,
) -> Report:  # fmt: skip
    """A run with these rows."""
    return Report(
        command="tvm-sepconv bench", where="Some CPU, 2 processors, 1 thread, 2026-01-01",
        threads=1, target=target, data_format="channels_last", cold=cold,
        others_processors=others, versions={"python": "3.11.2", "torch": "2.13.0"}, limits=limits,
        peers=PEERS, missing=missing or {}, rows=rows,
    )  # fmt: skip


def complete(peers: tuple[str, ...] = PEERS, beside: tuple[str, ...] = BESIDE) -> Report:
    """All workloads with times of these contestants; some rows are lost."""
    draw = np.random.default_rng(3)
    rows = (_drawn(workload, draw, (*peers, *beside)) for workload in workloads().values())
    missing = {name: "pip install it" for name in PEERS if name not in peers}
    return report(*rows, missing=missing)


def _drawn(workload: Workload, draw: np.random.Generator, names: tuple[str, ...]) -> Row:
    config = workload.config()
    kernel = KernelConfig(
        workload.channels, config.filters, config.kernel_size, config.strides,
        config.dilation_rate, config.depth_multiplier,
    )  # fmt: skip
    out_steps = config.out_steps(workload.steps)
    flops = kernel.flops(workload.batch, out_steps)
    moved = traffic(
        kernel, TILING, 16, workload.batch, workload.steps, out_steps, LIMITS.cache_bytes
    )
    kernel_us = 0.4 + flops / 118.1e3 / draw.uniform(0.72, 0.97)
    times = {OURS: kernel_us + 0.8}
    for name in names:
        factor, call_us = _SPEEDS[name]
        times[name] = call_us + kernel_us * max(factor * draw.uniform(0.7, 1.4), 0.9)
    extra = {"s": config.strides, "d": config.dilation_rate, "m": config.depth_multiplier}
    rare = "".join(f" {letter}{n}" for letter, n in extra.items() if n > 1)
    layer = f"{workload.channels}→{config.filters} k{config.kernel_size}{rare}"
    return Row(
        id=workload.id, shape=f"{workload.batch}×{workload.steps} {layer}", flops=flops,
        whole_call={name: samples(us) for name, us in times.items()},
        forms={name: "2-D, height 1" if us > 100 else "1-D" for name, us in times.items()},
        failures={}, kernel=samples(kernel_us), traffic=moved,
    )  # fmt: skip


def swept(grid: Grid = SMALL, lanes: int = 4) -> Sweep:
    """A sweep in which each shape takes 1 µs and what its next regular one computes."""
    points = []
    for shape in grid.shapes(lanes):
        channels, filters, multiplier, strides = shape
        whole = -(-channels // lanes) * -(-filters // lanes)
        flops = 1000 * channels * filters * multiplier // strides
        points.append(Point(*shape, kernel_us=1.0 + whole, flops=flops))
    return Sweep(
        command="tvm-sepconv bench --sweep", where="Some CPU", target="x86_64-sse42",
        data_format="channels_last", steps=256, kernel_size=3, lanes=lanes, peak_gflops=59.0,
        others_processors=0.0, versions={"python": "3"}, grid=grid, points=tuple(points),
    )  # fmt: skip
