"""Executed instructions and modelled cycles of six layers: neither may rise unnoticed.

The figures hold for the versions of LLVM, QEMU and TVM that they were made with. What gets faster,
or is meant to get slower, is written down by

    python tests/tuning/test_modelled_goldens.py --rewrite
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning.modelled import tools
from tvm_sepconv.compiler.tuning.modelled.score import Scorer
from tvm_sepconv.subjects import Subject, of_table

GOLDENS = Path(__file__).parent / "data" / "modelled_goldens.json"
TARGETS = ("aarch64-neon@cortex-a76", "aarch64-neon@cortex-a55")
LAYERS = {  # strides, a multiplier, dilation, few steps, the other data format
    "QN-C1": "channels_last", "MB-1": "channels_last", "MB-e": "channels_last",
    "SWW-2": "channels_last", "EEG-SSVEP": "channels_last", "QA-7": "channels_first",
}  # fmt: skip


def versions() -> dict[str, str]:
    return {**tools.tools("aarch64").versions, "tvm": importlib.metadata.version("apache-tvm")}


def subject(name: str) -> Subject:
    (found,) = of_table([name], LAYERS[name])
    return found


def figures(scorer: Scorer, name: str) -> dict[str, int]:
    """The layer with default decisions: whatever was recorded changes nothing."""
    one = subject(name)
    config = one.config.kernel_config(one.channels)
    found = scorer.score(config, one.batch, one.steps, decisions={})
    return {"instructions": found.instructions, "cycles": round(found.cycles)}


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDENS.read_text())
    try:
        here = versions()
    except RuntimeError as error:
        pytest.skip(str(error))
    if here != found["versions"]:
        pytest.skip(f"the goldens are of {found['versions']}, here are {here}")
    return found


@pytest.fixture(scope="module", params=TARGETS)
def scorer(request: pytest.FixtureRequest, goldens: dict[str, Any]) -> Iterator[Scorer]:
    with Scorer(cpu(request.param)) as made:
        yield made


@pytest.mark.parametrize("name", LAYERS)
def test_neither_instructions_nor_cycles_rise(
    name: str, scorer: Scorer, goldens: dict[str, Any]
) -> None:
    golden = goldens["layers"][name][scorer.target.name]
    found = figures(scorer, name)
    risen = {what: (golden[what], now) for what, now in found.items() if now > golden[what]}
    assert not risen, f"(golden, now): {risen}; see the top of this file"


def rewrite() -> None:
    """Make the goldens anew."""
    layers: dict[str, dict[str, Any]] = {name: {} for name in LAYERS}
    for target in TARGETS:
        with Scorer(cpu(target)) as scorer:
            for name in LAYERS:
                layers[name][target] = figures(scorer, name)
    text = json.dumps({"versions": versions(), "layers": layers}, indent=1)
    GOLDENS.write_text(f"{text}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --rewrite")
    rewrite()
