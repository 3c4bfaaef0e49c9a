"""The layer's arguments one by one: checked and resolved, in Keras 3.15's words."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import activations, initializers

Padding = str | tuple[int, int]

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
"""The dtype policies there are; a mixed one computes in 16 bits and keeps weights in float32."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer))  # bool passes as int, as in Keras


def one_integer(value: Any, name: str) -> int:
    """Return `value`, a positive int or a sequence of exactly one, as an int.

    A NumPy scalar is refused as Keras refuses it (inside a tuple it passes).

    Raises
    ------
    ValueError
        If it is not.
    """
    message = f"The `{name}` argument must be a tuple of 1 integers. Received {name}={value}"
    if isinstance(value, int):
        values: tuple[Any, ...] = (value,)
    else:
        try:
            values = tuple(value)
        except TypeError as error:
            raise ValueError(message) from error
    if len(values) != 1:
        raise ValueError(message)
    if not _is_integer(values[0]):
        # Keras runs the two sentences together; its text is kept.
        raise ValueError(f"{message}including element {values[0]} of type {type(values[0])}")
    if values[0] <= 0:
        raise ValueError(
            f"{message}, including values { {int(values[0])} } that do not satisfy `value > 0`"
        )
    return int(values[0])


def positive(value: Any, name: str) -> int:
    """Return `value`, an integer above 0, as an int; a ValueError that names `name` otherwise."""
    if not _is_integer(value) or value <= 0:
        kind = "" if _is_integer(value) else f" (of type {type(value)}); pass an int"
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected a strictly positive value. "
            f"Received {name}={value}{kind}."
        )
    return int(value)


def padding(value: Any) -> Padding:
    """Return "valid", "same" or the pair (left, right) of zeros to put around the steps.

    Raises
    ------
    ValueError
        If it is none of these. For "causal" the message says which pair it is.
    """
    if isinstance(value, str):
        name = value.lower()
        if name in ("valid", "same"):
            return name
        hint = ". For causal padding pass `padding=((kernel_size - 1) * dilation_rate, 0)`"
        raise ValueError(
            "The `padding` argument must be a list/tuple or one of {'valid', 'same'}. "
            f"Received: {name}{hint if name == 'causal' else ''}"
        )
    if isinstance(value, (list, tuple)) and len(value) == 2:
        left, right = value
        if _is_integer(left) and _is_integer(right) and left >= 0 and right >= 0:
            return int(left), int(right)
    raise ValueError(
        "The `padding` argument must be a list/tuple or one of {'valid', 'same'}; a list/tuple is "
        f"(left, right), two integers >= 0. Received: {value}"
    )


def data_format(value: Any) -> str:
    """Return "channels_last" or "channels_first"; None is what the user's keras.json says."""
    if value is None:
        return _keras_default(
            "image_data_format", "channels_last", ("channels_last", "channels_first")
        )
    name = str(value).lower()
    if name not in ("channels_first", "channels_last"):
        raise ValueError(
            "The `data_format` argument must be one of {'channels_first', 'channels_last'}. "
            f"Received: data_format={name}"
        )
    return name


def policy(value: Any) -> str:
    """Return the name of the dtype policy `value` stands for.

    Parameters
    ----------
    value
        A name of `POLICIES`, a NumPy dtype or scalar type, a Keras policy or its config dict, or
        None: the `floatx` of the user's keras.json, else float32.

    Raises
    ------
    ValueError
        If it stands for none of `POLICIES`.
    """
    if value is None:
        return _keras_default("floatx", "float32", ("float16", "float32", "float64"))
    name: Any = value
    if isinstance(value, Mapping):
        inner = value.get("config")
        name = inner.get("name") if isinstance(inner, Mapping) else None
    elif isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        name = np.dtype(value).name
    elif not isinstance(value, str):
        name = getattr(value, "name", None)
        if not isinstance(name, str):
            raise ValueError(
                "Cannot interpret `dtype` argument. Expected a string or an instance of "
                f"DTypePolicy. Received: dtype={value}"
            )
    if name not in POLICIES:
        raise ValueError(
            f"Cannot convert '{name}' to a mixed precision DTypePolicy. Valid policies are "
            f"{', '.join(repr(p) for p in POLICIES)}. Received: dtype={value}"
        )
    return str(name)


def layer_name(value: Any) -> str:
    """Return `value` if it is a string without "/", else raise a ValueError."""
    if not isinstance(value, str) or "/" in value:
        raise ValueError(
            "Argument `name` must be a string and cannot contain character `/`. "
            f"Received: name={value} (of type {type(value)})"
        )
    return value


def _keras_default(key: str, default: str, allowed: tuple[str, ...]) -> str:
    """Return the setting `key` of $KERAS_HOME/keras.json or ~/.keras/keras.json, else `default`."""
    folder = os.environ.get("KERAS_HOME", "~/.keras")
    path = Path(folder, "keras.json").expanduser()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Keras, too, takes an unreadable file for an empty one
        return default
    value = settings.get(key, default) if isinstance(settings, dict) else default
    if value not in allowed:
        raise ValueError(
            f"Invalid `{key}` configuration in {path}. Expected one of {allowed}. "
            f"Received: {key}={value}"
        )
    return str(value)


def activation(identifier: Any) -> Callable[..., Any]:
    """Return the activation, which must be callable with the outputs alone."""
    fn = activations.get(identifier)
    if fn is activations.threshold:
        raise ValueError(
            "The `activation` argument cannot be 'threshold' alone, which needs a threshold and a "
            "default value. Pass functools.partial(tvm_sepconv.activations.threshold, threshold=…, "
            "default_value=…)"
        )
    return fn


def weight_initializers(
    identifiers: tuple[Any, Any, Any], seed: int | None
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return the initializers of depthwise kernel, pointwise kernel and bias, None replaced.

    `seed`, if not None, seeds those that have no seed; an int, or a ValueError follows.
    """
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"The `seed` argument must be an int or None. Received: seed={seed}")
    defaults = (initializers.GlorotUniform(), initializers.GlorotUniform(), initializers.Zeros())
    chosen = [
        default if (found := initializers.get(identifier)) is None else found
        for identifier, default in zip(identifiers, defaults, strict=True)
    ]
    if seed is not None:
        # Three streams that are as independent as NumPy can make them, whatever the seed.
        streams = np.random.SeedSequence(seed % 2**64).generate_state(3).tolist()
        chosen = [initializers.with_seed(i, s) for i, s in zip(chosen, streams, strict=True)]
    return chosen[0], chosen[1], chosen[2]


def check_keywords(unknown: dict[str, Any]) -> None:
    """Accept what every Keras layer accepts and does not need here; refuse the rest."""
    unknown.pop("autocast", None)
    input_dim, input_shape = unknown.pop("input_dim", None), None
    if input_dim is None:
        input_shape = unknown.pop("input_shape", None)
    if input_dim is not None or input_shape is not None:
        warnings.warn(
            "Do not pass an `input_shape`/`input_dim` argument to a layer: it is not used. The "
            "layer takes its channels from the first input, or from `build`.",
            UserWarning,
            stacklevel=4,
        )
    if unknown:
        raise ValueError(f"Unrecognized keyword arguments passed to SeparableConv1D: {unknown}")
