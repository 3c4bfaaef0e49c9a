"""Keras 3.15's initializers in NumPy.

Random values come from `numpy.random.default_rng`, so they differ from Keras's for the same seed;
the distributions and the fans are the same. An instance gives the same values each time it is
called, with or without a seed, as Keras's do; two instances without a seed differ.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tvm_sepconv import identifiers, stft

Array = npt.NDArray[Any]
Initializer = Callable[..., Any]
Shape = Sequence[int]

# Standard deviation of a standard normal distribution cut at two standard deviations.
_TRUNCATED_STDDEV = 0.87962566103423978


def _cast(values: npt.ArrayLike, dtype: npt.DTypeLike | None) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes  # registers the name with NumPy; only such layers need the package

        dtype = ml_dtypes.bfloat16
    return np.asarray(values).astype(np.float32 if dtype is None else dtype)


class _Initializer(identifiers.Configurable, abc.ABC):
    keras_module: ClassVar[str] = "keras.initializers"

    def __call__(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        """Return an array of `shape` and `dtype` (default float32)."""
        return _cast(self._values(tuple(shape)), dtype)

    @abc.abstractmethod
    def _values(self, shape: tuple[int, ...]) -> Array: ...


class Zeros(_Initializer):
    """All 0."""

    def _values(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape)


class Ones(_Initializer):
    """All 1."""

    def _values(self, shape: tuple[int, ...]) -> Array:
        return np.ones(shape)


@dataclass(frozen=True)
class Constant(_Initializer):
    """All `value`, a scalar or what broadcasts to the shape."""

    value: Any = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.value, (np.ndarray, np.generic)):
            object.__setattr__(self, "value", _tuples(self.value.tolist()))

    def _values(self, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(np.asarray(self.value, np.float64), shape)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Identity(_Initializer):
    """`gain` times the identity matrix; only for two-dimensional shapes."""

    gain: float = 1.0

    def _values(self, shape: tuple[int, ...]) -> Array:
        if len(shape) != 2:
            raise ValueError(
                "Identity matrix initializer can only be used for 2D matrices. "
                f"Received: shape={shape} of rank {len(shape)}."
            )
        return self.gain * np.eye(*shape)


def _drawn() -> int:
    return int.from_bytes(os.urandom(8), "little")  # what `secrets` gives, without its imports


@dataclass(frozen=True)
class RandomInitializer(_Initializer):
    """Base of those that draw; `seed` is an int, None, or a Keras SeedGenerator's config dict."""

    _entropy: int = dataclasses.field(default_factory=_drawn, init=False, repr=False, compare=False)

    @property
    def _seed(self) -> Any:
        return getattr(self, "seed")  # noqa: B009 - a field of the subclasses, at its place in their order

    def __post_init__(self) -> None:
        seed = self._seed
        if isinstance(seed, Mapping):
            seed = seed.get("config", {}).get("seed")
            object.__setattr__(self, "seed", seed)
        if seed is not None and not isinstance(seed, int):
            raise ValueError(
                "`seed` argument should be an instance of `keras.random.SeedGenerator()` or an "
                f"integer. Received: seed={seed} (of type {type(seed)}); pass int(seed)"
            )

    def _rng(self) -> np.random.Generator:
        # NumPy takes no negative seeds, Keras does.
        return np.random.default_rng((self._entropy if self._seed is None else self._seed) % 2**64)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, those that Keras before 3.15 does not know only if given."""
        new = ("input_axes", "output_axes")
        return {k: v for k, v in super().get_config().items() if k not in new or v is not None}


@dataclass(frozen=True)
class RandomNormal(RandomInitializer):
    """Normal."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: Any = None

    def _values(self, shape: tuple[int, ...]) -> Array:
        return self._rng().normal(self.mean, self.stddev, shape)


