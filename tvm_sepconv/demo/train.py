"""Train the demo's network with Keras and write everything in ``data/``.

    python -m tvm_sepconv.demo.train --data aeon-1.6.0-py3-none-any.whl

needs Keras with a backend, h5py, and the recordings as published (see ``data/README.md``). The
number of epochs, the dropout and the noise were chosen by `--folds 5`: cross-validation within the
training split. The test split is read once, after training.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv.demo import data
from tvm_sepconv.demo.data import Recordings

SEED = 1
EPOCHS = 60
STEPS_AN_EPOCH = 24
BATCH = 32
DROPOUT = 0.3
NOISE = 0.6
# Every batch is cut to one of these lengths, so that nothing is padded and six shapes are compiled.
CROP_FRAMES = (7, 9, 11, 13, 16, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tvm_sepconv.demo.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="aeon's wheel, or a folder")
    parser.add_argument("--out", type=Path, default=data.FOLDER, help="default: the package's data")
    parser.add_argument("--folds", type=int, default=0, help="cross-validate instead of training")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args(argv)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    train_split = data.read_published(args.data, "TRAIN")
    if args.folds:
        scores = [
            _validate(train_split, fold, args.folds, args.epochs) for fold in range(args.folds)
        ]
        print(f"mean validation accuracy {100 * np.mean(scores):.1f} %")
        return 0
    model = train(train_split, args.epochs, SEED)
    test_split = data.read_published(args.data, "TEST")
    args.out.mkdir(parents=True, exist_ok=True)
    data.save_split(test_split, args.out / data.TEST_SPLIT.name)
    save_bare(model, args.out / data.MODEL.name)
    logits = predict(args.out / data.MODEL.name, test_split)
    np.save(args.out / data.LOGITS.name, logits)
    print(f"test accuracy {100 * accuracy(logits, test_split):.2f} %, written to {args.out}")
    return 0


def train(recordings: Recordings, epochs: int, seed: int) -> Any:
    """Return a network trained on random cuts of `recordings`."""
    import keras

    keras.utils.set_random_seed(seed)
    model = build(recordings)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, epochs * STEPS_AN_EPOCH)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        losses = []
        for step in range(STEPS_AN_EPOCH):
            frames = CROP_FRAMES[step % len(CROP_FRAMES)]
            losses.append(float(model.train_on_batch(*crop(recordings, frames, rng))))
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1} of {epochs}: loss {np.mean(losses):.4f}", flush=True)
    return model


def build(recordings: Recordings) -> Any:
    """Return the untrained network, its input normalized by the statistics of `recordings`."""
    import keras
    from keras import layers

    normalization = layers.Normalization(name="normalization")
    normalization.adapt(np.concatenate(recordings.utterances))
    return keras.Sequential(
        [
            keras.Input((None, data.CEPSTRA), name="cepstra"),
            normalization,
            layers.GaussianNoise(NOISE, name="noise"),
            layers.SeparableConv1D(64, 5, padding="same", activation="relu", name="near"),
            layers.Dropout(DROPOUT, name="near_dropout"),
            layers.SeparableConv1D(
                96, 5, dilation_rate=2, padding="same", activation="relu", name="wide"
            ),
            layers.Dropout(DROPOUT, name="wide_dropout"),
            layers.SeparableConv1D(128, 3, padding="same", activation="silu", name="voice"),
            layers.GlobalAveragePooling1D(name="average"),
            layers.Dropout(DROPOUT, name="average_dropout"),
            layers.Dense(data.SPEAKERS, name="speaker"),
        ],
        name="speaker_network",
    )


def crop(
    recordings: Recordings, frames: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a batch (BATCH, frames, 12) of random cuts, and the speakers (BATCH,)."""
    spare = recordings.frames - frames
    picked = rng.choice(np.flatnonzero(spare >= 0), BATCH)
    starts = rng.integers(0, spare[picked] + 1)
    cuts = [recordings.utterances[i][s : s + frames] for i, s in zip(picked, starts, strict=True)]
    return np.stack(cuts), recordings.speakers[picked]


def save_bare(model: Any, path: Path) -> None:
    """Save `model` without the optimizer's state, which is twice the size of the network."""
    import keras

    bare = keras.Sequential.from_config(model.get_config())
    bare.set_weights(model.get_weights())
    bare.save(path)


def predict(path: Path, recordings: Recordings) -> np.ndarray:
    """Return the saved network's logits (count, 9), each utterance alone and at its own length."""
    import keras

    model = keras.models.load_model(path)
    rows = [np.asarray(model(u[None], training=False))[0] for u in recordings.utterances]
    return np.stack(rows).astype(np.float32)


def accuracy(logits: np.ndarray, recordings: Recordings) -> float:
    """Return the share of utterances whose highest logit is their speaker's."""
    return float(np.mean(logits.argmax(axis=1) == recordings.speakers))


def _validate(recordings: Recordings, fold: int, folds: int, epochs: int) -> float:
    held_out = np.arange(len(recordings.utterances)) % folds == fold
    model = train(_subset(recordings, ~held_out), epochs, SEED + fold)
    validation = _subset(recordings, held_out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / data.MODEL.name
        save_bare(model, path)
        score = accuracy(predict(path, validation), validation)
    print(f"fold {fold + 1} of {folds}: validation accuracy {100 * score:.1f} %", flush=True)
    return score


def _subset(recordings: Recordings, mask: np.ndarray) -> Recordings:
    utterances = [recordings.utterances[i] for i in np.flatnonzero(mask)]
    return Recordings(utterances, recordings.speakers[mask])


if __name__ == "__main__":
    sys.exit(main())
