"""`from_keras` without Keras: what it reads, and what it says about files that it cannot read."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tvm_sepconv.demo import data
from tvm_sepconv.interop.keras import from_keras, read_model

Entry = dict[str, Any]


def separable(name: str, filters: int = 3, module: str = "keras.layers", **extra: Any) -> Entry:
    """What a config says of a layer with 4 input channels and kernel size 2."""
    config = {"name": name, "filters": filters, "kernel_size": [2], "padding": "same"}
    return {"module": module, "class_name": "SeparableConv1D", "config": config, **extra}


def model(*layers: Entry, name: str = "model", kind: str = "Sequential") -> Entry:
    config = {"name": name, "layers": list(layers)}
    return {"module": "keras", "class_name": kind, "config": config}


def weights(filters: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(filters)
    shapes: list[tuple[int, ...]] = [(2, 4, 1), (1, 4, filters), (filters,)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def write(path: Path, config: Any, groups: dict[str, list[np.ndarray]]) -> Path:
    """Write a .keras file with these variables."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for group, arrays in groups.items():
            for i, array in enumerate(arrays):
                file[f"{group}/vars/{i}"] = array
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", content.getvalue())
    return path


def edit_weights(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    """Change the HDF5 part of a .keras file."""
    with zipfile.ZipFile(path) as archive:
        config, content = archive.read("config.json"), io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "a") as file:
        edit(file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", content.getvalue())
    return path


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    return write(
        tmp_path / "one.keras", model(separable("a")), {"layers/separable_conv1d": weights()}
    )


def test_trained_network() -> None:
    layers = from_keras(data.MODEL)
    assert list(layers) == ["near", "wide", "voice"]
    shapes = [[w.shape for w in layer.get_weights()] for layer in layers.values()]
    assert shapes == [
        [(5, 12, 1), (1, 12, 64), (64,)],
        [(5, 64, 1), (1, 64, 96), (96,)],
        [(3, 96, 1), (1, 96, 128), (128,)],
    ]
    assert layers["wide"].get_config()["activation"] == "relu"
    np.testing.assert_array_equal(layers["wide"].get_config()["dilation_rate"], [2])


def test_path_may_be_a_string(one_layer: Path) -> None:
    (layer,) = from_keras(str(one_layer)).values()
    for got, expected in zip(layer.get_weights(), weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_groups_count_each_class_by_itself_and_skip_operations(tmp_path: Path) -> None:
    inner = model(separable("c", 5), kind="Functional", name="inner")
    operation = {"module": "keras.src.ops.nn", "class_name": "SeparableConv1D", "config": {}}
    other = {"module": "keras.layers", "class_name": "Dense", "config": {"name": "d"}}
    config = model(separable("a", 6), operation, other, inner, separable("b", 7))
    groups = {
        "layers/separable_conv1d": weights(6),
        "layers/separable_conv1d_1": weights(7),
        "layers/functional/layers/separable_conv1d": weights(5),
    }
    layers = from_keras(write(tmp_path / "m.keras", config, groups))
    assert {name: layer.config.filters for name, layer in layers.items()} == {
        "a": 6,
        "c": 5,
        "b": 7,
    }


def test_same_name_in_two_nested_models_is_keyed_by_path(tmp_path: Path) -> None:
    config = model(
        model(separable("a", 5), name="x"), model(separable("a", 6), name="y"), separable("b", 7)
    )
    groups = {
        "layers/sequential/layers/separable_conv1d": weights(5),
        "layers/sequential_1/layers/separable_conv1d": weights(6),
        "layers/separable_conv1d": weights(7),
    }
    layers = from_keras(write(tmp_path / "m.keras", config, groups))
    assert {n: layer.config.filters for n, layer in layers.items()} == {"x/a": 5, "y/a": 6, "b": 7}


def test_shared_layer_is_read_where_it_is_stored(tmp_path: Path) -> None:
    shared = separable("a", shared_object_id=7)
    config = model(shared, model(shared, name="inner"))
    path = write(tmp_path / "m.keras", config, {"layers/separable_conv1d": weights()})
    assert list(from_keras(path)) == ["a"]


def test_somebody_elses_class_of_that_name_is_not_ours(tmp_path: Path) -> None:
    config = model(separable("theirs", 5, module="their.package"), separable("ours", 6))
    groups = {"layers/separable_conv1d": weights(5), "layers/separable_conv1d_1": weights(6)}
    path = write(tmp_path / "m.keras", config, groups)
    with pytest.warns(UserWarning, match=r"'theirs' is left out: its class their\.package\."):
        layers = from_keras(path)
    assert {name: layer.config.filters for name, layer in layers.items()} == {"ours": 6}


@pytest.mark.parametrize("wrapper", ["TimeDistributed", "Bidirectional", "TheirBlock"])
def test_layer_inside_another_is_left_out_by_name(wrapper: str, tmp_path: Path) -> None:
    config = {"name": "outer", "layer": separable("inner")}
    wrapped = {"module": "keras.layers", "class_name": wrapper, "config": config}
    groups = {"layers/separable_conv1d": weights()}
    path = write(tmp_path / "m.keras", model(separable("a"), wrapped), groups)
    message = f"'inner' is left out: it is inside the {wrapper} layer 'outer'"
    with pytest.warns(UserWarning, match=message):
        assert list(from_keras(path)) == ["a"]
    path = write(tmp_path / "n.keras", model(wrapped), {})
    with pytest.raises(ValueError, match=f"found no SeparableConv1D .* can read. Layer {message}"):
        from_keras(path)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        pytest.param({"activation": "theirs>wave"}, "theirs>wave", id="custom activation"),
        pytest.param({"kernel_rank": 2}, "kernel_rank", id="argument of a newer Keras"),
        pytest.param({"dtype": "float8"}, "float8", id="dtype"),
        pytest.param({"filters": None}, "filters", id="no filters"),
    ],
)
def test_layer_with_what_is_not_known_is_left_out_by_name(
    arguments: dict[str, Any], word: str, tmp_path: Path
) -> None:
    strange = separable("strange")
    strange["config"].update(arguments)
    groups = {"layers/separable_conv1d": weights(), "layers/separable_conv1d_1": weights()}
    path = write(tmp_path / "m.keras", model(strange, separable("a")), groups)
    with pytest.warns(UserWarning, match=f"'strange' is left out: .*{word}"):
        assert list(from_keras(path)) == ["a"]


