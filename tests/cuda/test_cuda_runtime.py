"""Layers on a GPU: whose memory, which stream, how many copies, and what is refused; emulated."""

from __future__ import annotations

import builtins
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tvm_ffi
from gpu_machine import FRAMEWORKS, STREAM
from gpu_tensors import CuPy, Jax, Tensor, Torch
from layers import BATCH, CHANNELS, FILTERS, STEPS, assert_right, inputs, layer_of, normal

import tvm_sepconv as tsc
from tvm_sepconv import cuda_runtime, jit
from tvm_sepconv.bundle import BundleError
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.options import BuildOptions

SHAPE = (BATCH, STEPS, FILTERS)
WORK = ("launch", "allocate", "copy", "synchronize", "free", "pin")
each_framework = pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
pytestmark = pytest.mark.usefixtures("gpus")


def called(layer, kind=Torch, index=0):
    """The layer after a first call on a GPU, its log read."""
    layer(kind(inputs(layer.config.data_format, dtype=layer.dtype), index))
    return layer


# ---- tensors ------------------------------------------------------------------------------------


@each_framework
def test_tensors_are_computed_where_they_lie(kind, gpus):
    layer, x = called(layer_of()), kind(inputs())
    gpus.log(layer)
    y = layer(x)
    assert type(y) is kind and y.index == 0
    assert_right(layer, x.array, y.array)
    log = gpus.log(layer, *WORK)
    if kind in (Torch, CuPy):  # the framework's memory and stream, and nobody waits
        assert [line.split(" grid")[0] for line in log] == [f"launch 0 stream {STREAM}"]
        assert set(x.streams) <= {STREAM}
    else:
        own = ["allocate 0", "launch 0 stream 1", "synchronize 0 stream 1", "free 0"]
        assert [line[: len(start)] for line, start in zip(log, own, strict=True)] == own
        assert x.streams == [1]


@pytest.mark.parametrize(
    ("dtype", "data_format", "tolerance"),
    [("float32", "channels_last", 1e-5), ("float16", "channels_last", 5e-3),
     ("bfloat16", "channels_first", 4e-2)],
)  # fmt: skip
def test_dtypes_and_data_formats(dtype, data_format, tolerance, gpus):
    layer = layer_of(data_format, dtype=dtype)
    for steps in (STEPS, 1, 130):
        x = inputs(data_format, steps=steps).astype(dtype)
        y = layer(Tensor(x))
        assert y.array.dtype == x.dtype
        assert_right(layer, x, y.array.astype("float32"), tolerance)


