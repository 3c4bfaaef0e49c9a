"""CUDA libraries: built by nvcc and loaded without TVM and without a driver, in bundles too."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from bundles import rewrite  # noqa: E402
from command_line import refused  # noqa: E402
from tvm_sepconv.compiler.schedules import cuda as schedule  # noqa: E402

import tvm_sepconv  # noqa: E402
from tvm_sepconv import bundle, cli, gpu, jit, targets  # noqa: E402
from tvm_sepconv.commands import deploy  # noqa: E402
from tvm_sepconv.compiler import cuda, cuda_library, nvcc  # noqa: E402
from tvm_sepconv.compiler import targets as compiler_targets  # noqa: E402
from tvm_sepconv.compiler.targets import CudaTarget  # noqa: E402
from tvm_sepconv.compiler.tuning import logs  # noqa: E402
from tvm_sepconv.config import KernelConfig  # noqa: E402
from tvm_sepconv.options import BuildOptions  # noqa: E402

HERE = targets.machine()
ARCHS = ("sm_75", "sm_90")  # one without asynchronous copies, and one that is newer than it
SMALL = KernelConfig(channels=32, filters=32, kernel_size=3)
PLAIN = BuildOptions()

needs_host = pytest.mark.skipif(
    HERE not in targets.CUDA_HOSTS, reason="NVIDIA has no GPUs beside this processor"
)


@pytest.fixture(autouse=True)
def no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "folders", list)


def need_nvcc() -> None:
    try:
        nvcc.find()
    except RuntimeError as error:
        pytest.skip(str(error))
    if shutil.which("g++") is None:
        pytest.skip("nvcc needs g++")


# ---- names and choices ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host", "archs"),
    [
        ("cuda@x86_64", "x86_64", ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")),
        ("cuda@aarch64", "aarch64", targets.CUDA_ARCHS),
        ("cuda-sm_90", HERE, ("sm_90",)),
        ("cuda-sm_87", "aarch64", ("sm_87",)),
        ("cuda-sm_86@aarch64", "aarch64", ("sm_86",)),
    ],
)
def test_targets_say_host_and_architectures(name: str, host: str, archs: tuple[str, ...]) -> None:
    target = compiler_targets.of(name)
    assert isinstance(target, CudaTarget)
    assert (target.name, target.host, target.archs) == (name, host, archs)


@pytest.mark.parametrize("name", ["cuda@cortex-a53", "cuda-sm_70", "cuda@", "cuda-sm_90@"])
def test_unknown_cuda_targets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cuda-sm_90, with @aarch64\|x86_64 .*Received: target="):
        targets.resolve(name)


def test_each_family_refuses_the_others_targets() -> None:
    with pytest.raises(ValueError, match=r"takes CPU targets only here.*Received: target=cuda"):
        compiler_targets.cpu("cuda")
    with pytest.raises(ValueError, match=r"takes CUDA targets only.*Received: target=aarch64-neon"):
        compiler_targets.cuda("aarch64-neon")


@pytest.mark.parametrize("name", ["allow_tf32", "fast_math"])
def test_options_take_booleans(name: str) -> None:
    assert getattr(BuildOptions(), name) is False
    with pytest.raises(ValueError, match=f"`{name}` argument must be True or False.*=1"):
        BuildOptions(**{name: 1})


@pytest.mark.parametrize(
    ("archs", "ptx", "capability", "way"),
    [
        (("sm_80", "sm_86"), "sm_86", 86, 0),
        (("sm_80", "sm_86"), "sm_86", 89, 1),
        (("sm_80", "sm_86"), "sm_86", 75, None),
        (("sm_80", "sm_90"), "sm_90", 120, 2),
        (("sm_86",), "sm_86", 80, None),
        (("sm_80",), "sm_80", 87, 2),  # a Jetson runs no card's machine code
        (("sm_87",), "sm_87", 89, 2),
        (("sm_87",), "sm_87", 87, 0),
    ],
)
def test_code_for_a_gpu(archs: tuple[str, ...], ptx: str, capability: int, way: int | None) -> None:
    assert targets.cuda_code(archs, ptx, capability) == way


# ---- nvcc ----------------------------------------------------------------------------------------

FAKE = """#!{python}
import sys
from pathlib import Path
if "--dryrun" in sys.argv:
    print("#$ TOP={toolkit}", file=sys.stderr)
    sys.exit({broken})
