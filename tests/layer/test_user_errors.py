"""What the user can put right is said with the argument's name, before anything is computed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tvm_sepconv
from tvm_sepconv import cli, targets
from tvm_sepconv.demo import data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", ".", "--input", "none"), "`--input` must be a file. There is none called none"),
        (("run", ".", "--input", "folder"), "`--input` must be a file. folder is a folder"),
        (("run", ".", "--input", "a", "--output", "b/y"), "`--output` must lie in a folder. .* b$"),
        (("bench", "--from", "none"), "`--from` must be a file. There is none called none"),
        (("report", "--output", "file"), "`--output` must be a folder. file is a file"),
        (("report", "--output", "out", "--bench", "none"), "`--bench` must be a file. .*none$"),
        (("report", "--output", "out", "--logs", "none"), "`--logs` must be a folder. .*none$"),
        (("build", "MB-1", "--output", "file"), "`--output` must be a folder. file is a file"),
        (("build", "MB-1", "--logs", "none"), "`--logs` must be a folder. There is none called"),
        (("cycles", "MB-1", "--logs", "file"), "`--logs` must be a folder. file is a file"),
        (("logs", "show", "--logs", "none"), "`--logs` must be a folder. There is none called"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_paths_that_do_not_fit_their_option(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    assert cli.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err.strip())
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("content", ["", "null", "[]", '{"spaces_format": 1}', '{"format": 1}'])
def test_files_that_are_no_report(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert cli.main(["bench", "--from", str(tmp_path / "a.json")]) == 2
    assert "`--from` must name what --json wrote" in capsys.readouterr().err


def test_a_bundle_in_bfloat16_names_the_package_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    half = tvm_sepconv.SeparableConv1D(3, 2, dtype="bfloat16")
    half.build((None, None, 4))
    half.save(tmp_path / "half", targets=targets.runnable()[:1])
    # In a process of its own: here NumPy has the dtype already.
    code = (
        "import sys; sys.modules['ml_dtypes'] = None; import tvm_sepconv; tvm_sepconv.load('half')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: The dtype bfloat16 needs a package"
    )


def test_an_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert cli.main(["tune", "--keras", str(data.MODEL), "--steps", "20"]) == 2
    assert "pip install 'tvm-sepconv[h5]'" in capsys.readouterr().err


def test_a_module_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ModuleNotFoundError("no a", name="a")

    monkeypatch.setattr("tvm_sepconv.interop.keras.from_keras", fail)
    with pytest.raises(ModuleNotFoundError, match="no a"):
        cli.main(["tune", "--keras", "a.keras", "--steps", "20"])


def test_compile_takes_build_options() -> None:
    built = layer()
    built.build((None, None, 4))
    with pytest.raises(TypeError, match=r"`options` .*BuildOptions.* Received: 'x86_64-avx2'$"):
        built.compile("x86_64-avx2")  # type: ignore[arg-type]


def layer() -> tvm_sepconv.SeparableConv1D:
    return tvm_sepconv.SeparableConv1D(3, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "`layers` .* must be a dict .*list", lambda: tvm_sepconv.save([], "b")),
        (TypeError, "`layers` .*int.* for 'a'", lambda: tvm_sepconv.save({"a": 3}, "b")),
        (TypeError, "`options` .* Received: 3$", lambda: tvm_sepconv.save({}, "b", options=3)),
        (ValueError, "`target` .* target=3$", lambda: tvm_sepconv.BuildOptions(target=3)),
        (ValueError, "`input_shape` .*channels_last.* Received: 4$", lambda: layer().build(4)),
    ],
    ids=["save list", "save int", "save options", "target", "build"],
)
def test_values_of_another_kind(
    error: type[Exception], message: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(error, match=message):
        call()
