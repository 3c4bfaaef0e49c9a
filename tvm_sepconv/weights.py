"""A layer's weights: made, read, replaced, constrained; Keras's names and forms."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.variable import Variable

Array = npt.NDArray[Any]

WEIGHTS = ("depthwise_kernel", "pointwise_kernel", "bias")


class Weights:
    """The part of `SeparableConv1D` that has weights, and is told when they change."""

    config: SepConvConfig
    name: str
    trainable: bool
    depthwise_kernel: Variable | None
    pointwise_kernel: Variable | None
    bias: Variable | None
    _channels: int | None
    _activity_loss: Any
    _lock: threading.RLock

    def _weights_changed(self) -> None:
        """Called after a weight got another value."""

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self._channels is not None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create the weights for inputs of `input_shape`; batch and steps may be None.

        Raises
        ------
        ValueError
            If the channels are None, or the shape does not fit the layer.
        """
        with self._lock:
            if self.built:
                return
            config = self.config
            config.check_input_shape(input_shape)
            channels = input_shape[config.channel_axis]
            assert channels is not None  # check_input_shape refuses it
            initial = [
                (config.depthwise_initializer, config.depthwise_shape(channels)),
                (config.pointwise_initializer, config.pointwise_shape(channels)),
                (config.bias_initializer, config.bias_shape),
            ]
            names = WEIGHTS[: 2 + config.use_bias]
            for name, (initializer, shape) in zip(names, initial, strict=False):
                value = np.asarray(initializer(shape, dtype=config.variable_dtype))
                setattr(self, name, Variable(name, value, self._weights_changed))
            self._channels = channels

    @property
    def weights(self) -> list[Variable]:
        """``depthwise_kernel``, ``pointwise_kernel`` and, if the layer has one, ``bias``."""
        variables = (self.depthwise_kernel, self.pointwise_kernel, self.bias)
        return [v for v in variables if v is not None]

    @property
    def trainable_weights(self) -> list[Variable]:
        """The weights if the layer is trainable, else none."""
        return self.weights if self.trainable else []

    def get_weights(self) -> list[Array]:
        """Return copies of the weights, in Keras's order and shapes."""
        return [v.numpy() for v in self.weights]

    def set_weights(self, weights: Sequence[npt.ArrayLike]) -> None:
        """Replace all weights, or none if one does not fit.

        Raises
        ------
        ValueError
            If the layer is not built, or the number or a shape differs.
        TypeError
            If one is not numeric.
        """
        self._need_built("set_weights")
        if len(weights) != len(self.weights):
            raise ValueError(
                f"You called `set_weights(weights)` on layer '{self.name}' with a weight list of "
                f"length {len(weights)}, but the layer was expecting {len(self.weights)} weights."
            )
        arrays = [np.asarray(w) for w in weights]
        for variable, array in zip(self.weights, arrays, strict=True):
            variable.check_dtype(array)
            if variable.shape != array.shape:
                raise ValueError(
                    f"Layer {self.name} weight `{variable.name}` has shape {variable.shape}, which "
                    f"is not compatible with provided weight shape {array.shape}."
                )
        with self._lock:
            for variable, array in zip(self.weights, arrays, strict=True):
                variable.assign(array)

    def count_params(self) -> int:
        """Return the number of scalars in the weights."""
        self._need_built("count_params")
        return sum(int(np.prod(v.shape)) for v in self.weights)

    def _need_built(self, what: str) -> None:
        if not self.built:
            raise ValueError(
                f"You tried to call `{what}` on layer '{self.name}', but the layer isn't built. "
                "Call `build(input_shape)` first, or call the layer on data."
            )

    @property
    def losses(self) -> list[Any]:
        """The penalty of the last call's output, then those of trainable weights."""
        losses = [] if self._activity_loss is None else [self._activity_loss]
        for variable in self.trainable_weights:
            regularizer = getattr(
                self.config, f"{variable.name.removesuffix('_kernel')}_regularizer"
            )
            if regularizer is not None:
                losses.append(regularizer(variable.numpy()))
        return losses

    def apply_constraints(self) -> None:
        """Project each weight on its constraint, as an optimizer does after a step."""
        for variable in self.weights:
            constraint = getattr(self.config, f"{variable.name.removesuffix('_kernel')}_constraint")
            if constraint is not None:
                variable.assign(constraint(variable.numpy()))
