"""The demo's training script writes what the demo reads, with Keras's own answers."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tvm_sepconv.demo import data, peers, train
from tvm_sepconv.demo.network import load_network, logits

keras = pytest.importorskip("keras")

# Keras 3.15.1 on JAX: its variables' __array__ lacks the copy argument that NumPy 2 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two utterances a speaker of 8 or 10 frames; training is cut short to one shape."""
    monkeypatch.setattr(train, "CROP_FRAMES", (8,))
    monkeypatch.setattr(train, "STEPS_AN_EPOCH", 2)
    rng = np.random.default_rng(0)
    for split in ("TRAIN", "TEST"):
        lines = ["@data"]
        for speaker in range(1, data.SPEAKERS + 1):
            for frames in (8, 10):
                values = rng.standard_normal((data.CEPSTRA, frames)).round(6)
                rows = [",".join(map(str, row)) for row in values]
                lines.append(":".join([*rows, str(speaker)]))
        (tmp_path / f"JapaneseVowels_{split}.ts").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_training_writes_what_the_demo_reads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(["--data", str(source), "--out", str(out), "--epochs", "10"]) == 0
    assert "epoch 10 of 10: loss" in capsys.readouterr().out
    recordings = data.load_test_split(out / data.TEST_SPLIT.name)
    network = load_network(out / data.MODEL.name)
    separable = {
        layer.names[-1]: peers.numpy_layer(layer)
        for layer in network
        if layer.class_name == "SeparableConv1D"
    }
    answers = [logits(network, separable, utterance) for utterance in recordings.utterances]
    np.testing.assert_allclose(answers, np.load(out / data.LOGITS.name), rtol=1e-5, atol=1e-5)
    with zipfile.ZipFile(out / data.MODEL.name) as archive:
        assert b"optimizer" not in archive.read("model.weights.h5")


@pytest.mark.full  # compiles the training step twice
def test_cross_validation_stays_within_the_training_split(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "JapaneseVowels_TEST.ts").unlink()
    arguments = ["--data", str(source), "--out", str(tmp_path / "out"), "--epochs", "1"]
    assert train.main([*arguments, "--folds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "fold 2 of 2: validation accuracy" in printed
    assert "mean validation accuracy" in printed
    assert not (tmp_path / "out").exists()
