"""Files that Keras writes, opened without Keras: ``.keras``, ``.weights.h5``, legacy ``.h5``.

A ``.keras`` file is a zip of ``config.json`` (what the model is made of), ``model.weights.h5`` (its
variables) and ``metadata.json``. A ``.weights.h5`` file is the second alone. A legacy ``.h5`` file,
which Keras 2 wrote and Keras 3 still writes, has the first as the attribute ``model_config`` and
the variables in the group ``model_weights``.

Source: ``keras/src/saving/saving_lib.py`` and ``keras/src/legacy/saving/legacy_h5_format.py`` of
Keras 3.15.1.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_NEWEST = (3, 15)
_ZIP, _HDF5 = b"PK\x03\x04", b"\x89HDF"
_WITHOUT_CONFIG = (
    "has weights but not what the model is made of. Pass `config=`: the model's `get_config()`, "
    "the file of its `to_json()`, or a .keras or whole-model .h5 file of the same model"
)

ModelConfig = Mapping[str, Any] | str | os.PathLike[str]


class OpenModel(NamedTuple):
    """A saved model whose file is open.

    Attributes
    ----------
    config
        The model's own entry: ``class_name`` and ``config`` as in every entry of its layers.
    weights
        The HDF5 group that has the variables.
    is_legacy
        Whether variables lie under the names of layers, not under counted class names.
    names_agree
        Whether config and weights are of one file, so that the names of layers agree.
    version
        Of the Keras that wrote it, "" where the file does not say.
    received
        The end of an error message: what was passed.
    """

    config: dict[str, Any]
    weights: Any
    is_legacy: bool
    names_agree: bool
    version: str
    received: str


@contextlib.contextmanager
def open_model(
    path: str | os.PathLike[str], config: ModelConfig | None = None
) -> Iterator[OpenModel]:
    """Open a file that Keras wrote, and close it again.

    Parameters
    ----------
    path, config
        See `tvm_sepconv.from_keras`.

    Raises
    ------
    ValueError
        It is no such file, it is damaged, or there is a config too few or too many.
    FileNotFoundError
        There is no such file.
    ImportError
        h5py is not installed.
    """
    h5py = _import_h5py()
    received = f"Received: path={os.fspath(path)!r}"
    is_zip = _kind(Path(path)) == _ZIP
    archive = _read_archive(Path(path)) if is_zip else None
    given = None if config is None else _given_config(config)
    try:
        with h5py.File(io.BytesIO(archive[1]) if archive else path, "r") as file:
            yield _open_hdf5(file, archive, given, received)
    except (OSError, RuntimeError, KeyError) as error:  # h5py's words for damage at some depth
        part = "its model.weights.h5" if is_zip else "it"
        raise ValueError(
            f"`path` must be an intact file of Keras, but {part} cannot be read as HDF5: it is "
            f"truncated or damaged. Copy or save it again. {received}"
        ) from error


def newer(version: str) -> str:
    """Return a sentence for error messages if `version` is newer than what is known here."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    known = ".".join(map(str, _NEWEST))
    return f" It was written by Keras {version}, newer than {known}." if numbers > _NEWEST else ""


def _open_hdf5(
    file: Any, archive: tuple[Any, bytes, str] | None, given: Any, received: str
) -> OpenModel:
    own, version = (archive[0], archive[2]) if archive else _own_config(file)
    is_legacy = archive is None and ("model_weights" in file or "layer_names" in file.attrs)
    if own is not None and given is not None:
        raise ValueError(
            "`config` must be None for a file that says itself what the model is made of. "
            f"{received}"
        )
    known = own is not None or is_legacy or "layers" in file or OLD_LAYERS in file
    if not known:
        raise ValueError(
            "`path` must be a file of Keras, but this HDF5 file has neither `model_config` nor "
            f"`layers` nor `layer_names`. {received}"
        )
    if own is None and given is None:
        raise ValueError(f"`path` {_WITHOUT_CONFIG}. {received}")
    model = given if own is None else own
    weights = file.get("model_weights", file)
    return OpenModel(model, weights, is_legacy, own is not None, version, received)


OLD_LAYERS = "_layer_checkpoint_dependencies"  # TF-Keras 2.13's name for the group `layers`


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "Reading a file of Keras needs h5py, which the base install leaves out. Install the "
            "`[h5]` extra: pip install 'tvm-sepconv[h5]'."
        ) from error
    return h5py


def _kind(path: Path) -> bytes:
    """Return the first bytes of a zip or HDF5 file; refuse all else."""
    received = f"Received: path={str(path)!r}"
    if path.is_dir():
        raise ValueError(f"`path` must be a .keras or .h5 file, but it is a folder. {received}")
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a .keras or .h5 file, but there is none. {received}"
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic not in (_ZIP, _HDF5):
        raise ValueError(
            "`path` must be a file of Keras: .keras (a zip archive), .weights.h5 or .h5 (HDF5), "
            f"but it is something else. {received}"
        )
    return magic


def _read_archive(path: Path) -> tuple[dict[str, Any], bytes, str]:
    """Return the model's config, the bytes of its HDF5 file and the version of Keras."""
    received = f"Received: path={str(path)!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            metadata = (
                json.loads(archive.read("metadata.json")) if "metadata.json" in members else {}
            )
            config = json.loads(archive.read("config.json"))
            weights = archive.read("model.weights.h5")
    except KeyError as error:
        raise ValueError(
            "`path` must be a .keras file with config.json and model.weights.h5, but one of them "
            f"is missing: {error.args[0]} {received}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise ValueError(
            "`path` must be an intact .keras file, but it is truncated or damaged. Copy or save "
            f"it again. {received}"
        ) from error
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return config, weights, str(version or "")


def _own_config(file: Any) -> tuple[dict[str, Any] | None, str]:
    """Return a legacy file's config, or None, and the version of Keras."""
    text, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "")
    version = version.decode() if isinstance(version, bytes) else str(version)
    if text is None:
        return None, version
    try:
        return json.loads(text), version
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`path` must be an intact .h5 file, but its `model_config` is not JSON. Save the model "
            f"again. Received: path={file.filename!r}"
        ) from error


def _given_config(config: Any) -> dict[str, Any]:
    """Return the model's entry for what a caller passed as `config`."""
    try:
        if isinstance(config, str) and config.lstrip().startswith("{"):
            config = json.loads(config)
        elif isinstance(config, (str, os.PathLike)):
            config = _config_file(Path(config))
        model = json.loads(json.dumps(config))  # tuples become the lists of a saved config
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`config` must be what Keras saves of a model, made of what JSON has: its "
            f"`get_config()`, its `to_json()` or a file. Received: config={config!r:.200}"
        ) from error
    is_bare = isinstance(model, dict) and "layers" in model  # get_config has no class name
    return {"class_name": "Model", "config": model} if is_bare else model


def _config_file(path: Path) -> Any:
    if path.suffix != ".json":
        with open_model(path) as model:
            return model.config
    return json.loads(path.read_text(encoding="utf-8"))
