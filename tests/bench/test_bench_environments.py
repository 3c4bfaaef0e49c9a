"""The peers' environments: made once, in a folder of their own, and by pip's own settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tvm_sepconv import cli
from tvm_sepconv.bench import environments


class Pip:
    """Stands for the commands that make an environment: keeps them, and fails where it is told."""

    def __init__(self, *failing: str) -> None:
        self.commands: list[list[str]] = []
        self._failing = failing

    def __call__(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert "PYTHONPATH" not in env
        self.commands.append(command)
        if "venv" in command:
            Path(command[-1], "bin").mkdir(parents=True)
        failed = (
            any(word in command for word in self._failing) and "--extra-index-url" not in command
        )
        return subprocess.CompletedProcess(command, int(failed))


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TVM_SEPCONV_PEERS", str(tmp_path / "peers"))
    monkeypatch.setenv("PYTHONPATH", "/somebody/elses")
    return tmp_path / "peers"


def test_setup_makes_each_environment_once(
    peers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip()
    monkeypatch.setattr(environments.subprocess, "run", pip)
    assert cli.main(["bench", "--setup"]) == 0
    made = [command[-1] for command in pip.commands if "venv" in command]
    assert made == [str(peers / name) for name in environments.ENVIRONMENTS]
    for line in pip.commands:
        if "install" in line:
            assert Path(line[0]).parent.parent.parent == peers  # never into this one
    pip.commands.clear()
    assert cli.main(["bench", "--setup", "litert"]) == 0
    assert pip.commands == []
    assert f"litert: {peers / 'litert'}, complete" in capsys.readouterr().out


def test_environment_is_made_anew_when_more_is_wanted(
    peers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip()
    monkeypatch.setattr(environments.subprocess, "run", pip)
    environments.set_up(["litert"])
    (peers / "litert" / "old").touch()
    monkeypatch.setitem(environments.ENVIRONMENTS, "litert", ("ai-edge-litert==99",))
    assert not environments.complete("litert")
    environments.set_up(["litert"])
    assert not (peers / "litert" / "old").exists()
    assert pip.commands[-1][-1] == "ai-edge-litert==99"


def test_failed_install_leaves_no_complete_environment(
    peers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environments.subprocess, "run", Pip("openvino"))
    assert cli.main(["bench", "--setup", "openvino"]) == 2
    assert "error: The environment of openvino could not be made" in capsys.readouterr().err
    assert not environments.complete("openvino")


def test_pytorch_is_the_cpu_build_from_wherever_there_is_one(
    peers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wanted,) = (p for p in environments.ENVIRONMENTS["torch"] if p.startswith("torch"))
    assert wanted.endswith("+cpu")
    pip = Pip(wanted)
    monkeypatch.setattr(environments.subprocess, "run", pip)
    environments.set_up(["torch"])
    first, second = (command for command in pip.commands if "install" in command)
    assert "--extra-index-url" not in first  # what pip is configured to ask comes first
    assert "--extra-index-url" in second
    assert environments.complete("torch")


def test_python_of_an_environment_or_this_one(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments.python("litert", ("numpy",)) == Path(sys.executable)
    assert environments.python("litert", ("numpy", "no_such_module")) is None
    assert environments.python(None, ()) == Path(sys.executable)
    monkeypatch.setattr(environments.subprocess, "run", Pip())
    environments.set_up(["litert"])
    assert environments.python("litert", ("numpy",)) == peers / "litert" / "bin" / "python"


def test_environments_lie_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments.jit, "cache_root", lambda: tmp_path)
    assert environments.root() == tmp_path / "peers"
