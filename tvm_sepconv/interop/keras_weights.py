"""The variables of a saved Keras model's layers, from the HDF5 part of its file.

Keras 3 does not use layer names: a model's layers lie in the group ``layers``, each under its class
name in snake case with a counter for the second and later ones of that class, in the order of the
config; a nested model lies inside its parent's group; a layer that is shared is written once, where
the walk meets it first. A legacy file has a group for each layer of the outermost model, by name;
the attribute ``weight_names`` lists the variables of all layers in it by their paths.

Source: see ``keras_files.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_sepconv.interop.keras_files import OLD_LAYERS, OpenModel

Array = np.ndarray[Any, np.dtype[Any]]


def read(model: OpenModel, names: Sequence[str], group: str) -> list[Array]:
    """Return a layer's variables in Keras's order, none if it has none that Keras would find.

    Parameters
    ----------
    names
        Of the models around the layer, without the outermost, then its own.
    group
        Where Keras 3 keeps it.

    Returns
    -------
    list of numpy.ndarray
        In the saved dtypes; bfloat16, which NumPy lacks, is widened to float32.

    Raises
    ------
    ValueError
        The file has another layer's weights there, or holds what Keras does not write.
    """
    if model.is_legacy:
        return _by_names(model.weights, names)
    return _by_group(model, group, names[-1])


def _by_group(model: OpenModel, group: str, name: str) -> list[Array]:
    variables = _group(model.weights, f"{group}/vars")
    if variables is None and OLD_LAYERS in model.weights:
        group = group.replace("layers", OLD_LAYERS)
        variables = _group(model.weights, f"{group}/vars")
    if variables is None:
        group = f"{group.rpartition('/')[0]}/{name}"
        variables = _group(model.weights, f"{group}/vars")
    if variables is None:
        return []
    stored_name = variables.attrs.get("name", name)  # older Keras 3 wrote no name
    if model.names_agree and stored_name != name:
        raise ValueError(
            f"The weights in `{group}` of model.weights.h5 must be those of layer '{name}', but "
            f"they are of '{stored_name}': config and weights are not of one model. Save it again."
        )
    if set(variables) != {str(i) for i in range(len(variables))}:
        return []
    return [_array(variables, str(i)) for i in range(len(variables))]


def _by_names(weights: Any, names: Sequence[str]) -> list[Array]:
    """Read from the group of the outermost layer what bears the name of the innermost."""
    outermost = _group(weights, names[0])
    if outermost is None:
        return []
    found: dict[tuple[str, ...], list[str]] = {}
    for path in _weight_names(outermost):
        found.setdefault(tuple(path.split("/")[:-1]), []).append(path)
    steps = "/".join(names).split("/")  # TF-Keras allows a "/" in a layer's name
    own = [owner for owner in found if owner[-1:] == (steps[-1],)]
    if len(names) == 1 and len(found) == 1:
        own = list(found)  # its own, whatever name scope they were built in
    if not own:
        return []
    # Of two that end in the same name, the one inside the same models.
    best = max(own, key=lambda owner: (_common_end(owner, steps), -len(owner)))
    return [_array(outermost, path) for path in found[best]]


def _common_end(owner: Sequence[str], names: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(owner), reversed(names), strict=False):
        if a != b:
            break
        count += 1
    return count


def _weight_names(group: Any) -> list[str]:
    """Return the attribute ``weight_names``, which Keras splits if it is too large for HDF5."""
    keys = ["weight_names"]
    if keys[0] not in group.attrs:
        numbered = (f"{keys[0]}{number}" for number in itertools.count())
        keys = list(itertools.takewhile(lambda key: key in group.attrs, numbered))
    parts = [group.attrs[key] for key in keys]
    return [n.decode() if isinstance(n, bytes) else str(n) for part in parts for n in part]


def _group(parent: Any, path: str) -> Any:
    """Return a group, None if there is none, and refuse to follow a link to it."""
    steps = path.split("/")
    for end in range(1, len(steps) + 1):
        link = parent.get("/".join(steps[:end]), getlink=True)
        if link is None:
            return None
        _refuse_unless(_is_hard(link), path)
    group = parent[path]
    _refuse_unless(not hasattr(group, "shape"), path)
    return group


def _array(group: Any, path: str) -> Array:
    parent, _, key = path.rpartition("/")
    owner = _group(group, parent) if parent else group
    _refuse_unless(owner is not None and _is_hard(owner.get(key, getlink=True)), group.name)
    dataset = owner[key]
    is_own_data = hasattr(dataset, "shape") and not dataset.external and not dataset.is_virtual
    _refuse_unless(is_own_data, group.name)
    values = np.asarray(dataset[()])
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:  # bfloat16, as two opaque bytes
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


def _is_hard(link: Any) -> bool:
    # Soft and external links would let a model file draw in other files of this machine.
    return type(link).__name__ == "HardLink"


def _refuse_unless(is_plain: bool, group: str) -> None:
    if not is_plain:
        raise ValueError(
            f"`{group}` of the weights must hold plain datasets, as Keras writes them, but it "
            "holds a link or an external dataset. Save the model again with Keras."
        )
