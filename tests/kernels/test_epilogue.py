"""The compiled activations: error, special values, and what the code they become consists of."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")
from tvm import te  # noqa: E402
from tvm.s_tir import Schedule  # noqa: E402

from tvm_sepconv import activations  # noqa: E402
from tvm_sepconv.compiler.epilogue import NAMES, apply  # noqa: E402

WIDE = np.longdouble
X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "num-cores": 1}
TARGETS = {
    "sse42": {**X86, "mcpu": "x86-64-v2"},
    "avx2": {**X86, "mcpu": "x86-64-v3"},
    "avx512": {**X86, "mcpu": "x86-64-v4"},
    "aarch64": {**X86, "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"},
    "armv7": {
        **X86,
        "mtriple": "armv7a-linux-gnueabihf",
        "mcpu": "generic",
        "mattr": ["+v7", "+neon", "+vfp4"],
        "mfloat-abi": "hard",
    },
}
VECTOR_BYTES = {"sse42": 16, "avx2": 32, "avx512": 64, "aarch64": 16, "armv7": 16}
FEATURES = {"sse42": "sse4_2", "avx2": "fma", "avx512": "avx512f"}
ULP = {"gelu": 8}
# Absolute error allowed beside 4 ulp, in ulp of x: both cancel, in Keras too.
CANCELLING = {"squareplus": 4, "tanh_shrink": 4}
# A factor underflows before it is multiplied by x.
UNDERFLOWING = {"silu", "gelu", "mish"}

each_name = pytest.mark.parametrize("name", sorted(NAMES))
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def compiled(name: str, dtype: str, target: str, lanes: int | None = None):
    lanes = lanes or VECTOR_BYTES[target] // np.dtype(dtype).itemsize
    x = te.placeholder((te.var("rows"), lanes), dtype, name="x")
    y = te.compute(x.shape, lambda i, j: apply(name, x[i, j]), name="y")
    schedule = Schedule(te.create_prim_func([x, y]))
    schedule.vectorize(schedule.get_loops(schedule.get_sblock("y"))[-1])
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.compile(schedule.mod, target=TARGETS[target])


@functools.cache
def kernel(name: str, dtype: str, target: str):
    return compiled(name, dtype, target).jit()["main"]


def run(name: str, x: np.ndarray, target: str) -> np.ndarray:
    lanes = VECTOR_BYTES[target] // x.itemsize
    rows = tvm.runtime.tensor(np.resize(x, (-(-x.size // lanes), lanes)))
    out = tvm.runtime.tensor(np.empty(rows.shape, x.dtype))
    kernel(name, str(x.dtype), target)(rows, out)
    return out.numpy().ravel()[: x.size]


@functools.cache
def runnable() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    return [target for target, feature in FEATURES.items() if feature in flags]


def host(target: str) -> str:
    if target not in runnable():
        pytest.skip(f"this machine cannot run {target}")
    return target


@functools.cache
def samples(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**63, 20_000, np.uint64) * 2 + rng.integers(0, 2, 20_000, np.uint64)
    anything = bits.view(dtype)  # every exponent alike: subnormal to huge
    parts = [
        np.linspace(-100, 100, 60_001),
        rng.uniform(-1, 1, 20_000),
        rng.uniform(-20, 20, 20_000),
        rng.uniform(-760, 720, 10_000),
        rng.uniform(-1, 1, 20_000) * 2.0 ** rng.integers(-60, 8, 20_000),
    ]
    x = np.concatenate([np.concatenate(parts).astype(dtype), anything])
    return x[np.isfinite(x)]


def specials(dtype: str) -> np.ndarray:
    info = np.finfo(dtype)
    sizes = [np.inf, info.max, info.tiny, info.smallest_subnormal, 1e30, 0.5, 1, 2, 3, 6, 0]
    return np.array([np.nan, *sizes, *(-s for s in sizes)], dtype)


def erfc(x: np.ndarray) -> np.ndarray:
    """erfc in the wide type: the C library's float64 value, moved to x along the tangent."""
    near = x.astype(np.float64)
    value = np.fromiter(map(math.erfc, near.tolist()), np.float64, near.size).astype(WIDE)
    slope = -2 / np.sqrt(WIDE(np.pi)) * np.exp(-np.square(np.clip(near, -100, 100).astype(WIDE)))
    return value + np.where(np.abs(near) < 100, (x - near) * slope, 0)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


