"""``tvm-sepconv tune`` as it is: searches of a small layer, and what a signal does to one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT_SECS

from tvm_sepconv import cli, targets
from tvm_sepconv.compiler.tuning import logs

X86 = any(isa.startswith("x86_64") for isa in targets.runnable())
pytestmark = pytest.mark.skipif(not X86, reason="measures kernels on an x86 machine")
SMALL = ["--filters", "16", "--kernel-size", "3", "--channels", "16", "--steps", "100"]


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def started(tmp_path: Path, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, with a line for every trial."""
    where = ["--logs", str(tmp_path / "mine"), "--work-dir", str(tmp_path / "work")]
    code = (
        "import sys; from tvm_sepconv import cli; from tvm_sepconv.commands import display; "
        "display.LINE_EVERY = 1; "
        "sys.exit(cli.main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "tune", *SMALL, *where, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_found(number: signal.Signals, tmp_path: Path) -> None:
    # A group of its own, which gets the signal as a whole: so do terminals and `timeout`.
    # More trials than it could do before the signal comes, however late that is.
    with started(tmp_path, "--trials", "500", start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert any("2/500 trials" in line for line in process.stdout)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=LIMIT_SECS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, out + err
    assert "Stopping after the trial that runs" in err
    assert "Traceback" not in err
    log = tmp_path / "mine" / f"{targets.runnable()[0]}.jsonl"
    assert f"recorded in {log}" in out
    (record,) = logs.read(log)
    assert 2 <= record.trials < 500


def test_end_to_end(builds_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--logs", str(tmp_path / "mine"), "--work-dir", str(tmp_path / "work")]
    assert cli.main(["tune", *SMALL, *where, "--trials", "4", "--json", "-"]) == 0
    plain = json.loads(capsys.readouterr().out)
    (record,) = logs.read(Path(plain["recorded"]))
    assert plain["best_secs"] == record.median_secs <= record.default_secs == plain["default_secs"]
    assert plain["decisions"] == record.decisions
    assert plain["share_of_peak"] > 0
    (history,) = (tmp_path / "work").rglob("history.jsonl")
    assert cli.main(["tune", *SMALL, "--replay", str(history), "--trials", "4", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"layer: default .* measured once; 4 trials, .*; not recorded", out)


def test_an_input_that_is_too_short_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "--workloads", "SEED", "--work-dir", str(tmp_path)]) == 1
    assert "SEED: skipped. Only the variant for long inputs is tuned" in capsys.readouterr().out
    assert cli.main(["tune", "MB-1", "--minutes", "1e-9", "--work-dir", str(tmp_path)]) == 1
    assert "MB-1: not started" in capsys.readouterr().out
