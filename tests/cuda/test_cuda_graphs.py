"""What the driver is asked to do to time launches; the driver itself is a fake."""

from __future__ import annotations

import ctypes
import weakref
from functools import partial

import pytest
from fake_gpu import Driver

from tvm_sepconv.bench import cuda_graphs
from tvm_sepconv.bench.cuda_graphs import Gpu
from tvm_sepconv.compiler.tuning.cuda_measure import Timer


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return fake


def test_what_it_is(driver: Driver) -> None:
    gpu = Gpu()
    assert (gpu.name, gpu.l2_bytes, gpu.index) == ("NVIDIA H200", 50 << 20, 0)
    assert gpu.stream > 1 << 32  # a pointer, not cut off
    assert cuda_graphs.machine() == "NVIDIA H200, driver for CUDA 13.1"


def test_launches_are_captured_once_and_replayed(driver: Driver) -> None:
    gpu, launched = Gpu(), []
    replay = gpu.graph([lambda: launched.append(1), lambda: launched.append(2)])
    assert launched == [1, 2]
    begin, end = (driver.calls.index(f"cuStream{n}") for n in ("BeginCapture_v2", "EndCapture"))
    assert begin < end < driver.calls.index("cuGraphInstantiateWithFlags")
    driver.calls.clear()
    assert gpu.seconds(replay) == pytest.approx(4e-3)
    assert launched == [1, 2]
    names = ["cuGraphLaunch", "cuEventRecord", "cuGraphLaunch", "cuEventRecord"]
    assert driver.calls == [*names, "cuEventSynchronize", "cuEventElapsedTime"]
    gpu.synchronize()
    del replay
    assert driver.calls[-2:] == ["cuStreamSynchronize", "cuGraphExecDestroy"]


def test_a_graph_keeps_the_memory_that_it_reads(driver: Driver) -> None:
    class Memory:
        pass

    memory = Memory()
    there = weakref.ref(memory)
    timer = Timer([partial(id, memory)], Gpu())
    del memory
    assert timer.sample() > 0
    assert there() is not None
    del timer
    assert there() is None


def test_a_launch_that_fails_ends_the_capture(driver: Driver) -> None:
    gpu = Gpu()

    def bad() -> None:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        gpu.graph([bad])
    assert driver.calls[-1] == "cuStreamEndCapture"


def test_the_driver_is_quoted(driver: Driver) -> None:
    gpu = Gpu()
    driver.failing = "cuStreamSynchronize"
    words = "cuStreamSynchronize of the CUDA driver failed: unspecified launch failure .error 719."
    with pytest.raises(RuntimeError, match=words):
        gpu.synchronize()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "DRIVER", "libnot_there.so.1")
    with pytest.raises(OSError, match="libnot_there"):
        Gpu()
