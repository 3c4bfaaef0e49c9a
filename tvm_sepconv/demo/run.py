"""Name the speaker of 370 recordings through compiled layers; check every answer against Keras's.

    python -m tvm_sepconv.demo

reads the trained network without Keras, compiles its separable convolutions into one bundle, loads
that bundle as a device would, classifies every utterance at its own length, compares all logits
with those Keras gave, and times each layer beside NumPy and, where installed, ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tvm_sepconv
from tvm_sepconv.demo import data, timing
from tvm_sepconv.demo.network import Apply, load_network, logits
from tvm_sepconv.interop.keras import from_keras

# Float32 sums in another order differ by about 1e-5 at logits of this size (up to 40).
LOGIT_TOLERANCE = 1e-4


class Agreement(NamedTuple):
    """How a set of logits compares with Keras's and with the truth."""

    largest_difference: float
    other_speakers: int  # utterances for which the named speaker differs from Keras's
    accuracy: float

    @property
    def holds(self) -> bool:
        """Whether the answers are Keras's; NaN is not."""
        return self.largest_difference <= LOGIT_TOLERANCE and self.other_speakers == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if an answer differs from Keras's."""
    parser = argparse.ArgumentParser(prog="python -m tvm_sepconv.demo", description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the bundle in this folder")
    args = parser.parse_args(argv)
    if args.work is not None:
        return _run(args.work)
    with tempfile.TemporaryDirectory(prefix="tvm_sepconv_demo_") as folder:
        return _run(Path(folder))


def _run(work: Path) -> int:
    recordings = data.load_test_split()
    bundle = build_bundle(work)
    layers = tvm_sepconv.load(bundle)
    answers = classify(layers, recordings)
    agreement = compare(answers, np.load(data.LOGITS), recordings)
    print(
        f"  accuracy {100 * agreement.accuracy:.2f} %; largest difference from Keras's logits "
        f"{agreement.largest_difference:.2g} (allowed {LOGIT_TOLERANCE:g}); speakers named "
        f"otherwise than by Keras: {agreement.other_speakers}"
    )
    if not agreement.holds:
        print("FAILED: the compiled layers do not give Keras's answers", file=sys.stderr)
        return 1
    frames = (int(np.median(recordings.frames)), int(recordings.frames.max()))
    return timing.run_alone(bundle, frames)


def build_bundle(work: Path) -> Path:
    """Compile the network's separable layers into one bundle in `work`, and return its path."""
    layers = from_keras(data.MODEL)
    print(f"{data.MODEL.name}, read without Keras: separable layers {', '.join(layers)}")
    bundle = work / "speaker.sepconv"
    print(f"Compiling them into one bundle, {bundle} …", flush=True)
    start = time.perf_counter()
    tvm_sepconv.save(layers, bundle)
    size_bytes = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    print(f"  {time.perf_counter() - start:.1f} s, {size_bytes / 1024:.0f} KB")
    return bundle


def classify(layers: Mapping[str, Apply], recordings: data.Recordings) -> np.ndarray:
    """Return the logits (count, 9) of every utterance, each alone and at its own length."""
    network = load_network(data.MODEL)
    count = len(recordings.utterances)
    frames = recordings.frames
    print(f"Classifying {count} utterances of {frames.min()} to {frames.max()} frames", flush=True)
    rows = []
    for done, utterance in enumerate(recordings.utterances, start=1):
        rows.append(logits(network, layers, utterance))
        if done % 100 == 0 or done == count:
            print(f"  {done} of {count}", flush=True)
    return np.stack(rows)


def compare(answers: np.ndarray, keras: np.ndarray, recordings: data.Recordings) -> Agreement:
    """Compare logits (count, 9) with Keras's and with the true speakers."""
    named = answers.argmax(axis=1)
    return Agreement(
        largest_difference=float(np.abs(answers - keras).max()),
        other_speakers=int(np.sum(named != keras.argmax(axis=1))),
        accuracy=float(np.mean(named == recordings.speakers)),
    )
