"""A weight of a layer, with the part of Keras's Variable that inference and training loops use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class Variable:
    """A named array that tells its layer when it changes."""

    def __init__(self, name: str, value: npt.NDArray[Any], changed: Callable[[], None]) -> None:
        self.name = name
        self._value = value
        self._changed = changed

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, fixed when the layer was built."""
        return self._value.shape

    @property
    def dtype(self) -> str:
        """The dtype's name, such as "float32"."""
        return self._value.dtype.name

    def numpy(self) -> npt.NDArray[Any]:
        """Return a copy of the value."""
        return self._value.copy()

    def assign(self, value: npt.ArrayLike) -> Variable:
        """Replace the value; the next call of the layer uses it.

        Raises
        ------
        ValueError
            If the shape differs.
        """
        array = np.asarray(value)
        if array.shape != self.shape:
            raise ValueError(
                "The shape of the target variable and the shape of the target value in "
                f"`variable.assign(value)` must match. variable.shape={self.shape}, "
                f"Received: value.shape={array.shape}. Target variable: {self}"
            )
        self._value = array.astype(self._value.dtype)  # a new array: calls that run keep the old one
        self._changed()
        return self

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("A Variable is converted to an array by copying its value.")
        return self._value.astype(dtype or self._value.dtype)

    def __repr__(self) -> str:
        return f"<Variable {self.name}, shape={self.shape}, dtype={self.dtype}>"
