"""Commands run in this process."""

from __future__ import annotations

import pytest

from tvm_sepconv import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses: one line, no traceback, status 2."""
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tvm-sepconv {arguments[0]}: error: ")
    assert len(err.splitlines()) == 1, err
    return err
