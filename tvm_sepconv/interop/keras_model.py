"""What a saved Keras model is made of: its layers at every depth, and what follows each."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tvm_sepconv.identifiers import snake_case
from tvm_sepconv.interop import keras_weights
from tvm_sepconv.interop.keras_files import ModelConfig, OpenModel, newer, open_model

Entry = dict[str, Any]

SEPARABLE = "SeparableConv1D"
_OURS = "tvm_sepconv>SeparableConv1D"  # the registered name of the Keras layer of this package


class Place(NamedTuple):
    """Where a layer stands in a saved model.

    Attributes
    ----------
    names
        Names of the models around the layer, without the outermost, then its own.
    entry
        What the config says of it.
    group
        Where Keras 3 keeps its variables, and those of its siblings beside it.
    siblings
        The places of the layers of its model, itself among them, by name.
    uses
        What takes the output of each of those: names of layers, None for the model's output.
    """

    names: tuple[str, ...]
    entry: Entry
    group: str
    siblings: dict[str, Place]
    uses: dict[str, list[str | None]]


class SavedLayer(NamedTuple):
    """One layer of a saved model.

    Attributes
    ----------
    names
        Names of the models around the layer, without the outermost, then its own.
    class_name
        Keras's class, such as ``Dense``.
    config
        What the layer's ``get_config`` returned.
    channels
        Input channels it was built for, None where the file does not say.
    group
        Where Keras 3 keeps it in the weights file.
    weights
        Its variables in Keras's order; bfloat16 ones are widened to float32.
    """

    names: tuple[str, ...]
    class_name: str
    config: dict[str, Any]
    channels: int | None
    group: str
    weights: list[np.ndarray]


def read_model(
    path: str | os.PathLike[str],
    only: Collection[str] | None = None,
    config: ModelConfig | None = None,
) -> list[SavedLayer]:
    """Read a saved model's layers with their configurations and weights, in the model's order.

    Parameters
    ----------
    path, config
        See `tvm_sepconv.from_keras`.
    only
        Classes of Keras to keep, so that the weights of the others are not read; None keeps all.
    """
    with open_model(path, config) as model:
        chosen = (
            place
            for place in places(model)
            if only is None or (place.entry["class_name"] in only and is_keras_own(place.entry))
        )
        return [saved for saved, _ in once(model, chosen)]


def places(model: OpenModel) -> list[Place]:
    """Return the places of all layers that are no models, depth first, in Keras's order."""
    try:
        # A subclassed model lists no layers in its config: it is one without any that we can find.
        return list(_walk(model.config["config"], "", ()))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`path` must be a file of Keras 2 or 3, but its config does not describe a model of "
            f"that kind.{newer(model.version)} {model.received}"
        ) from error


def once(model: OpenModel, chosen: Iterator[Place]) -> list[tuple[SavedLayer, list[Place]]]:
    """Read layers; one that stands at several places is read once, with all its places."""
    read: list[tuple[SavedLayer, list[Place]]] = []
    for place in chosen:
        saved = read_layer(model, place)
        # Keras 3 writes a shared layer where it meets it first, a legacy file has a copy each time.
        twin = next((r for r in read if _is_shared(model, saved, r[0])), None)
        if twin is None:
            read.append((saved, [place]))
        else:
            twin[1].append(place)
    return read


def read_layer(model: OpenModel, place: Place) -> SavedLayer:
    """Read the layer at `place`."""
    entry = place.entry
    weights = keras_weights.read(model, place.names, place.group)
    class_name = entry["class_name"].rpartition(">")[2]
    channels = _built_channels(entry)
    return SavedLayer(place.names, class_name, entry["config"], channels, place.group, weights)


def is_keras_own(entry: Entry) -> bool:
    """Return whether a layer is of Keras's own class, not of somebody else's by that name."""
    # A legacy file and TF-Keras's nested models name no module; a registered class then has a ">".
    module = str(entry.get("module") or "keras").partition(".")[0]
    return module in ("keras", "tf_keras") and ">" not in entry["class_name"]


