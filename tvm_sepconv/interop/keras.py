"""Layers of a saved Keras 3 model, read from the ``.keras`` file without Keras.

A ``.keras`` file is a zip of ``config.json`` (what the model is made of) and ``model.weights.h5``
(its variables). The second does not use layer names: a model's layers lie in the group ``layers``,
each under its class name in snake case with a counter for the second and later ones of that class,
in the order of the config; a nested model or wrapped layer lies inside its parent's group; a layer
that is shared is written once, where the walk meets it first. This module repeats that walk.

Source: ``keras/src/saving/saving_lib.py`` and ``keras/src/models/functional.py`` of Keras 3.15.1.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvm_sepconv.identifiers import snake_case
from tvm_sepconv.layer import SeparableConv1D

_LAYER_CLASS = "SeparableConv1D"


class SavedLayer(NamedTuple):
    """One layer of a saved model.

    Attributes
    ----------
    names
        Names of the models and wrappers around the layer, without the outermost, then its own.
    class_name
        Keras's class, such as ``Dense``.
    config
        What the layer's ``get_config`` returned.
    channels
        Input channels it was built for, None where the file does not say.
    group
        Its group in ``model.weights.h5``.
    weights
        Its variables in Keras's order; bfloat16 ones are widened to float32.
    """

    names: tuple[str, ...]
    class_name: str
    config: dict[str, Any]
    channels: int | None
    group: str
    weights: list[np.ndarray]


def from_keras(path: str | os.PathLike[str]) -> dict[str, SeparableConv1D]:
    """Read every SeparableConv1D of a saved Keras model.

    Parameters
    ----------
    path
        A ``.keras`` file of Keras 3. Reading it needs h5py (the ``[h5]`` extra), not Keras.

    Returns
    -------
    dict
        Built layers with the saved weights, by layer name, in the model's order. Layers of nested
        models that bear the same name are keyed ``outer/inner/name`` instead, as in Keras's paths.

    Raises
    ------
    ValueError
        The file is not a ``.keras`` file, is damaged, has no such layer, or its weights do not fit
        its configuration.
    FileNotFoundError
        There is no such file.
    ImportError
        h5py is not installed.
    """
    saved = read_model(path, only={_LAYER_CLASS})
    if not saved:
        raise ValueError(
            "`from_keras` found no SeparableConv1D layer in the model. Layers that a custom layer "
            "or subclassed model creates for itself do not stand in the file's config: copy those "
            f"with `set_weights(keras_layer.get_weights())`. Received: path={os.fspath(path)!r}"
        )
    own_names = [layer.names[-1] for layer in saved]
    layers = {}
    for layer in saved:
        unique = own_names.count(layer.names[-1]) == 1
        layers[layer.names[-1] if unique else "/".join(layer.names)] = _build(layer)
    return layers


def read_model(
    path: str | os.PathLike[str], only: Collection[str] | None = None
) -> list[SavedLayer]:
    """Read a saved model's layers with their configurations and weights, in the model's order.

    Parameters
    ----------
    path
        A ``.keras`` file of Keras 3.
    only
        Classes of Keras to keep, so that the weights of the others are not read; None keeps all.
    """
    h5py = _import_h5py()
    config, weights_h5 = _read_archive(Path(path))
    received = f"Received: path={os.fspath(path)!r}"
    try:
        # A subclassed model lists no layers in its config: it is one without any that we can find.
        listed = list(_walk(config["config"].get("layers", []), "layers", ()))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "`path` must be a .keras file of Keras 3, but its config.json does not describe a "
            f"model of that kind. {received}"
        ) from error
    try:
        with h5py.File(io.BytesIO(weights_h5), "r") as file:
            return [
                _read_layer(file, names, entry, group)
                for names, entry, group in listed
                if only is None or (entry["class_name"] in only and _is_keras_own(entry))
                # A shared layer was read where the walk first met it.
                if "shared_object_id" not in entry or f"{group}/vars" in file
            ]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            "`path` must be an intact .keras file, but its model.weights.h5 cannot be read as "
            f"HDF5. Save the model again. {received}"
        ) from error


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "Reading a .keras file needs h5py, which the base install leaves out. Install the "
            "`[h5]` extra: pip install 'tvm-sepconv[h5]'."
        ) from error
    return h5py


def _read_archive(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the model's config and the bytes of its HDF5 file."""
    received = f"Received: path={str(path)!r}"
    if path.is_dir():
        raise ValueError(f"`path` must be a .keras file, but it is a folder. {received}")
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a .keras file, but there is none. {received}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        raise ValueError(
            "`path` must be a .keras file (a zip archive), but it is something else. A legacy .h5 "
            f"model is saved as .keras by Keras 3 with `model.save('model.keras')`. {received}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            weights = archive.read("model.weights.h5")
    except KeyError as error:
        raise ValueError(
            "`path` must be a .keras file with config.json and model.weights.h5, but one of them "
            f"is missing: {error.args[0]} {received}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            "`path` must be an intact .keras file, but it is truncated or damaged. Copy or save "
            f"it again. {received}"
        ) from error
    return config, weights


def _walk(
    entries: list[dict[str, Any]], group: str, outer: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str]]:
    """Yield names, config entry and HDF5 group of each layer, depth first, in Keras's order."""
    count: dict[str, int] = {}
    for entry in entries:
        # Functional models also list operations such as keras.ops.add: they hold no variables
        # and take no number from the layers of that class name.
        if str(entry.get("module")).startswith("keras.src.ops"):
            continue
        name = snake_case(entry["class_name"])
        number = count.get(name, 0)
        count[name] = number + 1
        own = f"{name}_{number}" if number else name
        yield from _walk_entry(entry, f"{group}/{own}", outer)


