"""The figures of our ARM kernels: what is made of the counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("tvm")

from tvm_sepconv import cli
from tvm_sepconv.compiler.tuning.modelled import figures, score, tools
from tvm_sepconv.compiler.tuning.modelled.cycles import Block, Model
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.subjects import of_table

TARGET = "aarch64-neon@cortex-a55"
BLOCK = Block(0, 10, b"")
CALLS = {"ours": 100, "litert": 150, "onnxruntime": 300}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is called takes as long as `CALLS` says, its second form half of that."""

    class Fake(figures.Counting):
        def __init__(self, *arguments: object) -> None:
            pass

        def sections(self, arguments: list[str]) -> list[tuple[list[str], Counter[Block]]]:
            what, *more = arguments
            if what != "call":
                return [([what, "form"], Counter({BLOCK: {"import": 100, "load": 40}[what]}))]
            forms = [(more[0], 2), ("another", 1)]
            return [
                ([name, form], Counter({BLOCK: times * CALLS[more[0]] * (1 + (name == "MB-0"))}))
                for name in ("MB-0", "MB-1") for form, times in forms
            ]  # fmt: skip

    class Counts(Model):
        def __init__(self, *arguments: object) -> None:
            pass

        def cycles(self, counts: Counter[Block]) -> float:
            return float(counts[BLOCK])

    monkeypatch.setattr(figures, "Counting", Fake)
    monkeypatch.setattr(figures, "Model", Counts)
    monkeypatch.setattr(figures, "_save", lambda subject, folder: None)
    monkeypatch.setattr(tools, "tools", lambda arch: None)


def test_the_best_form_of_the_best_peer_counts(counted: None) -> None:
    said: list[str] = []
    python: Any = None
    ratios = figures.compared(python, of_table(["MB-0,MB-1"], "channels_last"), said.append)
    assert ratios == [1.5, 1.5]
    assert said[0] == "MB-0: ours 200 cycles, LiteRT 300, ONNX Runtime 600: 1.50×"
    assert figures.loading(python, said.append) == 0.4
    assert said[2] == "MB-1: 400 instructions to an answer, 1,000 for numpy"


@pytest.mark.parametrize(("share", "status"), [(0.9, 0), (0.8, 1)], ids=["reached", "not"])
def test_the_figures_are_a_table_and_a_status(
    share: float, status: int, counted: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(figures, "mean_share", lambda target, subjects, say: share)
    monkeypatch.setattr(figures, "vector_share", lambda subject, say: 0.75)
    monkeypatch.setattr(figures, "emulated_python", lambda folder, requirements: None)
    monkeypatch.setattr(figures, "COMPARED", ("MB-0", "MB-1"))
    assert cli.main(["cycles", "--figures"]) == status
    *_, n1, a55, armv7, mean, least, loading = capsys.readouterr().out.splitlines()
    assert n1.endswith("≥ 85%  reached" if status == 0 else "≥ 85%  NOT REACHED")
    assert f"{share:.1%}" in a55 and a55.endswith("≥ 75%  reached")
    assert "75.0%" in armv7 and armv7.endswith("reached")
    assert "1.50×" in mean and "1.50×" in least
    assert "0.40" in loading and loading.endswith("reached")


def test_layers_below_a_megaflop_are_left_out_of_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = []

    class Fake:
        def __init__(self, target: object) -> None:
            pass

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def score(self, config: KernelConfig, batch: int, steps: int) -> score.Score:
            scored.append(config.kernel_size)
            floor = [90.0, 40.0][len(scored) - 1]
            return score.Score(batch, steps, 1, 100.0, floor, "neoverse-n1", Counter())

    monkeypatch.setattr(figures, "Scorer", Fake)
    said: list[str] = []
    subjects = of_table(["SEED,MB-0,MB-1"], "channels_last")
    assert figures.mean_share(TARGET, subjects, said.append) == pytest.approx(0.6)
    assert scored == [11, 13]
    assert said[0] == f"{TARGET}  MB-0: 90.0% of the floor"
