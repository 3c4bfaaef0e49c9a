"""Is a bundle right in the hands of frameworks: in their memory, on their streams, in a graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import tvm_sepconv
from tvm_sepconv.compiler.gpu_session import peers
from tvm_sepconv.compiler.gpu_session.bench import Array, Bench
from tvm_sepconv.compiler.gpu_session.plan import Item
from tvm_sepconv.compiler.tuning import cuda_measure

BUNDLE = "MB-1"
BATCH, STEPS = 3, 203
_SLEEP_CYCLES = 2_000_000  # what comes before the input is there reads zeros

Right = Callable[[str, Array], None]


def load(bench: Bench) -> Any:
    """The layer as a user loads it."""
    return tvm_sepconv.load(bench.plan.folder / f"{BUNDLE}.sepconv", device=peers.DEVICE)


def check(bench: Bench, item: Item) -> dict[str, Any]:
    """Compare what the layer gives a framework with the reference, in one way after another.

    Raises
    ------
    ValueError
        For the first way in which it is wrong.
    ModuleNotFoundError
        If there is no such framework.
    """
    layer, checked = load(bench), list[str]()
    depthwise, pointwise, *bias = layer.get_weights()
    x = np.random.default_rng(0).standard_normal((BATCH, STEPS, depthwise.shape[1]), np.float32)
    operands = (x, depthwise, pointwise, bias[0] if bias else None, layer.config)
    kernel = layer.config.kernel_config(depthwise.shape[1])
    expected, allowed = cuda_measure.answer(0.0, kernel, *operands)

    def right(way: str, y: Array) -> None:
        if y.shape != expected.shape or not (np.abs(y - expected) <= allowed).all():
            raise ValueError(f"{way}: the output is wrong")
        checked.append(way)

    WAYS[item.what](bench, layer, x, right)
    return {"checked": checked}


def _arrays(bench: Bench, layer: Any, x: Array, right: Right) -> None:
    right("arrays", layer(x))
    right("reversed", layer(np.ascontiguousarray(x[:, ::-1])[:, ::-1]))


def _torch(bench: Bench, layer: Any, x: Array, right: Right) -> None:
    import torch

    there = torch.from_numpy(x).to(peers.DEVICE)
    right("a new output", layer(there).cpu().numpy())
    right("strided", layer(there.swapaxes(1, 2).contiguous().swapaxes(1, 2)).cpu().numpy())
    stream = torch.cuda.Stream()
    late = torch.zeros_like(there)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_SLEEP_CYCLES)
        late.copy_(there)
        y = layer(late)
    stream.synchronize()
    right("another stream", y.cpu().numpy())
    out = torch.zeros_like(y)
    call = partial(layer, late, out=out)
    replay = peers.TorchGraphs(bench.clock).graph([call])
    late.copy_(there.flip(0))
    out.zero_()
    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    right("a graph, with another input", out.flip(0).cpu().numpy())


def _cupy(bench: Bench, layer: Any, x: Array, right: Right) -> None:
    cupy: Any = importlib.import_module("cupy")  # which no machine without a GPU has
    there = cupy.asarray(x)
    right("a new output", cupy.asnumpy(layer(there)))
    cupy.cuda.Stream.null.synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        twice = there * 2
        out = cupy.zeros_like(layer(twice))
        layer(twice / 2, out=out)
        right("another stream, into an output", cupy.asnumpy(out))


def _jax(bench: Bench, layer: Any, x: Array, right: Right) -> None:
    import jax

    there = jax.device_put(x)
    for _ in range(5):
        right("a new output", np.asarray(layer(there * 2 / 2)))


WAYS: dict[str, Callable[[Bench, Any, Array, Right], None]] = {
    "arrays": _arrays,
    "PyTorch": _torch,
    "CuPy": _cupy,
    "JAX": _jax,
}
