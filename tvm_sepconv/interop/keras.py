"""Keras's models: their SeparableConv1D layers from a saved file, or replaced in the model itself.

`from_keras` reads files and needs no Keras. `SeparableConv1D` and `convert` are for use inside
Keras, which they import when they are asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from tvm_sepconv import constraints, initializers, regularizers, tensors
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop.keras_files import ModelConfig, OpenModel, newer, open_model
from tvm_sepconv.interop.keras_folding import Fold, fold
from tvm_sepconv.interop.keras_model import (
    Place,
    SavedLayer,
    is_separable,
    once,
    places,
    read_model,
    separable_inside,
)
from tvm_sepconv.layer import SeparableConv1D as Layer

if TYPE_CHECKING:
    from tvm_sepconv.interop.keras_convert import convert
    from tvm_sepconv.interop.keras_layer import SeparableConv1D

__all__ = [
    "Fold",
    "KerasLayers",
    "SavedLayer",
    "SeparableConv1D",
    "convert",
    "from_keras",
    "read_model",
]

log = logging.getLogger("tvm_sepconv")

_IN_KERAS = {
    "SeparableConv1D": "tvm_sepconv.interop.keras_layer",
    "convert": "tvm_sepconv.interop.keras_convert",
}


def __getattr__(name: str) -> Any:
    if name not in _IN_KERAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_IN_KERAS[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "tvm_sepconv":
            raise
        raise ImportError(
            f"`{name}` works inside Keras, with one of its backends, but '{missing}' is not "
            "installed. Install an extra: pip install 'tvm-sepconv[keras,jax]' (or "
            "`tensorflow` or `torch` for the backend, with KERAS_BACKEND set to it)."
        ) from error


# What TF-Keras 2 writes for every convolution and this layer has no use for.
_KERAS_2 = ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint")
_FOR_TRAINING = {
    f"{owner}_{kind}": get
    for kind, get, owners in (
        ("initializer", initializers.get, ("depthwise", "pointwise", "bias")),
        ("regularizer", regularizers.get, ("depthwise", "pointwise", "bias", "activity")),
        ("constraint", constraints.get, ("depthwise", "pointwise", "bias")),
    )
    for owner in owners
}


class KerasLayers(dict[str, Layer]):
    """The layers of a saved model by name.

    Attributes
    ----------
    folds
        What was folded into each layer, by the same names; empty unless that was asked for.
    """

    folds: dict[str, Fold]


def from_keras(
    path: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    fold_batch_norm: bool = False,
    fold_activation: bool = False,
) -> KerasLayers:
    """Read every SeparableConv1D of a saved Keras model, at any depth.

    Needs h5py (the ``[h5]`` extra), not Keras.

    Parameters
    ----------
    path
        A ``.keras`` file of Keras 3 or TF-Keras, a ``.weights.h5`` file of theirs, or a legacy
        ``.h5`` file, which Keras 2 and 3 write.
    config
        For a file with weights alone, what the model is made of: its ``get_config()``, its
        ``to_json()`` as text or in a ``.json`` file, or a ``.keras`` or ``.h5`` file of it.
    fold_batch_norm
        Whether to fold a BatchNormalization along the channels that is all that takes a layer's
        output, if the layer has no activation of its own. A warning says where there is one that
        could not be folded; the result's ``folds`` tell how far each fold moved the outputs.
    fold_activation
        Whether to fold an Activation, ReLU, LeakyReLU or ELU layer in the same place, or behind the
        BatchNormalization, if a kernel has that function.

    Returns
    -------
    KerasLayers
        A dict of built layers with the saved weights, by layer name, in the model's order. Layers
        of several models that bear the same name are keyed ``outer/inner/name`` instead, as in
        Keras's paths. A layer that is used at several places is there once.

    Warns
    -----
    UserWarning
        For a layer that is left out, named with the reason: one inside a wrapper such as
        TimeDistributed, of a class that is not Keras's own, or with an activation or arguments that
        are not known here. For custom initializers, regularizers and constraints, which only matter
        in training and are left away.

    Raises
    ------
    ValueError
        The file is none of Keras's, is damaged, has no such layer, or its weights do not fit its
        configuration.
    FileNotFoundError
        There is no such file.
    ImportError
        h5py is not installed.
    """
    layers = KerasLayers()
    layers.folds = {}
    found = read_layers(path, config, fold_batch_norm, fold_activation)
    own_names = [names[-1] for names, _, _ in found]
    for names, layer, folded in found:
        name = names[-1] if own_names.count(names[-1]) == 1 else "/".join(names)
        while name in layers:  # TF-Keras allows a "/" in a layer's own name too
            name += "_"
        layers[name] = layer
        if folded is not None:
            layers.folds[name] = folded
            log.info("layer '%s': %s", name, folded)
            if folded.reason is not None:
                warnings.warn(
                    f"Layer '{name}' is not all that was asked for: {folded}", stacklevel=2
                )
    return layers


Found = tuple[tuple[str, ...], Layer, Fold | None]


def read_layers(
    path: str | os.PathLike[str],
    config: ModelConfig | None,
    fold_batch_norm: bool,
    fold_activation: bool,
) -> list[Found]:
    """Read the layers as `from_keras` does, with the names around each, outermost first."""
    left_out: list[str] = []
    found: list[Found] = []
    with open_model(path, config) as model:
        chosen = [place for place in places(model) if _is_chosen(place, left_out)]
        for saved, at in once(model, iter(chosen)):
            parsed = _parse(saved, left_out)
            if parsed is None:
                continue
            weights = _checked_weights(saved, parsed, model)
            folded = None
            if fold_batch_norm or fold_activation:
                parsed, weights, folded = fold(
                    model, at, parsed, weights, fold_batch_norm, fold_activation
                )
            found.append((saved.names, _layer(parsed, weights), folded))
        end = f"{newer(model.version)} {model.received}"
    if not found:
        raise ValueError(_none_found(left_out) + end)
    for text in left_out:
        warnings.warn(text, stacklevel=3)
    return found


def _is_chosen(place: Place, left_out: list[str]) -> bool:
    entry = place.entry
    if is_separable(entry):
        return True
    name, class_name = "/".join(place.names), entry["class_name"]
    if inner := separable_inside(entry["config"]):
        left_out.append(
            f"Layer '{inner}' is left out: it is inside the {class_name} layer '{name}', and only "
            "layers called on (batch, steps, channels) by the model itself are read."
        )
    elif class_name.endswith("SeparableConv1D"):
        module = entry.get("module")
        owner = entry.get("registered_name") or (f"{module}.{class_name}" if module else class_name)
        left_out.append(
            f"Layer '{name}' is left out: its class {owner} is not Keras's own and may compute "
            "something else."
        )
    return False


def _parse(saved: SavedLayer, left_out: list[str]) -> SepConvConfig | None:
    """Return the layer's arguments, or None and a line in `left_out` if they are not known."""
    name = "/".join(saved.names)
    given = {k: v for k, v in saved.config.items() if k not in (*_KERAS_2, "batch_input_shape")}
    for key, get in _FOR_TRAINING.items():
        try:
            get(given.get(key))
        except (TypeError, ValueError):
            warnings.warn(
                f"Layer '{name}' is read without its `{key}`, which is not Keras's own and matters "
                f"in training only: {given.pop(key)}",
                stacklevel=4,
            )
    if isinstance(given.get("name"), str):
        given["name"] = given["name"].replace("/", "_")  # TF-Keras allows it
    try:
        is_causal = given.get("padding") == "causal"  # TF-Keras 2 had it
        parsed = SepConvConfig.from_dict({**given, "padding": "valid"} if is_causal else given)
        if is_causal:
            padding = (parsed.effective_kernel - 1, 0)
            parsed = SepConvConfig.from_dict({**given, "padding": padding})
    except (TypeError, ValueError) as error:
        left_out.append(f"Layer '{name}' is left out: {error}")
        return None
    if "bfloat16" in parsed.dtype:
        tensors.need_bfloat16()
    return parsed


