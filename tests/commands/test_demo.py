"""The speaker demo: its data, its network against Keras's answers, and the command itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import reference
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.demo import data, peers, run, timing
from tvm_sepconv.demo.network import Apply, load_network, logits
from tvm_sepconv.interop.keras import SavedLayer

RECORDINGS = data.load_test_split()
KERAS_LOGITS = np.load(data.LOGITS)
SEPARABLE = {
    layer.names[-1]: layer
    for layer in load_network(data.MODEL)
    if layer.class_name == "SeparableConv1D"
}

HEADER = "@problemName JapaneseVowels\n@data\n"


def by_reference(layer: SavedLayer) -> Apply:
    config = SepConvConfig.from_dict(layer.config)
    return lambda x: reference.separable_conv1d(x, *layer.weights, config).astype(np.float32)


def classified(separable: Mapping[str, Apply]) -> run.Agreement:
    network = load_network(data.MODEL)
    answers = [logits(network, separable, utterance) for utterance in RECORDINGS.utterances]
    return run.compare(np.stack(answers), KERAS_LOGITS, RECORDINGS)


def test_recordings_are_the_published_test_split() -> None:
    frames = RECORDINGS.frames
    assert len(RECORDINGS.utterances) == 370
    assert (frames.min(), frames.max(), frames.sum()) == (7, 29, 5687)
    # As the publisher counts them, speaker by speaker.
    assert np.bincount(RECORDINGS.speakers).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert {u.shape[1] for u in RECORDINGS.utterances} == {data.CEPSTRA}
    assert {u.dtype for u in RECORDINGS.utterances} == {np.dtype(np.float32)}
    everything = np.concatenate(RECORDINGS.utterances)
    assert np.isfinite(everything).all()
    # Padded or stretched versions of this data would repeat or blur the last frames.
    assert not any(np.array_equal(u[-1], u[-2]) for u in RECORDINGS.utterances)
    np.testing.assert_allclose([everything.min(), everything.max()], [-1.69252, 1.982559])


def test_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in data.FOLDER.iterdir()}
    assert set(sizes) == {
        "README.md",
        "japanese_vowels_test.npz",
        "speaker.keras",
        "speaker_logits.npy",
    }
    assert sum(sizes.values()) < 500_000


def test_network_has_three_separable_layers_and_no_optimizer() -> None:
    assert list(SEPARABLE) == ["near", "wide", "voice"]
    with zipfile.ZipFile(data.MODEL) as archive:
        assert b"optimizer" not in archive.read("model.weights.h5")


def test_keras_logits_name_the_speaker() -> None:
    assert KERAS_LOGITS.shape == (370, data.SPEAKERS)
    assert KERAS_LOGITS.dtype == np.float32
    assert run.compare(KERAS_LOGITS, KERAS_LOGITS, RECORDINGS).accuracy >= 0.95


def test_reference_gives_keras_logits() -> None:
    agreement = classified({name: by_reference(layer) for name, layer in SEPARABLE.items()})
    assert agreement.largest_difference <= run.LOGIT_TOLERANCE
    assert agreement.other_speakers == 0


def test_numpy_peer_gives_keras_logits() -> None:
    agreement = classified({name: peers.numpy_layer(layer) for name, layer in SEPARABLE.items()})
    assert agreement.holds


def test_command_end_to_end(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tvm_sepconv.demo", "--work", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = re.search(
        r"accuracy ([\d.]+) %; largest difference .* (\S+) \(allowed", finished.stdout
    )
    assert found, finished.stdout
    assert float(found[1]) >= 95
    assert float(found[2]) <= run.LOGIT_TOLERANCE
    for name in SEPARABLE:  # one line at the median length, one at the longest
        rows = re.findall(rf"^{name} .*?(\d+)((?: +\d+\.\d)+)$", finished.stdout, re.MULTILINE)
        assert [int(frames) for frames, _ in rows] == [15, 29], finished.stdout
    bundle = tvm_sepconv.load(tmp_path / "speaker.sepconv")
    assert sorted(bundle) == sorted(SEPARABLE)
    assert classified(bundle).holds


@pytest.mark.parametrize(
    ("shift", "holds"),
    [(0.0, True), (5e-5, True), (2e-4, False), (np.nan, False)],
    ids=["same", "rounding", "different", "nan"],
)
def test_agreement_within_tolerance_only(shift: float, holds: bool) -> None:
    answers = KERAS_LOGITS.astype(np.float64)
    answers[7, 3] += shift
    assert run.compare(answers, KERAS_LOGITS, RECORDINGS).holds is holds


def test_agreement_counts_other_speakers() -> None:
    rolled = np.roll(KERAS_LOGITS, 1, axis=1)
    agreement = run.compare(rolled, KERAS_LOGITS, RECORDINGS)
    assert agreement.other_speakers == 370
    assert not agreement.holds


def test_wrong_answers_end_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: peers.numpy_layer(layer) for name, layer in SEPARABLE.items()}
    wrong["voice"] = lambda x: peers.numpy_layer(SEPARABLE["voice"])(x) * np.float32(1.001)
    monkeypatch.setattr(run, "build_bundle", lambda work: work)
    monkeypatch.setattr(tvm_sepconv, "load", lambda path: wrong)
    assert run.main(["--work", str(tmp_path)]) == 1
    assert "do not give Keras's answers" in capsys.readouterr().err


def test_table_refuses_to_time_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_sepconv, "set_num_threads", lambda count: None)
    layer = SEPARABLE["near"]
    right = peers.numpy_layer(layer)
    with pytest.raises(AssertionError, match="NumPy is not the layer"):
        timing.report({"near": (layer, lambda x: right(x) + np.float32(0.01))}, [7])


def test_table_without_onnxruntime_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tvm_sepconv, "set_num_threads", lambda count: None)
    monkeypatch.setattr(peers, "missing_for_onnxruntime", lambda: ["onnx", "onnxruntime"])
    layer = SEPARABLE["near"]
    timing.report({"near": (layer, peers.numpy_layer(layer))}, [7])
    printed = capsys.readouterr().out
    assert "ONNX Runtime is left out: onnx and onnxruntime not installed" in printed
    assert re.search(r"^near 12→64 k5 +7 +[\d.]+ +[\d.]+$", printed, re.MULTILINE)


@pytest.mark.parametrize("name", list(SEPARABLE))
def test_onnxruntime_peer_is_the_layer(name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    layer = SEPARABLE[name]
    x = np.random.default_rng(0).standard_normal((2, 9, layer.weights[0].shape[1]), np.float32)
    y = peers.onnxruntime_layer(layer, threads=1)(np.ascontiguousarray(x.swapaxes(1, 2)))
    np.testing.assert_allclose(y.swapaxes(1, 2), by_reference(layer)(x), 1e-4, 1e-5)


def test_network_with_an_unknown_layer_is_refused() -> None:
    layer = load_network(data.MODEL)[-1]._replace(class_name="LSTM")
    with pytest.raises(ValueError, match="Received: LSTM 'speaker'"):
        logits([layer], {}, RECORDINGS.utterances[0])


def line(frames: int, speaker: str, cepstra: int = data.CEPSTRA) -> str:
    rows = [",".join(f"{c}.{t}" for t in range(frames)) for c in range(cepstra)]
    return ":".join([*rows, speaker]) + "\n"


def test_ts_is_frames_by_cepstra() -> None:
    recordings = data.parse_ts(HEADER + line(3, "1") + line(7, "9"))
    assert [u.shape for u in recordings.utterances] == [(3, 12), (7, 12)]
    assert recordings.speakers.tolist() == [0, 8]
    np.testing.assert_array_equal(recordings.utterances[0][2], np.float32(np.arange(12) + 0.2))


@pytest.mark.parametrize(
    ("text", "received"),
    [
        (line(3, "0"), "speaker 0"),
        (line(3, "10"), "speaker 10"),
        (line(3, "1", cepstra=11), "11 cepstra"),
        ("1,2:" + line(3, "1", cepstra=11), r"12 cepstra of lengths \[2, 3\]"),
    ],
    ids=["speaker 0", "speaker 10", "a cepstrum missing", "unequal lengths"],
)
def test_ts_of_another_form_is_refused(text: str, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        data.parse_ts(HEADER + text)


def test_split_is_found_in_a_folder_and_in_a_wheel(tmp_path: Path) -> None:
    text = HEADER + line(3, "4")
    folder = tmp_path / "folder" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (folder / "JapaneseVowels_TEST.ts").write_text(text)
    (folder / "JapaneseVowels_eq_TEST.ts").write_text("stretched")
    with zipfile.ZipFile(tmp_path / "aeon.whl", "w") as wheel:
        wheel.writestr("aeon/data/JapaneseVowels_eq_TEST.ts", "stretched")
        wheel.writestr("aeon/data/JapaneseVowels_TEST.ts", text)
    for source in (tmp_path / "folder", tmp_path / "aeon.whl"):
        assert data.read_published(source, "TEST").speakers.tolist() == [3]


def test_source_without_the_recordings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds JapaneseVowels_TRAIN\.ts: fetch it with"):
        data.read_published(tmp_path, "TRAIN")


def test_split_survives_saving(tmp_path: Path) -> None:
    data.save_split(RECORDINGS, tmp_path / "again.npz")
    again = data.load_test_split(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.speakers, RECORDINGS.speakers)
    for ours, theirs in zip(again.utterances, RECORDINGS.utterances, strict=True):
        np.testing.assert_array_equal(ours, theirs)
