"""The frameworks of a session on a GPU compute the layer; here on the processor."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
from fake_gpu import HostClock

from tvm_sepconv.compiler.gpu_session import peers, plan
from tvm_sepconv.compiler.gpu_session.bench import Problem

# Two multipliers and an even kernel, a stride, a dilation, padding "valid".
LAYERS = ("EEG-SSVEP", "QN-C1", "MB-e", "SWW-2")


def problem(layer: str) -> Problem:
    one = plan.Library("", layer, "float32", plan.DEFAULT)
    return Problem.drawn(one.config, one.kernel, 2, 40, 0.0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("contestants", ["", "JAX"])
def test_a_peer_is_the_layer(layer: str, contestants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax" if contestants else "torch")
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    case = problem(layer)
    for prepare in peers.entries(contestants).values():
        assert case.error(prepare(case, "float32", HostClock()).output()) < 4


def test_xla_is_timed_over_many_calls_at_once() -> None:
    pytest.importorskip("jax")
    case = problem("SWW-2")
    (prepare,) = peers.entries("JAX").values()
    assert prepare(case, "tf32", HostClock()).timer()() > 0
    assert peers._jax_calls(case, HostClock()) == peers.JAX_CALLS


def test_a_graph_of_torch_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    for name in ("ExternalStream", "stream", "graph", "synchronize"):
        nothing = contextlib.nullcontext()
        monkeypatch.setattr(torch.cuda, name, lambda *a, nothing=nothing, **named: nothing)
    replayed: list[int] = []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    given = torch.zeros(1)
    there = weakref.ref(given)
    replay = peers.TorchGraphs(HostClock()).graph([partial(torch.relu, given)])
    del given
    replay()
    assert replayed == [1]
    assert there() is not None


@pytest.mark.parametrize(
    ("contestants", "names"),
    [
        ("", {"torch", "cuDNN channels_last"}),
        ("torch.compile", {"torch.compile"}),
        ("JAX", {"JAX"}),
    ],
)
def test_who_is_compared_with(contestants: str, names: set[str]) -> None:
    assert {name.partition(":")[0] for name in peers.entries(contestants)} == names
