"""``tvm-sepconv inspect``: what it shows, and what it says of damage."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import refused

import tvm_sepconv
from tvm_sepconv import cli, targets
from tvm_sepconv.commands import inspect
from tvm_sepconv.compiler.tuning import logs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "net.sepconv"
    layers = {}
    for name, filters in (("first", 4), ("second", 8)):
        layers[name] = tvm_sepconv.SeparableConv1D(filters, 3, name=name)
        layers[name].build((None, None, 4))
    here = targets.runnable()[0]
    other = "armv7-neon" if here.startswith("x86") else "x86_64-avx2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "folders", list)
        tvm_sepconv.save(layers, path, [other, here])
    return path


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_inspect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = targets.runnable()[0]
    assert cli.main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    assert f"{saved}: format 1, by tvm_sepconv {tvm_sepconv.__version__}, tvm 0.27" in out
    assert re.search(r"; \d+ files, intact\n", out)
    assert "layers\n  first: c4_f4_k3" in out
    assert f"\n{here} (used here)\n" in out
    assert re.search(r"c4_f8_k3\w+: tiles of [\d, ]+ steps default\n", out)


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_loading_a_bundle_asks_for_no_record(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "lookup", None)
    with caplog.at_level(logging.DEBUG, "tvm_sepconv"):
        layers = tvm_sepconv.load(saved)
        layers["first"](np.zeros((1, 9, 4), np.float32))
    assert not [r for r in caplog.records if r.name.startswith("tvm_sepconv")]


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_saving_says_once_where_each_kernel_is_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "folders", list)
    monkeypatch.setattr(logs, "_announced", set())
    layer, here = tvm_sepconv.SeparableConv1D(4, 3), targets.runnable()[0]
    layer.build((None, None, 4))
    with caplog.at_level(logging.INFO, "tvm_sepconv"):
        for _ in range(2):
            layer.save(tmp_path / "one.sepconv", [here])
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "tvm_sepconv"]
    assert said == [
        ("INFO", f"4→4 k3 for {here}: default decisions; `tvm-sepconv tune` can search better ones")
    ]


def test_inspect_tells_tuned_transferred_and_default() -> None:
    rows = [
        (96, "tuned", 1e-5, None), (64, "transferred", 1e-5, 1.31), (4, "default", None, None),
        (1, "default", None, None),
    ]  # fmt: skip
    names = ("decisions", "origin", "record_secs", "distance")
    variants = [dict(zip(names, ({"step_tile": n}, *rest), strict=True)) for n, *rest in rows]
    assert inspect.origins(variants) == (
        "tiles of 96 steps tuned (10.0 µs), tiles of 64 steps transferred (distance 1.3), "
        "tiles of 4, 1 steps default"
    )


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_inspect_finds_damage(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    victim = next(iter(next(iter(manifest["libraries"].values())).values()))["path"]
    copy = tmp_path / "copy.sepconv"
    for path in saved.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(saved)).write_bytes(path.read_bytes())
    (copy / victim).write_bytes((copy / victim).read_bytes()[:-1])
    assert "truncated or altered" in refused(capsys, "inspect", str(copy))


def test_no_bundle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a bundle" in refused(capsys, "inspect", "/nowhere/at/all")
