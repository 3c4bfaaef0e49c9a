"""Keras 3.15's activations in NumPy, and how Keras names them.

The functions keep dtype and shape (glu halves an axis), propagate NaN as Keras on JAX does, and
raise no NumPy warnings. `get` and `serialize` go between them and Keras's configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy.typing as npt

from tvm_sepconv.activation_functions import (
    celu as celu,
)
from tvm_sepconv.activation_functions import (
    elu as elu,
)
from tvm_sepconv.activation_functions import (
    exponential as exponential,
)
from tvm_sepconv.activation_functions import (
    gelu as gelu,
)
from tvm_sepconv.activation_functions import (
    glu as glu,
)
from tvm_sepconv.activation_functions import (
    hard_shrink as hard_shrink,
)
from tvm_sepconv.activation_functions import (
    hard_sigmoid as hard_sigmoid,
)
from tvm_sepconv.activation_functions import (
    hard_silu as hard_silu,
)
from tvm_sepconv.activation_functions import (
    hard_tanh as hard_tanh,
)
from tvm_sepconv.activation_functions import (
    leaky_relu as leaky_relu,
)
from tvm_sepconv.activation_functions import (
    linear as linear,
)
from tvm_sepconv.activation_functions import (
    log_sigmoid as log_sigmoid,
)
from tvm_sepconv.activation_functions import (
    log_softmax as log_softmax,
)
from tvm_sepconv.activation_functions import (
    mish as mish,
)
from tvm_sepconv.activation_functions import (
    relu as relu,
)
from tvm_sepconv.activation_functions import (
    relu6 as relu6,
)
from tvm_sepconv.activation_functions import (
    selu as selu,
)
from tvm_sepconv.activation_functions import (
    sigmoid as sigmoid,
)
from tvm_sepconv.activation_functions import (
    silu as silu,
)
from tvm_sepconv.activation_functions import (
    soft_shrink as soft_shrink,
)
from tvm_sepconv.activation_functions import (
    softmax as softmax,
)
from tvm_sepconv.activation_functions import (
    softplus as softplus,
)
from tvm_sepconv.activation_functions import (
    softsign as softsign,
)
from tvm_sepconv.activation_functions import (
    sparse_plus as sparse_plus,
)
from tvm_sepconv.activation_functions import (
    sparse_sigmoid as sparse_sigmoid,
)
from tvm_sepconv.activation_functions import (
    sparsemax as sparsemax,
)
from tvm_sepconv.activation_functions import (
    squareplus as squareplus,
)
from tvm_sepconv.activation_functions import (
    tanh as tanh,
)
from tvm_sepconv.activation_functions import (
    tanh_shrink as tanh_shrink,
)
from tvm_sepconv.activation_functions import (
    threshold as threshold,
)

Array = npt.NDArray[Any]
Activation = Callable[..., Any]

_FUNCTIONS: dict[str, Activation] = {
    fn.__name__: fn
    for fn in (
        relu, leaky_relu, relu6, softmax, celu, elu, selu, softplus, softsign, squareplus,
        soft_shrink, sparse_plus, silu, gelu, glu, tanh, tanh_shrink, threshold, sigmoid,
        sparse_sigmoid, exponential, hard_sigmoid, hard_silu, hard_tanh, hard_shrink, linear,
        mish, log_softmax, log_sigmoid, sparsemax,
    )
}  # fmt: skip
_ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}

NAMES = frozenset(_FUNCTIONS)
"""The canonical Keras name of every activation here."""

ELEMENTWISE = NAMES - {"softmax", "log_softmax", "sparsemax", "glu", "threshold"}
"""Names a kernel can apply to one element alone. `threshold` is none: it needs two arguments."""


@dataclass(frozen=True)
class ActivationLayer:
    """A Keras activation layer with its parameters: a callable that serialises as that layer does.

    Parameters
    ----------
    class_name
        `"ReLU"`, `"LeakyReLU"`, `"ELU"` or `"Softmax"`.
    parameters
        The layer's arguments, all of them, as sorted (name, value) pairs.
    """

    class_name: str
    parameters: tuple[tuple[str, Any], ...]

    def __call__(self, x: npt.ArrayLike) -> Array:
        """Apply the function to `x`; shape and dtype stay."""
        return cast(Array, _LAYERS[self.class_name][0](x, **dict(self.parameters)))

    def get_config(self) -> dict[str, Any]:
        """Return the layer's arguments."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.parameters}


