"""What the doctor finds on a healthy machine, and in each thing that can be wrong."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import rpc_fleet
from command_line import refused
from rpc_fleet import KEY, Fleet, nobody

from tvm_sepconv import cli, doctor, gpu, jit, targets
from tvm_sepconv.compiler import link, nvcc
from tvm_sepconv.compiler.tuning import boards_doctor, logs
from tvm_sepconv.doctor import NOTE, OK, PROBLEM, WARNING, Finding
from tvm_sepconv.tracker import Address

if not targets.runnable():
    pytest.skip("libraries are made for x86-64 and ARM machines", allow_module_level=True)
TARGET = targets.runnable()[0]
OTHER = "aarch64-neon" if not TARGET.startswith("aarch64") else "armv7-neon"


def only(findings: Iterator[Finding], status: str) -> Finding:
    found = [finding for finding in findings if finding.status == status]
    assert len(found) == 1, found
    return found[0]


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the doctor find these, whatever the machine is like."""
    return lambda *findings: monkeypatch.setattr(doctor, "examine", lambda target: iter(findings))


def test_this_machine_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in ("python", "packages", "compiler", "processor", "linker", "cuda", "layer"):
        assert re.search(rf"^(ok|note) +{line} ", out, re.MULTILINE), out
    assert re.search(r"^ok +layer +a small layer compiles, runs and is right \(.* s\)$", out, re.M)
    assert re.search(r"\nno problems, (no|\d+) warnings?\n$", out)
    assert "\x1b" not in out


