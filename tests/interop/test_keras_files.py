"""`from_keras` without Keras: files with weights alone, and legacy files of TF-Keras and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tvm_sepconv import SeparableConv1D, from_keras, reference

DATA = Path(__file__).parent / "data"
# What TF-Keras 2.21 computed with the models in the files beside it, layer by layer.
EXPECTED = dict(np.load(DATA / "tf_keras.npz"))
# What each layer takes, and what comes of it with and without the layers after it.
STEPS = {
    "conv": ("x", "conv", "relu6"),
    "inner/conv": ("relu6", "inner/conv", "inner/swish"),
    "frozen": ("inner", "frozen", "frozen"),
    "half": ("frozen", "half", "half"),
}
TF_KERAS = {
    "whole.h5": ("tf_keras.h5", None),
    "keras": ("tf_keras.keras", None),
    "weights.h5": ("tf_keras_by_name.h5", "tf_keras.keras"),
}


def read(files: str, **arguments: Any) -> dict[str, SeparableConv1D]:
    path, config = TF_KERAS[files]
    return from_keras(DATA / path, config=config and DATA / config, **arguments)


def computed(layer: SeparableConv1D, x: np.ndarray) -> np.ndarray:
    depthwise, pointwise, *bias = layer.get_weights()
    x = x.astype(layer.config.compute_dtype)
    bias = bias[0] if bias else None
    return reference.separable_conv1d(x, depthwise, pointwise, bias, layer.config)


@pytest.mark.parametrize("files", TF_KERAS)
@pytest.mark.parametrize("fold", [False, True], ids=["as saved", "folded"])
def test_layers_of_tf_keras(files: str, fold: bool) -> None:
    layers = read(files, fold_batch_norm=fold, fold_activation=fold)
    assert list(layers) == list(STEPS)
    for name, layer in layers.items():
        given, alone, with_others = STEPS[name]
        y = computed(layer, EXPECTED[given])
        wanted = EXPECTED[with_others if fold else alone]
        assert y.shape == wanted.shape
        tolerance = 3e-3 if layer.config.compute_dtype == "float16" else 2e-6
        np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance * abs(wanted).max())


def test_arguments_of_tf_keras() -> None:
    layers = read("whole.h5")
    assert layers["conv"].config.padding == (4, 0)  # causal, kernel 3, dilation 2
    assert layers["half"].config.dtype == "mixed_float16"
    assert not layers["frozen"].trainable
    assert not layers["inner/conv"].config.use_bias


def test_compiled_layer_of_a_legacy_file() -> None:
    layer = read("whole.h5", fold_batch_norm=True, fold_activation=True)["conv"]
    y = layer(EXPECTED["x"])
    np.testing.assert_allclose(y, EXPECTED["relu6"], rtol=1e-5, atol=1e-5)


def entry(name: str, **arguments: Any) -> dict[str, Any]:
    config = {"name": name, "filters": 3, "kernel_size": [2], "use_bias": False, **arguments}
    return {"class_name": "SeparableConv1D", "config": config}


def nested(name: str, *layers: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": name, "layers": list(layers)}}


def legacy(
    path: Path, model: Any, groups: dict[str, dict[str, float]], chunks: bool = False
) -> Path:
    """Write a legacy file; each layer's variables are filled with one value."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(model)
        file.create_group("model_weights")
        for group, owners in groups.items():
            owner = file.create_group(f"model_weights/{group}")
            names = [f"{n}/{kind}:0" for n in owners for kind in ("depthwise", "pointwise")]
            for part in range(len(names) if chunks else 0):
                owner.attrs[f"weight_names{part}"] = [names[part].encode()]
            if not chunks:
                owner.attrs["weight_names"] = [name.encode() for name in names]
            for name, value in owners.items():
                owner[f"{name}/depthwise:0"] = np.full((2, 4, 1), value, np.float32)
                owner[f"{name}/pointwise:0"] = np.full((1, 4, 3), value, np.float32)
    return path


def values(layers: dict[str, SeparableConv1D]) -> dict[str, float]:
    return {name: float(layer.get_weights()[0][0, 0, 0]) for name, layer in layers.items()}


def test_weights_are_found_by_the_names_around_them(tmp_path: Path) -> None:
    inside = nested("x", entry("a"), nested("y", entry("a"), entry("b")))
    model = nested("m", inside, entry("a"))
    groups = {"x": {"a": 1.0, "y/a": 2.0, "y/b": 3.0}, "a": {"scope/a_1": 4.0}}
    layers = from_keras(legacy(tmp_path / "m.h5", model, groups))
    assert values(layers) == {"x/a": 1.0, "x/y/a": 2.0, "b": 3.0, "a": 4.0}


def test_names_too_many_for_one_attribute(tmp_path: Path) -> None:
    path = legacy(tmp_path / "m.h5", nested("m", entry("a")), {"a": {"a": 5.0}}, chunks=True)
    assert values(from_keras(path)) == {"a": 5.0}