def is_separable(entry: Entry) -> bool:
    """Return whether an entry is a SeparableConv1D of Keras, or its subclass in this package."""
    if _OURS in (entry.get("registered_name"), entry["class_name"]):
        return True
    return bool(entry["class_name"] == SEPARABLE) and is_keras_own(entry)


def separable_inside(config: Any) -> str | None:
    """Return the name of a SeparableConv1D that a layer's config has somewhere inside, or None."""
    if isinstance(config, Mapping):
        inner = config.get("config")
        if str(config.get("class_name")).endswith(SEPARABLE) and isinstance(inner, Mapping):
            return str(inner.get("name", SEPARABLE))
        config = list(config.values())
    if isinstance(config, list):
        return next((name for part in config if (name := separable_inside(part))), None)
    return None


def _walk(model: dict[str, Any], group: str, outer: tuple[str, ...]) -> Iterator[Place]:
    """Yield the layers of a model's config, and of the models in it."""
    entries = model.get("layers", [])
    siblings: dict[str, Place] = {}
    uses = _uses(model)
    count: dict[str, int] = {}
    nested: list[Place] = []
    for entry in entries:
        # Functional models also list operations such as keras.ops.add: they hold no variables
        # and take no number from the layers of that class name.
        if str(entry.get("module")).startswith("keras.src.ops"):
            continue
        kind = snake_case(entry["class_name"].rpartition(">")[2])
        number = count.get(kind, 0)
        count[kind] = number + 1
        own = f"{kind}_{number}" if number else kind
        names = (*outer, str(entry["config"].get("name", entry["class_name"])))
        place = Place(names, entry, f"{group}layers/{own}", siblings, uses)
        siblings[names[-1]] = place
        nested.append(place)
    for place in nested:
        if isinstance(place.entry["config"].get("layers"), list):  # Sequential or Functional
            yield from _walk(place.entry["config"], f"{place.group}/", place.names)
        else:
            yield place


def _uses(model: Mapping[str, Any]) -> dict[str, list[str | None]]:
    entries = model.get("layers", [])
    names = [str(entry["config"].get("name", entry["class_name"])) for entry in entries]
    uses: dict[str, list[str | None]] = {name: [] for name in names}
    if "output_layers" not in model:  # Sequential: each takes what the one before gave
        for name, following in zip(names, [*names[1:], None], strict=False):
            uses[name].append(following)
        return uses
    for name, entry in zip(names, entries, strict=True):
        for source in _references(entry.get("inbound_nodes")):
            uses.setdefault(source, []).append(name)
    for source in _references(model["output_layers"]):
        uses.setdefault(source, []).append(None)
    return uses


def _references(node: Any) -> Iterator[str]:
    """Yield the layers whose outputs a call's arguments name, in Keras 2's form or Keras 3's."""
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            yield str(node["config"]["keras_history"][0])
        else:
            yield from _references(list(node.values()))
    elif isinstance(node, list):
        is_tensor = len(node) >= 3 and isinstance(node[0], str)
        if is_tensor and all(isinstance(index, int) for index in node[1:3]):
            yield node[0]
            node = node[3:]  # of Keras 2: the call's other arguments
        for part in node:
            yield from _references(part)


def _is_shared(model: OpenModel, saved: SavedLayer, earlier: SavedLayer) -> bool:
    if not earlier.weights or _without_ids(saved.config) != _without_ids(earlier.config):
        return False
    if not model.is_legacy:
        return not saved.weights
    same = len(saved.weights) == len(earlier.weights)
    return same and all(map(np.array_equal, saved.weights, earlier.weights))


def _without_ids(config: Any) -> Any:
    """Return a config without Keras's marks of the objects that are in it more than once."""
    if isinstance(config, dict):
        return {k: _without_ids(v) for k, v in config.items() if k != "shared_object_id"}
    return [_without_ids(part) for part in config] if isinstance(config, list) else config


def _built_channels(entry: Entry) -> int | None:
    shape = (entry.get("build_config") or {}).get("input_shape")
    if not isinstance(shape, list) or len(shape) != 3:
        return None
    channels_first = entry["config"].get("data_format") == "channels_first"
    channels = shape[1 if channels_first else 2]
    return None if channels is None else int(channels)
