"""Tuning on a GPU elsewhere, through a real tracker and servers; the GPU is emulated."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cuda_emulator import library as emulated
from rpc_fleet import KEY, SERVER, Fleet, Process
from tvm_sepconv.compiler.schedules import cuda
from waiting import until

from tvm_sepconv import cli, targets
from tvm_sepconv.compiler import cuda as cuda_build
from tvm_sepconv.compiler import nvcc
from tvm_sepconv.compiler.build import _ffi_include
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import (
    boards_doctor,
    cuda_measure,
    cuda_search,
    finalists,
    logs,
    search,
    tune,
)
from tvm_sepconv.compiler.tuning.board import CandidateError
from tvm_sepconv.compiler.tuning.boards import Boards
from tvm_sepconv.compiler.tuning.cuda_board import CudaBoard
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.doctor import NOTE, OK
from tvm_sepconv.options import BuildOptions
from tvm_sepconv.tracker import Tracker

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
    pytest.mark.skipif(
        targets.machine() not in targets.CUDA_HOSTS, reason="no GPU is beside such a processor"
    ),
]
CONFIG = KernelConfig(channels=12, filters=3, kernel_size=5, activation="relu")
BATCH, STEPS = 4, 10
GPU = "an emulated GPU, driver for CUDA 13.0"
BARE = "bare"  # the key of a server without a driver


class Compiler(emulated.Nvcc):
    """Nvcc, which compiles for this processor, and nothing twice."""

    made: ClassVar[dict[str, bytes]] = {}

    def library(self, source: str, output: Path, *arguments: Any) -> dict[str, Any]:
        if source not in self.made:
            super().library(source, output, *arguments)
            self.made[source] = output.read_bytes()
        output.write_bytes(self.made[source])
        return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and a right library for it."""
    path = tmp_path_factory.mktemp("libraries")
    cuda_measure.write_task(path / "task.npz", CONFIG, BATCH, STEPS)
    target = CudaTarget("cuda-sm_80")
    one = (cuda_build.Variant(cuda_search.Grid(CONFIG, target, BATCH, STEPS).default),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc, "find", Compiler)
        cuda_build.build_library(CONFIG, target, path / "good.so", one, BuildOptions())
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers that find an emulated driver, sm_80, and one that finds none."""
    path = tmp_path_factory.mktemp("fleet")
    for name in ("driver", "none"):
        (path / name).mkdir()
    emulated.build_driver(path / "driver" / "libcuda.so.1")
    (path / "none" / "libcuda.so.1").write_text("no library")
    one = Fleet(path, {"LD_LIBRARY_PATH": str(path / "driver")})
    bare = None
    try:
        variables = {"LD_LIBRARY_PATH": str(path / "none")}
        log = path / "bare.log"
        bare = Process(SERVER, log, one.address.port, BARE, variables=variables)
        until(lambda: _free(one, BARE), "the server without a driver")
        yield one
    finally:
        one.close()
        if bare:
            bare.kill()


def _free(fleet: Fleet, key: str) -> int:
    with Tracker(fleet.address) as tracker:
        return tracker.free(key)


class Place:
    """A server, and libraries to measure there."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        fleet.need(1)
        self.folder = folder
        self.boards = Boards(fleet.address, KEY, CudaTarget("cuda"))

    def measure(self, *names: str, rounds: int = 2) -> list[list[float]]:
        libraries = [str(self.folder / f"{name}.so") for name in names or ["good"]]
        return self.boards.measure(self.folder / "task.npz", libraries, rounds)


@pytest.fixture
def place(fleet: Fleet, folder: Path) -> Place:
    return Place(fleet, folder)


# What a library has, without a kernel; `run` and the bytes of its workspace are a test's.
LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <tvm/ffi/c_api.h>
#define FUNCTION(name) \\
  int __tvm_ffi_##name(void* self, const TVMFFIAny* a, int32_t n, TVMFFIAny* result) {{ \\
    (void)self; (void)a; (void)n; (void)result;