arguments = sys.argv[1:]
Path({log!r}).write_text("\\n".join(arguments))
Path(arguments[arguments.index("-o") + 1]).write_bytes(b"library")
print('''{report}''', file=sys.stderr)
sys.exit({failing})
"""
REPORT = """ptxas info    : Compiling entry function 'one_kernel' for 'sm_80'
ptxas info    : Function properties for one_kernel
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 16896 bytes smem, 424 bytes cmem[0]
ptxas info    : Compiling entry function 'two_kernel' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 424 bytes cmem[0]"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make an nvcc that notes what it is told; it is the one that is found."""
    home = tmp_path / "toolkit"

    def make(**changes: Any) -> Path:
        words = {"python": sys.executable, "toolkit": home, "log": str(tmp_path / "log"),
                 "report": REPORT, "broken": 0, "failing": 0, **changes}  # fmt: skip
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "include").mkdir(exist_ok=True)
        header = home / "include" / "cuda_runtime_api.h"
        header.write_text("#define CUDART_VERSION  13000\n")
        path = home / "bin" / "nvcc"
        path.write_text(FAKE.format(**words))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(cuda_library, "assemble", lambda *arguments: "")  # which takes seconds
    make.log = tmp_path / "log"  # type: ignore[attr-defined]
    make()
    return make


