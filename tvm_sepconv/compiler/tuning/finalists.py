"""What of a search becomes its record: the fastest in alternation, beyond chance.

No TVM is needed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tvm_sepconv.compiler.tuning.history import Trial
from tvm_sepconv.compiler.tuning.records import Record
from tvm_sepconv.config import KernelConfig

FINALISTS = 3
ATTEMPTS, QUIET = 3, 0.1  # measurements, while the middle half of one spreads over more than this
_MEASURED = ("variant", "target", "threads", "batch", "steps", "decisions", "machine", "tvm")

T = TypeVar("T")


def finalists(known: Sequence[T], trials: Mapping[T, Trial]) -> list[T]:
    """The known candidates that work, the default first, and the fastest of all."""
    working = [tiling for tiling in trials if trials[tiling].secs is not None]
    fastest = sorted(working, key=lambda tiling: trials[tiling].median_secs)[:FINALISTS]
    return list(dict.fromkeys([*(tiling for tiling in known if tiling in working), *fastest]))


def settled(measure: Callable[[], Sequence[Sequence[float]]]) -> Sequence[Sequence[float]]:
    """Measure the finalists, and again where something disturbed it; the quietest result."""
    results = []
    for _ in range(ATTEMPTS):
        results.append(measure())
        if _noise(results[-1]) <= QUIET:
            break
    return min(results, key=_noise)


def _noise(samples: Sequence[Sequence[float]]) -> float:
    """The largest spread of a candidate's middle half, over its median."""
    low, median, high = np.percentile(samples, [25, 50, 75], axis=1)
    return float(np.max((high - low) / median))


def winner(samples: Sequence[Sequence[float]]) -> int:
    """The fastest of alternated samples; 0, the default, unless another is faster beyond chance."""
    table = np.array(samples)
    best = int(np.argmin(np.median(table, axis=1)))
    low, ratio, high = np.percentile(table[best] / table[0], [25, 50, 75])
    # 95 % of medians: the notch of a box plot (McGill, Tukey and Larsen 1978).
    return best if ratio + 1.57 * (high - low) / table.shape[1] ** 0.5 < 1 else 0


def not_beaten(samples: Sequence[Sequence[float]]) -> list[int]:
    """Which of alternated samples the first, the default's, is not faster than beyond chance."""
    return [n for n, own in enumerate(samples) if n == 0 or winner([own, samples[0]]) == 0]


def record_of(
    search: Mapping[str, Any], samples: Sequence[float], default: Sequence[float], trials: int
) -> Record:
    """The record of a search that is over.

    Parameters
    ----------
    search
        What was searched, by the record's names; ``config`` as plain values.
    samples, default
        Seconds of one call with ``search["decisions"]``, and with the default's.
    """
    low, median, high = (float(n) for n in np.percentile(samples, [25, 50, 75]))
    return Record(
        config=KernelConfig.from_dict(search["config"]),
        **{name: search[name] for name in _MEASURED},
        median_secs=median,
        default_secs=float(np.median(default)),
        noise=(high - low) / median,
        trials=trials,
        date=now(),
        modelled=search.get("modelled") or None,
    )


def now() -> str:
    """The date and time, as records have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
