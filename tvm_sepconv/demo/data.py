"""The demo's recordings, and what ``data/README.md`` says about them.

An utterance is a float32 array (frames, 12) of linear-prediction cepstra, its speaker 0 to 8.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "data"
TEST_SPLIT = FOLDER / "japanese_vowels_test.npz"
MODEL = FOLDER / "speaker.keras"
LOGITS = FOLDER / "speaker_logits.npy"

CEPSTRA = 12
SPEAKERS = 9


class Recordings(NamedTuple):
    """Utterances (frames, 12) float32, each of its own length, and their speakers (count,)."""

    utterances: list[np.ndarray]
    speakers: np.ndarray

    @property
    def frames(self) -> np.ndarray:
        """Length of each utterance in frames, (count,)."""
        return np.array([len(utterance) for utterance in self.utterances])


def load_test_split(path: Path = TEST_SPLIT) -> Recordings:
    """Read the 370 test utterances that come with the package."""
    with np.load(path) as file:
        ends = np.cumsum(file["lengths"], dtype=np.int64)
        utterances = np.split(file["frames"], ends[:-1])
        return Recordings(utterances, file["speakers"].astype(np.int64))


def save_split(recordings: Recordings, path: Path) -> None:
    """Write utterances end to end, with their lengths, compressed."""
    np.savez_compressed(
        path,
        frames=np.concatenate(recordings.utterances).astype(np.float32),
        lengths=recordings.frames.astype(np.uint8),
        speakers=recordings.speakers.astype(np.uint8),
    )


def read_published(source: Path, split: str) -> Recordings:
    """Read a split as published, from aeon's wheel or from a folder with the two ``.ts`` files.

    Parameters
    ----------
    source
        The wheel, or a folder anywhere above ``JapaneseVowels_TRAIN.ts``. The files named
        ``…_eq_…`` hold the utterances stretched to one length and are not used.
    split
        ``TRAIN`` (270 utterances) or ``TEST`` (370).

    Raises
    ------
    FileNotFoundError
        `source` does not hold that file.
    """
    name = f"JapaneseVowels_{split}.ts"
    if source.is_dir():
        for path in sorted(source.rglob(name)):
            return parse_ts(path.read_text())
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            for member in wheel.namelist():
                if member.endswith(f"/{name}"):
                    return parse_ts(io.TextIOWrapper(wheel.open(member)).read())
    raise FileNotFoundError(
        f"`source` must be the wheel of aeon or a folder that holds {name}: fetch it with "
        f"`pip download --no-deps aeon`. Received: source={str(source)!r}"
    )


def parse_ts(text: str) -> Recordings:
    """Parse the ``.ts`` format: after ``@data``, a line an utterance, ``row:row:…:speaker``.

    Raises
    ------
    ValueError
        A line does not hold 12 cepstra of equal length and a speaker 1 to 9.
    """
    utterances, speakers = [], []
    for line in text.partition("@data\n")[2].splitlines():
        *cepstra, label = line.split(":")
        values = [[float(value) for value in row.split(",")] for row in cepstra]
        lengths = {len(row) for row in values}
        if len(values) != CEPSTRA or len(lengths) != 1 or not 1 <= int(label) <= SPEAKERS:
            raise ValueError(
                "`text` must hold 12 cepstra of equal length and a speaker from 1 to 9 a line. "
                f"Received: {len(values)} cepstra of lengths {sorted(lengths)}, speaker {label}"
            )
        utterances.append(np.array(values, np.float32).T.copy())
        speakers.append(int(label) - 1)
    return Recordings(utterances, np.array(speakers))