def test_slashes_in_names(tmp_path: Path) -> None:
    model = nested("m", entry("x/a"), nested("x", entry("a")), nested("z", entry("a")))
    groups = {"x/a": {"x/a": 1.0}, "x": {}, "z": {"a": 3.0}}
    path = tmp_path / "m.h5"
    with h5py.File(legacy(path, model, {"x/a": groups["x/a"], "z": groups["z"]}), "a") as file:
        file["model_weights/x"].attrs["weight_names"] = [b"a/depthwise:0", b"a/pointwise:0"]
        file["model_weights/x/a/depthwise:0"] = np.full((2, 4, 1), 2.0)
        file["model_weights/x/a/pointwise:0"] = np.full((1, 4, 3), 2.0)
    layers = from_keras(path)
    assert values(layers) == {"x/a": 1.0, "x/a_": 2.0, "z/a": 3.0}
    assert layers["x/a"].name == "x_a"


@pytest.mark.parametrize("groups", [{}, {"a": {}}, {"a": {"b": 1.0, "c": 1.0}}])
def test_legacy_file_without_the_weights(groups: dict[str, Any], tmp_path: Path) -> None:
    path = legacy(tmp_path / "m.h5", nested("m", entry("a")), groups)
    with pytest.raises(ValueError, match=r"layer 'a' must fit .* Received: no weights"):
        from_keras(path)


def test_registered_class_of_somebody_else(tmp_path: Path) -> None:
    theirs = entry("theirs")
    theirs["class_name"] = "their>SeparableConv1D"
    path = legacy(tmp_path / "m.h5", nested("m", theirs), {"theirs": {"theirs": 1.0}})
    with pytest.raises(ValueError, match=r"'theirs' is left out: its class their>Separable"):
        from_keras(path)


def test_links_in_a_legacy_file_are_refused(tmp_path: Path) -> None:
    path = legacy(tmp_path / "m.h5", nested("m", entry("a")), {"a": {"a": 1.0}})
    with h5py.File(path, "a") as file:
        del file["model_weights/a/a/depthwise:0"]
        file["model_weights/a/a/depthwise:0"] = h5py.ExternalLink("other.h5", "x")
    with pytest.raises(ValueError, match="must hold plain datasets"):
        from_keras(path)


@pytest.fixture
def weights_alone(tmp_path: Path) -> Path:
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/separable_conv1d/vars/0"] = np.full((2, 4, 1), 6.0)
        file["layers/separable_conv1d/vars/1"] = np.full((1, 4, 3), 6.0)
        # Names that Keras makes up differ between two instances of a model, and mean nothing.
        file["layers/separable_conv1d/vars"].attrs["name"] = "a_1"
    return path


MODEL = nested("m", entry("a"))


def test_config_in_each_form(weights_alone: Path, tmp_path: Path) -> None:
    in_json = tmp_path / "m.json"
    in_json.write_text(json.dumps(MODEL))
    in_h5 = legacy(tmp_path / "m.h5", MODEL, {})
    for config in (MODEL, MODEL["config"], json.dumps(MODEL), in_json, str(in_json), in_h5):
        assert values(from_keras(weights_alone, config=config)) == {"a": 6.0}


def test_config_that_is_missing(weights_alone: Path) -> None:
    with pytest.raises(ValueError, match=r"Pass `config=`: the model's `get_config\(\)`"):
        from_keras(weights_alone)


def test_config_too_many() -> None:
    with pytest.raises(ValueError, match="`config` must be None for a file that says itself"):
        from_keras(DATA / "tf_keras.h5", config=MODEL)


@pytest.mark.parametrize("config", [{"a": {1}}, "{", [1]], ids=["set", "half", "list"])
def test_config_of_something_else(config: Any, weights_alone: Path) -> None:
    with pytest.raises(ValueError, match=r"`config` must be what|config does not describe a model"):
        from_keras(weights_alone, config=config)


def test_config_file_that_is_not_there(weights_alone: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        from_keras(weights_alone, config="gone.json")


def test_config_file_that_is_no_json(weights_alone: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ValueError, match=r"`config` must be what Keras saves.*m\.json"):
        from_keras(weights_alone, config=tmp_path / "m.json")


def test_hdf5_of_something_else(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["measurements"] = [1.0]
    with pytest.raises(ValueError, match="this HDF5 file has neither `model_config` nor"):
        from_keras(tmp_path / "m.h5")


@pytest.mark.parametrize("text", ["{", 3], ids=["half", "number"])
def test_legacy_config_that_is_no_json(text: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = text
    with pytest.raises(ValueError, match="its `model_config` is not JSON"):
        from_keras(tmp_path / "m.h5")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_hdf5(share: float, tmp_path: Path) -> None:
    content = (DATA / "tf_keras.h5").read_bytes()
    path = tmp_path / "m.h5"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated or damaged") as caught:
        from_keras(path)
    assert caught.value.__cause__ is not None


def test_damaged_object_in_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    path.write_bytes((DATA / "tf_keras.h5").read_bytes())
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["model_weights/conv/conv/bias:0"].id).addr
    with path.open("r+b") as file:
        file.seek(address + 16)  # the first message of its header
        file.write(b"\xff" * 16)
    with pytest.raises(ValueError, match="truncated or damaged") as caught:
        from_keras(path)
    assert isinstance(caught.value.__cause__, KeyError)
