"""A Python of 64-bit ARM under QEMU: what runs on a device runs there, without a compiler.

It is downloaded once, by version, into this user's cache (``~/.cache/tvm_sepconv/emulated``);
without apt, pip's index or an emulator the tests say so and are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import native
import pytest
from rpc_fleet import KEY, PORTS, Fleet, free_port
from waiting import until

pytest.importorskip("tvm")

from tvm_sepconv import cli, saving
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import logs
from tvm_sepconv.compiler.tuning.boards import Boards
from tvm_sepconv.compiler.tuning.modelled.figures import BASE
from tvm_sepconv.compiler.tuning.modelled.python import EmulatedPython, emulated_python
from tvm_sepconv.compiler.tuning.records import read

# Not this run's cache, which is empty: the conftest moves that.
FOLDER = Path.home() / ".cache" / "tvm_sepconv" / "emulated"
BOARD = ("apache-tvm==" + importlib.metadata.version("apache-tvm"), "cloudpickle", "psutil",
         "tornado")  # fmt: skip
TARGET = "aarch64-neon@cortex-a76"


def made(requirements: tuple[str, ...]) -> EmulatedPython:
    try:
        return emulated_python(FOLDER, requirements)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def python() -> EmulatedPython:
    return made(BASE)


def test_a_bundle_is_verified_with_the_base_install_alone(
    python: EmulatedPython, tmp_path: Path
) -> None:
    layers = {
        "plain": native.layer_of(12, filters=10, kernel_size=5, padding="same", activation="relu"),
        "double": native.layer_of(3, filters=4, kernel_size=2, strides=2, dtype="float64"),
    }
    saving.save(layers, tmp_path / "net.sepconv", targets=["aarch64-neon"])
    code = (
        "import importlib.util, platform, sys\n"
        "from tvm_sepconv import cli\n"
        "assert platform.machine() == 'aarch64'\n"
        "assert not any(map(importlib.util.find_spec, ('tvm', 'onnx', 'rich', 'pytest')))\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = python.run(["-c", code, "verify", str(tmp_path / "net.sepconv")])
    assert "aarch64-neon" in done.stdout
    assert all(name in done.stdout for name in layers)


def test_what_fails_there_is_an_error_with_its_reason(python: EmulatedPython) -> None:
    with pytest.raises(RuntimeError, match=r"status 1: [\s\S]*ModuleNotFoundError: .*tvm"):
        python.run(["-c", "import tvm"])
    with pytest.raises(RuntimeError, match="had not ended after 1 s"):
        python.run(["-c", "import time; time.sleep(60)"], timeout_secs=1)


def test_what_cannot_be_made_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(BASE)  # or skips
    with pytest.raises(RuntimeError, match=r"this command failed:\n  .*pip[\s\S]*no such word"):
        emulated_python(FOLDER, ["no such word"])
    monkeypatch.setattr("tvm_sepconv.compiler.tuning.modelled.python.shutil.which", lambda n: None)
    with pytest.raises(RuntimeError, match="needs apt-get, of Debian or Ubuntu"):
        emulated_python(tmp_path, BASE)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Fleet]:
    """A tracker here and a server in the emulated Python."""
    python = made((*BASE, *BOARD))
    fleet = Fleet(tmp_path)
    try:
        port = free_port()
        command = [str(python.launcher), "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--port-end", str(port + PORTS), "--key", KEY]
        command += ["--tracker", str(fleet.address)]
        variables = python.environment({"TVM_USE_RUNTIME_LIB": "1"})
        with (tmp_path / "server.log").open("w") as log:
            server = subprocess.Popen(command, env=variables, stderr=log, start_new_session=True)
        try:
            until(lambda: fleet.registered()[1] == 1, "the emulated server")
            yield fleet
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    finally:
        fleet.close()


def test_an_emulated_board_is_tuned_for_through_the_tracker(
    board: Fleet, builds_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    command = ["tune", "--rpc", str(board.address), "--key", KEY, "--target", TARGET]
    command += ["--channels", "16", "--filters", "32", "--kernel-size", "5", "--steps", "130"]
    command += ["--trials", "8", "--quiet", "--logs", str(tmp_path / "logs")]
    assert cli.main([*command, "--work-dir", str(tmp_path / "work")]) == 0
    (record,) = read(tmp_path / "logs" / f"{TARGET}.jsonl")
    assert record.modelled is None
    assert (record.trials, record.target) == (8, TARGET)
    (kept,) = (tmp_path / "work").rglob("history.jsonl")
    header, *trials, _ = map(json.loads, kept.read_text().splitlines())
    assert header["modelled"] is False
    assert [trial["error"] for trial in trials] == [None] * 8


def test_an_arm_board_without_a_gpu_says_so(board: Fleet) -> None:
    with pytest.raises(ValueError, match="for cuda-sm_87: it has no NVIDIA GPU to use"):
        Boards(board.address, KEY, CudaTarget("cuda-sm_87"))
