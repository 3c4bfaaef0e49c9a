"""Frameworks on the GPU: PyTorch's operators, Inductor's and XLA's code for the layer.

PyTorch is captured into a CUDA graph as we are. XLA's executables cannot be: many of its calls,
each with an input of its own, are one program there, timed from its start to its end on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tvm_sepconv import activations
from tvm_sepconv.bench.case import Case
from tvm_sepconv.compiler.gpu_session.bench import Array, Problem
from tvm_sepconv.compiler.tuning.cuda_measure import Clock, Launch, Loaded, Timer, rotated

EAGER, CHANNELS_LAST = "torch", "cuDNN channels_last"
COMPILED = "torch.compile"
JAX_CALLS = 32  # of one program, at least: what starts it is shared among so many
DEVICE = "cuda"
MATRIX = 8192  # rows and columns


@dataclass(frozen=True)
class Peer:
    """A framework's layer with an input on the GPU.

    Parameters
    ----------
    output
        Computes once; the result in the layer's data format.
    timer
        Gets ready to be timed; returns what gives the seconds of one call.
    """

    output: Callable[[], Array]
    timer: Callable[[], Callable[[], float]]


Prepare = Callable[[Problem, str, Clock], Peer]


def entries(contestants: str) -> Mapping[str, Prepare]:
    """Whom to compare with: a framework's forms by name, after a colon what tells them apart."""
    from tvm_sepconv.bench.contestants.torch import FORMS

    if contestants == "JAX":
        return {"JAX": _jax}
    if contestants == COMPILED:
        return {f"{COMPILED}: {form}": _torch(form, True) for form in (FORMS[0], FORMS[2])}
    plain = {EAGER: _torch(FORMS[0], False)}
    return plain | {f"{CHANNELS_LAST}: {form}": _torch(form, False) for form in FORMS[1:]}


class TorchGraphs:
    """A clock whose graphs are torch's: its allocator must know of the capture."""

    def __init__(self, clock: Clock) -> None:
        import torch

        self._torch = torch
        self.index, self.stream, self.l2_bytes = clock.index, clock.stream, clock.l2_bytes
        self.seconds, self.synchronize = clock.seconds, clock.synchronize
        self._stream: Any = torch.cuda.ExternalStream(clock.stream)

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """Capture; see `Gpu.graph`."""
        torch = self._torch
        with torch.cuda.stream(self._stream):
            for launch in launches[:3]:  # libraries choose and load their kernels
                launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for launch in launches:
                launch()

        def replay(_: Sequence[Launch] = tuple(launches)) -> None:  # whose inputs it reads
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay


def _torch(form: str, compiled: bool) -> Prepare:
    """The preparation of one of PyTorch's forms."""

    def prepare(problem: Problem, precision: str, clock: Clock) -> Peer:
        import torch

        from tvm_sepconv.bench.contestants.torch import FORMS, network

        tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        case = _case(problem)
        dtype = torch.float16 if precision == "float16" else torch.float32
        module = network(case, form).to(device=DEVICE, dtype=dtype)
        if compiled:
            torch._dynamo.reset()
            module = torch.compile(module, dynamic=False)
        x = torch.from_numpy(case.channels_first(problem.x)).to(DEVICE)
        if form != FORMS[0]:
            x = x[:, :, None].contiguous(memory_format=torch.channels_last)

        def call(x: Any) -> Any:
            with torch.inference_mode():
                return module(x)

        def output() -> Array:
            return np.asarray(case.from_channels_first(call(x).float().cpu().numpy()))

        def timer() -> Callable[[], float]:
            item = problem.x.itemsize
            size = problem.x.nbytes + item * int(np.prod(problem.out_shape))
            copies = [x.clone() for _ in range(rotated(size, clock.l2_bytes))]
            launches = [partial(call, each) for each in copies]
            return Timer(launches, TorchGraphs(clock)).sample

        return Peer(output, timer)

    return prepare


def _case(problem: Problem) -> Case:
    weights = [np.asarray(w, np.float32) for w in problem.weights if w is not None]
    return Case(problem.config, tuple(weights), problem.x, problem.expected, problem.allowed)


def _jax(problem: Problem, precision: str, clock: Clock) -> Peer:
    import jax

    config = problem.config
    digits = {"float32": "highest", "tf32": "tensorfloat32"}.get(precision)
    jax.config.update("jax_default_matmul_precision", digits)
    x = _case(problem).channels_last(problem.x)
    steps = x.shape[1]
    depthwise, pointwise, bias = problem.weights
    taps = np.ascontiguousarray(depthwise).reshape(len(depthwise), 1, -1)
    axes = ("NWC", "WIO", "NWC")
    function = getattr(jax.nn, activations.name_of(config.activation) or "", None)

    def layer(x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, taps, (config.strides,), [config.pad_amounts(steps)], (1,),
            (config.dilation_rate,), axes, feature_group_count=x.shape[-1],
        )  # fmt: skip
        y = y @ pointwise[0]
        y = y if bias is None else y + bias
        return y if function is None else function(y)

    def output() -> Array:
        return _case(problem).from_channels_last(np.asarray(jax.jit(layer)(x), np.float32))

    def timer() -> Callable[[], float]:
        copies = [jax.device_put(x) for _ in range(_jax_calls(problem, clock))]
        program = jax.jit(lambda inputs: [layer(one) for one in inputs])
        jax.block_until_ready(program(copies))

        def seconds() -> float:
            jax.block_until_ready(program(copies))
            start = time.perf_counter()
            jax.block_until_ready(program(copies))
            return (time.perf_counter() - start) / len(copies)

        return seconds

    return Peer(output, timer)


def _jax_calls(problem: Problem, clock: Clock) -> int:
    """As many as we take turns with, and more where that is little memory."""
    size = 2 * problem.x.nbytes
    return max(rotated(size, clock.l2_bytes), min(JAX_CALLS, (1 << 28) // size))


def unaligned(loaded: Loaded, problem: Problem) -> Array:
    """Our output for tensors that begin one element off: a slice's, which no wide move can read."""
    import torch

    # As whole numbers, because torch takes no bfloat16 from NumPy and gives none back.
    whole = np.dtype(f"i{problem.x.itemsize}")
    number, dtype = (getattr(torch, name) for name in (whole.name, problem.x.dtype.name))

    def off(values: Any) -> Any:
        flat = torch.empty(values.numel() + 1, dtype=dtype, device=DEVICE)
        part = flat[1:].view(values.shape)
        part.copy_(values)
        return part

    x = off(torch.from_numpy(problem.x.view(whole)).view(dtype))
    out = off(torch.full(problem.out_shape, float("nan"), dtype=dtype))
    loaded.launch(x, out)()  # on torch's current stream
    return np.asarray(out.view(number).cpu().numpy().view(problem.x.dtype))


def matrix_products(clock: Clock) -> dict[str, float]:
    """Floating-point operations a second of torch's largest products, by precision."""
    import torch

    graphs, found = TorchGraphs(clock), {}
    for name, dtype in (("float32", "float32"), ("tf32", "float32"), ("float16", "float16")):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(getattr(torch, dtype)) for _ in "ab")
        replay = graphs.graph([partial(torch.matmul, a, b)] * 4)
        clock.seconds(replay)
        found[name] = 4 * 2 * MATRIX**3 / min(clock.seconds(replay) for _ in range(5))
    return found