def test_nvcc_is_looked_for_in_order(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fake()
    places = [tmp_path / name for name in ("path", "local", "site")]
    for place, inner in zip(places, ("", "cuda-9.2/bin", "cu13/bin"), strict=True):
        (place / inner).mkdir(parents=True)
        shutil.copy(first, place / inner / "nvcc")
    newer = tmp_path / "local" / "cuda-13.1" / "bin" / "nvcc"
    newer.parent.mkdir(parents=True)
    shutil.copy(first, newer)
    monkeypatch.setenv("PATH", str(places[0]))
    monkeypatch.setattr(nvcc, "TOOLKITS", places[1])
    monkeypatch.setattr(nvcc, "_pip", lambda: [places[2]])
    assert nvcc.find().path == first
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert nvcc.find().path == places[0] / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    assert nvcc.find().path == newer
    monkeypatch.setattr(nvcc, "TOOLKITS", tmp_path / "nothing")
    assert nvcc.find().path == places[2] / "cu13" / "bin" / "nvcc"
    monkeypatch.setattr(nvcc, "_pip", list)
    with pytest.raises(RuntimeError, match=r"NVIDIA's CUDA toolkit.*pip install 'tvm-sepconv\[c"):
        nvcc.find()


def test_nvcc_is_told_architectures_and_options(fake: Any, tmp_path: Path) -> None:
    found = nvcc.find()
    source = "__global__ void __launch_bounds__(256, 2) one_kernel(float* y) {}"
    kernels = found.library(source, tmp_path / "a.so", ("sm_80", "sm_90"), HERE)
    assert (tmp_path / "a.so").read_bytes() == b"library"
    told = fake.log.read_text().split("\n")
    generated = [told[i + 1] for i, word in enumerate(told) if word == "-gencode"]
    assert generated == [
        "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]  # fmt: skip
    assert told[told.index("-cudart") + 1] == "static"
    assert "--use_fast_math" not in told
    assert kernels == {
        "sm_80/one": nvcc.Resources(63, 16896, 12, threads=256),
        "sm_90/two": nvcc.Resources(40, 0, 0, threads=1024),
    }
    found.library(source, tmp_path / "a.so", ("sm_80",), HERE, fast_math=True)
    assert "--use_fast_math" in fake.log.read_text().split("\n")


def test_a_broken_nvcc_is_named(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake(broken=1)
    with pytest.raises(RuntimeError, match=f"{path} does not run: .*CUDA_HOME"):
        nvcc.find().toolkit  # noqa: B018
    fake(failing=1, report="no such architecture")
    for gpp, way_out in (("/usr/bin/g++", "install a newer toolkit"), (None, r"install g\+\+$")):
        monkeypatch.setattr(nvcc.shutil, "which", lambda name, gpp=gpp: gpp)
        with pytest.raises(
            RuntimeError, match=rf"This command failed:(.|\n)*no such architecture(.|\n)*{way_out}"
        ):
            nvcc.find().library("", tmp_path / "a.so", ("sm_80",), HERE)
    assert not (tmp_path / "a.so").exists()


def test_building_for_another_processor(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = next(host for host in targets.CUDA_HOSTS if host != HERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = nvcc.find()

    def build() -> None:
        found.library("", tmp_path / "a.so", ("sm_87",), other)

    apt = f"apt install g\\+\\+-{other.replace('_', '-')}-linux-gnu"
    with pytest.raises(RuntimeError, match=f"needs {other}-linux-gnu-g\\+\\+: {apt}"):
        build()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    message = f"manylinux2014_{other} --only-binary=:all: 'nvidia-cuda-runtime==13.0"
    with pytest.raises(RuntimeError, match=f"libcudart_static.a.*--platform {message}"):
        build()
    place = nvcc.cross_folder(other) / "nvidia" / "cu13" / "lib" / "libcudart_static.a"
    place.parent.mkdir(parents=True)
    place.touch()
    build()
    told = fake.log.read_text().split("\n")
    assert told[told.index("-ccbin") + 1] == f"{other}-linux-gnu-g++"
    assert told[told.index("-cudart") + 1] == "none"
    assert str(place) in told
    assert f"-I{found.toolkit / 'include'}" in told


# ---- the source ----------------------------------------------------------------------------------


def test_architectures_have_their_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "CUDA_ARCHS", ARCHS)
    target, allowed = CudaTarget("cuda"), BuildOptions(allow_tf32=True)
    chosen = cuda.variants(SMALL, target, allowed)
    assert tuple(chosen) == ARCHS
    forms = {arch: {v.tiling.to_dict()["form"] for v in group} for arch, group in chosen.items()}
    assert forms == {"sm_75": {"cores"}, "sm_90": {"tensor_cores"}}
    source = cuda.source(SMALL, target, chosen, allowed)
    kernels = source.count('extern "C" __global__ void __launch_bounds__') // 2  # declared first
    assert source.count("#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 750\n") == kernels // 2
    assert source.count("#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900\n") == kernels // 2
    described = cuda.describe(SMALL, target, chosen, allowed)
    assert described["options"] == {"allow_tf32": True, "fast_math": False}
    assert [variant["archs"] for variant in described["variants"]] == [
        [arch] for arch in ARCHS for _ in chosen[arch]
    ]
    one = cuda.source(SMALL, CudaTarget("cuda-sm_90"), chosen["sm_90"][:1], allowed)
    assert "__CUDA_ARCH__ ==" not in one.partition("namespace sepconv")[0].rpartition("#endif")[2]


def one_more(x: Any) -> Any:
    return lambda n, t, c: x[n, t, c] + 1


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_what_lies_between_two_kernels_is_in_the_workspace(layout: str) -> None:
    batch, out_steps = (tvm.te.var(name, "int32") for name in ("batch", "out_steps"))
    kernels = []
    for read, written in (("x", "intermediate"), ("intermediate", "output")):
        x = tvm.te.placeholder((batch, out_steps, 32), "float32", name=read)
        y = tvm.te.compute(x.shape, one_more(x), name=written)
        kernels.append(tvm.te.create_prim_func([x, y]))
    form = cuda_library.Form("t0p", {"t0p_first": kernels[0], "t0p_then": kernels[1]})
    text = cuda_library._launch(replace(SMALL, data_format=layout), form)
    time = 1 if layout == "channels_last" else 2
    assert f"shape[] = {{c.out.shape[0], c.out.shape[{time}], 32}};" in text
    assert "intermediate = {c.workspace, c.x.device, 3, {kDLFloat, 32, 1}, shape, nullptr" in text
    first, then = (line for line in text.splitlines() if line.lstrip().startswith("TVMFFIAny"))
    assert first.endswith("{sepconv::argument(c.x), sepconv::argument(intermediate)};")
    assert then.endswith("{sepconv::argument(intermediate), sepconv::argument(c.out)};")
    assert (
        "t0p_bytes(int64_t batch, int64_t out_steps) { return batch * out_steps * 32 * 4; }" in text
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_for_every_architecture(dtype: str) -> None:
    half = replace(SMALL, dtype=dtype)
    chosen = cuda.variants(half, CudaTarget("cuda"), PLAIN)
    assert tuple(chosen) == CudaTarget("cuda").archs
    for arch, group in chosen.items():
        copies = {variant.tiling.to_dict()["buffers"] for variant in group}
        assert copies == {1} if arch == "sm_75" else 2 in copies


def test_half_precision_compiles_for_the_oldest_and_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_nvcc()
    monkeypatch.setattr(targets, "CUDA_ARCHS", ARCHS)
    half = replace(SMALL, dtype="float16")
    target = CudaTarget(f"cuda@{HERE}")
    chosen = {arch: group[:1] for arch, group in cuda.variants(half, target, PLAIN).items()}
    used = cuda.build_library(half, target, tmp_path / "half.so", chosen, PLAIN)
    assert code_in(tmp_path / "half.so") == {("machine", 75), ("machine", 90), ("ptx", 90)}
    assert {kernel.spill_bytes for kernel in used.values()} == {0}
    # An architecture's kernels are empty in the other's code: those have no need of registers.
    full = {name for name, kernel in used.items() if kernel.registers > 32}
    assert {name.split("_sep")[0] for name in full} == {
        "sm_75/t0p", "sm_75/t0a", "sm_90/t1p", "sm_90/t1a",
    }  # fmt: skip


def test_bfloat16_stays_what_it_is_for_the_oldest_alone() -> None:
    brain, target = replace(SMALL, dtype="bfloat16"), CudaTarget("cuda-sm_75")
    chosen = cuda.variants(brain, target, PLAIN)["sm_75"][-1:]
    kernels = cuda.source(brain, target, chosen, PLAIN)
    assert "nv_bfloat16* __restrict__ x_ptr" in kernels
    assert "short* __restrict__" not in kernels


def test_what_no_architecture_computes_is_refused() -> None:
    double = replace(SMALL, dtype="float64", accumulation_dtype="float64")
    with pytest.raises(ValueError, match=r"No kernel for cuda: .*float64"):
        cuda.variants(double, CudaTarget("cuda"), PLAIN)


def test_writing_the_source_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CudaTarget("cuda-sm_80")
    variants = cuda.variants(SMALL, target, PLAIN)["sm_80"][-1:]
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "0")
    before = dict(os.environ)
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(cuda.source(SMALL, target, variants, PLAIN)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert len(made) == 2
    assert dict(os.environ) == before
    monkeypatch.delenv("TVM_COMPILE_FORCE_FALLBACK")
    with pytest.raises(RuntimeError, match="no"), cuda_library._source_only():
        raise RuntimeError("no")
    assert "TVM_COMPILE_FORCE_FALLBACK" not in os.environ


# ---- a library that nvcc built -------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a layer for this processor and for GPUs of two architectures."""
    need_nvcc()
    path = tmp_path_factory.mktemp("cuda") / "layer.sepconv"
    layer = tvm_sepconv.SeparableConv1D(SMALL.filters, SMALL.kernel_size, name="layer")
    layer.build((None, None, SMALL.channels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "folders", list)
        patch.setattr(targets, "CUDA_ARCHS", ARCHS)
        layer.save(path, [targets.runnable()[0], "cuda"])
    return path


@pytest.fixture(scope="module")
def library(saved: Path) -> Path:
    _, found = bundle.open_bundle(saved, "cuda")[0].libraries("cuda")
    return found["layer"]


LOADED = """
import json, sys
import tvm_ffi
module = tvm_ffi.load_module(sys.argv[1])
described, driver = json.loads(module["describe"]()), module["driver_version"]()
print(json.dumps([described, "tvm" in sys.modules, driver]))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/lib" in line})
"""


@needs_host
def test_the_library_loads_with_tvm_ffi_alone(saved: Path, library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADED, str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, mapped = done.stdout.splitlines()
    described, with_tvm, driver = json.loads(first)
    assert not with_tvm
    assert "libcudart" not in mapped
    if gpu.missing():
        assert driver == 0
    entry = bundle.read_manifest(saved)["libraries"]["cuda"][SMALL.key]
    assert {**entry, **described} == entry
    assert entry["path"] == f"lib/cuda/{SMALL.key}.so"
    assert (entry["archs"], entry["ptx"], entry["host"]) == (list(ARCHS), "sm_90", HERE)
    assert entry["kernel"] == SMALL.to_dict()
    assert entry["options"] == {"allow_tf32": False, "fast_math": False}
    assert entry["cuda"] == nvcc.find().runtime_version
    assert entry["packing"] == schedule.packing(SMALL, False)


def code_in(path: Path) -> set[tuple[str, int]]:
    """The code for GPUs in a shared library: ("ptx" or "machine", architecture)."""
    data, found = path.read_bytes(), set()
    start = data.find(struct.pack("<I", 0xBA55ED50))
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, length, content = struct.unpack_from("<HHIQ", data, at)
            (arch,) = struct.unpack_from("<I", data, at + 28)
            found.add(({1: "ptx", 2: "machine"}[kind], arch))
            at += length + content
        start = data.find(struct.pack("<I", 0xBA55ED50), end)
    return found


@needs_host
def test_the_library_has_its_architectures_and_ptx(library: Path) -> None:
    assert code_in(library) == {("machine", 75), ("machine", 90), ("ptx", 90)}


def test_the_library_needs_only_what_every_machine_has(library: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    command = [readelf, "--dynamic", "--dyn-syms", "--wide", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".")[0] for line in text.splitlines() if "(NEEDED)" in line}
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    assert needed <= system | {"ld-linux-x86-64", "ld-linux-aarch64"}
    rows = [line.split() for line in text.splitlines() if " UND " not in line]
    defined = {r[7] for r in rows if len(r) > 7 and r[4] in ("GLOBAL", "WEAK", "UNIQUE")}
    assert {name for name in defined if not name.startswith("__tvm_ffi_")} == set()
    assert {"__tvm_ffi_run", "__tvm_ffi_describe", "__tvm_ffi_copy"} <= defined


REFUSED = """
import sys
import numpy, tvm_ffi
module = tvm_ffi.load_module(sys.argv[1])
x = numpy.zeros((2, 8, 32), "float32")
shape = tvm_ffi.Shape
for name, arguments in {cases}:
    try:
        module[name](*arguments)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        print("nothing was refused")
"""
CASES = {
    "too-few": ("('run', (x, x))", "TypeError Mismatched number of arguments"),
    "no-tensor": ("('run', (1, x, x, x, 0, x))", "TypeError Mismatched type on argument #0"),
    "no-number": ("('run', (x, x, x, x, x, x))", "TypeError Mismatched type on argument #4"),
    "dtype": (
        "('run', (x.astype('float64'), x, x, x, 0, x))",
        "TypeError The `x` argument must have the dtype float32. Received: float64",
    ),
    "on-the-cpu": (
        "('run', (x, x, x, x, 0, x))",
        "ValueError The `x` argument must be on a CUDA device. Received: a tensor on DLPack device "
        "type 1",
    ),
    "negative-shape": (
        "('empty', (shape((2, -1)), 'float32', 0))",
        "ValueError The `shape` argument must not be negative. Received: -1",
    ),
    "sizes": (
        "('copy', (x, x[:1]))",
        "ValueError Both tensors of a copy must be contiguous and of the same size. Received: 2048",
    ),
    "strides": ("('copy', (x[..., ::2], x[..., ::2]))", "ValueError Both tensors of a copy must"),
    "both-on-the-cpu": (
        "('copy', (x, x))", "ValueError One of both tensors of a copy must be on a CUDA device",
    ),
}  # fmt: skip


@needs_host
def test_wrong_arguments_are_refused(library: Path) -> None:
    script = REFUSED.replace("{cases}", f"({', '.join(call for call, _ in CASES.values())})")
    command = [sys.executable, "-I", "-c", script, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line, (_, expected) in zip(
        CASES, done.stdout.splitlines(), CASES.values(), strict=True
    ):
        assert line.startswith(expected), name


@needs_host
@pytest.mark.skipif(gpu.missing() is None, reason="is about machines without a GPU")
def test_without_a_driver_it_says_so(library: Path) -> None:
    calls = "('empty', (shape((2,)), 'float32', 0)), ('pinned', (shape((2,)), 'float32')), "
    calls += "('prepare', (0,)), ('synchronize', (0,)), ('workspace', (1, 8, 0))"
    command = [sys.executable, "-I", "-c", REFUSED.replace("{cases}", f"({calls})"), str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("RuntimeError") and "driver" in line for line in lines), lines


def test_a_library_for_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_nvcc()
    monkeypatch.delenv("XDG_CACHE_HOME")  # the user's own may have what pip was told to put there
    target = CudaTarget("cuda-sm_87")
    try:
        nvcc.find()._host_flags(target.host)
    except RuntimeError as error:
        pytest.skip(str(error))
    variants = cuda.variants(SMALL, target, PLAIN)["sm_87"][-1:]
    kernels = cuda.build_library(SMALL, target, tmp_path / "jetson.so", variants, PLAIN)
    assert {key.partition("/")[0] for key in kernels} == {"sm_87"}
    assert code_in(tmp_path / "jetson.so") == {("machine", 87), ("ptx", 87)}
    header = (tmp_path / "jetson.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", header, 18) == (183,)  # EM_AARCH64


# ---- bundles and commands ------------------------------------------------------------------------


def test_a_bundle_chooses_for_the_processor_and_for_a_gpu(saved: Path, tmp_path: Path) -> None:
    here = targets.runnable()[0]
    assert bundle.open_bundle(saved)[1] == here
    opened, chosen = bundle.open_bundle(saved, "cuda")
    assert chosen == "cuda"
    assert opened.libraries("cuda")[0] is None
    with pytest.raises(bundle.BundleError, match=r"no library for cuda-sm_80; it has cuda, "):
        bundle.open_bundle(saved, "cuda-sm_80")
    alone = tmp_path / "alone.sepconv"
    shutil.copytree(saved, alone)

    def without_cpu(manifest: dict[str, Any]) -> None:
        del manifest["libraries"][here]
        manifest["runtimes"] = {}

    rewrite(alone, without_cpu)
    assert bundle.open_bundle(alone, "cuda")[1] == "cuda"
    with pytest.raises(bundle.BundleError, match="cuda needs an NVIDIA GPU"):
        bundle.open_bundle(alone)


def test_a_deployed_part_may_be_for_gpus_alone(saved: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    deploy.stage(bundle.open_bundle(saved)[0], ["cuda"], part)
    opened, _ = bundle.open_bundle(part, "cuda")
    assert opened.targets == ("cuda",)
    assert opened.manifest["runtimes"] == {}


def test_a_damaged_cuda_library_is_found(
    saved: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.sepconv"
    shutil.copytree(saved, copy)
    victim = copy / library.relative_to(saved)
    victim.write_bytes(victim.read_bytes()[:-1])
    assert bundle.open_bundle(copy)[1] != "cuda"  # which looks at what it uses
    with pytest.raises(bundle.BundleError, match="truncated or altered"):
        bundle.open_bundle(copy, "cuda")
    assert "truncated or altered" in refused(capsys, "inspect", str(copy))


def entry(archs: tuple[str, ...], host: str = HERE, version: int = 13000) -> dict[str, Any]:
    return {"layer": {"archs": list(archs), "ptx": archs[-1], "host": host, "cuda": version}}


OLD, ALL = ("sm_80",), targets.CUDA_ARCHS


@pytest.mark.parametrize(
    ("libraries", "capability", "driver", "chosen"),
    [
        ({"cuda": entry(ALL), "cuda-sm_90": entry(("sm_90",))}, 90, 13000, "cuda-sm_90"),
        ({"cuda": entry(ALL), "cuda-sm_90": entry(("sm_90",))}, 80, 13000, "cuda"),
        ({"cuda-sm_80": entry(OLD), "cuda-sm_90": entry(("sm_90",))}, 86, 13000, "cuda-sm_80"),
        ({"cuda-sm_80": entry(OLD)}, 90, 13000, "cuda-sm_80"),
        ({"cuda-sm_80": entry(OLD, version=13010)}, 80, 13000, "cuda-sm_80"),
        ({"cuda": entry(ALL, "armv7"), "cuda@x": entry(ALL)}, 90, 13000, "cuda@x"),
        ({"cuda-sm_80": entry(OLD, version=13010)}, 90, 13000, None),
        ({"cuda-sm_80": entry(OLD)}, 80, 12080, None),
        ({"cuda-sm_90": entry(("sm_90",))}, 80, 13000, None),
        ({"cuda": entry(ALL, "armv7")}, 90, 13000, None),
    ],
)
def test_the_library_for_a_gpu(
    libraries: dict[str, Any], capability: int, driver: int, chosen: str | None
) -> None:
    opened = bundle.Bundle(Path("b.sepconv"), {"libraries": libraries})
    if chosen is not None:
        assert bundle.cuda_target(opened, capability, driver) == chosen
        return
    release = f"{driver // 1000}.{driver % 1000 // 10}"
    message = f"runs on this GPU, an sm_{capability} .*driver for CUDA {release}: cuda"
    with pytest.raises(bundle.BundleError, match=message) as caught:
        bundle.cuda_target(opened, capability, driver)
    (archs,) = {", ".join(group["layer"]["archs"]) for group in libraries.values()}
    assert archs in str(caught.value)


def test_a_bundle_without_cuda_says_what_it_has() -> None:
    opened = bundle.Bundle(Path("b.sepconv"), {"libraries": {"x86_64-avx2": {}}})
    with pytest.raises(bundle.BundleError, match="no libraries for GPUs; it has x86_64-avx2"):
        bundle.cuda_target(opened, 90, 13000)


@pytest.mark.parametrize("capability", [None, 90, 80])
def test_inspect_shows_cuda_libraries(
    saved: Path,
    capability: int | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: None if capability else "none")
    monkeypatch.setattr(gpu, "capability", lambda index: capability)
    monkeypatch.setattr(gpu, "driver_version", lambda: 99990)
    assert cli.main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert f"\ncuda{' (used on cuda:0)' if capability == 90 else ''}\n" in text
    assert f"  for sm_75, sm_90 and all newer than sm_90, beside {HERE}, with a driver" in text
    assert f"  {SMALL.key}: sm_75: tiles of " in text


def test_build_writes_libraries_for_gpus(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", "--target", "cuda-sm_90", "--workloads", "MB-1", "--fast-math"]
    output = tmp_path / "out"
    assert cli.main([*arguments, "--allow-tf32", "--output", str(output)]) == 0
    (made,) = (output / "cuda-sm_90").iterdir()
    assert made.name.endswith("_bias_float32_tf32_fastmath.so")
    assert made.read_bytes() == b"library"
    assert "--use_fast_math" in fake.log.read_text().split("\n")
    text = capsys.readouterr().out
    assert text.startswith("MB-1: sm_90: tiles of ")
    assert text.endswith(f"; {made}\n")


def test_build_into_the_cache_needs_no_gpu(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_SEPCONV_CACHE", str(tmp_path / "cache"))
    jit.cache_root.cache_clear()
    arguments = ["build", "--target", "cuda-sm_90", "--workloads", "MB-1"]
    made = []
    for more in ((), ("--fast-math",), ()):
        assert cli.main([*arguments, *more]) == 0
        made.append(Path(capsys.readouterr().out.split("; ")[-1].strip()))
    jit.cache_root.cache_clear()
    assert made[0] == made[2] != made[1]
    assert made[0].read_bytes() == b"library"
    assert made[0].is_relative_to(tmp_path / "cache")


def test_build_without_nvcc_names_both_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "_places", lambda: iter(()))
    arguments = ("--target", "cuda", "--workloads", "MB-1", "--output", str(tmp_path))
    message = refused(capsys, "build", *arguments)
    assert "NVIDIA's CUDA toolkit" in message
    assert "pip install 'tvm-sepconv[cuda]'" in message


def test_save_takes_targets_once(tmp_path: Path) -> None:
    layer = tvm_sepconv.SeparableConv1D(2, 3)
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match=r"must have no target.*Received: options\.target='cuda'"):
        tvm_sepconv.save({"a": layer}, tmp_path / "a", None, False, BuildOptions(target="cuda"))


def test_saved_libraries_tell_their_options_apart(fake: Any, tmp_path: Path) -> None:
    layer = tvm_sepconv.SeparableConv1D(SMALL.filters, SMALL.kernel_size, name="layer")
    layer.build((None, None, SMALL.channels))
    chosen = BuildOptions(allow_tf32=True)
    layer.save(tmp_path / "a", ["cuda-sm_90"], options=chosen)
    (made,) = bundle.read_manifest(tmp_path / "a")["libraries"]["cuda-sm_90"].values()
    assert made["path"] == f"lib/cuda-sm_90/{SMALL.key}_tf32.so"
    assert made["options"] == chosen.arithmetic
