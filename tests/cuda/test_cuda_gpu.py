"""Layers on a real GPU: right, on the caller's stream, in graphs; PyTorch, CuPy and JAX."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tvm_ffi
from layers import BATCH, CHANNELS, FILTERS, STEPS, assert_right, inputs, layer_of, normal

from tvm_sepconv import cuda_runtime, gpu, load
from tvm_sepconv.options import BuildOptions

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not module.cuda.is_available():
        pytest.skip("this PyTorch was built without CUDA")
    return module


@pytest.fixture(scope="module", autouse=True)
def nvcc():
    pytest.importorskip("tvm")
    from tvm_sepconv.compiler import nvcc

    try:
        nvcc.find()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)]
)
def test_arrays(dtype, tolerance, data_format):
    layer = layer_of(data_format, dtype=dtype)
    layer.compile(BuildOptions(target=f"cuda-sm_{gpu.capability(0)}"))
    for steps in (1, STEPS, 1000):
        x = inputs(data_format, steps=steps).astype(dtype)
        assert_right(layer, x, layer(x).astype("float32"), tolerance)


def test_tensors_of_torch(torch):
    layer, x = layer_of(), torch.from_numpy(inputs()).cuda()
    for view in (x, x[:, 1:], x[..., :3].repeat(1, 1, 2)[..., :CHANNELS], x.half(), x[:0],
                 x.swapaxes(1, 2).contiguous().swapaxes(1, 2)):  # fmt: skip
        y = layer(view)
        assert y.device == x.device and y.dtype == torch.float32
        assert_right(layer, view.cpu().numpy(), y.cpu().numpy())
    out = torch.empty(BATCH, STEPS, FILTERS, device="cuda")
    assert layer(x, out=out) is out and torch.equal(out, layer(x))
    room = torch.zeros(out.numel(), device="cuda")
    with pytest.raises(ValueError, match="overlap"):
        layer(room[: x.numel()].reshape(x.shape), out=room.reshape(out.shape))


def test_torchs_current_stream(torch):
    layer, x = layer_of(), torch.from_numpy(normal(64, 4000, CHANNELS)).cuda()
    expected = layer(x)
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(2_000_000)  # what comes too early reads zeros
            late.copy_(x)
            y = layer(late)
        stream.synchronize()
        assert torch.equal(y, expected)


def test_graphs_of_torch(torch):
    layer, x = layer_of(), torch.from_numpy(inputs()).cuda()
    out = layer(x).zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, out=out)
        new = layer(x)
    x.copy_(torch.from_numpy(normal(*x.shape, seed=9)))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(layer, x.cpu().numpy(), out.cpu().numpy())
    assert torch.equal(out, new)
    layer.set_weights(layer.get_weights())
    # What spoils a capture is told again, by torch, at its end.
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="before the capture"),
    ):
        layer(x)


def test_memory_is_given_back(torch):
    layer, x = layer_of(), normal(8, 10000, CHANNELS)
    layer.compile(BuildOptions(target=f"cuda-sm_{gpu.capability(0)}"))
    layer(x)
    del layer
    gc.collect()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        layer = layer_of()
        layer.compile(BuildOptions(target=f"cuda-sm_{gpu.capability(0)}"))
        layer(x)
        del layer
        gc.collect()
    assert torch.cuda.mem_get_info()[0] >= before - 2**20


def test_more_memory_than_there_is(torch):
    layer = layer_of()
    layer.compile(BuildOptions(target=f"cuda-sm_{gpu.capability(0)}"))
    layer(inputs())
    with pytest.raises(MemoryError, match=r"bytes are not to be had on cuda:0"):
        layer._cuda.library.empty(tvm_ffi.Shape((2**50,)), "uint8", 0)
    assert_right(layer, inputs(), layer(inputs()))


def test_the_operator_of_torch(torch):
    from torch import nn

    from tvm_sepconv.interop.torch import from_torch

    def pair():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
            nn.Conv1d(CHANNELS, FILTERS, 1),
            nn.ReLU(),
        ).eval()

    x = torch.from_numpy(inputs("channels_first"))
    expected = pair()(x)
    model = pair()
    assert len(from_torch(model).replaced) == 1
    model.cuda()
    with torch.inference_mode():
        y = model(x.cuda())
        assert y.is_cuda
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, backend="eager")(x.cuda())
        assert torch.equal(compiled, y)
    with pytest.raises(ValueError, match=r"must be on cuda:0, as the weights are"):
        model(x)


def test_arrays_of_cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    layer, x = layer_of(), cupy.asarray(inputs())
    with cupy.cuda.Stream(non_blocking=True):
        for view in (x, x[:, ::2], x[..., ::-1], x.astype("float16")):
            y = layer(view)
            assert isinstance(y, cupy.ndarray)
            assert_right(layer, cupy.asnumpy(view), cupy.asnumpy(y))
        out = cupy.empty((BATCH, STEPS, FILTERS), "float32")
        assert layer(x, out=out) is out


def test_arrays_of_jax():
    pytest.importorskip("jax", reason="JAX is not installed")
    # In a process of its own: the tests' JAX is held to the CPU.
    script = """
        import sys
        sys.path.insert(0, {tests!r})
        import jax
        import numpy as np
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError:
            sys.exit(77)  # built without CUDA
        from layers import assert_right, inputs, layer_of
        layer, x = layer_of(), jax.device_put(inputs(), device)
        for _ in range(10):
            y = layer(x * 2)
            assert isinstance(y, jax.Array) and y.devices() == {{device}}
            assert_right(layer, inputs() * 2, np.asarray(y))
    """
    code = textwrap.dedent(script.format(tests=str(Path(__file__).parents[1])))
    environment = {**os.environ, "JAX_PLATFORMS": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this JAX was built without CUDA")
    assert done.returncode == 0, done.stderr


def test_bundles(tmp_path):
    layer = layer_of()
    layer.save(tmp_path / "b", [f"cuda-sm_{gpu.capability(0)}"])
    loaded = load(tmp_path / "b", device="cuda:0")
    assert_right(layer, inputs(), loaded(inputs()))
    with pytest.raises(ValueError, match=r"Received: cuda:99"):
        load(tmp_path / "b", device="cuda:99")
    library = cuda_runtime.Library(loaded._cuda.library.path)
    library.check(0)