# The layers' own defaults: LeakyReLU's slope is 0.3 where leaky_relu's is 0.2.
_LAYERS: dict[str, tuple[Activation, dict[str, Any]]] = {
    "ReLU": (relu, {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}),
    "LeakyReLU": (leaky_relu, {"negative_slope": 0.3}),
    "ELU": (elu, {"alpha": 1.0}),
    "Softmax": (softmax, {"axis": -1}),
}

# Parameters that make a layer one of the named functions, which a kernel can apply.
_PLAIN: dict[ActivationLayer, Activation] = {
    ActivationLayer(class_name, tuple(sorted(parameters.items()))): fn
    for class_name, parameters, fn in (
        ("ReLU", {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}, relu),
        ("ReLU", {"max_value": 6.0, "negative_slope": 0.0, "threshold": 0.0}, relu6),
        ("LeakyReLU", {"negative_slope": 0.2}, leaky_relu),
        ("ELU", {"alpha": 1.0}, elu),
        ("Softmax", {"axis": -1}, softmax),
    )
}


def _layer(class_name: str, config: Mapping[str, Any]) -> Activation:
    """Make the callable of a Keras activation layer's config."""
    defaults = _LAYERS[class_name][1]
    given = {k: v for k, v in config.items() if k not in ("name", "trainable", "dtype")}
    if class_name == "LeakyReLU" and "alpha" in given:  # Keras 2's word for it
        given["negative_slope"] = given.pop("alpha")
    if unknown := given.keys() - defaults.keys():
        raise ValueError(
            f"Unrecognized keyword arguments passed to {class_name}: "
            f"{ {k: given[k] for k in sorted(unknown)} }. Expected some of {sorted(defaults)}"
        )
    merged = {**defaults, **given}
    for key in merged.keys() & {"negative_slope", "threshold", "max_value", "alpha"}:
        value = merged[key]
        optional = key == "max_value" and value is None
        if not optional and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(
                f"The `{key}` argument of a {class_name} layer cannot be None or negative. "
                f"Expected a non-negative float. Received: {key}={value}"
            )
    pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in merged.items())
    layer = ActivationLayer(class_name, tuple(sorted(pairs)))
    return _PLAIN.get(layer, layer)


def _from_dict(config: Mapping[str, Any]) -> Activation | None:
    class_name, inner = config.get("class_name"), config.get("config")
    if class_name == "function" and isinstance(inner, str):
        return _FUNCTIONS.get(_ALIASES.get(inner, inner))
    if class_name == "Activation" and isinstance(inner, Mapping):
        return get(inner.get("activation"))
    if class_name in _LAYERS and isinstance(inner, Mapping):
        return _layer(str(class_name), inner)
    return _FUNCTIONS.get(_ALIASES.get(str(class_name), str(class_name)))


def get(identifier: Any) -> Activation:
    """Find an activation.

    Parameters
    ----------
    identifier
        None (linear), a Keras name, Keras's config dict of a function or of a ReLU, LeakyReLU, ELU,
        Softmax or Activation layer, or any callable, which is returned as it is.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if identifier is None:
        return linear
    fn: Any = identifier
    if isinstance(identifier, str):
        fn = _FUNCTIONS.get(_ALIASES.get(identifier, identifier))
    elif isinstance(identifier, Mapping):
        fn = _from_dict(identifier)
    if callable(fn):
        return cast(Activation, fn)
    raise ValueError(
        f"Could not interpret activation function identifier: {identifier}. Pass a callable, "
        f"a Keras activation config, or one of {', '.join(sorted({*NAMES, *_ALIASES}))}"
    )


def deserialize(config: Any) -> Activation:
    """Find the activation that `serialize` or Keras wrote as `config`; see `get`."""
    return get(config)


def name_of(fn: Any) -> str | None:
    """Return the canonical Keras name if `fn` is a function of this module, else None."""
    name = getattr(fn, "__name__", None)
    return name if isinstance(name, str) and _FUNCTIONS.get(name) is fn else None


def serialize(fn: Any) -> str | dict[str, Any]:
    """Return what Keras writes into a config for `fn`: a name, or the config dict of a layer.

    Raises
    ------
    ValueError
        If `fn` is a custom callable.
    """
    if (name := name_of(fn)) is not None:
        return name
    if isinstance(fn, ActivationLayer):
        return {
            "module": "keras.layers",
            "class_name": fn.class_name,
            "config": fn.get_config(),
            "registered_name": None,
        }
    raise ValueError(
        f"Unknown activation function '{fn}' cannot be serialized: a custom callable has no Keras "
        "name and cannot be put in a config. Use one of the named activations, or apply the "
        "callable after a layer with `activation=None`"
    )
