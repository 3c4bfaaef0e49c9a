"""``tvm-sepconv tune --target cuda``: on which machine it measures, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from fake_searches import FakeTune

from tvm_sepconv import cli, gpu
from tvm_sepconv.compiler import nvcc
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import boards, logs, tune
from tvm_sepconv.tracker import Address


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTune:
    one = FakeTune(tmp_path / "logs" / "cuda-sm_90.jsonl")
    monkeypatch.setattr(tune, "tune", one)
    return one


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "capability", lambda index: 90)
    monkeypatch.setattr(nvcc, "find", lambda: None)


def test_without_a_gpu_it_names_the_ways_out(
    fake: FakeTune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "the driver finds none")
    message = refused(capsys, "tune", "--target", "cuda")
    assert "measures kernels on an NVIDIA GPU, and this machine has none to use: the dr" in message
    assert "`tvm-sepconv tune --target cuda --rpc HOST:PORT --key KEY`" in message
    assert "or run it on a machine with a GPU, its driver and nvcc" in message
    assert "tvm-sepconv gpu prepare FOLDER" in message
    assert "`tvm-sepconv build --target cuda` needs no GPU" in message
    assert fake.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "cuda-sm_80"), "this machine's is cuda-sm_90: what is measured on one"),
        (("--target", "cuda-sm_80"), "measure: `tvm-sepconv tune --target cuda-sm_80 --rpc HOST"),
        (("--target", "cuda", "--space", "auto"), "no threads of ours. Received also: --space"),
        (("--target", "cuda", "--num-threads", "2"), "Received also: --num-threads"),
        (("--target", "cuda", "--rpc", "9190"), "`--rpc` needs --key too"),
        (("--target", "cuda", "--replay", "."), "name its architecture, such as --target cuda-sm_"),
        (("--target", "x86", "--precision", "tf32"), "of GPUs, --target cuda. .*also: --precision"),
    ],
)
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...],
    message: str,
    fake: FakeTune,
    hopper: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert re.search(message, refused(capsys, "tune", *arguments))
    assert fake.calls == []


def test_a_gpu_of_no_target_is_named(
    hopper: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda index: 61)
    assert "Received: target=cuda-sm_61" in refused(capsys, "tune", "--target", "cuda")


def test_without_nvcc(
    hopper: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError(nvcc.MISSING)

    monkeypatch.setattr(nvcc, "find", missing)
    assert "needs nvcc" in refused(capsys, "tune", "--target", "cuda")


@pytest.mark.parametrize(
    ("precision", "dtype", "tf32"),
    [((), "float32", False), (("--precision", "tf32"), "float32", True),
     (("--precision", "float16"), "float16", False)],
)  # fmt: skip
def test_what_it_asks_of_a_search(
    precision: tuple[str, ...],
    dtype: str,
    tf32: bool,
    fake: FakeTune,
    hopper: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ("--work-dir", str(tmp_path))
    assert cli.main(["tune", "MB-1", "--target", "cuda", *precision, *where]) == 0
    (call,) = fake.calls
    asked: dict[str, Any] = {n: call[n] for n in ("target", "allow_tf32", "batch", "runner")}
    assert asked == {
        "target": CudaTarget("cuda-sm_90"), "allow_tf32": tf32, "batch": 1, "runner": None,
    }  # fmt: skip
    assert (call["config"].dtype, call["config"].filters) == (dtype, 64)
    out = capsys.readouterr().out
    assert "Tuning MB-1 for cuda-sm_90, up to 32 trials each" in out
    assert "of peak" not in out  # a processor's means nothing here


class Jetsons:
    """In the place of `boards.Boards`: what is behind a key."""

    def __init__(self, address: Address, key: str, target: CudaTarget, threads: int) -> None:
        self.asked = str(address), key, target, threads
        self.target = CudaTarget("cuda-sm_87")

    def __enter__(self) -> Jetsons:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_boards_say_what_gpu_they_have(
    fake: FakeTune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "the driver finds none")
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(boards, "Boards", Jetsons)
    command = ["tune", "MB-1", "--target", "cuda@aarch64", "--rpc", "9190", "--key", "orin"]
    assert cli.main([*command, "--precision", "tf32", "--work-dir", str(tmp_path)]) == 0
    (call,) = fake.calls
    assert call["runner"].asked == ("127.0.0.1:9190", "orin", CudaTarget("cuda@aarch64"), 1)
    assert (call["target"], call["allow_tf32"]) == (CudaTarget("cuda-sm_87"), True)
    assert "Tuning MB-1 for cuda-sm_87, up to" in capsys.readouterr().out


def test_boards_measure_what_is_built_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "_places", lambda: iter(()))
    message = refused(capsys, "tune", "--target", "cuda", "--rpc", "9190", "--key", "orin")
    assert "Building for CUDA needs nvcc" in message