def test_custom_objects_that_matter_in_training_only_are_left_away(tmp_path: Path) -> None:
    entry = separable("a")
    theirs = {"module": "their", "class_name": "L0", "config": {}, "registered_name": "their>L0"}
    entry["config"] |= {"bias_regularizer": theirs, "depthwise_constraint": "non_neg"}
    path = write(tmp_path / "m.keras", model(entry), {"layers/separable_conv1d": weights()})
    with pytest.warns(UserWarning, match="'a' is read without its `bias_regularizer`.*their>L0"):
        (layer,) = from_keras(path).values()
    assert layer.config.bias_regularizer is None
    assert layer.config.depthwise_constraint is not None


def test_layer_of_this_package_is_read(tmp_path: Path) -> None:
    entry = separable("a", module="tvm_sepconv.interop.keras")
    entry["registered_name"] = "tvm_sepconv>SeparableConv1D"
    path = write(tmp_path / "m.keras", model(entry), {"layers/separable_conv1d": weights()})
    assert list(from_keras(path)) == ["a"]


@pytest.mark.parametrize(
    "group",
    [
        pytest.param("layers/a", id="by layer name"),
        pytest.param("_layer_checkpoint_dependencies/separable_conv1d", id="TF-Keras 2.13"),
    ],
)
def test_other_layouts_of_the_weights(group: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.keras", model(separable("a")), {group: weights()})
    (layer,) = from_keras(path).values()
    for got, expected in zip(layer.get_weights(), weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_layers_without_weights_are_listed_too(tmp_path: Path) -> None:
    dropout = {"module": "keras.layers", "class_name": "Dropout", "config": {"name": "d"}}
    path = write(tmp_path / "m.keras", model(dropout), {})
    assert [(saved.names, saved.weights) for saved in read_model(path)] == [(("d",), [])]


def test_variables_under_other_names_are_left_out(tmp_path: Path) -> None:
    custom = {"module": "their.package", "class_name": "Custom", "config": {"name": "c"}}
    path = write(tmp_path / "m.keras", model(custom), {})
    edit_weights(path, lambda file: file.create_dataset("layers/custom/vars/table", data=[1.0]))
    assert read_model(path)[0].weights == []


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        pytest.param(model(), {}, id="empty model"),
        pytest.param({"class_name": "Net", "config": {"name": "net"}}, {}, id="subclassed model"),
        pytest.param(model(model(name="inner")), {}, id="nested empty model"),
    ],
)
def test_no_such_layer(config: Entry, groups: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no SeparableConv1D layer .* Received: path='.*m.keras'"):
        from_keras(write(tmp_path / "m.keras", config, groups))


@pytest.mark.parametrize(
    ("arrays", "received"),
    [
        pytest.param([], "no weights", id="none"),
        pytest.param(weights()[:2], r"\(2, 4, 1\), \(1, 4, 3\)\]", id="bias missing"),
        pytest.param([*weights(), weights()[2]], r"\(3,\), \(3,\)", id="one too many"),
        pytest.param(weights(5), r"\(1, 4, 5\)", id="other filters"),
        pytest.param([weights()[0][:1], *weights()[1:]], r"\(1, 4, 1\)", id="other kernel size"),
        pytest.param([weights()[0][:, :3], *weights()[1:]], r"\(2, 3, 1\)", id="other channels"),
        pytest.param([weights()[0][0], *weights()[1:]], r"\(4, 1\)", id="other rank"),
    ],
)
def test_weights_that_do_not_fit(arrays: list[np.ndarray], received: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.keras", model(separable("conv")), {"layers/separable_conv1d": arrays}
    )
    with pytest.raises(ValueError, match=f"layer 'conv' must fit .*Received: .*{received}"):
        from_keras(path)


def test_weights_for_other_channels_than_the_model_was_built_for(tmp_path: Path) -> None:
    entry = separable("conv", build_config={"input_shape": [None, None, 5]})
    path = write(tmp_path / "m.keras", model(entry), {"layers/separable_conv1d": weights()})
    with pytest.raises(ValueError, match=r"expected shapes \[\(2, 5, 1\), \(1, 5, 3\), \(3,\)\]"):
        from_keras(path)


def test_weights_of_another_layer(one_layer: Path) -> None:
    def rename(file: h5py.File) -> None:
        file["layers/separable_conv1d/vars"].attrs["name"] = "b"

    with pytest.raises(ValueError, match="must be those of layer 'a', but they are of 'b'"):
        from_keras(edit_weights(one_layer, rename))


def link_group(file: h5py.File) -> None:
    del file["layers"]
    file["layers"] = h5py.ExternalLink("other.h5", "layers")


def link_array(file: h5py.File) -> None:
    del file["layers/separable_conv1d/vars/0"]
    file["layers/separable_conv1d/vars/0"] = h5py.SoftLink("/layers/separable_conv1d/vars/1")


def group_for_array(file: h5py.File) -> None:
    del file["layers/separable_conv1d/vars/0"]
    file.create_group("layers/separable_conv1d/vars/0")


def external_array(file: h5py.File) -> None:
    variables = file["layers/separable_conv1d/vars"]
    del variables["0"]
    variables.create_dataset("0", (2, 4, 1), "f4", external=[("other.bin", 0, 32)])


def virtual_array(file: h5py.File) -> None:
    variables = file["layers/separable_conv1d/vars"]
    del variables["0"]
    layout = h5py.VirtualLayout((2, 4, 1), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", (2, 4, 1))
    variables.create_virtual_dataset("0", layout)


@pytest.mark.parametrize(
    "edit", [link_group, link_array, group_for_array, external_array, virtual_array]
)
def test_what_leads_out_of_the_file_is_refused(
    edit: Callable[[h5py.File], None], one_layer: Path
) -> None:
    with pytest.raises(ValueError, match="must hold plain datasets"):
        from_keras(edit_weights(one_layer, edit))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` must be a .keras or .h5 file.*gone.keras"):
        from_keras(tmp_path / "gone.keras")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is a folder"):
        from_keras(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"\x89PNG\r\n\x1a\n", b"{}"], ids=["empty", "stub", "png", "json"]
)
def test_not_a_keras_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file of Keras: .* but it is something else"):
        from_keras(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(share: float, one_layer: Path) -> None:
    content = one_layer.read_bytes()
    one_layer.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated or damaged") as caught:
        from_keras(one_layer)
    assert caught.value.__cause__ is not None


def test_one_byte_changed(one_layer: Path) -> None:
    content = bytearray(one_layer.read_bytes())
    content[content.index(b"\x89HDF") + 100] ^= 1
    one_layer.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        from_keras(one_layer)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_zip_without(member: str, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name in {"config.json", "model.weights.h5"} - {member}:
            archive.writestr(name, "{}")
    with pytest.raises(ValueError, match=f"one of them is missing: .*{member}"):
        from_keras(path)


@pytest.mark.parametrize(
    "config",
    [[], {}, {"config": None}, {"config": {"layers": [{"config": {}}]}}, {"config": []}],
    ids=["list", "empty", "null", "layer without class", "list of layers"],
)
def test_config_of_something_else(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its config does not describe a model"):
        from_keras(write(tmp_path / "m.keras", config, {}))


def test_config_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{")
        archive.writestr("model.weights.h5", "")
    with pytest.raises(ValueError, match="truncated or damaged"):
        from_keras(path)


def test_newer_keras_is_named_where_its_file_is_not_understood(one_layer: Path) -> None:
    edit_weights(one_layer, lambda file: file.move("layers", "tensors"))
    with zipfile.ZipFile(one_layer, "a") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "4.2.0"}))
    with pytest.raises(
        ValueError, match=r"no weights.* written by Keras 4\.2\.0, newer than 3\.15"
    ):
        from_keras(one_layer)


def test_weights_that_are_no_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(model(separable("a"))))
        archive.writestr("model.weights.h5", b"not HDF5")
    with pytest.raises(ValueError, match="cannot be read as HDF5"):
        from_keras(path)


def test_missing_h5py_names_the_extra(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"`\[h5\]` extra: pip install 'tvm-sepconv\[h5\]'"):
        from_keras(one_layer)
