"""Items of a session: is a library right, how long does everybody take, what can the GPU do."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tvm_sepconv import workloads
from tvm_sepconv.compiler.gpu_session import frameworks, peers
from tvm_sepconv.compiler.gpu_session.bench import Bench, Problem
from tvm_sepconv.compiler.gpu_session.plan import DEFAULT, TWO_KERNELS, Item, Library
from tvm_sepconv.compiler.tuning.cuda_measure import Timer, alternated

ROUNDS = 15
OURS = "tvm_sepconv"
# Lengths around tiles' edges, more samples than a warp, and one step.
SIZES = ((2, 37), (1, 331), (33, 5), (1, 1))
COPY_BYTES = 1 << 30
CALLS = 2000
_PEER_SLACK = 4.0  # frameworks round the intermediate and more


def correctness(bench: Bench, item: Item) -> dict[str, Any]:
    """Compare a library with the reference at several sizes, the layer's own among them."""
    library = next(one for one in bench.plan.libraries if one.name == item.what)
    steps = workloads.workloads()[library.layer].steps
    worst, unaligned = 0.0, None
    for batch, length in ((1, steps), *SIZES):
        if library.config.out_steps(length) < 1:
            continue
        problem = bench.problem(library, batch, length)
        loaded = bench.loaded(library, problem)
        worst = max(worst, problem.error(loaded.output(problem.x, problem.out_shape)))
        if on_gpu() and batch > 1:
            unaligned = problem.error(peers.unaligned(loaded, problem))
    return {"error": worst, "unaligned_error": unaligned}


def comparison(bench: Bench, item: Item) -> dict[str, Any]:
    """Time our libraries and others in turns; who fails is named and the rest go on."""
    precision = item.precision
    ours = bench.plan.library(item.what, precision, DEFAULT)
    two = bench.plan.library(item.what, precision, TWO_KERNELS) if not item.contestants else None
    assert ours is not None
    problem = bench.problem(ours, item.batch, item.steps)
    entries: dict[str, Callable[[], Callable[[], float]]] = {
        OURS: partial(_ours, bench, ours, problem)
    }
    if two is not None:
        entries[TWO_KERNELS] = partial(_ours, bench, two, problem)
    for name, prepare in peers.entries(item.contestants).items():
        entries[name] = partial(_peer, prepare, bench, problem, precision)
    timers, errors = {}, {}
    for name, timer in entries.items():
        try:
            timers[name] = timer()
        except Exception as error:
            errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if not bench.works():
                raise
    samples = alternated(list(timers.values()), ROUNDS)
    times = {name: [1e6 * s for s in found] for name, found in zip(timers, samples, strict=True)}
    return {"us": {n: _median(t) for n, t in times.items()}, "errors": errors,
            "noise": {n: _spread(t) for n, t in times.items()}}  # fmt: skip


def _ours(bench: Bench, library: Library, problem: Problem) -> Callable[[], float]:
    loaded = bench.loaded(library, problem)
    problem.error(loaded.output(problem.x, problem.out_shape))
    return Timer(loaded.rotation(problem.x, problem.out_shape), bench.clock).sample


def _peer(
    prepare: peers.Prepare, bench: Bench, problem: Problem, precision: str
) -> Callable[[], float]:
    peer = prepare(problem, precision, bench.clock)
    problem.error(peer.output(), _PEER_SLACK)
    return peer.timer()


def _median(times: list[float]) -> float:
    return float(np.median(times))


def _spread(times: list[float]) -> float:
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / middle)


def rest(bench: Bench, item: Item) -> dict[str, Any]:
    """Measure what the GPU can do, or what a call from Python takes."""
    found = {
        "bandwidth": _bandwidth,
        "matrix products": _products,
        "call overhead": _overhead,
    }[item.what](bench)
    return {**found, "machine": bench.name()}


def _bandwidth(bench: Bench) -> dict[str, Any]:
    """Bytes read and written a second, by a copy of more than the last cache holds."""
    library = next(one for one in bench.plan.libraries if one.kind == DEFAULT)
    loaded = bench.loaded(library, bench.problem(library, 1, 8))
    source, to = (loaded.empty((COPY_BYTES,), "uint8") for _ in range(2))
    secs = alternated([partial(bench.clock.seconds, partial(loaded.copy, source, to))], ROUNDS)[0]
    return {"bytes_a_second": 2 * COPY_BYTES / _median(secs)}


def _products(bench: Bench) -> dict[str, Any]:
    return {"flops": peers.matrix_products(bench.clock)}


def _overhead(bench: Bench) -> dict[str, Any]:
    """What a call takes from Python with torch's tensors, when the GPU is not waited for."""
    import torch

    layer = frameworks.load(bench)
    channels = workloads.workloads()[frameworks.BUNDLE].channels
    x = torch.randn(1, 16, channels, device="cuda")
    out = layer(x)
    calls = {"new": partial(layer, x), "out": partial(layer, x, out=out)}
    found = {}
    for name, call in calls.items():
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        found[f"{name}_us"] = 1e6 * _median(times)
    return found


def on_gpu() -> bool:
    """Whether there is a PyTorch that computes on GPUs."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())