VIEWS = {
    "plain": lambda x: Torch(x),
    "slice": lambda x: Torch(np.pad(x, ((1, 1), (2, 3), (1, 2)))[1:-1, 2:-3, 1:-2]),
    "transposed": lambda x: Torch(x.swapaxes(1, 2).copy().swapaxes(1, 2)),
    "every other element": lambda x: Torch(np.repeat(x, 2, axis=2)[..., ::2]),
    "expanded": lambda x: Torch(np.broadcast_to(x[:1], x.shape)),
    "float16": lambda x: Torch(x.astype(np.float16)),
    "float64": lambda x: Torch(x.astype(np.float64)),
    "with gradients": lambda x: Torch(x, requires_grad=True),
    "negated": lambda x: Torch(-x, negated=True),
    "CuPy, every other element": lambda x: CuPy(np.repeat(x, 2, axis=2)[..., ::2]),
    "CuPy, float16": lambda x: CuPy(x.astype(np.float16)),
    "JAX, float16": lambda x: Jax(x.astype(np.float16)),
    "slice of another framework": lambda x: Tensor(np.pad(x, ((0, 0), (0, 0), (1, 2)))[..., 1:-2]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_and_dtypes_of_tensors(view, gpus):
    layer, x = called(layer_of()), VIEWS[view](inputs())
    shown = -x.array if view == "negated" else x.array
    y = layer(x)
    assert type(y) is type(x) and y.array.dtype == np.float32
    assert_right(layer, shown, y.array)


@each_framework
def test_empty_batches_launch_nothing(kind, gpus):
    layer = called(layer_of())
    gpus.log(layer)
    assert layer(kind(inputs()[:0])).shape == (0, STEPS, FILTERS)
    assert gpus.log(layer, "launch") == []


def test_the_operator_of_torch(gpus):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from tvm_sepconv.interop import torch_operator

    layer = called(layer_of())
    for x in (Torch(inputs()), Torch(np.repeat(inputs(), 2, axis=2)[..., ::2])):
        gpus.log(layer)
        y = Torch(zeros())
        torch_operator._run_cuda(layer._cuda, x, 1, y)
        assert_right(layer, x.array, y.array)
        assert [line.split(" grid")[0] for line in gpus.log(layer)] == [f"launch 0 stream {STREAM}"]


# ---- outputs ------------------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
def test_outputs_are_written_in_place(kind, first, gpus):
    if kind is Jax:
        pytest.skip("JAX's arrays never change")
    layer, x = layer_of(seed=3), kind(inputs())
    if not first:
        called(layer)
    out = kind(np.zeros(SHAPE, "float32"))
    assert layer(x, out=out) is out
    assert_right(layer, x.array, out.array)


@pytest.mark.parametrize("kind", [Torch, CuPy])
def test_outputs_without_contiguous_rows(kind, gpus):
    layer, x = called(layer_of()), kind(inputs())
    room = np.zeros((*SHAPE, 2), "float32")
    out = kind(room[..., 0])
    assert layer(x, out=out) is out
    assert_right(layer, x.array, room[..., 0])
    assert not room[..., 1].any()


def within_its_input():
    room = np.zeros(SHAPE, "float32")
    return Torch(room.ravel()[: BATCH * STEPS * CHANNELS].reshape(inputs().shape)), Torch(room)


def zeros(dtype="float32", shape=SHAPE):
    return np.zeros(shape, dtype)


OUTPUTS = {
    "array": (zeros, ValueError, r"`out` .* on cuda:0, as the inputs .* device type 1"),
    "list": (lambda: [1.0], TypeError, r"`out` .* tensor on cuda:0, .* Received: <class 'list'>"),
    "other GPU": (lambda: Torch(zeros(), 1), ValueError, r"on cuda:0, .* device type 2, index 1"),
    "dtype": (lambda: Torch(zeros("float16")), TypeError, r"dtype float32. .* torch.float16"),
    "shape": (lambda: Torch(zeros(shape=(1, 9, 6))), ValueError,
              r"`out` .* shape \(2, 9, 6\). Received: out.shape=\(1, 9, 6\)"),
    "JAX": (lambda: Jax(zeros()), ValueError, "`out` .* read-only Jax"),
    "negated": (lambda: Torch(zeros(), negated=True), ValueError, "`out` .* plain memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_refused_outputs(case, gpus):
    make, error, message = OUTPUTS[case]
    with pytest.raises(error, match=message):
        called(layer_of())(Torch(inputs()), out=make())


def test_outputs_within_their_inputs(gpus):
    x, out = within_its_input()
    with pytest.raises(ValueError, match=r"`out` .* overlap"):
        called(layer_of())(x, out=out)


def test_outputs_on_the_gpu_for_arrays(gpus):
    with pytest.raises(ValueError, match=r"`out` .* on the CPU, as the inputs are"):
        layer_of()(inputs(), out=Torch(zeros()))


INPUTS = {
    "integers": (lambda: Torch(np.zeros((2, 9, 5), "i4")), TypeError, "floating-point.*int32"),
    "complex": (lambda: Tensor(np.zeros((2, 9, 5), "c8")), TypeError, "floating-point.*complex64"),
    "channels": (lambda: Torch(np.zeros((2, 9, 4), "f4")), ValueError, "to have value 5"),
    "axes": (lambda: Torch(np.zeros((9, 5), "f4")), ValueError, "min_ndim=3, found ndim=2"),
    "dtype": (lambda: Tensor(np.zeros((2, 9, 5), "f2")), TypeError,
              "not PyTorch's, CuPy's or JAX's must have dtype float32.*float16"),
    "rows": (lambda: Tensor(np.zeros((2, 9, 10), "f4")[..., ::2]), TypeError, "contiguous rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUTS)
def test_refused_inputs(case, gpus):
    make, error, message = INPUTS[case]
    with pytest.raises(error, match=message):
        called(layer_of())(make())


# ---- what NumPy computes ------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_activations_of_numpy(kind, given, gpus):
    layer, x = layer_of(activation="softmax", activity_regularizer="l2"), kind(inputs())
    y = out = kind(zeros()) if given and kind in (Torch, CuPy) else None
    if out is None:
        y = layer(x)
    else:
        assert layer(x, out=out) is out
    assert type(y) is kind
    assert_right(layer, x.array, y.array)
    np.testing.assert_allclose(layer.losses, [0.01 * (y.array**2).sum() / BATCH], rtol=1e-5)


# ---- arrays -------------------------------------------------------------------------------------


def on_gpu(**arguments):
    layer = layer_of(**arguments)
    layer.compile(BuildOptions(target="cuda-sm_80"))
    return layer


def test_arrays_go_through_pinned_memory(gpus):
    layer, x = on_gpu(), inputs()
    assert_right(layer, x, layer(x))
    log = gpus.log(layer, *WORK)
    assert len([line for line in log if line.startswith("pin")]) == 2
    assert_right(layer, x[:, ::-1], layer(x[:, ::-1]))
    assert [line.split()[0] for line in gpus.log(layer, *WORK)] == [
        "copy", "launch", "copy", "synchronize",
    ]  # fmt: skip
    out = np.empty((1, 4, FILTERS), "float32")
    assert layer(x[:1, :4].astype("float64"), out=out) is out
    assert_right(layer, x[:1, :4], out)
    assert "unpin" in " ".join(gpus.log(layer))
    assert layer(x[:0]).shape == (0, STEPS, FILTERS)
    assert_right(layer, x, layer(x.tolist()), tolerance=1e-5)


def test_arrays_of_many_threads(gpus):
    layer = on_gpu()
    given = [normal(BATCH, 5 + i % 3, CHANNELS, seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for x, y in zip(given, pool.map(layer, given), strict=True):
            assert_right(layer, x, y)


def test_bfloat16_arrays(gpus):
    layer = layer_of("channels_first", dtype="bfloat16")
    layer.compile(BuildOptions(target="cuda-sm_80"))
    x = inputs("channels_first").astype("bfloat16")
    y = layer(x)
    assert y.dtype == x.dtype
    assert_right(layer, x, y.astype("float32"), 4e-2)


# ---- weights ------------------------------------------------------------------------------------


def test_weights_go_to_each_gpu_once(gpus):
    layer, x = layer_of(seed=4), inputs()
    for index in (1, 0, 1, 0):
        assert_right(layer, x, layer(Torch(x, index)).array)
    log = gpus.log(layer, "allocate", "copy", "launch")
    assert [line[:10] for line in log].count("allocate 1") == 3
    assert [line[:10] for line in log].count("allocate 0") == 3
    assert [line.split(" stream")[0] for line in log if line[0] == "l"] == [
        f"launch {index}" for index in (1, 0, 1, 0)
    ]


def test_new_weights(gpus):
    layer, x = called(layer_of(seed=5)), inputs()
    old = layer._cuda
    gpus.log(layer)
    layer.set_weights([2 * w for w in layer.get_weights()])
    assert_right(layer, x, layer(Torch(x)).array)
    assert layer._cuda is not old
    del old
    assert len(gpus.log(layer, "free")) == 3


@pytest.mark.parametrize("use", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_of_layers(use, gpus):
    layer = use(on_gpu())
    assert layer._gpu == 0
    assert_right(layer, inputs(), layer(inputs()))


@pytest.mark.parametrize(
    ("channels", "filters", "multiplier", "dtype"), [(5, 6, 1, "float32"), (17, 33, 2, "float16")]
)
def test_packing(channels, filters, multiplier, dtype):
    packing = {"lanes": 32, "channels": 16 * -(-channels // 16), "dtype": dtype}
    depthwise = normal(3, channels, multiplier)
    pointwise = normal(1, channels * multiplier, filters, seed=1)
    first, second, bias = cuda_runtime.pack(packing, depthwise, pointwise, np.ones(filters))
    lined, panels = packing["channels"], -(-filters // 32)
    assert first.shape == (3, multiplier, lined) and first.dtype == np.float32
    assert second.shape == (panels, multiplier * lined, 32) and second.dtype == dtype
    assert bias.shape == (32 * panels,) and bias.sum() == filters and bias.dtype == np.float32
    for m in range(multiplier):
        for c in range(lined):
            inside = c < channels
            want = depthwise[:, c, m] if inside else 0
            assert np.array_equal(first[:, m, c], np.broadcast_to(want, 3))
            row = second[:, m * lined + c].ravel()
            want = pointwise[0, c * multiplier + m].astype(dtype) if inside else 0
            assert np.array_equal(row[:filters], np.broadcast_to(want, filters))
            assert not row[filters:].any()
    assert cuda_runtime.pack(packing, depthwise, pointwise, None)[2] is None


# ---- graphs and machines ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Torch, CuPy])
def test_calls_can_be_captured(kind, gpus):
    layer, x = called(layer_of(), kind), kind(inputs())
    out = kind(np.zeros(SHAPE, "float32"))
    gpus.log(layer)
    gpus.set(layer, capturing=1)
    layer(x, out=out)
    layer(x)
    assert [line.split()[0] for line in gpus.log(layer)] == ["launch", "launch"]
    assert_right(layer, x.array, out.array)


def test_arrays_may_be_freed_during_a_capture(gpus):
    layer, x = called(layer_of(seed=7), Torch), Torch(inputs())
    memory = layer._cuda.library.empty(tvm_ffi.Shape((3, 5)), "float32", 0)
    gpus.log(layer)
    gpus.set(layer, capturing=1)
    del memory
    assert "free 0 60" in gpus.log(layer, "free")
    assert_right(layer, x.array, layer(x).array)  # refused in a capture that was broken


def test_weights_may_begin_behind_their_memory(gpus):
    layer, x = called(layer_of(seed=8), Torch), Torch(inputs())
    library, y = layer._cuda.library, layer(x)
    out, left = Torch(np.zeros_like(y.array)), layer.config.pad_amounts(STEPS)[0]
    library.run(x, *map(Torch, layer._cuda._weights), left, out)
    assert_right(layer, x.array, out.array)


def test_captured_weights_outlive_new_ones(gpus):
    layer, x = called(layer_of(seed=9), Torch), Torch(inputs())
    new = [weight + 1 for weight in layer.get_weights()]
    library = layer._cuda.library.path
    gpus.log(library)
    layer.set_weights(layer.get_weights())
    assert gpus.log(library, "free")  # nothing was captured
    layer(x)
    gpus.set(layer, capturing=1)
    layer(x)
    gpus.set(layer, capturing=0)
    gpus.log(library)
    layer.set_weights(new)
    assert not gpus.log(library, "free")
    assert_right(layer, x.array, layer(x).array)
    layer.set_weights(new)
    assert gpus.log(library, "free")  # only those of the capture stay


def test_first_calls_cannot_be_captured(gpus):
    layer = called(layer_of(seed=6))
    gpus.set(layer, capturing=1)
    with pytest.raises(RuntimeError, match=r"cannot be captured.*Call it once before") as info:
        layer(Torch(inputs(), 1))
    assert "StreamCapture" in str(info.value.__cause__)
    gpus.set(capturing=0)
    assert_right(layer, inputs(), layer(Torch(inputs(), 1)).array)


MACHINES = {
    "no GPU": (dict(devices=0), RuntimeError, "No NVIDIA GPU .*: the driver reports error 100"),
    "one GPU": (dict(devices=1), ValueError, "this machine's 1 GPUs, .*Received: cuda:1"),
    "old driver": (dict(driver=12080), RuntimeError, "needs a driver for CUDA 13.0; .* for 12.8"),
    "driver's error": (dict(driver_error=3), RuntimeError, "error 3 to cuDeviceGetAttribute"),
    "old GPU": (dict(capability=75), RuntimeError, "code for sm_80, .* cuda:1 is an sm_75. Build"),
    "Jetson": (dict(capability=72), RuntimeError, "is an sm_72"),
    "no room": (dict(free_bytes=100), MemoryError, r"\d+ bytes are not to be had on cuda:1"),
    "no image": (dict(no_image=1), RuntimeError, "kernels on cuda:1: cudaErrorNoKernelImage"),
}  # fmt: skip


@pytest.mark.parametrize("case", MACHINES)
def test_machines_that_cannot(case, gpus):
    layer, (settings, error, message) = called(layer_of(seed=8)), MACHINES[case]
    gpus.set(layer, **settings)
    with pytest.raises(error, match=message):
        layer(Torch(inputs(), 1))
    gpus.reset()
    assert_right(layer, inputs(), layer(Torch(inputs(), 1)).array)


@pytest.mark.parametrize(
    ("capability", "driver"), [(80, 13000), (86, 13010), (87, 13000), (90, 13000), (120, 14000)]
)
def test_machines_that_can(capability, driver, gpus):
    layer = called(layer_of())
    gpus.set(layer, capability=capability, driver=driver)
    layer._cuda.library.check(0)


def test_drivers_that_do_not_know_the_ptx(gpus):
    layer = called(layer_of())
    layer._cuda.library.description["cuda"] = 13010
    gpus.set(capability=86)
    layer._cuda.library.check(0)
    gpus.set(capability=90)
    with pytest.raises(RuntimeError, match=r"needs a driver for CUDA 13.1; this machine's is for"):
        layer._cuda.library.check(0)


def test_failed_launches(gpus):
    layer = called(layer_of())
    gpus.set(layer, launch_error=719)
    for call in (partial(layer, Torch(inputs())), partial(layer, Jax(inputs()))):
        with pytest.raises(RuntimeError, match=r"cudaErrorLaunchFailure"):
            call()


def test_without_tvm_ffi(monkeypatch, gpus):
    def refuse(name, *args, **kwargs):
        if name == "tvm_ffi":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    path = called(layer_of())._cuda.library.path
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"pip install apache-tvm-ffi"):
        cuda_runtime.Library(path)


@pytest.mark.parametrize(
    ("name", "index"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)]
)
def test_names_of_devices(name, index):
    assert cuda_runtime.index_of(name) == index
    for wrong in (f"{name}:x", name.upper(), 1):
        with pytest.raises(ValueError, match=r"`device` .*'cuda:<index>'. Received: device="):
            cuda_runtime.index_of(wrong)


# ---- bundles ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(emulated_gpus, tmp_path_factory):
    """The same layer with libraries for the CPU alone, for GPUs alone, and for both."""
    layer, folder = layer_of(seed=9), tmp_path_factory.mktemp("bundles")
    for name, targets in {
        "cpu": None,
        "gpu": ["cuda-sm_80"],
        "both": ["x86", "cuda-sm_80"],
    }.items():
        if targets and "x86" in targets:
            targets = [jit._host_target(None), "cuda-sm_80"]
        layer.save(folder / name, targets)
    return folder


def test_arrays_run_on_the_cpu_if_the_bundle_can(bundles, gpus):
    layer = tsc.load(bundles / "both")
    assert_right(layer, inputs(), layer(inputs()))
    assert layer._cuda is None
    assert_right(layer, inputs(), layer(Torch(inputs(), 1)).array)
    assert bundles in layer._cuda.library.path.parents


@pytest.mark.parametrize(
    ("name", "device", "index"),
    [("gpu", None, 0), ("gpu", "cuda:1", 1), ("both", "cuda:1", 1), ("both", "cuda", 0)],
)
def test_arrays_run_on_the_gpu(name, device, index, bundles, gpus):
    layer = tsc.load(bundles / name, device=device)
    gpus.log(layer)
    assert_right(layer, inputs(), layer(inputs()))
    assert any(line.startswith(f"launch {index} ") for line in gpus.log(layer))
    assert layer._compiled is None
    assert_right(layer, inputs(), layer(Torch(inputs(), index)).array)
    with pytest.raises(ValueError, match=rf"on cuda:{index}, where the weights of layer"):
        layer(Torch(inputs(), 1 - index))
    assert_right(layer, inputs(), pickle.loads(pickle.dumps(layer))(inputs()))


def test_bundles_without_cuda(bundles, gpus):
    layer = tsc.load(bundles / "cpu")
    with pytest.raises(BundleError, match=r"no libraries for GPUs"):
        layer(Torch(inputs()))
    with pytest.raises(BundleError, match=r"no libraries for GPUs"):
        tsc.load(bundles / "cpu", device="cuda")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [(dict(device="cuda:7"), ValueError, "Received: cuda:7"),
     (dict(device="gpu"), ValueError, "Received: device='gpu'"),
     (dict(device="cpu", target="cuda-sm_80"), ValueError, "both be of a CPU or both of a GPU")],
)  # fmt: skip
def test_devices_that_cannot_be_loaded_for(arguments, error, message, bundles, gpus):
    with pytest.raises(error, match=message):
        tsc.load(bundles / "both", **arguments)


def test_loading_for_gpus_without_one(bundles, gpus):
    gpus.set(devices=0)
    assert_right(layer := tsc.load(bundles / "both"), inputs(), layer(inputs()))
    for name in ("gpu", "both"):
        with pytest.raises(RuntimeError, match=r"No NVIDIA GPU"):
            tsc.load(bundles / name, device="cuda")


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, "cuda-sm_80"), (81, "cuda-sm_80"), (120, "cuda-sm_90"), (50, "cuda-sm_75")],
)
def test_libraries_are_built_for_the_gpu(capability, target, monkeypatch, gpus):
    asked = []
    monkeypatch.setattr(jit, "_entry", lambda *a: asked.append(a[1]) or jit.Path())
    gpus.set(capability=capability)
    config = KernelConfig(channels=2, filters=2, kernel_size=2)
    jit.cuda_library(config, 0, BuildOptions())
    jit.cuda_library(config, 0, BuildOptions(target="cuda", allow_tf32=True))
    assert asked == [target, "cuda"]


def test_options_are_part_of_the_key():
    config = KernelConfig(channels=2, filters=2, kernel_size=2)
    options = (BuildOptions(), BuildOptions(allow_tf32=True), BuildOptions(fast_math=True))
    keys = {jit._key(config, "cuda-sm_80", None, options=choice) for choice in options}
    assert len(keys) == 3
