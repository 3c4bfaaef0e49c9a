"""What a session asks of a bundle in the hands of frameworks; here on the processor."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import HostClock

import tvm_sepconv
from tvm_sepconv import workloads
from tvm_sepconv.compiler.gpu_session import frameworks, peers, plan, worker
from tvm_sepconv.compiler.gpu_session.bench import Bench

DONE = {
    "arrays": ["arrays", "reversed"],
    "PyTorch": ["a new output", "strided", "another stream", "a graph, with another input"],
    "CuPy": ["a new output", "another stream, into an output"],
    "JAX": ["a new output"] * 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tvm")
    workload = workloads.workloads()[frameworks.BUNDLE]
    layer = tvm_sepconv.SeparableConv1D.from_config(workload.config().to_dict())
    layer.build((1, workload.steps, workload.channels))
    path = tmp_path_factory.mktemp("prepared")
    layer.save(path / f"{frameworks.BUNDLE}.sepconv", targets=["x86"])
    return path


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A prepared folder whose GPU is this processor, where nothing waits for anything."""
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    monkeypatch.setattr(peers, "TorchGraphs", lambda clock: clock)
    null = SimpleNamespace(synchronize=lambda: None)
    cupy = SimpleNamespace(
        asarray=np.asarray, asnumpy=np.asarray, zeros_like=np.zeros_like,
        cuda=SimpleNamespace(Stream=lambda non_blocking: contextlib.nullcontext()),
    )  # fmt: skip
    cupy.cuda.Stream.null = null  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    return Bench(plan.Plan(folder, "sm_90", "", "", (), {}), HostClock())


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None, raising=False)
    return torch


@pytest.mark.parametrize("what", plan.FRAMEWORKS)
def test_a_bundle_is_checked_in_each_way(
    bench: Bench, what: str, request: pytest.FixtureRequest
) -> None:
    if what == "JAX":
        pytest.importorskip("jax")
    if what == "PyTorch":
        request.getfixturevalue("torch")
    assert frameworks.check(bench, plan.Item("frameworks", what)) == {"checked": DONE[what]}


def test_what_is_not_the_layer_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    load = frameworks.load

    def wrong(bench: Bench) -> Any:
        layer = load(bench)
        spoilt = SimpleNamespace(config=layer.config, get_weights=layer.get_weights)
        return type("Spoilt", (), {**vars(spoilt), "__call__": lambda self, x: layer(x + 1)})()

    monkeypatch.setattr(frameworks, "load", wrong)
    answer = worker.answer(bench, lambda: frameworks.check(bench, plan.Item("", "arrays")))
    assert answer["error"] == "ValueError: arrays: the output is wrong"


def test_a_framework_that_is_not_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ModuleNotFoundError, match="cupy"):
        frameworks.check(bench, plan.Item("frameworks", "CuPy"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_one_element_off(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    one = plan.Library("", "SWW-2", dtype, plan.FORM)
    problem = Bench(plan.Plan(Path(), "", "", "", (), {}), HostClock()).problem(one, 2, 37)
    given: list[Any] = []

    def launch(x: Any, out: Any) -> Any:
        assert all(tensor.data_ptr() % 16 == problem.x.itemsize for tensor in (x, out))
        given.append(x.float().numpy())
        return lambda: out.view(-1)[1:].fill_(2.5)

    y = peers.unaligned(SimpleNamespace(launch=launch), problem)  # type: ignore[arg-type]
    assert (given[0] == problem.x.astype("float32")).all()
    assert (y.dtype, y.shape) == (problem.x.dtype, problem.out_shape)
    assert np.isnan(float(y.flat[0]))
    assert (y.ravel()[1:].astype("float32") == 2.5).all()
