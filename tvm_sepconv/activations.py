"""Keras 3.15's activations in NumPy, and how Keras names them.

The functions keep dtype and shape (glu halves an axis), propagate NaN as Keras on JAX does, and
raise no NumPy warnings. `get` and `serialize` go between them and Keras's configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy.typing as npt

from tvm_sepconv import activation_functions as functions
from tvm_sepconv.activation_functions import *  # noqa: F403 - all that its __all__ has

Array = npt.NDArray[Any]
Activation = Callable[..., Any]

_FUNCTIONS: dict[str, Activation] = {n: getattr(functions, n) for n in functions.__all__}
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
    "ReLU": (functions.relu, {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}),
    "LeakyReLU": (functions.leaky_relu, {"negative_slope": 0.3}),
    "ELU": (functions.elu, {"alpha": 1.0}),
    "Softmax": (functions.softmax, {"axis": -1}),
}

# Parameters that make a layer one of the named functions, which a kernel can apply.
_PLAIN: dict[ActivationLayer, Activation] = {
    ActivationLayer(class_name, tuple(sorted(parameters.items()))): fn
    for class_name, parameters, fn in (
        ("ReLU", {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}, functions.relu),
        ("ReLU", {"max_value": 6.0, "negative_slope": 0.0, "threshold": 0.0}, functions.relu6),
        ("LeakyReLU", {"negative_slope": 0.2}, functions.leaky_relu),
        ("ELU", {"alpha": 1.0}, functions.elu),
        ("Softmax", {"axis": -1}, functions.softmax),
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
        return functions.linear
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