# The mathematical functions, in a type wider than the one under test.
EXACT = {
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "celu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "exponential": np.exp,
    "gelu": lambda x: x * erfc(-x * np.sqrt(WIDE(0.5))) / 2,
    "log_sigmoid": lambda x: -softplus(-x),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "selu": lambda x: (
        WIDE("1.0507009873554804934193349852946")
        * np.where(x > 0, x, WIDE("1.6732632423543772848170429916717") * np.expm1(np.minimum(x, 0)))
    ),
    "leaky_relu": lambda x: np.where(x < 0, x / 5, x),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_shrink": lambda x: np.where(np.abs(x) > 0.5, x, 0),
    "soft_shrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - WIDE(0.5), 0),
    "sigmoid": lambda x: np.where(x < 0, np.exp(-np.abs(x)), 1) / (1 + np.exp(-np.abs(x))),
    "silu": lambda x: x * np.where(x < 0, np.exp(-np.abs(x)), 1) / (1 + np.exp(-np.abs(x))),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sparse_plus": lambda x: np.where(x >= 1, x, np.square(np.clip(x, -1, 1) + 1) / 4),
    "sparse_sigmoid": lambda x: (np.clip(x, -1, 1) + 1) / 2,
    "squareplus": lambda x: (x + np.sqrt(np.square(x) + 4)) / 2,
    "tanh": np.tanh,
    "tanh_shrink": lambda x: x - np.tanh(x),
    "linear": lambda x: x,
}


@functools.cache
def exact(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    x = samples(dtype)
    if name == "squareplus":  # beyond, x² is infinite; see the special values
        x = x[np.abs(x) < np.sqrt(np.finfo(dtype).max) / 2]
    with np.errstate(all="ignore"):
        return x, EXACT[name](x.astype(WIDE))


def ulp_error(name: str, got: np.ndarray, want: np.ndarray, x: np.ndarray) -> float:
    """Largest error in ulp of the result, after the stated absolute allowances."""
    with np.errstate(all="ignore"):
        rounded = want.astype(got.dtype)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(rounded))
        keep = np.isfinite(rounded)
        got, want, rounded, x = got[keep], want[keep], np.abs(rounded[keep]), np.abs(x[keep])
        floor = CANCELLING.get(name, 0) * np.spacing(x).astype(WIDE)
        if name in UNDERFLOWING:
            floor = floor + np.minimum(x, 800) * WIDE(np.finfo(got.dtype).smallest_subnormal)
        error = np.maximum(np.abs(got.astype(WIDE) - want) - floor, 0)
        return float(np.max(error / np.spacing(rounded)))


@pytest.mark.skipif(np.finfo(WIDE).eps > 2**-63, reason="needs a type wider than float64")
@each_name
@each_dtype
@pytest.mark.parametrize("target", FEATURES)
def test_error_is_within_four_ulp(name, dtype, target):
    x, want = exact(name, dtype)
    assert ulp_error(name, run(name, x, host(target)), want, x) <= ULP.get(name, 4)


@each_name
@each_dtype
@pytest.mark.parametrize("target", FEATURES)
def test_special_values_are_those_of_keras(name, dtype, target):
    x = specials(dtype)
    got, want = run(name, x, host(target)), getattr(activations, name)(x)
    # NaN and infinities as in Keras; the rest is coarse, because Keras's gelu(-6) is 14 ulp off.
    info = np.finfo(dtype)
    np.testing.assert_allclose(got, want, rtol=32 * info.eps, atol=info.tiny)


@each_dtype
@pytest.mark.parametrize("target", FEATURES)
def test_relu_and_linear_are_exact_to_the_bit(dtype, target):
    x = samples(dtype)
    for name, want in (("linear", x), ("relu", np.where(x <= 0, 0, x).astype(dtype))):
        assert run(name, x, host(target)).tobytes() == want.tobytes()


@each_dtype
def test_exponential_overflows_and_underflows_where_the_type_does(dtype):
    low, high = (-103, 88) if dtype == "float32" else (-745, 709)
    x = np.array([high, high + 1, low, low - 2], dtype)
    got = run("exponential", x, host("avx2"))
    assert np.isfinite(got[0])
    assert np.isinf(got[1])
    assert 0 < got[2] < np.finfo(dtype).tiny
    assert got[3] == 0


def test_names_are_the_element_wise_activations():
    assert NAMES == activations.ELEMENTWISE


def test_an_unknown_name_is_refused():
    x = te.placeholder((4,), "float32")
    with pytest.raises(ValueError, match=r"`name` argument must be .*'gelu'.* name=softmax"):
        apply("softmax", x[0])


def test_another_dtype_is_refused():
    x = te.placeholder((4,), "int32")
    with pytest.raises(ValueError, match=r"`value` argument .*'float32'.* value.dtype=int32"):
        apply("relu", x[0])