@dataclass(frozen=True)
class TruncatedNormal(RandomInitializer):
    """Normal, redrawn beyond two standard deviations."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: Any = None

    def _values(self, shape: tuple[int, ...]) -> Array:
        return _truncated_normal(self._rng(), shape) * self.stddev + self.mean


def _truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(np.count_nonzero(outside))
    return values


@dataclass(frozen=True)
class RandomUniform(RandomInitializer):
    """Uniform in [`minval`, `maxval`)."""

    minval: float = -0.05
    maxval: float = 0.05
    seed: Any = None

    def _values(self, shape: tuple[int, ...]) -> Array:
        return self._rng().uniform(self.minval, self.maxval, shape)


def compute_fans(
    shape: Shape, input_axes: Shape | None = None, output_axes: Shape | None = None
) -> tuple[int, int]:
    """Return (fan in, fan out) of a weight: (k·channels, k·multiplier) for a depthwise kernel.

    The last two axes of `shape` are inputs and outputs and the ones before them positions, unless
    both `input_axes` and `output_axes` say which axes count.
    """
    if input_axes is not None and output_axes is not None:
        return math.prod(shape[a] for a in input_axes), math.prod(shape[a] for a in output_axes)
    if len(shape) < 2:
        return (shape[0], shape[0]) if shape else (1, 1)
    positions = math.prod(shape[:-2])
    return shape[-2] * positions, shape[-1] * positions


@dataclass(frozen=True)
class VarianceScaling(RandomInitializer):
    """Variance `scale / n`, where n is the fan in, the fan out or their mean, by `mode`."""

    scale: float = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    seed: Any = None
    input_axes: tuple[int, ...] | None = None
    output_axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0.0:
            raise ValueError(
                f"Argument `scale` must be positive float. Received: scale={self.scale}"
            )
        if self.mode not in (modes := ("fan_in", "fan_out", "fan_avg")):
            raise ValueError(f"Invalid `mode` argument: {self.mode}. Please use one of {modes}")
        name = self.distribution.lower()
        name = "truncated_normal" if name == "normal" else name
        if name not in (names := ("uniform", "truncated_normal", "untruncated_normal")):
            raise ValueError(f"Invalid `distribution` argument: {name}. Please use one of {names}")
        object.__setattr__(self, "distribution", name)

    def _values(self, shape: tuple[int, ...]) -> Array:
        fan_in, fan_out = compute_fans(shape, self.input_axes, self.output_axes)
        n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        stddev = math.sqrt(self.scale / max(1.0, n))
        if self.distribution == "uniform":
            limit = math.sqrt(3) * stddev
            return self._rng().uniform(-limit, limit, shape)
        if self.distribution == "truncated_normal":
            return _truncated_normal(self._rng(), shape) * (stddev / _TRUNCATED_STDDEV)
        return self._rng().normal(0.0, stddev, shape)


@dataclass(frozen=True)
class _Named(RandomInitializer):
    """VarianceScaling with its scale, mode and distribution in the class."""

    scaling: ClassVar[tuple[float, str, str]]
    seed: Any = None
    input_axes: tuple[int, ...] | None = None
    output_axes: tuple[int, ...] | None = None

    def _values(self, shape: tuple[int, ...]) -> Array:
        seed = self._entropy if self.seed is None else self.seed
        scaling = VarianceScaling(*self.scaling, seed, self.input_axes, self.output_axes)
        return scaling._values(shape)


class GlorotUniform(_Named):
    """Uniform in ±sqrt(6 / (fan in + fan out)) (Glorot & Bengio, 2010)."""

    scaling = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Named):
    """Truncated normal of variance 2 / (fan in + fan out) (Glorot & Bengio, 2010)."""

    scaling = (1.0, "fan_avg", "truncated_normal")


class HeNormal(_Named):
    """Truncated normal of variance 2 / fan in (He et al., 2015)."""

    scaling = (2.0, "fan_in", "truncated_normal")


class HeUniform(_Named):
    """Uniform in ±sqrt(6 / fan in) (He et al., 2015)."""

    scaling = (2.0, "fan_in", "uniform")


class LecunNormal(_Named):
    """Truncated normal of variance 1 / fan in (LeCun et al., 1998)."""

    scaling = (1.0, "fan_in", "truncated_normal")


class LecunUniform(_Named):
    """Uniform in ±sqrt(3 / fan in) (LeCun et al., 1998)."""

    scaling = (1.0, "fan_in", "uniform")


@dataclass(frozen=True)
class Orthogonal(RandomInitializer):
    """`gain` times a random orthogonal matrix, all axes but the last as one (Saxe et al., 2014)."""

    gain: float = 1.0
    seed: Any = None

    def _values(self, shape: tuple[int, ...]) -> Array:
        if len(shape) < 2:
            raise ValueError(
                "The tensor to initialize must be at least two-dimensional. "
                f"Received: shape={shape} of rank {len(shape)}."
            )
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(self._rng().standard_normal((max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diag(r))  # makes q uniform over the orthogonal matrices
        return self.gain * (q if rows >= columns else q.T).reshape(shape)


@dataclass(frozen=True)
class STFT(_Initializer):
    """Kernel (frame length, 1, bins) of a short-time Fourier transform, its real or imaginary side.

    `window` is a name, the window's values, or None; `scaling` is "density", "spectrum" or None.
    Keras takes its windows from SciPy; here are the cosine windows and Bartlett's.
    """

    side: str = "real"
    window: str | tuple[float, ...] | None = "hann"
    scaling: str | None = "density"
    periodic: bool = False

    def __post_init__(self) -> None:
        stft.check(self.side, self.window, self.scaling)
        if self.window is not None and not isinstance(self.window, str):
            object.__setattr__(self, "window", tuple(float(v) for v in self.window))

    def _values(self, shape: tuple[int, ...]) -> Array:
        return stft.kernel(shape, self.side, self.window, self.scaling, self.periodic)


def _given(array: Array, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
    """Serve as the initializer that gives back `array`."""
    if tuple(shape) != array.shape:
        raise ValueError(
            f"Expected `shape` to be {array.shape} for direct tensor as initializer. "
            f"Received shape={tuple(shape)}"
        )
    return _cast(array, dtype)


_CLASSES = identifiers.table(
    (
        Zeros, Ones, Constant, Identity, RandomNormal, RandomUniform, TruncatedNormal,
        VarianceScaling, GlorotUniform, GlorotNormal, HeNormal, HeUniform, LecunNormal,
        LecunUniform, Orthogonal, STFT,
    ),
    {
        "IdentityInitializer": Identity, "OrthogonalInitializer": Orthogonal,
        "STFTInitializer": STFT, "normal": RandomNormal, "uniform": RandomUniform,
        "one": Ones, "zero": Zeros,
    },
)  # fmt: skip


def get(identifier: Any) -> Initializer | None:
    """Find an initializer; None stays None (the layer puts its documented default there).

    Parameters
    ----------
    identifier
        A Keras name, config dict, class or instance; a callable `(shape, dtype)`; or an array of
        the values.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if identifier is None:
        return None
    if isinstance(identifier, (np.ndarray, np.generic)):
        return functools.partial(_given, np.asarray(identifier))
    return identifiers.get("initializer", _CLASSES, identifier)


def with_seed(initializer: Initializer, seed: int) -> Initializer:
    """Return `initializer` with `seed` if it draws and has no seed of its own, else itself."""
    if isinstance(initializer, RandomInitializer) and initializer.get_config()["seed"] is None:
        return dataclasses.replace(initializer, seed=seed)  # type: ignore[call-arg]
    return initializer


def deserialize(config: Any) -> Initializer | None:
    """Find the initializer that `serialize` or Keras wrote as `config`; see `get`."""
    return get(config)


def serialize(initializer: Any) -> dict[str, Any] | None:
    """Return Keras's config dict; None stays None; a custom callable is a ValueError."""
    return identifiers.serialize("initializer", initializer)