def _checked_weights(saved: SavedLayer, config: SepConvConfig, model: OpenModel) -> list[Any]:
    """Return the layer's weights, once their shapes agree with its arguments."""
    shapes = [weights.shape for weights in saved.weights]
    channels = saved.channels
    if channels is None and shapes and len(shapes[0]) == 3:
        channels = shapes[0][1]
    expected = [] if channels is None else list(config.weight_shapes(channels).values())
    if not expected or shapes != expected:
        raise ValueError(
            f"The saved weights of layer '{saved.names[-1]}' must fit its configuration: expected "
            f"shapes {expected or 'of a built layer'}. Received: {shapes or 'no weights'} in "
            f"`{saved.group}`. Build the model (call it once) before saving it."
            f"{newer(model.version)}"
        )
    return [weights.astype(config.variable_dtype) for weights in saved.weights]


def _layer(config: SepConvConfig, weights: list[Any]) -> Layer:
    layer = Layer._of(config)
    layer._restore(weights[0].shape[1], weights)
    return layer


def _none_found(left_out: list[str]) -> str:
    if left_out:
        return "`from_keras` found no SeparableConv1D layer that it can read. " + " ".join(left_out)
    return (
        "`from_keras` found no SeparableConv1D layer in the model. Layers that a custom layer or "
        "subclassed model creates for itself do not stand in the file's config: copy those with "
        "`set_weights(keras_layer.get_weights())`."
    )
