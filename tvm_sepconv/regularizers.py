"""Keras 3.15's weight and activity regularizers in NumPy."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from tvm_sepconv import identifiers

Array = npt.NDArray[Any]
Regularizer = Callable[[Any], Any]


class _Regularizer(identifiers.Configurable, abc.ABC):
    keras_module: ClassVar[str] = "keras.regularizers"

    def __call__(self, x: npt.ArrayLike) -> np.floating[Any]:
        """Return the penalty of `x`, a scalar of its dtype, summed in float64."""
        x = np.asarray(x)
        with np.errstate(all="ignore"):
            penalty = np.asarray(self._penalty(x.astype(np.float64))).astype(x.dtype)
        return cast("np.floating[Any]", penalty[()])

    @abc.abstractmethod
    def _penalty(self, x: Array) -> Any: ...

    def _check(self, *names: str, default: float) -> None:
        """Replace None by `default` and refuse what is no non-negative finite float."""
        for name in names:
            value = getattr(self, name)
            value = default if value is None else value
            if not isinstance(value, (float, int)) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"Invalid value for argument `{name}`: expected a non-negative float. "
                    f"Received: {name}={value}"
                )
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class L1(_Regularizer):
    """`l1 * Σ|x|`."""

    l1: float = 0.01

    def __post_init__(self) -> None:
        self._check("l1", default=0.01)

    def _penalty(self, x: Array) -> Any:
        return self.l1 * np.sum(np.abs(x))


@dataclass(frozen=True)
class L2(_Regularizer):
    """`l2 * Σx²`."""

    l2: float = 0.01

    def __post_init__(self) -> None:
        self._check("l2", default=0.01)

    def _penalty(self, x: Array) -> Any:
        return self.l2 * np.sum(np.square(x))


@dataclass(frozen=True)
class L1L2(_Regularizer):
    """`l1 * Σ|x| + l2 * Σx²`; a factor of 0 leaves its term out."""

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        self._check("l1", "l2", default=0.0)

    def _penalty(self, x: Array) -> Any:
        # Left out rather than multiplied by 0, so that an infinite weight gives no NaN.
        l1 = self.l1 * np.sum(np.abs(x)) if self.l1 else 0.0
        return l1 + (self.l2 * np.sum(np.square(x)) if self.l2 else 0.0)


@dataclass(frozen=True)
class OrthogonalRegularizer(_Regularizer):
    """`factor` times the mean |cosine| between the rows (or columns) of a matrix.

    Only for two-dimensional weights, as in Keras: a SeparableConv1D kernel has three axes.
    """

    factor: float = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        self._check("factor", default=0.01)
        if self.mode not in ("rows", "columns"):
            raise ValueError(
                'Invalid value for argument `mode`. Expected one of {"rows", "columns"}. '
                f"Received: mode={self.mode}"
            )

    def _penalty(self, x: Array) -> Any:
        if x.ndim != 2:
            raise ValueError(
                "Inputs to OrthogonalRegularizer must have rank 2. "
                f"Received: inputs.shape={x.shape}"
            )
        rows = x if self.mode == "rows" else x.T
        # 1e7 = 1 / Keras's epsilon keeps a row of zeros a row of zeros.
        rows = rows * np.minimum(1 / np.sqrt(np.sum(np.square(rows), axis=1, keepdims=True)), 1e7)
        size = len(rows)
        off_diagonal = (rows @ rows.T) * (1.0 - np.eye(size))
        return self.factor * 0.5 * np.sum(np.abs(off_diagonal)) / np.float64(size * (size - 1) / 2)


_CLASSES = identifiers.table(
    (L1, L2, L1L2, OrthogonalRegularizer),
    # Keras's documentation says "l1_l2", its code knows "l1l2".
    {"l1_l2": L1L2},
)


def get(identifier: Any) -> Regularizer | None:
    """Find a regularizer by Keras name, config dict, class, instance or callable; None stays None.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    return None if identifier is None else identifiers.get("regularizer", _CLASSES, identifier)


def deserialize(config: Any) -> Regularizer | None:
    """Find the regularizer that `serialize` or Keras wrote as `config`; see `get`."""
    return get(config)


def serialize(regularizer: Any) -> dict[str, Any] | None:
    """Return Keras's config dict; None stays None; a custom callable is a ValueError."""
    return identifiers.serialize("regularizer", regularizer)
