"""Layers for the tests of compiled code: weights, the allowed error, the C API and a C host."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import tvm_sepconv
from tvm_sepconv import reference
from tvm_sepconv.config import SepConvConfig

NATIVE = Path(tvm_sepconv.__file__).parent / "native"
HOST = Path(__file__).with_name("c_host.c")
# What every C library for Linux has had for a decade, under the same names: glibc, musl and bionic.
C_LIBRARY = {
    "__sched_cpucount", "__tls_get_addr", "_exit", "alarm", "calloc", "dladdr", "dlclose",
    "dlerror", "dlopen", "dlsym", "fclose", "fgets", "fopen", "fork", "fread", "free", "fseek",
    "ftell", "getenv", "getpid", "malloc", "memchr", "memcpy", "memmove", "memset",
    "posix_memalign", "pthread_create", "pthread_detach", "pthread_key_create", "pthread_once",
    "pthread_setspecific", "pthread_sigmask", "sched_getaffinity", "sched_getcpu",
    "sched_setaffinity", "sched_yield", "sigfillset", "signal", "snprintf", "strchr", "strcmp",
    "strcspn", "strlen", "strncmp", "strstr", "syscall", "vsnprintf", "waitpid",
    "__getauxval", "getauxval",  # also GCC's atomics on aarch64
}  # fmt: skip
PADDINGS = {"valid": 0, "same": 1}


def weights(config: SepConvConfig, channels: int, seed: int = 0) -> list[np.ndarray]:
    """Depthwise kernel, pointwise kernel and, if there is one, bias."""
    rng = np.random.default_rng(seed)
    shapes = [config.depthwise_shape(channels), config.pointwise_shape(channels), config.bias_shape]
    shapes = shapes[: 3 if config.use_bias else 2]
    return [rng.standard_normal(shape).astype(config.compute_dtype) for shape in shapes]


def inputs(config: SepConvConfig, batch: int, steps: int, channels: int, seed: int = 1):
    shape = (batch, steps, channels) if config.channel_axis == -1 else (batch, channels, steps)
    return np.random.default_rng(seed).standard_normal(shape).astype(config.compute_dtype)


def layer_of(channels: int, seed: int = 0, **arguments: Any) -> tvm_sepconv.SeparableConv1D:
    """A built layer with random weights, bias included."""
    layer = tvm_sepconv.SeparableConv1D(**arguments)
    first = layer.config.channel_axis == 1
    layer.build((None, channels, None) if first else (None, None, channels))
    layer.set_weights(weights(layer.config, channels, seed))
    return layer


def check(y: np.ndarray, x: np.ndarray, config: SepConvConfig, tensors: list[np.ndarray]) -> None:
    """Assert that `y` is the layer's output within the rounding of its dtype."""
    tensors = [*tensors, None][:3]
    expected = reference.separable_conv1d(x, *tensors, config)
    terms = config.kernel_size + tensors[1].shape[1]
    eps = np.finfo(config.compute_dtype).eps
    # The steepest activation used is gelu (1.13).
    allowed = 1.13 * 4 * eps * np.sqrt(terms) * reference.magnitude(x, *tensors, config)
    assert y.shape == expected.shape
    assert y.dtype == config.compute_dtype
    assert (np.abs(y - expected) <= allowed + 4 * eps * np.abs(expected)).all()


class View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, array: np.ndarray) -> View:
        batch, row = (stride // array.itemsize for stride in array.strides[:2])
        return cls(array.ctypes.data, batch, row)


def c_api(runtime: Path) -> ctypes.CDLL:
    """The functions of tvm_sepconv.h, declared once more from reading it."""
    c = ctypes.CDLL(str(runtime))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    c.tvm_sepconv_last_error.restype = ctypes.c_char_p
    c.tvm_sepconv_out_steps.restype = size
    c.tvm_sepconv_out_steps.argtypes = (pointer, size)
    c.tvm_sepconv_layer_create.argtypes = (
        ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int, size, size,
        ctypes.POINTER(pointer),
    )  # fmt: skip
    c.tvm_sepconv_layer_destroy.argtypes = (pointer,)
    c.tvm_sepconv_run.argtypes = (pointer, size, size, View, View)
    return c


def create(
    c: ctypes.CDLL, library: Path, config: SepConvConfig, tensors: list[np.ndarray]
) -> ctypes.c_void_p:
    """A layer of the C API."""
    handle = ctypes.c_void_p()
    padding, pair = PADDINGS.get(config.padding, 2), config.padding
    left, right = pair if padding == 2 else (0, 0)
    pointers = [tensor.ctypes.data for tensor in tensors] + [None]
    status = c.tvm_sepconv_layer_create(
        str(library).encode(), *pointers[:3], padding, left, right, ctypes.byref(handle)
    )
    assert status == 0, c.tvm_sepconv_last_error()
    return handle


def compile_host(compiler: str, runtime: Path, output: Path) -> None:
    """Compile c_host.c against a runtime library, which is then looked for beside the program."""
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{NATIVE}"]
    libraries = [str(runtime), "-Wl,-rpath,$ORIGIN", "-ldl", "-lpthread", "-o", str(output)]
    done = subprocess.run([*command, str(HOST), *libraries], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_host(
    host: list[str], library: Path, config: SepConvConfig, tensors: list[np.ndarray],
    x: np.ndarray, folder: Path, threads: int = 2,
) -> np.ndarray:  # fmt: skip
    """Run the host program on raw files; `host` may start with an emulator."""
    names = ["depthwise", "pointwise", "bias"]
    for name, tensor in zip(names, tensors, strict=False):
        tensor.tofile(folder / name)
    x.tofile(folder / "x")
    first = config.channel_axis == 1
    batch, steps, channels = x.swapaxes(1, 2).shape if first else x.shape
    out_steps = config.out_steps(steps)
    padding, pair = PADDINGS.get(config.padding, 2), config.padding
    left, right = pair if padding == 2 else (0, 0)
    files = [str(folder / name) for name in names[: len(tensors)]] + ["-"]
    sizes = [x.itemsize, batch, steps, channels, config.filters, int(first)]
    numbers = map(str, [padding, left, right, threads, *sizes])
    command = [*host, str(library), *files[:3], *numbers, str(folder / "x"), str(folder / "y")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout == f"{out_steps} output steps, {threads} threads\n"
    shape = (batch, config.filters, out_steps) if first else (batch, out_steps, config.filters)
    return np.fromfile(folder / "y", config.compute_dtype).reshape(shape)


def undefined(library: Path) -> set[str]:
    """The symbols that a library takes from others, with their version if they ask for one."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {line.split()[-1] for line in done.stdout.splitlines() if " w " not in line}
