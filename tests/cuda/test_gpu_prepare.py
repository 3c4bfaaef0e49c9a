"""Preparing a session on a GPU: what is built once, what is rejected, and what the folder holds."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
import zipfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tvm_sepconv.compiler.schedules import cuda

import tvm_sepconv
from tvm_sepconv.compiler.gpu_session import plan, prepare, session
from tvm_sepconv.compiler.gpu_session.plan import CANDIDATE, DEFAULT, TWO_KERNELS, Library, Plan
from tvm_sepconv.compiler.tuning import builder

MB = Library("MB-1.float32", "MB-1", "float32", DEFAULT)


class Prepared:
    """What `prepare` finds instead of nvcc, pip and processes."""

    def __init__(self) -> None:
        self.built, self.rejected, self.broken = list[str](), "", ""
        self._run: Any = subprocess.run

    def submit(self, function: Any, *arguments: Any) -> Future[str]:
        future: Future[str] = Future()
        try:
            future.set_result(function(*arguments))
        except RuntimeError as error:  # as TVM's processes send it
            future.set_exception(type(error)(traceback.format_exc()))
        return future

    def shutdown(self) -> None:
        pass

    def build(self, library: Library, work: str, arch: str, state: str) -> str:
        self.built.append(library.name)
        if library.name == self.broken:
            raise RuntimeError("nvcc fails\nat length")
        why = self.rejected if library.kind == CANDIDATE else ""
        Path(work, library.file).write_text(library.name)
        note = {"state": state, "rejected": why}
        Path(work, f"{library.name}.json").write_text(json.dumps(note))
        return why

    def pip(self, command: list[str], **settings: Any) -> Any:
        if "pip" not in command:
            return self._run(command, **settings)
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "one.whl", "w") as wheel:
            wheel.writestr("tvm_ffi/__init__.py", "")
        return SimpleNamespace(returncode=0)


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    one = Prepared()
    monkeypatch.setattr(builder, "processes", lambda: one)
    monkeypatch.setattr(prepare, "build", one.build)
    monkeypatch.setattr(prepare.subprocess, "run", one.pip)
    monkeypatch.setattr(tvm_sepconv.SeparableConv1D, "save", lambda *a, **named: None)
    return one


def prepared(folder: Path, **settings: Any) -> Plan:
    return prepare.prepare(folder / "gpu", folder / "work", ["MB-1"], 2, **settings)


def test_a_folder_is_prepared_once_and_runs_by_itself(
    without_nvcc: Prepared, tmp_path: Path
) -> None:
    made = prepared(tmp_path)
    assert without_nvcc.built == [library.name for library in made.libraries]
    kinds = {library.kind for library in made.libraries}
    assert {DEFAULT, CANDIDATE, plan.FORM} <= kinds
    dtypes = {(o.kernel.dtype, o.data_format) for o in made.libraries}
    assert {("bfloat16", "channels_last"), ("float16", "channels_first")} <= dtypes
    candidates = [o.decisions for o in made.libraries if o.kind == CANDIDATE]
    assert len(candidates) == 2 * 3
    assert Plan.load(made.folder) == made
    without_nvcc.built.clear()
    assert prepared(tmp_path).libraries == made.libraries
    assert without_nvcc.built == []
    session.unpack(made.folder)
    assert (made.folder / "libraries" / MB.file).read_text() == MB.name
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    (made.folder / "packages" / "tvm_ffi" / "__init__.py").unlink()
    command = [sys.executable, str(made.folder), "--minutes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert "`--minutes` must be positive" in done.stderr


def test_results_of_other_libraries_are_set_aside(without_nvcc: Prepared, tmp_path: Path) -> None:
    made = prepared(tmp_path)
    (made.folder / "results").mkdir()
    (made.folder / "results" / plan.RESULTS).write_text('{"key": "rest/bandwidth"}')
    assert plan.results(made.folder)
    prepared(tmp_path)
    assert plan.results(made.folder) == {}
    (aside,) = made.folder.glob("results-*")
    assert (aside / plan.RESULTS).is_file()


def test_the_two_kernels_of_each_layer_where_there_are_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tilings(config: Any, allow_tf32: bool, arch: str) -> tuple[Any, ...]:
        if config.dtype == "float16":
            raise ValueError("no such form")
        return SimpleNamespace(to_dict=lambda: {"form": "two_kernels"}), None

    form = SimpleNamespace(default_tilings=tilings)
    monkeypatch.setitem(cuda.FORMS, "two_kernels", form)
    two = [one for one in prepare.libraries(["MB-0"], 1) if one.kind == TWO_KERNELS]
    assert [(one.name, one.decisions) for one in two] == [
        ("MB-0.float32.two", {"form": "two_kernels"}), ("MB-0.tf32.two", {"form": "two_kernels"}),
    ]  # fmt: skip


def test_candidates_that_are_rejected_are_counted(without_nvcc: Prepared, tmp_path: Path) -> None:
    without_nvcc.rejected = "too many registers"
    for _ in range(2):  # the second time from what the first one noted
        made = prepared(tmp_path)
        assert made.rejected == {"too many registers": 6}
        assert not [library for library in made.libraries if library.kind == CANDIDATE]


def test_what_nvcc_cannot_build(without_nvcc: Prepared, tmp_path: Path) -> None:
    without_nvcc.broken = "MB-1.float32.1"
    assert prepared(tmp_path).rejected == {"RuntimeError: nvcc fails": 1}
    without_nvcc.broken = "MB-1.tf32"
    (tmp_path / "work" / "MB-1.tf32.json").unlink()
    with pytest.raises(RuntimeError, match=r"MB-1.tf32 cannot be built: nvcc fails"):
        prepared(tmp_path)


def test_a_folder_too_large_to_travel(
    without_nvcc: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "MOST_BYTES", 1 << 20)
    with pytest.raises(RuntimeError, match=r"of 1 that may travel. Prepare fewer `--workloads`"):
        prepared(tmp_path)


def test_without_a_wheel(
    without_nvcc: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = SimpleNamespace(returncode=1, stderr="no such version")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *a, **named: failing)
    with pytest.raises(RuntimeError, match=r"pip could not get tvm-ffi for Python 3.99: no such"):
        prepared(tmp_path, python="3.99")