def test_a_problem_is_the_exit_status(
    few: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    few(Finding(OK, "head", "fine"), Finding(PROBLEM, "leg", "broken", "plaster"))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == (
        "ok       head       fine\n"
        "problem  leg        broken\n"
        "                    → plaster\n\n"
        "1 problem, no warnings\n"
    )


def test_a_warning_is_none(few: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    few(Finding(WARNING, "nose", "runs", "tissue"))
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "problems": 0,
        "findings": [{"status": "warning", "subject": "nose", "text": "runs", "remedy": "tissue"}],
    }


def test_a_terminal_gets_colours_and_its_width(
    few: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few(Finding(PROBLEM, "leg", "broken " * 12))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("\x1b[31;1mproblem  \x1b[0mleg        broken broken")
    assert lines[1].startswith(" " * 20 + "broken")
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["doctor"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--key", "pi"], "`--key` needs --rpc too"),
        (["--rpc", "pi"], "`--rpc` must be the tracker's port or host:port"),
        (["--target", "z80"], "`target` argument must be one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, "doctor", *arguments)


def test_boards_need_the_compiler_here(
    few: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few()
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert cli.main(["doctor", "--rpc", "9190"]) == 1
    assert "pip install 'tvm-sepconv[compiler,tune]'" in capsys.readouterr().out


# ---- packages ----------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"numpy": "2.1", "apache-tvm-ffi": "0.1.14.post1", "safetensors": "0.5"}
    versions["apache-tvm"] = "0.27.0.post1"
    monkeypatch.setattr(doctor, "version", versions.get)
    return versions


@pytest.mark.parametrize(
    ("change", "status", "text", "remedy"),
    [
        ({"apache-tvm-ffi": "0.1.15.post2"}, PROBLEM, "0.1.15.post2 crashes", "ffi<0.1.15'"),
        ({"apache-tvm": "0.28.1"}, PROBLEM, "apache-tvm 0.28.1: only 0.27", "[compiler]"),
        ({"apache-tvm": None}, WARNING, "no layer can be compiled", "[compiler]"),
        ({"safetensors": None}, PROBLEM, "safetensors not installed", "install safetensors"),
    ],
    ids=["crashes", "newer", "no compiler", "incomplete"],
)
def test_versions_that_do_not_go_together_are_named(
    change: dict[str, str | None], status: str, text: str, remedy: str, installed: dict[str, Any]
) -> None:
    assert all(finding.status == OK for finding in doctor._packages())
    installed.update(change)
    found = only(doctor._packages(), status)
    assert text in found.text
    assert remedy in str(found.remedy)


def test_without_the_compiler_nothing_is_compiled(installed: dict[str, Any]) -> None:
    installed["apache-tvm"] = None
    assert not list(doctor._layer())
    assert not list(doctor._linkers(None))


def test_extras_are_complete_incomplete_or_not_there(installed: dict[str, Any]) -> None:
    installed.update({"h5py": "3.8", "xgboost": "3.0", "rich": "14"})
    found = {finding.status: finding for finding in doctor._extras()}
    assert found[OK].text == "[h5]"
    assert found[WARNING].text == "[tune] lacks cloudpickle, psutil, tornado"
    assert found[NOTE].remedy == "pip install 'tvm-sepconv[cross]'"


def test_the_versions_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert f"apache-tvm=={doctor.TVM[0]}.{doctor.TVM[1]}.*" in extras["compiler"]
    limit = ".".join(map(str, doctor.FFI_CRASHES))
    assert any(line.endswith(f"<{limit}") for line in extras["compiler"])
    for extra, distributions in doctor.EXTRAS.items():
        names = {re.split(r"[^\w-]", line)[0] for line in extras[extra]} - {"apache-tvm-ffi"}
        assert names == set("|".join(distributions).split("|"))


# ---- the machine -------------------------------------------------------------------------------


def test_only_linux_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert "only Linux" in only(doctor._python(), PROBLEM).text


def test_a_target_that_cannot_run_here_is_for_boards() -> None:
    found = only(doctor._processor(OTHER), NOTE)
    assert f"{OTHER} can be built, not run or tuned here" in found.text
    assert "--rpc" in str(found.remedy)


def test_a_processor_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "runnable", lambda: ())
    assert "runs none of" in only(doctor._processor(None), PROBLEM).text


@pytest.mark.parametrize("target", [None, OTHER])
def test_a_linker_is_missed_where_it_is_needed(
    target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(triple: str) -> None:
        raise RuntimeError(f"No C compiler for {triple}. Install one.")

    monkeypatch.setattr(link, "toolchain", absent)
    found = list(doctor._linkers(target))
    assert [f.status for f in found[:3]] == [PROBLEM, PROBLEM if target else NOTE, NOTE]
    assert {f.remedy for f in found} == {"Install one."}


def test_a_compiler_without_a_c_library_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SOURCE", "#include <no_such_header.h>\n")
    assert "no_such_header" in next(doctor._linkers(None)).text


@pytest.mark.parametrize("missing", [None, "the driver finds none"])
def test_cuda_is_looked_for(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: missing)
    monkeypatch.setattr(nvcc, "_places", lambda: iter(()))
    device, compiler = doctor._cuda(None)
    assert device.text == (f"no NVIDIA GPU: {missing}" if missing else "an NVIDIA GPU")
    assert (compiler.status, compiler.text[:27]) == (NOTE, "Building for CUDA needs nvc")
    assert "pip install 'tvm-sepconv[cuda]'" in str(compiler.remedy)
    assert only(doctor._cuda("cuda-sm_90"), PROBLEM).remedy == compiler.remedy
    assert device.remedy is None
    wanted = next(doctor._cuda("cuda-sm_90")).remedy
    assert wanted == ("Tune on a board: --rpc HOST:PORT --key KEY" if missing else None)
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert len(list(doctor._cuda(None))) == 1


def test_nvcc_is_tried_for_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Compiler:
        path, release = Path("/opt/cuda/bin/nvcc"), "CUDA 13.0"

        def library(self, source: str, output: Path, archs: Sequence[str], host: str) -> None:
            built.append((archs, host))
            if host != "aarch64":
                raise RuntimeError("No compiler for it. Install one.")

    monkeypatch.setattr(nvcc, "find", Compiler)
    _, found = doctor._cuda(None)
    assert (found.status, found.text, built) == (OK, "/opt/cuda/bin/nvcc, CUDA 13.0", [])
    _, found = doctor._cuda("cuda-sm_87")
    assert found.text == "/opt/cuda/bin/nvcc, CUDA 13.0 builds for sm_87 beside aarch64"
    _, found = doctor._cuda("cuda-sm_90@x86_64")
    assert (found.status, found.text) == (PROBLEM, "No compiler for it")
    assert built == [(("sm_87",), "aarch64"), (("sm_90",), "x86_64")]


def test_folders_that_cannot_be_written_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("/root: permission denied")

    monkeypatch.setattr(jit, "users_cache", refuse)
    monkeypatch.setattr(logs, "writable", refuse)
    cache, records = doctor._folders()
    assert (cache.status, records.status) == (WARNING, PROBLEM)
    assert "/root: permission denied" in cache.text
    assert "TVM_SEPCONV_CACHE" in str(cache.remedy)
    assert "/root: permission denied" in str(records.remedy)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("import os; os.abort()", "crashes: signal 6"),
        ("raise ValueError('no, says the test')", "not compile and run: ValueError: no, says the"),
        ("print('[0.5, 2]')", "wrong by 0.5"),
        ("print('[NaN, 2]')", "wrong by nan"),
        ("import time; time.sleep(60)", "was not compiled and run in 0.5 s"),
    ],
    ids=["crash", "error", "wrong", "nan", "hang"],
)
def test_a_layer_that_does_not_run_is_a_problem(
    script: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_LAYER", script)
    if "sleep" in script:
        monkeypatch.setattr(doctor, "LAYER_LIMIT_SECS", 0.5)
    assert text in only(doctor._layer(), PROBLEM).text


def test_the_threads_of_a_call_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert (
        doctor._threads(1).text
        == "a call uses 1, of 4 processors: the control group grants no more"
    )
    assert "this process may use no more" in doctor._threads(2).text
    monkeypatch.setenv("TVM_SEPCONV_NUM_THREADS", "1")
    assert "TVM_SEPCONV_NUM_THREADS" in doctor._threads(1).text


@pytest.mark.parametrize("busy", [0.0, 1.5])
def test_what_makes_times_vary_is_named(busy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"scaling_governor": "powersave", "active": "1"}
    monkeypatch.setattr(doctor, "_word", lambda path: words[path.name])
    monkeypatch.setattr(doctor, "LISTEN_SECS", 0.01)
    monkeypatch.setattr(doctor.OthersWork, "processors", lambda self: busy)
    governor, smt, others = doctor._quiet()
    assert governor.status == WARNING
    assert "powersave" in governor.text
    assert smt.status == NOTE
    assert others.status == (WARNING if busy else OK)


def test_a_check_that_fails_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise KeyError("what")

    for name in ("_python", "_packages", "_extras", "_folders", "_layer", "_quiet"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "_python", broken)
    found = only(doctor.examine(None), PROBLEM)
    assert (found.subject, found.text) == ("python", "could not be examined: KeyError: 'what'")


# ---- boards ------------------------------------------------------------------------------------


fleet = rpc_fleet.fleet


def examined(address: Address, key: str | None, target: str | None) -> list[Finding]:
    return list(boards_doctor.examine(address, key, target))


def test_boards_that_work_are_named(fleet: Fleet) -> None:
    (server,) = fleet.need(1)
    found = examined(fleet.address, KEY, None)
    assert [finding.status for finding in found] == [OK] * 4 + [NOTE]
    texts = [finding.text for finding in found]
    assert texts[0] == f"a tracker answers at {fleet.address}"
    assert texts[1] == f"1 under the key '{KEY}', of which 1 free"
    assert re.fullmatch(rf"127.0.0.1:{server.port}: .+ processors; can run {TARGET}", texts[2])
    assert re.fullmatch(rf"a layer built for {TARGET} is right there, and takes .+ µs", texts[3])
    assert re.match(r"a GPU too: |it has no NVIDIA GPU to use \(", texts[4])


def test_without_a_key_there_is_a_list(fleet: Fleet) -> None:
    fleet.need(1)
    assert (
        f"keys and their servers: {KEY} (1)"
        in only(iter(examined(fleet.address, None, None)), NOTE).text
    )


def test_a_wrong_key_and_a_wrong_target_are_problems(fleet: Fleet) -> None:
    fleet.need(1)
    wrong = only(iter(examined(fleet.address, "rpi5", None)), PROBLEM)
    assert "no server under the key 'rpi5'" in wrong.text
    assert "Start one on the board" in str(wrong.remedy)
    try:
        link.toolchain("aarch64-linux-gnu")
    except RuntimeError as error:
        pytest.skip(str(error))
    assert "another architecture" in str(only(iter(examined(fleet.address, KEY, OTHER)), PROBLEM))


def test_a_tracker_that_is_not_there_is_a_problem() -> None:
    with nobody() as address:
        assert "No RPC tracker answers" in only(iter(examined(address, KEY, None)), PROBLEM).text


def test_a_network_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(address: Address) -> None:
        raise ConnectionError("Not tried")

    monkeypatch.setattr(boards_doctor, "Tracker", absent)
    found = only(iter(examined(Address("pi.local", 9190), KEY, None)), WARNING)
    assert "ssh -N -L" in found.text