def undefined_symbols(path: Path) -> set[str]:
    """Names an ELF object needs from elsewhere."""
    data = path.read_bytes()
    wide = data[4] == 2
    offset = (
        struct.unpack_from("<Q", data, 40)[0] if wide else struct.unpack_from("<I", data, 32)[0]
    )
    size, count = struct.unpack_from("<HH", data, 58 if wide else 46)
    header = "<IIQQQQIIQQ" if wide else "<IIIIIIIIII"
    sections = [struct.unpack_from(header, data, offset + i * size) for i in range(count)]
    names = set()
    for section in (s for s in sections if s[1] == 2):  # SHT_SYMTAB
        strings = sections[section[6]][4]
        for at in range(section[4] + section[9], section[4] + section[5], section[9]):
            name, where = struct.unpack_from("<IBBH", data, at)[:1] + struct.unpack_from(
                "<H", data, at + (6 if wide else 14)
            )
            if where == 0:
                end = data.index(b"\0", strings + name)
                names.add(data[strings + name : end].decode())
    return names


ARITHMETIC = r"^\s+v?(?:f?n?m?(?:add|sub)(?:\d+)?|mul|div|sqrt|max|min|andn?|cmp\w*|blendv?)"


# Not linear: its loop would be a copy, which LLVM makes a memcpy.
@pytest.mark.parametrize("name", sorted(NAMES - {"linear"}))
@each_dtype
@pytest.mark.parametrize("target", TARGETS)
def test_code_calls_nothing_and_is_vectorised(name, dtype, target, tmp_path):
    module = compiled(name, dtype, target, lanes=16).mod
    module.write_to_file(str(tmp_path / "k.o"))
    allowed = {"__aeabi_unwind_cpp_pr0"} if target == "armv7" else set()
    assert undefined_symbols(tmp_path / "k.o") <= allowed
    if target in FEATURES:
        asm = module.inspect_source("asm")
        assert not re.findall(ARITHMETIC + r"s[sd]\s.*", asm, re.M)
        assert re.findall(ARITHMETIC + r"p[sd]\s", asm, re.M)


def test_the_symbol_reader_sees_a_library_call(tmp_path):
    x = te.placeholder((16,), "float32", name="x")
    y = te.compute(x.shape, lambda i: te.exp(x[i]), name="y")
    for target in TARGETS.values():
        ex = tvm.compile(te.create_prim_func([x, y]), target=target)
        ex.mod.write_to_file(str(tmp_path / "k.o"))
        assert "expf" in undefined_symbols(tmp_path / "k.o")


@each_dtype
@pytest.mark.parametrize("target", FEATURES)
def test_relu_is_two_instructions_a_vector_at_most(dtype, target):
    asm = compiled("relu", dtype, target).mod.inspect_source("asm")
    stores = re.findall(r"^\s+v?mov[au]p[sd]\s+%[xyz]mm\d+, [-\d]*\(", asm, re.M)
    assert stores
    assert len(re.findall(ARITHMETIC + r"p[sd]\s", asm, re.M)) <= 2 * len(stores)


def cuda_source(name: str, count: int) -> str:
    x = te.placeholder((count,), "float32", name="x")
    y = te.compute(x.shape, lambda i: apply(name, x[i]), name="y")
    schedule = Schedule(te.create_prim_func([x, y]))
    block, thread = schedule.split(*schedule.get_loops(schedule.get_sblock("y")), [None, 64])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"})
    with target:
        module = tvm.compile(schedule.mod, target=target).mod
    return next(m.inspect_source() for m in module.imports if "cuda" in m.kind)


CUDA_ON_THE_CPU = """
#include <math.h>
#define __global__
#define __launch_bounds__(n)
typedef unsigned int uint;
static struct {{ int x; }} blockIdx, threadIdx;
{kernel}
extern "C" void run(float* x, float* y, int count) {{
  for (int i = 0; i < count; ++i) {{
    blockIdx.x = i / 64; threadIdx.x = i % 64;
    main_kernel(x, y);
  }}
}}
"""


@each_name
def test_cuda_source_computes_the_same(name, tmp_path, monkeypatch):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(
        "TVM_COMPILE_FORCE_FALLBACK", "1"
    )  # source, where there is no CUDA to compile it
    x, want = exact(name, "float32")
    x, want = (np.concatenate([a[:: a.size // 16000][:16000], a[-384:]]) for a in (x, want))
    source = cuda_source(name, x.size + 64)
    (tmp_path / "k.cc").write_text(
        CUDA_ON_THE_CPU.format(kernel=source[source.index('extern "C" __global__') :])
    )
    options = ["-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
    subprocess.run(
        [compiler, *options, "-o", str(tmp_path / "k.so"), str(tmp_path / "k.cc")], check=True
    )
    special = np.resize(specials("float32"), 64)
    given = np.concatenate([x, special])
    got = np.empty_like(given)
    pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (given, got))
    ctypes.CDLL(str(tmp_path / "k.so")).run(*pointers, given.size)
    assert ulp_error(name, got[: x.size], want, x) <= ULP.get(name, 4)
    wanted, info = getattr(activations, name)(special), np.finfo(np.float32)
    np.testing.assert_allclose(got[x.size :], wanted, rtol=32 * info.eps, atol=info.tiny)
