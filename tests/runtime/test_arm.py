"""Layers compiled for ARM, called from C, and run under emulated Cortex-A53 and Cortex-A7 cores."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
from pathlib import Path

import native
import pytest

pytest.importorskip("tvm")

from tvm_sepconv.compiler import build, link
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.config import SepConvConfig

TRIPLE = "aarch64-linux-gnu"
# The oldest 64-bit core: an instruction of a later version of the architecture ends the program.
QEMU = ["qemu-aarch64-static", "-cpu", "cortex-a53", "-L", f"/usr/{TRIPLE}"]
# The oldest 32-bit core with fused multiply-adds: what only a v8 core has ends the program too.
TRIPLE_32 = "arm-linux-gnueabihf"
QEMU_32 = ["qemu-arm-static", "-cpu", "cortex-a7", "-L", f"/usr/{TRIPLE_32}"]

# name: (layer, channels, (batch, steps) of one library)
CASES = {
    "SEED": (dict(filters=3, kernel_size=2, strides=2, activation="relu"), 12, [(4, 10), (1, 2)]),
    "QN-C1": (
        dict(filters=256, kernel_size=33, strides=2, padding="same", activation="relu"),
        64, [(1, 1000), (1, 1)],
    ),
    "channels-first": (
        dict(filters=10, kernel_size=5, strides=2, dilation_rate=2, padding=(3, 1),
             data_format="channels_first", activation="gelu"),
        7, [(2, 131), (1, 9)],
    ),
    "multiplier": (
        dict(filters=24, kernel_size=3, padding="same", depth_multiplier=2, use_bias=False),
        9, [(2, 70), (3, 1)],
    ),
    "float64": (
        dict(filters=6, kernel_size=4, padding="same", activation="tanh", dtype="float64"),
        5, [(2, 67)],
    ),
}  # fmt: skip

# Every core, layout and kind of edge, each pair of them where it is cheap: taps by three, four and
# one, channels and filters short of a vector, lanes left over, both kinds of stride, and lengths
# that every variant serves some part of.
CORES = {
    "aarch64-neon@cortex-a53": (
        dict(filters=32, kernel_size=20, padding="same", dilation_rate=2, activation="relu"),
        13, [(1, 201), (2, 5), (1, 1)],
    ),
    "aarch64-neon@cortex-a55": (
        dict(filters=13, kernel_size=3, data_format="channels_first"),
        20, [(1, 150), (2, 21), (1, 5)],
    ),
    "aarch64-neon@cortex-a72": (
        dict(filters=9, kernel_size=4, strides=2, depth_multiplier=2, padding=(2, 0)),
        20, [(1, 167), (2, 9)],
    ),
    "aarch64-neon@cortex-a76": (
        dict(filters=3, kernel_size=7, strides=3, depth_multiplier=2, padding="same",
             data_format="channels_first", activation="gelu"),
        6, [(1, 199), (2, 8)],
    ),
    "aarch64-neon@neoverse-n1": (
        dict(filters=20, kernel_size=33, padding="same", use_bias=False), 3, [(1, 200), (2, 7)],
    ),
    "aarch64-fp16@cortex-a76": (
        dict(filters=17, kernel_size=6, padding="same", dtype="float16"), 9, [(1, 140), (2, 3)],
    ),
    "aarch64-neon": (
        dict(filters=7, kernel_size=9, data_format="channels_first", dtype="float64"),
        5, [(1, 90), (2, 10)],
    ),
}  # fmt: skip
CORES_32 = {
    "armv7-neon@cortex-a53": (
        dict(filters=24, kernel_size=9, padding="same", activation="tanh"),
        13, [(1, 140), (2, 5)],
    ),
    "armv7-neon@cortex-a72": (
        dict(filters=11, kernel_size=5, strides=2, data_format="channels_first"),
        6, [(1, 150), (2, 11)],
    ),
}  # fmt: skip

needs_emulator = pytest.mark.skipif(
    not shutil.which(QEMU[0]) or not shutil.which(f"{TRIPLE}-gcc"),
    reason=f"needs {QEMU[0]} and a C library for aarch64 ({TRIPLE}-gcc)",
)


@pytest.fixture
def only_zig(monkeypatch):
    """No compiler but the one that pip installs."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ziglang")
    link.toolchain.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    yield
    link.toolchain.cache_clear()


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Path:
    return host_for("aarch64-neon", TRIPLE, tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def host_32(tmp_path_factory) -> Path:
    if absent := [name for name in (QEMU_32[0], f"{TRIPLE_32}-gcc") if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(absent)}")
    return host_for("armv7-neon", TRIPLE_32, tmp_path_factory.mktemp("host32"))


def host_for(target: str, triple: str, folder: Path) -> Path:
    runtime = folder / "libtvm_sepconv_runtime.so"
    link.toolchain.cache_clear()
    build.build_runtime(cpu(target), runtime)
    native.compile_host(f"{triple}-gcc", runtime, folder / "host")
    return folder / "host"


def compiled(
    layer: SepConvConfig, channels: int, path: Path, target_name: str = "aarch64-neon"
) -> Path:
    config, target = layer.kernel_config(channels), cpu(target_name)
    build.build_library(config, target, path, build.variants(config, target))
    return path


def assert_right(case, host: list[str], folder: Path, target: str) -> None:
    arguments, channels, sizes = case
    layer = SepConvConfig.parse(**arguments)
    tensors = native.weights(layer, channels)
    library = compiled(layer, channels, folder / "layer.so", target)
    # C wants weights in the dtype of the sums.
    given = [w.astype(layer.kernel_config(channels).accumulation_dtype) for w in tensors]
    for batch, steps in sizes:
        x = native.inputs(layer, batch, steps, channels)
        y = native.run_host(host, library, layer, given, x, folder)
        native.check(y, x, layer, tensors)


@needs_emulator
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_right_on_a_cortex_a53(case, host, tmp_path):
    assert_right(case, [*QEMU, str(host)], tmp_path, "aarch64-neon")


@needs_emulator
@pytest.mark.parametrize("target", CORES)
def test_a_core_tunes_and_asks_for_no_more_than_the_instruction_set(target, host, tmp_path):
    core = "cortex-a76" if target.startswith("aarch64-fp16") else "cortex-a53"
    emulator = [core if word == "cortex-a53" else word for word in QEMU]
    assert_right(CORES[target], [*emulator, str(host)], tmp_path, target)


@pytest.mark.parametrize("name", ["SEED", "channels-first", "multiplier"])
def test_is_right_on_a_cortex_a7(name, host_32, tmp_path):
    assert_right(CASES[name], [*QEMU_32, str(host_32)], tmp_path, "armv7-neon")


@pytest.mark.parametrize("target", CORES_32)
def test_a_core_keeps_to_armv7(target, host_32, tmp_path):
    assert_right(CORES_32[target], [*QEMU_32, str(host_32)], tmp_path, target)


@needs_emulator
def test_is_right_when_all_tools_came_from_pip(only_zig, tmp_path):
    assert link.toolchain(TRIPLE).name == "zig"
    arguments, channels, ((batch, steps), *_) = CASES["SEED"]
    layer = SepConvConfig.parse(**arguments)
    tensors = native.weights(layer, channels)
    library = compiled(layer, channels, tmp_path / "layer.so")
    runtime = tmp_path / "libtvm_sepconv_runtime.so"
    build.build_runtime(cpu("aarch64-neon"), runtime)
    native.compile_host(f"{TRIPLE}-gcc", runtime, tmp_path / "host")
    x = native.inputs(layer, batch, steps, channels)
    y = native.run_host([*QEMU, str(tmp_path / "host")], library, layer, tensors, x, tmp_path)
    native.check(y, x, layer, tensors)


@needs_emulator
def test_the_emulated_core_refuses_newer_instructions(tmp_path):
    # Armv8.1's atomic add: without this the runs above would show nothing about instruction sets.
    (tmp_path / "new.c").write_text(
        'int main(void) { long x = 0; __asm__ volatile("ldadd %0, %0, [%1]" : : "r"(x), "r"(&x)); }'
    )
    compile = [f"{TRIPLE}-gcc", "-march=armv8.1-a", "new.c", "-o", "new"]
    subprocess.run(compile, cwd=tmp_path, check=True)
    done = subprocess.run([*QEMU, str(tmp_path / "new")], capture_output=True)
    assert done.returncode == -signal.SIGILL
    newer = ["max" if word == "cortex-a53" else word for word in QEMU]
    assert subprocess.run([*newer, str(tmp_path / "new")]).returncode == 0


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize("tools", ["system", "zig"])
def test_needs_nothing_but_a_c_library(tools, request, tmp_path):
    if tools == "zig":
        request.getfixturevalue("only_zig")
    elif not shutil.which(f"{TRIPLE}-gcc"):
        pytest.skip(f"needs {TRIPLE}-gcc")
    build.build_runtime(cpu("aarch64-neon"), tmp_path / "runtime.so")
    library = compiled(SepConvConfig.parse(3, 2), 12, tmp_path / "layer.so")
    assert native.undefined(library) == set()
    assert native.undefined(tmp_path / "runtime.so") <= native.C_LIBRARY
