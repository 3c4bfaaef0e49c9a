"""``tvm-sepconv build --keras`` and ``--onnx``: a model's file becomes a bundle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import refused
from onnx_models import CHANNELS, Model

import tvm_sepconv
from tvm_sepconv import cli, targets
from tvm_sepconv.bundle import read_manifest

pytest.importorskip("tvm")

FILE = Path(__file__).parents[1] / "interop" / "data" / "tf_keras.keras"
HERE = targets.runnable()[-1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "pair.onnx"
    onnx.save(Model().pair(norms="after").proto(), path)
    return path


def assert_same(loaded: object, layer: tvm_sepconv.SeparableConv1D) -> None:
    assert isinstance(loaded, tvm_sepconv.SeparableConv1D)
    assert loaded.config.activation == layer.config.activation
    for ours, theirs in zip(loaded.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as saved"])
def test_keras(fold: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.sepconv"
    arguments = ["build", "--keras", str(FILE), "--output", str(path), "--target", HERE]
    assert cli.main([*arguments, *["--fold"] * fold]) == 0
    said = capsys.readouterr()
    expected = tvm_sepconv.from_keras(FILE, fold_batch_norm=fold, fold_activation=fold)
    loaded = tvm_sepconv.load(path)
    assert loaded.keys() == expected.keys()
    for name, layer in expected.items():
        assert_same(loaded[name], layer)
    assert ("conv: 'bn' and 'relu6' folded in, outputs differ by at most " in said.out) == fold
    assert re.search(rf"^{re.escape(str(path))}: [1-9]\d+ kB$", said.out, re.MULTILINE)
    assert not said.err and not (path / "c").exists()


def test_onnx_for_several_targets_and_c(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.sepconv"
    where = ["--output", str(path), "--target", f"{HERE},aarch64-neon"]
    assert cli.main(["build", "--onnx", str(model), *where, "--with-c"]) == 0
    assert "Compiling node0 …" in capsys.readouterr().out
    assert set(read_manifest(path)["libraries"]) == {HERE, "aarch64-neon"}
    assert (path / "c" / "tvm_sepconv.h").is_file()
    (layer,) = tvm_sepconv.from_onnx(model).values()
    loaded = tvm_sepconv.load(path)
    assert_same(loaded, layer)
    x = np.ones((2, CHANNELS, 9), np.float32)
    np.testing.assert_allclose(loaded(x), layer(x), rtol=1e-5, atol=1e-5)


def test_what_is_left_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Model().pair().conv(7, 1, 3, group=7, name="lonely")
    onnx.save(one.proto(), tmp_path / "left.onnx")
    where = ["--output", str(tmp_path / "net.sepconv"), "--target", HERE]
    assert cli.main(["build", "--onnx", str(tmp_path / "left.onnx"), *where]) == 0
    assert re.match(r"(?s)warning: .*\n  lonely: ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keras", str(FILE)], "`--keras` needs --output, the bundle's folder"),
        (["--keras", "none.keras", "--output", "b"], "`--keras` must be a file. There is none"),
        (["--keras", str(FILE), "--output", str(FILE)], "`--output` must be a folder"),
        (["--keras", str(FILE), "--onnx", "m"], "`--keras` names the layers. .*also: --onnx"),
        (["--onnx", str(FILE), "--fold"], "`--onnx` names the layers. Received also: --fold"),
        (["--onnx", str(FILE), "--output", "b"], "must be an ONNX file"),
        (["MB-1", "--keras", str(FILE)], "`--keras` names the layers. Received also: MB-1"),
        (["--keras", str(FILE), "--output", "b", "--logs", "no"], "`--logs` must be a folder"),
        (["--keras", str(FILE), "--output", "b", "--target", "vax"], "Received: target=vax"),
        (["--fold"], "`--fold` needs --keras or --onnx too"),
        (["MB-1", "--with-c"], "`--with-c` needs --keras or --onnx too"),
    ],
    ids=lambda value: " ".join(value).replace(str(FILE), "F") if isinstance(value, list) else "",
)
def test_what_the_user_can_put_right(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(capsys, "build", *arguments))
    assert not list(tmp_path.iterdir())
