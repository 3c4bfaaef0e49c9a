"""Keras 3.15's weight constraints in NumPy: each returns the projected weight, its dtype kept."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tvm_sepconv import identifiers

Array = npt.NDArray[Any]
Constraint = Callable[[Any], Any]

_EPSILON = 1e-7  # keras.config.epsilon()'s default


class _Constraint(identifiers.Configurable, abc.ABC):
    keras_module: ClassVar[str] = "keras.constraints"

    def __call__(self, w: npt.ArrayLike) -> Array:
        """Project `w`."""
        w = np.asarray(w)
        wide = w if w.dtype == np.float64 else w.astype(np.float32)
        with np.errstate(all="ignore"):
            return self._project(wide).astype(w.dtype)

    @abc.abstractmethod
    def _project(self, w: Array) -> Array: ...


def _norms(w: Array, axis: int | tuple[int, ...]) -> Array:
    return np.asarray(np.sqrt(np.sum(np.square(w), axis=axis, keepdims=True)))


@dataclass(frozen=True)
class MaxNorm(_Constraint):
    """Scale weights down to a norm of at most `max_value` along `axis` (an int or several)."""

    max_value: float = 2
    axis: int | tuple[int, ...] = 0

    def _project(self, w: Array) -> Array:
        norms = _norms(w, self.axis)
        return np.asarray(w * (np.clip(norms, 0, self.max_value) / (_EPSILON + norms)))


class NonNeg(_Constraint):
    """Replace negative weights by 0."""

    def _project(self, w: Array) -> Array:
        return np.asarray(np.maximum(w, 0))


@dataclass(frozen=True)
class UnitNorm(_Constraint):
    """Scale weights to norm 1 along `axis`."""

    axis: int | tuple[int, ...] = 0

    def _project(self, w: Array) -> Array:
        return np.asarray(w / (_EPSILON + _norms(w, self.axis)))


@dataclass(frozen=True)
class MinMaxNorm(_Constraint):
    """Move norms along `axis` into [`min_value`, `max_value`] by the share `rate`."""

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int | tuple[int, ...] = 0

    def _project(self, w: Array) -> Array:
        norms = _norms(w, self.axis)
        desired = (
            self.rate * np.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        )
        return np.asarray(w * (desired / (_EPSILON + norms)))


_CLASSES = identifiers.table((MaxNorm, NonNeg, UnitNorm, MinMaxNorm), {})


def get(identifier: Any) -> Constraint | None:
    """Find a constraint by Keras name, config dict, class, instance or callable; None stays None.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    return None if identifier is None else identifiers.get("constraint", _CLASSES, identifier)


def deserialize(config: Any) -> Constraint | None:
    """Find the constraint that `serialize` or Keras wrote as `config`; see `get`."""
    return get(config)


def serialize(constraint: Any) -> dict[str, Any] | None:
    """Return Keras's config dict; None stays None; a custom callable is a ValueError."""
    return identifiers.serialize("constraint", constraint)