def _walk_entry(
    entry: dict[str, Any], group: str, outer: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str]]:
    config = entry["config"]
    names = (*outer, str(config.get("name", entry["class_name"])))
    if isinstance(config.get("layers"), list):  # a nested Sequential or Functional model
        yield from _walk(config["layers"], f"{group}/layers", names)
        return
    yield names, entry, group
    wrapped = config.get("layer")  # TimeDistributed and other wrappers
    if isinstance(wrapped, dict) and "class_name" in wrapped:
        yield from _walk_entry(wrapped, f"{group}/layer", names)


def _is_keras_own(entry: dict[str, Any]) -> bool:
    return str(entry.get("module")).partition(".")[0] == "keras"


def _built_channels(entry: dict[str, Any]) -> int | None:
    shape = (entry.get("build_config") or {}).get("input_shape")
    if not isinstance(shape, list) or len(shape) != 3:
        return None
    channels_first = entry["config"].get("data_format") == "channels_first"
    channels = shape[1 if channels_first else 2]
    return None if channels is None else int(channels)


def _read_layer(file: Any, names: tuple[str, ...], entry: dict[str, Any], group: str) -> SavedLayer:
    weights = _read_weights(file, group, names[-1])
    return SavedLayer(
        names, entry["class_name"], entry["config"], _built_channels(entry), group, weights
    )


def _read_weights(file: Any, group: str, name: str) -> list[np.ndarray]:
    """Return the variables of a layer; none if it has no group or keeps something else in it."""
    steps = f"{group}/vars".split("/")
    for end in range(1, len(steps) + 1):
        link = file.get("/".join(steps[:end]), getlink=True)
        if link is None:
            return []
        _refuse_unless(_is_hard(link), group)
    variables = file[f"{group}/vars"]
    stored_name = variables.attrs.get("name", name)  # older Keras 3 wrote no name
    if stored_name != name:
        raise ValueError(
            f"The weights in `{group}` of model.weights.h5 must be those of layer '{name}', but "
            f"they are of '{stored_name}': config and weights are not of one model. Save it again."
        )
    if set(variables) != {str(i) for i in range(len(variables))}:
        return []
    return [_read_array(variables, str(i), group) for i in range(len(variables))]


def _read_array(variables: Any, key: str, group: str) -> np.ndarray:
    _refuse_unless(_is_hard(variables.get(key, getlink=True)), group)
    dataset = variables[key]
    is_own_data = hasattr(dataset, "shape") and not dataset.external and not dataset.is_virtual
    _refuse_unless(is_own_data, group)
    values = np.asarray(dataset[()])
    if dataset.attrs.get("dtype") == "bfloat16":  # stored as two opaque bytes
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


def _is_hard(link: Any) -> bool:
    # Soft and external links would let a model file draw in other files of this machine.
    return type(link).__name__ == "HardLink"


def _refuse_unless(is_plain: bool, group: str) -> None:
    if not is_plain:
        raise ValueError(
            f"`{group}` of model.weights.h5 must hold plain datasets, as Keras writes them, but it "
            "holds a link or an external dataset. Save the model again with Keras."
        )


def _build(saved: SavedLayer) -> SeparableConv1D:
    layer = SeparableConv1D.from_config(saved.config)
    channels = _check_weights(saved)
    channels_first = saved.config.get("data_format") == "channels_first"
    layer.build((None, channels, None) if channels_first else (None, None, channels))
    layer.set_weights(saved.weights)
    return layer


def _check_weights(saved: SavedLayer) -> int:
    """Return the layer's input channels, once its stored shapes agree with its config."""
    config = saved.config
    shapes = [weights.shape for weights in saved.weights]
    channels: int | None = saved.channels
    if channels is None and shapes and len(shapes[0]) == 3:
        channels = shapes[0][1]
    kernel = config["kernel_size"]
    steps = kernel[0] if isinstance(kernel, (list, tuple)) else kernel
    filters, multiplier = config["filters"], config.get("depth_multiplier", 1)
    expected: list[tuple[Any, ...]] = [(steps, channels, multiplier)]
    expected.append((1, None if channels is None else channels * multiplier, filters))
    if config.get("use_bias", True):
        expected.append((filters,))
    if channels is None or shapes != expected:
        raise ValueError(
            f"The saved weights of layer '{saved.names[-1]}' must fit its configuration: expected "
            f"shapes {expected}. Received: {shapes or 'no weights'} in `{saved.group}` of "
            "model.weights.h5. Build the model (call it once) before saving it."
        )
    return channels
