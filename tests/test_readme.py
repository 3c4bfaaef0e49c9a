"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tvm_sepconv.workloads import workloads

README = Path(__file__).parents[1] / "README.md"


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert (tmp_path / "layer.sepconv" / "manifest.json").is_file()


def test_figures_cover_the_workloads() -> None:
    figures = README.read_text().partition("## Figures")[2]
    assert set(workloads()) == set(re.findall(r"^\| (\S+) \| \d", figures, flags=re.MULTILINE))
