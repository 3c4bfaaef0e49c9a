"""The layers after a SeparableConv1D that can be computed within it: folded into its arguments.

At inference a BatchNormalization multiplies each filter and adds to it, which the pointwise kernel
and the bias can do for it; an element-wise activation layer is the layer's own activation. That is
the same layer only where nothing else sees the values in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tvm_sepconv import activations, arguments, reference
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.interop.folding import Affine, batch_norm
from tvm_sepconv.interop.keras_files import OpenModel
from tvm_sepconv.interop.keras_model import Place, is_keras_own, read_layer

Array = np.ndarray[Any, np.dtype[Any]]

_BATCH_NORM = "BatchNormalization"
_ACTIVATIONS = ("Activation", "ReLU", "LeakyReLU", "ELU")
_STEPS = 16  # of output, for the comparison


class Fold(NamedTuple):
    """What was folded into a layer, and how far that moved its outputs.

    Attributes
    ----------
    layers
        Names of the layers that the layer now computes too, in order.
    difference
        The largest difference between the folded layer's outputs and those of the layers one after
        the other, on two inputs of standard normal values; from rounding the folded weights.
    magnitude
        The largest of those outputs.
    reason
        Why what follows was not folded, or not all of it; None where there was no obstacle.
    """

    layers: tuple[str, ...]
    difference: float
    magnitude: float
    reason: str | None

    def __str__(self) -> str:
        """Return the fold in words."""
        parts = []
        if self.layers:
            names = " and ".join(f"'{name}'" for name in self.layers)
            parts.append(
                f"{names} folded in, outputs differ by at most {self.difference:.1e} "
                f"(of up to {self.magnitude:.2g})"
            )
        if self.reason:
            parts.append(f"not folded: {self.reason}")
        return "; ".join(parts) or "nothing to fold"


class NotFoldedError(Exception):
    """A layer cannot be folded; the message says why."""


def fold(
    model: OpenModel,
    saved_at: list[Place],
    config: SepConvConfig,
    weights: list[Array],
    batch_norm: bool,
    activation: bool,
) -> tuple[SepConvConfig, list[Array], Fold]:
    """Fold what follows a layer into it.

    Parameters
    ----------
    saved_at
        Where the layer stands in the model.
    weights
        The layer's.
    batch_norm, activation
        What to fold.

    Returns
    -------
    config, weights, fold
        Of the layer that computes all of it, its weights folded in float64 and rounded once.
    """
    after: list[Callable[[Array], Array]] = []
    layers: list[str] = []
    folded, folded_weights, reason = config, weights, None
    try:
        if batch_norm and (found := _follower(saved_at, (_BATCH_NORM,), config)):
            affine = _affine(model, found, config)
            folded, folded_weights = _scaled(config, weights, affine)
            after.append(_along(config.channel_axis, affine))
            layers.append(found.names[-1])
            saved_at = [found]
        if activation and (found := _follower(saved_at, _ACTIVATIONS, config)):
            folded = dataclasses.replace(folded, activation=_activation(found, folded))
            after.append(folded.activation)
            layers.append(found.names[-1])
    except NotFoldedError as error:
        reason = str(error)
    outcome = Fold(tuple(layers), *_compare(config, weights, after, folded, folded_weights), reason)
    return folded, folded_weights, outcome


def _follower(
    saved_at: list[Place], classes: tuple[str, ...], config: SepConvConfig
) -> Place | None:
    """Return the layer of one of Keras's `classes` that alone takes the output.

    None if none takes it; a NotFoldedError if one does, but something else sees the values too.
    """
    place = saved_at[0]
    name, uses = place.names[-1], place.uses[place.names[-1]]
    takers = [place.siblings[use] for use in uses if use in place.siblings]
    found = next((taker for taker in takers if _is_one_of(taker, classes)), None)
    if found is None:
        return None
    if len(saved_at) > 1:
        raise NotFoldedError(f"'{name}' is shared by {len(saved_at)} models")
    if len(place.entry.get("inbound_nodes", [None])) != 1:
        raise NotFoldedError(f"'{name}' is called more than once")
    if len(uses) != 1:
        raise NotFoldedError(f"{len(uses)} layers or outputs of the model take what '{name}' gives")
    dtype = arguments.policy(found.entry["config"].get("dtype")).removeprefix("mixed_")
    if dtype != config.compute_dtype:
        raise NotFoldedError(f"'{found.names[-1]}' computes in {dtype}, not {config.compute_dtype}")
    return found


def _is_one_of(place: Place, classes: tuple[str, ...]) -> bool:
    return place.entry["class_name"] in classes and is_keras_own(place.entry)


def _is_called_for_training(node: Any) -> bool:
    if isinstance(node, dict):
        return bool(node.get("training")) or _is_called_for_training(list(node.values()))
    return isinstance(node, list) and any(_is_called_for_training(part) for part in node)


def _affine(model: OpenModel, place: Place, layer: SepConvConfig) -> Affine:
    """Return what the normalization multiplies by and then adds, in float64."""
    name, config = place.names[-1], place.entry["config"]
    if layer.activation is not activations.linear:
        raise NotFoldedError(f"the layer's own activation comes before '{name}'")
    axis = config.get("axis", -1)
    axes = [number % 3 for number in (axis if isinstance(axis, list) else [axis])]
    if axes != [layer.channel_axis % 3]:
        raise NotFoldedError(f"'{name}' is along axis {axis}, not along the channels")
    if _is_called_for_training(place.entry.get("inbound_nodes")):
        raise NotFoldedError(f"'{name}' is called with training=True")
    values = [np.asarray(w, np.float64) for w in read_layer(model, place).weights]
    scaled, centred = bool(config.get("scale", True)), bool(config.get("center", True))
    if len(values) < 2 + scaled + centred or any(v.shape != (layer.filters,) for v in values):
        raise NotFoldedError(f"'{name}' has other variables than its configuration says")
    gamma = values.pop(0) if scaled else None
    beta = values.pop(0) if centred else None
    with np.errstate(all="ignore"):  # a negative variance gives NaN, as it does in Keras
        return batch_norm(gamma, beta, values[0], values[1], config.get("epsilon", 1e-3))


def _scaled(
    config: SepConvConfig, weights: list[Array], affine: Affine
) -> tuple[SepConvConfig, list[Array]]:
    depthwise, pointwise, *bias = weights
    constant = bias[0].astype(np.float64) if bias else 0.0
    exact = [pointwise.astype(np.float64) * affine.scale, constant * affine.scale + affine.shift]
    with np.errstate(over="ignore"):
        rounded = [w.astype(config.variable_dtype) for w in exact]
        narrow = [w.astype(config.compute_dtype).astype(np.float64) for w in rounded]
    if not all(np.isfinite(w).all() for w in narrow):
        raise NotFoldedError(f"the folded weights are not finite in {config.compute_dtype}")
    return dataclasses.replace(config, use_bias=True), [depthwise, *rounded]


def _along(axis: int, affine: Affine) -> Callable[[Array], Array]:
    shape = (-1,) if axis == -1 else (-1, 1)
    return lambda y: y * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def _activation(place: Place, config: SepConvConfig) -> Callable[..., Any]:
    name, entry = place.names[-1], place.entry
    if config.activation is not activations.linear:
        raise NotFoldedError(f"the layer's own activation comes before '{name}'")
    try:
        fn = activations.get({"class_name": entry["class_name"], "config": entry["config"]})
    except ValueError as error:
        raise NotFoldedError(f"'{name}' is a function that is not Keras's") from error
    if activations.name_of(fn) not in activations.ELEMENTWISE:
        raise NotFoldedError(f"'{name}' is not one of the element-wise functions of a kernel")
    return fn


def _compare(
    config: SepConvConfig,
    weights: list[Array],
    after: list[Callable[[Array], Array]],
    folded: SepConvConfig,
    folded_weights: list[Array],
) -> tuple[float, float]:
    """Return the largest difference that folding makes, and the largest output."""
    if not after:
        return 0.0, 0.0
    channels = weights[0].shape[1]
    steps = config.effective_kernel + (_STEPS - 1) * config.strides
    x = np.random.default_rng(0).standard_normal((2, steps, channels))
    x = x if config.channel_axis == -1 else x.swapaxes(1, 2)
    y = _exact(x, weights, config)
    for apply in after:
        y = apply(y)
    ours = _exact(x, folded_weights, folded)
    return float(np.abs(ours - y).max()), float(np.abs(y).max())


def _exact(x: Array, weights: list[Array], config: SepConvConfig) -> Array:
    """Apply a layer in float64, its weights as rounded for the kernel."""
    rounded = [w.astype(config.compute_dtype) for w in weights]
    depthwise, pointwise, *bias = rounded
    return reference.separable_conv1d(x, depthwise, pointwise, bias[0] if bias else None, config)
