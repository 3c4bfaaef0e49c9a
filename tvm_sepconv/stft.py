"""Kernels of the short-time Fourier transform, for the STFT initializer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Coefficients a of Σ (-1)^k a_k cos(2πkt), t in [0, 1]; the aliases are SciPy's.
_COSINE_WINDOWS: dict[tuple[str, ...], tuple[float, ...]] = {
    ("boxcar", "box", "ones", "rect", "rectangular"): (1.0,),
    ("hann", "hanning", "han"): (0.5, 0.5),
    ("hamming", "hamm", "ham"): (0.54, 0.46),
    ("blackman", "black", "blk"): (0.42, 0.50, 0.08),
    ("nuttall", "nutl", "nut"): (0.3635819, 0.4891775, 0.1365995, 0.0106411),
    ("blackmanharris", "blackharr", "bkh"): (0.35875, 0.48829, 0.14128, 0.01168),
    ("flattop", "flat", "flt"): (0.21557895, 0.41663158, 0.277263158, 0.083578947, 0.006947368),
}
_BARTLETT = ("bartlett", "bart", "brt")
_WINDOWS = {name: a for names, a in _COSINE_WINDOWS.items() for name in names}


def check(side: str, window: Any, scaling: str | None) -> None:
    """Raise a ValueError, mostly in Keras's words, for an argument of STFT that does not fit."""
    if side not in ("real", "imag"):
        raise ValueError(f"side should be 'real' or 'imag', not {side}")
    if isinstance(window, str) and window not in (names := (*_WINDOWS, *_BARTLETT)):
        raise ValueError(
            f"Unknown `window` name: {window}. Pass the window's values, or one of "
            f"{', '.join(sorted(names))}"
        )
    if scaling not in (None, "density", "spectrum"):
        raise ValueError(
            "Scaling is invalid, it must be `None`, 'density' or 'spectrum'. "
            f"Received scaling={scaling}"
        )


def _window(name: str, length: int, periodic: bool) -> Array:
    if length == 1:
        return np.ones(1)
    t = np.arange(length) / (length if periodic else length - 1)
    if name in _BARTLETT:
        return 1 - np.abs(2 * t - 1)
    terms = [(-1) ** k * a * np.cos(2 * np.pi * k * t) for k, a in enumerate(_WINDOWS[name])]
    return np.asarray(np.sum(terms, axis=0))


def kernel(
    shape: tuple[int, ...],
    side: str,
    window: str | tuple[float, ...] | None,
    scaling: str | None,
    periodic: bool,
) -> Array:
    """Return the float64 kernel of `shape` (frame length, 1, bins).

    Raises
    ------
    ValueError
        If the values of `window` are not as many as the frame is long.
    """
    frame_length, _, bins = shape
    time = np.arange(frame_length).reshape(-1, 1, 1)
    angle = -2 * np.pi * time * (np.arange(bins) / ((bins - 1) * 2))
    waves = np.cos(angle) if side == "real" else np.sin(angle)
    if window is None:
        return np.asarray(waves)
    named = isinstance(window, str)
    values = _window(str(window), frame_length, periodic) if named else np.array(window)
    if values.shape != (frame_length,):
        raise ValueError(
            "The shape of `window` must be equal to [frame_length]. "
            f"Received: window shape={values.shape}, frame_length={frame_length}"
        )
    scale = {
        "density": np.sqrt(np.sum(np.square(values))),
        "spectrum": np.sum(np.abs(values)),
        None: 1.0,
    }[scaling]
    return np.asarray(waves * values.reshape(-1, 1, 1) / scale)
