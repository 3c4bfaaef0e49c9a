"""The layer as a function, composed with whatever comes first."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np

from tvm_sepconv.layer import SeparableConv1D


def layer_separable_conv_1d(
    object: Any, filters: Any, kernel_size: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make a `SeparableConv1D` and compose it with `object`.

    The arguments after `object` are the layer's, in its order and with its defaults.

    Parameters
    ----------
    object
        None, an array or tensor, or a model with a method ``add``. A Sequential of Keras or a
        symbolic tensor gets the Keras layer, `tvm_sepconv.interop.keras.SeparableConv1D`.

    Returns
    -------
    Any
        The layer for None, its output for an array or tensor, `object` with the layer added for a
        model.
    """
    layer: Any = _layer_class(object)(filters, kernel_size, *args, **kwargs)
    if object is None:
        return layer
    is_data = isinstance(object, (np.ndarray, list, tuple)) or hasattr(object, "__dlpack__")
    if not is_data and hasattr(object, "add"):
        object.add(layer)
        return object
    return layer(object)


def _layer_class(object: Any) -> Any:
    keras = sys.modules.get("keras")  # who has an object of Keras has imported it
    if keras is not None and isinstance(object, (keras.Model, keras.KerasTensor)):
        from tvm_sepconv.interop.keras import SeparableConv1D as KerasLayer

        return KerasLayer
    return SeparableConv1D


_first = inspect.Parameter("object", inspect.Parameter.POSITIONAL_OR_KEYWORD)
layer_separable_conv_1d.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_first, *SeparableConv1D.__signature__.parameters.values()]
)
