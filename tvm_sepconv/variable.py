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
        return str(self._value.dtype.name)

    def numpy(self) -> npt.NDArray[Any]:
        """Return a copy of the value."""
        return np.array(self._value)

    def assign(self, value: npt.ArrayLike) -> Variable:
        """Replace the value; the next call of the layer uses it.

        Raises
        ------
        ValueError
            If the shape differs.
        TypeError
            If `value` is not made of real numbers.
        """
        array = np.asarray(value)
        self.check_dtype(array)
        if array.shape != self.shape:
            raise ValueError(
                "The shape of the target variable and the shape of the target value in "
                f"`variable.assign(value)` must match. variable.shape={self.shape}, "
                f"Received: value.shape={array.shape}. Target variable: {self}"
            )
        self._value = array.astype(self._value.dtype)  # a new one: calls that run keep the old
        self._changed()
        return self

    def check_dtype(self, array: npt.NDArray[Any]) -> None:
        """Refuse what has no value in the variable's dtype: complex numbers, strings, objects."""
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise TypeError(
                f"The value of `{self.name}` must have a floating-point or integer dtype. "
                f"Received: value.dtype={array.dtype}"
            )

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("A Variable is converted to an array by copying its value.")
        return self._value.astype(dtype or self._value.dtype)

    def __repr__(self) -> str:
        return f"<Variable {self.name}, shape={self.shape}, dtype={self.dtype}>"
