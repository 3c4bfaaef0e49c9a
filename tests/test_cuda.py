"""The CUDA kernel: right on the emulator, one launch, no spills; all without a GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm_sepconv.compiler.schedules import cuda as schedule  # noqa: E402

from tvm_sepconv import reference  # noqa: E402
from tvm_sepconv.compiler import cuda  # noqa: E402
from tvm_sepconv.config import KernelConfig, SepConvConfig  # noqa: E402

LAYOUTS = ("channels_last", "channels_first")


@dataclass(frozen=True)
class Case:
    layer: dict[str, object]
    channels: int
    sizes: tuple[tuple[int, int], ...]  # (batch, steps), all from one kernel
    tiling: schedule.Tiling | None = None


RAGGED = dict(filters=70, kernel_size=5, strides=3, dilation_rate=2, depth_multiplier=2,
              padding="same", activation="silu", use_bias=False)  # fmt: skip
CASES = {
    "SEED": Case(
        dict(filters=3, kernel_size=2, strides=2, padding="valid", activation="relu"),
        12, ((4, 10), (1, 2), (2, 131)),
    ),
    "QN-C1": Case(
        dict(filters=256, kernel_size=33, strides=2, padding="same", activation="relu"),
        64, ((1, 1000), (2, 1)),
    ),
    "ragged": Case(RAGGED, 37, ((2, 200), (1, 1), (3, 7))),
    "dilated": Case(
        dict(filters=33, kernel_size=3, dilation_rate=2, strides=2, padding=(1, 4)),
        31, ((2, 129), (1, 1)),
    ),
    "causal": Case(dict(filters=32, kernel_size=4, padding=(3, 0)), 32, ((1, 64), (2, 65), (1, 1))),
    "tiny": Case(
        dict(filters=1, kernel_size=1, strides=5, depth_multiplier=3), 1, ((2, 9), (1, 1))
    ),
    "halo-unstaged": Case(
        dict(filters=5, kernel_size=3, dilation_rate=800, padding="same"), 9, ((1, 70), (1, 1700))
    ),
    "three-channels": Case(dict(filters=64, kernel_size=2), 3, ((2, 130), (1, 2))),
    "gelu": Case(
        dict(filters=40, kernel_size=7, padding="same", activation="gelu"), 34, ((1, 70),)
    ),
    "tiles-small": Case(RAGGED, 37, ((1, 200),), schedule.Tiling(32, 64, 4, 2, True)),
    "tiles-large": Case(RAGGED, 37, ((1, 400),), schedule.Tiling(128, 96, 8, 16, True)),
    "tiles-unstaged": Case(RAGGED, 37, ((1, 200),), schedule.Tiling(96, 32, 32, 32, False)),
}  # fmt: skip

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def emitted(config: KernelConfig, tiling: schedule.Tiling | None) -> str:
    return cuda.emit_source(config, tiling)


def parsed(case: Case, layout: str) -> tuple[SepConvConfig, KernelConfig]:
    layer = SepConvConfig.parse(**case.layer, data_format=layout)
    return layer, layer.kernel_config(case.channels)


def weights(layer: SepConvConfig, channels: int, rng: np.random.Generator):
    dtype = layer.compute_dtype
    depthwise = rng.standard_normal(layer.depthwise_shape(channels)).astype(dtype)
    pointwise = rng.standard_normal(layer.pointwise_shape(channels)).astype(dtype)
    bias = rng.standard_normal(layer.filters).astype(dtype) if layer.use_bias else None
    return depthwise, pointwise, bias


def whole(extent: int) -> int:
    return -(-extent // 32) * 32


def packed(layer: SepConvConfig, depthwise, pointwise, bias) -> dict[str, np.ndarray]:
    """From Keras's layout to the kernel's, element by element."""
    taps, channels, multiplier = depthwise.shape
    filters = pointwise.shape[2]
    lined = whole(channels) if layer.data_format == "channels_last" else channels
    d = np.zeros((taps, multiplier, lined), depthwise.dtype)
    p = np.zeros((whole(filters) // 32, multiplier * channels, 32), pointwise.dtype)
    for c, m in np.ndindex(channels, multiplier):
        d[:, m, c] = depthwise[:, c, m]
        for f in range(filters):
            p[f // 32, m * channels + c, f % 32] = pointwise[0, c * multiplier + m, f]
    arrays = {"depthwise_kernel_ptr": d, "pointwise_kernel_ptr": p}
    if bias is not None:
        arrays["bias_ptr"] = np.pad(bias, (0, whole(filters) - filters))
    return {name: framed(array) for name, array in arrays.items()}


def framed(array: np.ndarray) -> np.ndarray:
    """The same values between NaNs, which whoever reads past an end drags into the answer."""
    frame = np.full(array.size + 2 * 1024, np.nan, array.dtype)
    frame[1024:-1024] = array.ravel()
    return frame[1024:-1024].reshape(array.shape)


def inset(shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """An array of NaN and a view of `shape` in it that is neither compact nor aligned."""
    base = np.full((shape[0] + 2, shape[1] + 3, shape[2] + 3), np.nan, dtype)
    return base, base[1:-1, 1:-2, 1:-2]


class Layer:
    """A case's kernel on the emulator, its weights, and its reference."""

    def __init__(self, case: Case, layout: str, folder: Path, source: str | None = None) -> None:
        if shutil.which("g++") is None:
            pytest.skip("the CUDA emulator needs g++")
        self.layer, config = parsed(case, layout)
        self.rng = np.random.default_rng(0)
        self.dtype = config.dtype
        self.time = 2 if layout == "channels_first" else 1
        self.channels = case.channels
        self.weights = weights(self.layer, case.channels, self.rng)
        self.arrays = packed(self.layer, *self.weights)
        self.launch = cuda.launch(config, case.tiling)
        source = source or emitted(config, case.tiling)
        self.kernel = cuda_emulator.Kernel(source, folder)

    def input(self, batch: int, steps: int) -> np.ndarray:
        shape = [batch, self.channels, self.channels]
        shape[self.time] = steps
        return self.rng.standard_normal(shape).astype(self.dtype)

    def __call__(self, x: np.ndarray, left: int, out_steps: int, order: int) -> np.ndarray:
        """Run the kernel on arrays that are neither compact nor aligned."""
        _, inside = inset(x.shape, self.dtype)
        inside[...] = x
        shape = [len(x), self.layer.filters, self.layer.filters]
        shape[self.time] = out_steps
        around, output = inset(tuple(shape), self.dtype)
        (x_batch, x_row, _), (y_batch, y_row, _) = (
            [stride // x.itemsize for stride in view.strides] for view in (inside, output)
        )
        sizes = dict(
            batch=len(x), steps=x.shape[self.time], out_steps=out_steps, left=left,
            x_batch=x_batch, x_row=x_row, y_batch=y_batch, y_row=y_row,
        )  # fmt: skip
        arguments = {**self.arrays, **sizes, "x_ptr": inside, "output_ptr": output}
        grid = self.launch.grid(len(x), out_steps)
        self.kernel.launch(grid, self.launch.block, arguments, order)
        answer = output.copy()
        output[...] = np.nan
        assert np.isnan(around).all(), "wrote outside the output"
        return answer

    def check(self, answer: np.ndarray, x: np.ndarray, layer: SepConvConfig | None = None) -> None:
        expected = reference.separable_conv1d(x, *self.weights, layer or self.layer)
        terms = self.layer.kernel_size + self.channels * self.layer.depth_multiplier
        scale = reference.magnitude(x, *self.weights, layer or self.layer)
        eps = np.finfo(self.dtype).eps
        # No activation here is steeper than 1.13 (gelu), nor further off than 4 ulp of its own.
        allowed = 1.13 * 4 * eps * np.sqrt(terms) * scale + 4 * eps * np.abs(expected)
        assert answer.shape == expected.shape
        assert (np.abs(answer - expected) <= allowed).all()


@each_layout
@each_case
def test_is_right_in_every_order_of_its_threads(case, layout, tmp_path):
    layer = Layer(case, layout, tmp_path)
    for batch, steps in case.sizes:
        x = layer.input(batch, steps)
        left, _ = layer.layer.pad_amounts(steps)
        answers = [
            layer(x, left, layer.layer.out_steps(steps), order) for order in cuda_emulator.ORDERS
        ]
        layer.check(answers[0], x)
        assert len({answer.tobytes() for answer in answers}) == 1


@each_layout
def test_negative_left_padding_skips_steps(layout, tmp_path):
    layer = Layer(CASES["causal"], layout, tmp_path)
    valid = replace(layer.layer, padding="valid")
    x = layer.input(2, 80)
    rest = x[:, 7:] if layout == "channels_last" else x[..., 7:]
    layer.check(layer(x, -7, valid.out_steps(73), 0), rest, valid)


@each_layout
@each_case
def test_is_one_kernel_in_shared_memory_of_any_gpu(case, layout):
    _, config = parsed(case, layout)
    tiling = case.tiling or schedule.default_tiling(config)
    source = emitted(config, case.tiling)
    assert re.findall(r"__global__ void .*?(\w+)\([^()]*\) {", source) == [cuda.KERNEL_NAME]
    arrays = re.findall(r"__shared__ alignas\(\d+\) float \w+\[(\d+)\];", source)
    assert arrays
    assert len(arrays) == source.count("__shared__")
    assert 4 * sum(map(int, arrays)) <= schedule.shared_bytes(config, tiling) <= 48 * 1024


@each_layout
def test_emulator_notices_every_missing_barrier(layout, tmp_path):
    case = CASES["tiles-small"]
    source = emitted(parsed(case, layout)[1], case.tiling)
    barriers = [m.span() for m in re.finditer(re.escape("__syncthreads();"), source)]
    assert len(barriers) >= 2
    for number, (start, end) in enumerate(barriers):
        folder = tmp_path / str(number)
        folder.mkdir()
        layer = Layer(case, layout, folder, source[:start] + source[end:])
        x = layer.input(*case.sizes[0])
        left, _ = layer.layer.pad_amounts(x.shape[layer.time])
        out_steps = layer.layer.out_steps(x.shape[layer.time])
        answers = {layer(x, left, out_steps, order).tobytes() for order in cuda_emulator.ORDERS}
        assert len(answers) > 1, f"barrier {number}"


@pytest.mark.parametrize(
    ("body", "grid", "threads", "message"),
    [
        ("if (threadIdx.x < 16) __syncthreads();", (1, 1, 1), 32, "divergent barrier"),
        (
            "if (threadIdx.x < 16) __syncthreads();\nelse __syncthreads();",
            (1, 1, 1),
            32,
            "divergent",
        ),
        (
            "__shared__ float a[8]; a[threadIdx.x] = 1; y[0] = a[0];",
            (1, 1, 1),
            9,
            "index 8 outside",
        ),
        ("float a[8]; a[threadIdx.x] = 1; y[0] = a[n];", (1, 1, 1), 9, "index 8 outside"),
        (
            "__shared__ float a[12289]; a[n] = 1; __syncthreads(); y[0] = a[n];",
            (1, 1, 1),
            1,
            "49156 bytes",
        ),
        ("y[0] = 1;", (1, 1, 1), 1025, "1025 threads"),
        ("y[0] = 1;", (1, 65536, 1), 1, "grid of"),
        ("y[0] = 1;", (0, 1, 1), 1, "grid of"),
    ],
)
def test_emulator_reports_what_a_gpu_forbids(body, grid, threads, message, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    source = f'#include <cuda.h>\nextern "C" __global__ void k(float* y, int n) {{\n{body}\n}}'
    kernel = cuda_emulator.Kernel(source, tmp_path)
    with pytest.raises(cuda_emulator.EmulationError, match=message):
        kernel.launch(grid, (threads, 1, 1), {"y": np.zeros(1, "float32"), "n": 3})


def test_emulated_shared_and_local_memory_start_poisoned(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    source = """#include <cuda.h>
    extern "C" __global__ void k(float* y) {
      __shared__ float a[2];
      if (blockIdx.x == 0) a[0] = a[1] = 1;
      y[blockIdx.x] = a[0];
    }"""
    y = np.zeros(2, "float32")
    cuda_emulator.Kernel(source, tmp_path).launch((2, 1, 1), (1, 1, 1), {"y": y})
    assert y[0] == 1
    assert np.isnan(y[1])


@each_layout
@pytest.mark.parametrize("name", ["SEED", "QN-C1", "ragged"])
def test_default_spills_no_registers(name, layout, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None or subprocess.run([nvcc, "--version"], capture_output=True).returncode:
        pytest.skip("needs a working nvcc")
    (tmp_path / "kernel.cu").write_text(emitted(parsed(CASES[name], layout)[1], None))
    command = [nvcc, "-arch=sm_80", "-cubin", "-Xptxas=-v", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    assert int(registers) <= 128, "two blocks no longer fit a multiprocessor"


def test_emitting_leaves_the_environment_alone(monkeypatch):
    config = KernelConfig(channels=2, filters=2, kernel_size=2)
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "0")
    before = dict(os.environ)
    cuda.emit_source(config)
    assert dict(os.environ) == before
    monkeypatch.delenv("TVM_COMPILE_FORCE_FALLBACK")
    with pytest.raises(ValueError, match="arch"):
        cuda.emit_source(config, arch="none")
    assert "TVM_COMPILE_FORCE_FALLBACK" not in os.environ


def test_refuses_what_it_cannot_compile():
    for dtypes in (("float16", "float32"), ("float32", "float64"), ("float64", "float64")):
        names = dict(zip(("dtype", "accumulation_dtype"), dtypes, strict=True))
        message = "float32 only.*dtype={}, accumulation_dtype={}".format(*dtypes)
        with pytest.raises(ValueError, match=message):
            cuda.emit_source(KernelConfig(channels=2, filters=2, kernel_size=2, **names))
    few = KernelConfig(channels=3, filters=2, kernel_size=2, data_format="channels_first")
    with pytest.raises(ValueError, match=r"128 threads cannot share the 96 .* for 3 channels"):
        cuda.emit_source(few, schedule.Tiling(32, 32, 32, 4, True))
    long = KernelConfig(channels=32, filters=2, kernel_size=500)
    with pytest.raises(ValueError, match=r"lower `step_tile`.*Received: 80896 bytes"):
        cuda.emit_source(long, schedule.Tiling(64, 32, 32, 8, True))


@pytest.mark.parametrize(("batch", "out_steps"), [(0, 1), (65536, 1), (1, 0)])
def test_launch_refuses_grids_that_cuda_refuses(batch, out_steps):
    launch = cuda.launch(KernelConfig(channels=2, filters=33, kernel_size=2))
    assert launch.grid(65535, 65) == (2, 1, 65535)
    with pytest.raises(ValueError, match=f"batch={batch}, out_steps={out_steps}"):
        launch.grid(batch, out_steps)


def test_tiling_survives_a_record():
    tiling = schedule.Tiling(64, 96, 16, 8, False)
    assert schedule.Tiling.from_dict(tiling.to_dict()) == tiling
    with pytest.raises(
        ValueError, match=r"decisions are \['channel_tile', .*Received: \['steps'\]"
    ):
        schedule.Tiling.from_dict({"steps": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_tile", 48), ("step_tile", 0), ("step_tile", 1056), ("filter_tile", 16),
     ("filter_tile", 0), ("channel_tile", 0), ("channel_tile", 12), ("warps", 3), ("warps", 64),
     ("warps", 1)],
)  # fmt: skip
def test_tiling_refuses_numbers_that_do_not_divide(name, value):
    decisions = {**schedule.Tiling(64, 32, 32, 8, True).to_dict(), name: value}
    with pytest.raises(ValueError, match=f"`{name}` decision must be .*{name}={value}"):
        schedule.Tiling.from_dict(decisions)


@each_layout
@pytest.mark.parametrize("filters", [1, 32, 33, 96, 224, 256])
@pytest.mark.parametrize("halo", [0, 32, 256, 400, 1300, 20000])
def test_default_tiling_fits_every_layer(filters, halo, layout):
    for stride in (1, 2, 7, 60):
        config = KernelConfig(
            channels=512, filters=filters, kernel_size=2, dilation_rate=max(halo, 1),
            strides=stride, data_format=layout,
        )  # fmt: skip
        tiling = schedule.default_tiling(config)
        assert schedule.shared_bytes(config, tiling) <= 48 * 1024
        assert tiling.stage_input or halo > 1000 or stride > 40
        assert whole(filters) % tiling.filter_tile == 0
