"""The layer as a function, composed with whatever comes first."""

from __future__ import annotations

import inspect
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
        None, an array or tensor, or a model with a method ``add``.

    Returns
    -------
    Any
        The layer for None, its output for an array or tensor, `object` with the layer added for a
        model.
    """
    layer = SeparableConv1D(filters, kernel_size, *args, **kwargs)
    if object is None:
        return layer
    is_data = isinstance(object, (np.ndarray, list, tuple)) or hasattr(object, "__dlpack__")
    if not is_data and hasattr(object, "add"):
        object.add(layer)
        return object
    return layer(object)


_first = inspect.Parameter("object", inspect.Parameter.POSITIONAL_OR_KEYWORD)
layer_separable_conv_1d.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_first, *SeparableConv1D.__signature__.parameters.values()]
)