static inline int raise(const char* text) {{ return TVMFFIErrorSetRaisedFromCStr("ValueError", text), -1; }}
static inline int broken(int error) {{  // as everything is from now on, says the driver
  ((void (*)(int))dlsym(dlopen("libfake_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "fake_cuda_break"))(error);
  return 0;
}}
FUNCTION(describe)
  result->type_index = kTVMFFIRawStr;
  result->v_c_str = "{{\\"packing\\": {{\\"lanes\\": 4, \\"channels\\": 12, \\"dtype\\": \\"float32\\"}}}}";
  return 0;
}}
FUNCTION(prepare) return 0; }}
FUNCTION(workspace)
  result->type_index = kTVMFFIInt;
  result->v_int64 = {workspace};
  return 0;
}}
FUNCTION(run) {body} }}
"""  # noqa: E501


def _bad_library(path: Path, body: str, workspace: str = "0") -> None:
    _compile(LIBRARY.format(body=body, workspace=workspace), path)


def _compile(text: str, path: Path) -> None:
    source, made = path.with_suffix(".c"), path.with_suffix(".o")
    source.write_text(text)
    tools = toolchain(f"{targets.machine()}-linux-gnu")
    tools.object_file(source, made, (_ffi_include(),))
    tools.shared_library([made], path)


# ---- what it is for ----------------------------------------------------------------------------


def test_libraries_take_turns_in_one_session(place: Place) -> None:
    assert place.boards.machine == GPU
    assert place.boards.target == CudaTarget("cuda-sm_80")
    good, again = place.measure("good", "good", rounds=4)
    assert (len(good), len(again)) == (4, 4)
    assert min(*good, *again) > 0


# ---- what is wrong with a candidate ------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "workspace", "message"),
    [
        ("return 0;", "0", r"\d+ of \d+ outputs are wrong"),
        ('return raise("no such thing");', "0", "^ValueError: no such thing$"),
        ("return broken(700);", "0", "an illegal memory access was encountered .error 700 of the"),
        ("return broken(600);", "0", "no result after 1 s"),
        (
            "return 0;",
            "(a[0].v_int64 * a[1].v_int64) << 23",
            f"^{331 << 23} bytes are not to be had",
        ),
    ],
    ids=["wrong", "raises", "crash", "hang", "memory"],
)
def test_a_bad_candidate_costs_one_session(
    body: str, workspace: str, message: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bad_library(place.folder / "bad.so", body, workspace)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=message):
        if "after 1 s" in message:  # no limit for who is only slow
            patch.setattr("tvm_sepconv.compiler.tuning.board.CALL_LIMIT_SECS", 1)
        place.measure("bad")
    assert len(place.measure()[0]) == 2


def test_nobody_is_given_the_answer_of_the_one_before(place: Place) -> None:
    _bad_library(place.folder / "bad.so", "return 0;")
    with pytest.raises(RuntimeError, match="outputs are wrong"):
        place.measure("good", "bad")


def test_what_is_sent_has_the_dtype_of_the_layer(place: Place) -> None:
    half = dataclasses.replace(CONFIG, dtype="float16")
    cuda_measure.write_task(place.folder / "task16.npz", half, BATCH, STEPS)
    bits = "static const int bits[] = {16, 32, 32, 32, 0, 16};"
    wrong = "i != 4 && ((DLTensor*)a[i].v_ptr)->dtype.bits != bits[i]"
    body = f'for (int i = 0; i < 6; ++i) if ({wrong}) return raise("bits");'
    _bad_library(place.folder / "bad.so", f"{bits} {body} return 0;")
    library = [str(place.folder / "bad.so")]
    with pytest.raises(RuntimeError, match="outputs are wrong"):
        place.boards.measure(place.folder / "task16.npz", library, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no library", "the library cannot be opened: .* too short"),
        (None, "the library is none for CUDA: .*undefined symbol: __tvm_ffi_describe"),
    ],
    ids=["no library", "another"],
)
def test_a_file_that_is_no_library_is_named(
    content: bytes | None, message: str, place: Place
) -> None:
    if content is None:
        _compile("int other;", place.folder / "bad.so")
    else:
        (place.folder / "bad.so").write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        place.measure("bad")


# ---- what is wrong with a board ----------------------------------------------------------------


def test_a_gpu_of_another_architecture_is_called_so(fleet: Fleet) -> None:
    fleet.need(1)
    with pytest.raises(ValueError, match=r"cannot run .* cuda-sm_90: its GPU, .* an sm_80") as e:
        Boards(fleet.address, KEY, CudaTarget("cuda-sm_90"))
    assert "is an sm_80, and what is built is for sm_90. Choose --target cuda-sm_80 or" in str(e)


def test_a_board_without_a_gpu_is_called_so(fleet: Fleet) -> None:
    with pytest.raises(ValueError, match=r"for cuda: it has no NVIDIA GPU to use .*libcuda.so.1"):
        Boards(fleet.address, BARE, CudaTarget("cuda"))


@pytest.mark.parametrize("other", ["another GPU", None])
def test_boards_that_are_not_alike_end_a_search(
    other: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if other:
        place.boards.machine, said = other, GPU
    else:
        place.boards.key, said = BARE, "it has no NVIDIA GPU to use"
    with pytest.raises(RunnerError, match=f"not alike: the search began on .*it is said: {said}"):
        place.measure()


class Paper(CudaBoard):
    """A board of which only a description is there."""

    def __init__(self, capability: int, driver: int = 13000) -> None:
        self.found = capability, driver, 1 << 20, "NVIDIA Paper"

    def _gpu(self) -> tuple[int, int, int, str]:
        return self.found


@pytest.mark.parametrize(
    ("capability", "asked", "found"),
    [
        (90, "cuda", "cuda-sm_90"),
        (90, "cuda-sm_90", "cuda-sm_90"),
        (90, f"cuda-sm_90@{targets.machine()}", "cuda-sm_90"),
        (87, "cuda@aarch64", "cuda-sm_87"),
        (87, "cuda-sm_87", "cuda-sm_87"),
    ],
)
def test_what_a_gpu_is_tuned_for(
    capability: int, asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "find", Compiler)
    identity = Paper(capability).identity(CudaTarget(asked))
    assert identity == ("NVIDIA Paper, driver for CUDA 13.0", CudaTarget(found))


def test_what_is_built_is_for_the_processor_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "machine", lambda: "x86_64")
    found = Paper(90).identity(CudaTarget("cuda@aarch64")).target
    assert (found, found.host) == (CudaTarget("cuda-sm_90@aarch64"), "aarch64")


@pytest.mark.parametrize(
    ("capability", "driver", "message"),
    [
        (61, 13000, r"is an sm_61, and what is built is for sm_75, .*\. Choose another --key$"),
        (80, 13000, r"is an sm_80, .* Choose --target cuda-sm_80 or another --key$"),
        (90, 12080, r"driver is for CUDA 12\.8, .* one for CUDA 13\.0\. Update .* CUDA_HOME$"),
    ],
)
def test_a_gpu_that_will_not_do_is_refused(
    capability: int, driver: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "find", Compiler)
    asked = CudaTarget("cuda" if capability == 61 else "cuda-sm_90")
    with pytest.raises(CandidateError, match=message):
        Paper(capability, driver).identity(asked)


# ---- the doctor ----------------------------------------------------------------------------------


def test_the_doctor_looks_at_the_gpu(
    fleet: Fleet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.need(1)
    monkeypatch.setattr(boards_doctor, "CONFIG", CONFIG)
    monkeypatch.setattr(nvcc, "find", Compiler)
    monkeypatch.setattr(
        cuda_build, "build_library",
        lambda config, target, output, *_: shutil.copyfile(folder / "good.so", output),
    )  # fmt: skip
    found = list(boards_doctor.examine(fleet.address, KEY, "cuda"))
    assert [finding.status for finding in found] == [OK] * 4
    assert found[2].text.endswith(f": {GPU}; can run cuda-sm_80")
    assert "a layer built for cuda-sm_80 is right there, and takes" in found[-1].text


def test_the_doctor_finds_a_gpu_that_nobody_asked_for(fleet: Fleet) -> None:
    fleet.need(1)
    last = list(boards_doctor.examine(fleet.address, KEY, None))[-1]
    assert (last.status, last.text) == (NOTE, f"a GPU too: {GPU}")
    assert str(last.remedy).endswith("with --target cuda-sm_80")


# ---- all of it -----------------------------------------------------------------------------------


@pytest.fixture
def command(
    fleet: Fleet, builds_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`tune` for a small layer, two candidates, and nobody else's records."""
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(nvcc, "find", Compiler)
    monkeypatch.setattr(tune, "FINAL_SAMPLES", 3)  # emulated ones take long
    monkeypatch.setattr(finalists, "ATTEMPTS", 1)
    every = cuda_search.Grid(CONFIG, CudaTarget("cuda-sm_80"), BATCH, STEPS)
    few = [tiling for tiling in every.tilings if tiling != every.default][:1]
    monkeypatch.setattr(cuda, "candidates", lambda *arguments: few)
    layer = ["--channels", "12", "--filters", "3", "--kernel-size", "5", "--activation", "relu"]
    layer += ["--batch", str(BATCH), "--steps", str(STEPS)]
    where = ["--work-dir", str(tmp_path / "work"), "--logs", str(tmp_path / "logs")]
    boards = ["--rpc", str(fleet.address), "--key", KEY]
    return ["tune", "--target", "cuda", *boards, *layer, *where]


def test_a_search_whose_board_dies(
    command: list[str], fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = fleet.need(2)
    before = [server.sessions() for server in servers]

    def kill() -> None:
        def both() -> bool:
            pairs = zip(servers, before, strict=True)
            return all(server.sessions() > count for server, count in pairs)

        until(both, "a session each")
        servers[0].signal(signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        assert cli.main(command) == 0
        killed.result()
    assert "for cuda-sm_80, up to" in capsys.readouterr().out
    (path,) = (tmp_path / "work").rglob("history.jsonl")
    header, *others = (json.loads(line) for line in path.read_text().splitlines())
    assert (header["target"], header["machine"]) == ("cuda-sm_80", GPU)
    trials = [line for line in others if "trial" in line]
    assert [(line["error"], len(line["secs"])) for line in trials] == [(None, search.SAMPLES)] * 2
    (record,) = logs.read(tmp_path / "logs" / "cuda-sm_80.jsonl")
    assert (record.target, record.machine, record.trials) == ("cuda-sm_80", GPU, 2)
    assert record.median_secs > 0
