"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tvm_sepconv.workloads import workloads

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
NEEDED = {"keras": ["keras", "h5py"], "torch": ["torch"], "onnx": ["onnx"], "jax": ["jax"]}


def framework(example: str) -> str:
    """Which of them an example is about; of none is the first."""
    named = re.search(rf"\b({'|'.join(NEEDED)})\b", example)
    return named[1] if named else "layer"


@pytest.mark.parametrize("example", EXAMPLES, ids=framework)
# What PyTorch 2.13 warns of in its own code.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_examples(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    for package in NEEDED.get(framework(example), []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if framework(example) == "onnx":  # which reads a model that its reader has
        import onnx
        from onnx_models import Model

        onnx.save_model(Model().pair(pads=[1, 1]).proto(), "model.onnx")
    exec(compile(example, str(README), "exec"), {})
    bundles = [path.parent for path in tmp_path.rglob("manifest.json")]
    assert bundles == [tmp_path / name for name in re.findall(r"[\w.]+\.sepconv", example)[:1]]


def test_every_framework_has_an_example() -> None:
    assert [framework(example) for example in EXAMPLES] == ["layer", *NEEDED]


def test_figures_cover_the_workloads() -> None:
    figures = README.read_text().partition("## Figures")[2]
    assert set(workloads()) == set(re.findall(r"^\| (\S+) \| \d", figures, flags=re.MULTILINE))
