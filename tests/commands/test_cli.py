"""The command line: what holds for every subcommand."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from tvm_sepconv import cli
from tvm_sepconv.commands import scope
from tvm_sepconv.subjects import Subject


@pytest.mark.parametrize("arguments", [(), ("fly",), ("tune", "--trials", "many"), ("inspect",)])
def test_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: tvm-sepconv" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert all(f"\n    {name} " in shown for name in cli.COMMANDS)
    assert shown.endswith("\ntvm-sepconv: error: a COMMAND is needed\n")


@pytest.mark.parametrize(
    ("arguments", "prog"),
    [
        (("--frob",), "tvm-sepconv"),
        (("build", "--frob"), "tvm-sepconv build"),
        (("inspect", "bundle", "--frob"), "tvm-sepconv inspect"),
        (("cache", "show", "--frob"), "tvm-sepconv cache"),
    ],
)
def test_an_unknown_option_is_reported_with_the_usage_of_its_command(
    arguments: tuple[str, ...], prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: {prog} [-h]")
    assert shown.endswith(f"\n{prog}: error: unrecognized arguments: --frob\n")


@pytest.mark.parametrize(
    "arguments", [("--vers",), ("build", "--fast"), ("logs", "show", "--lo", "x")], ids=" ".join
)
def test_options_are_not_abbreviated(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"tvm-sepconv {importlib.metadata.version('tvm_sepconv')}\n"


def test_errors_of_tvm_itself_are_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    class InternalError(RuntimeError):
        pass

    def fail(subjects: list[Subject]) -> None:
        raise InternalError("a bug")

    monkeypatch.setattr(scope, "kernels", fail)
    with pytest.raises(InternalError, match="a bug"):
        cli.main(["build"])


def test_the_command_starts_without_tvm() -> None:
    code = (
        "import sys; from tvm_sepconv import cli; cli.main(['inspect', '/nowhere'])\n"
        "assert not {'tvm', 'tvm_ffi', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
