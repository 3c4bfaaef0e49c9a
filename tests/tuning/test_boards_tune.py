"""A search that measures on boards, from the command line to the record."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rpc_fleet
from rpc_fleet import KEY, Fleet
from waiting import until

from tvm_sepconv import cli, targets
from tvm_sepconv.compiler.tuning import logs

HERE = [isa for isa in targets.runnable() if isa.startswith("x86_64")]
pytestmark = pytest.mark.skipif(not HERE, reason="the servers here are x86 machines")
TRIALS = 8


fleet = rpc_fleet.fleet


@pytest.fixture
def tune(
    fleet: Fleet, builds_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command, for a small layer and nobody else's records."""
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    command = ["tune", "--rpc", str(fleet.address), "--key", KEY, "--trials", str(TRIALS)]
    command += ["--target", HERE[0], "--channels", "16", "--filters", "32"]
    command += ["--kernel-size", "5", "--steps", "130", "--quiet"]
    return [*command, "--work-dir", str(tmp_path / "work"), "--logs", str(tmp_path / "logs")]


def lines(folder: Path, name: str) -> list[dict]:
    (path,) = folder.rglob(name)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_boards_measure_and_one_that_dies_costs_no_trial(
    tune: list[str], fleet: Fleet, tmp_path: Path
) -> None:
    servers = fleet.need(2)

    def kill() -> int:
        until(lambda: min(server.sessions() for server in servers) >= 2, "two sessions each")
        servers[0].signal(signal.SIGKILL)
        return servers[0].sessions()

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        assert cli.main(tune) == 0
        assert killed.result() >= 2
    assert servers[1].sessions() >= 2
    header, *others = lines(tmp_path / "work", "history.jsonl")
    trials = [line for line in others if "trial" in line]
    assert [line["error"] for line in trials] == [None] * TRIALS
    assert "processors" in header["machine"]
    assert list((tmp_path / "logs").glob(f"{HERE[0]}.jsonl"))


def test_no_board_at_all_is_one_message(
    tune: list[str], fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    for server in fleet.need(1):
        server.kill()
    until(lambda: not fleet.registered()[0], "the tracker's noticing it")
    assert cli.main(tune) == 2
    err = capsys.readouterr().err
    assert f"tvm-sepconv tune: error: The RPC tracker at {fleet.address} has no server" in err
