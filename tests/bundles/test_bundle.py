"""Bundles: what is written, and that it comes back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import native
import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import reference, runtime, targets
from tvm_sepconv.bundle import open_bundle

pytest.importorskip("tvm")

from tvm_sepconv.compiler import package

LAYERS = {  # name: (layer, channels)
    "first": (dict(filters=3, kernel_size=2, strides=2, activation="relu"), 12),
    # Another padding and other weights: the same kernel.
    "second": (dict(filters=3, kernel_size=2, strides=2, activation="relu", padding="same"), 12),
    "third/of.three": (
        dict(filters=5, kernel_size=3, padding=(4, 1), depth_multiplier=2, use_bias=False,
             data_format="channels_first", activation="gelu", dtype="float64"), 4,
    ),
}  # fmt: skip
LEVELS = targets.host_family()[-2:]  # the two best of this machine


def layers_of_three() -> dict[str, tvm_sepconv.SeparableConv1D]:
    return {
        name: native.layer_of(channels, seed, **arguments, name=name.replace("/", "_"))
        for seed, (name, (arguments, channels)) in enumerate(LAYERS.items())
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "three.sepconv"
    tvm_sepconv.save(layers_of_three(), path, LEVELS)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def compiles_nothing(monkeypatch):
    """Files that only look like libraries, for tests of what is around them."""
    monkeypatch.setattr(
        package.build, "build_library", lambda _, __, output, ___: output.write_bytes(b"library")
    )
    monkeypatch.setattr(
        package.build, "build_runtime", lambda _, output: output.write_bytes(b"runtime")
    )


def manifest_of(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def answers(layer: tvm_sepconv.SeparableConv1D) -> list[bytes]:
    channels = layer.depthwise_kernel.shape[1]
    sizes = [(1, 3), (2, 64), (3, 201)]
    return [layer(native.inputs(layer.config, *size, channels)).tobytes() for size in sizes]


# ---- there and back ---------------------------------------------------------------------------


def test_a_layer_comes_back(tmp_path):
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    layer.save(tmp_path / "new" / "one.sepconv", LEVELS[-1:])
    loaded = tvm_sepconv.load(str(tmp_path / "new" / "one.sepconv"))
    assert type(loaded) is tvm_sepconv.SeparableConv1D
    assert loaded.config == layer.config
    assert loaded.get_config() == layer.get_config()
    for ours, theirs in zip(layer.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert answers(loaded) == answers(layer)


@pytest.mark.parametrize("target", [None, *LEVELS])
def test_layers_come_back_by_name(saved, target):
    loaded = tvm_sepconv.load(saved, target)
    assert list(loaded) == list(LAYERS)
    for name, layer in layers_of_three().items():
        for batch, steps in [(1, 3), (2, 64), (3, 201)]:
            x = native.inputs(layer.config, batch, steps, LAYERS[name][1])
            native.check(loaded[name](x), x, layer.config, layer.get_weights())


def test_a_loaded_layer_takes_new_weights_wherever_the_process_went(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved.parent)
    loaded = tvm_sepconv.load(saved.name)["first"]
    monkeypatch.chdir(tmp_path)
    tensors = native.weights(loaded.config, 12, seed=9)
    loaded.set_weights(tensors)
    x = native.inputs(loaded.config, 2, 9, 12)
    native.check(loaded(x), x, loaded.config, tensors)


def test_a_path_need_not_be_ascii(saved, tmp_path):
    path = tmp_path / "é ü 声 %s"
    shutil.copytree(saved, path)
    assert list(tvm_sepconv.load(path)) == list(LAYERS)


def test_without_targets_every_level_of_this_host_is_saved(tmp_path, compiles_nothing):
    native.layer_of(12, filters=3, kernel_size=2).save(tmp_path / "b")
    opened, chosen = open_bundle(tmp_path / "b")
    assert opened.targets == tuple(sorted(targets.host_family()))
    assert chosen == targets.runnable()[0]


def test_libraries_of_other_targets_are_not_read(copy):
    for target in LEVELS[:-1]:
        shutil.rmtree(copy / "lib" / target)
    assert list(tvm_sepconv.load(copy)) == list(LAYERS)


def test_the_manifest(saved):
    from tvm_sepconv.compiler.targets import cpu

    manifest = manifest_of(saved)
    assert manifest["format_version"] == 1
    assert {"tvm_sepconv", "tvm"} <= set(manifest["producer"])
    assert list(manifest["layers"]) == list(LAYERS)
    keys = [entry["library"] for entry in manifest["layers"].values()]
    assert keys[0] == keys[1] != keys[2]
    for entry, layer in zip(manifest["layers"].values(), layers_of_three().values(), strict=True):
        config = tvm_sepconv.SepConvConfig.from_dict(entry["config"])
        assert config == layer.config
    assert set(manifest["libraries"]) == set(LEVELS)
    for target, libraries in manifest["libraries"].items():
        assert set(libraries) == set(keys)
        for key, entry in libraries.items():
            assert entry["path"] == f"lib/{target}/{key}.so"
            assert entry["cpu_features"] == list(targets.FEATURES[target])
            double = entry["kernel"]["dtype"] == "float64"
            assert entry["intermediate_dtype"] == ("float64" if double else "float32")
            assert entry["packing"] == {"lanes": cpu(target).lanes(entry["intermediate_dtype"])}
            tiles = [variant["decisions"]["step_tile"] for variant in entry["variants"]]
            assert tiles == sorted(tiles, reverse=True)
            for variant in entry["variants"]:
                assert variant["origin"] in ("default", "tuned", "transferred")
                assert (variant["record_secs"] is None) == (variant["origin"] == "default")
    ((arch, entry),) = manifest["runtimes"].items()
    assert arch == targets.machine()
    assert entry["abi"] == runtime.ABI


def test_the_manifest_has_the_hash_of_every_other_file(saved):
    manifest = manifest_of(saved)
    entries = [*manifest["runtimes"].values(), *manifest["files"].values()]
    entries += [entry for target in manifest["libraries"].values() for entry in target.values()]
    hashes = {entry["path"]: entry["sha256"] for entry in entries}
    files = {str(p.relative_to(saved)): p for p in saved.rglob("*") if p.is_file()}
    assert set(files) == {"manifest.json", *hashes}
    for name, value in hashes.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == value


def test_weights_are_in_keras_layout_once(saved):
    from safetensors.numpy import load_file

    tensors = load_file(saved / "weights.safetensors")
    expected = {
        f"{name}/{weight.name}": weight.numpy()
        for name, layer in layers_of_three().items()
        for weight in layer.weights
    }
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_the_self_test_is_the_references(saved):
    opened, _ = open_bundle(saved)
    loaded = tvm_sepconv.load(saved)
    for name, tensors in opened.selftest().items():
        x, y = tensors["input"], tensors["output"]
        config, weights = loaded[name].config, loaded[name].get_weights()
        assert x.dtype == y.dtype == config.compute_dtype
        expected = reference.separable_conv1d(x, *[*weights, None][:3], config)
        np.testing.assert_array_equal(y, expected.astype(y.dtype))
        assert y.shape[0] == 2 and y.size > 0 and np.ptp(y) > 0
        native.check(loaded[name](x), x, config, weights)
    assert sum(f.stat().st_size for f in saved.glob("selftest*")) < 20_000


def test_saving_a_loaded_layer(saved, tmp_path):
    loaded = tvm_sepconv.load(saved)["second"]
    loaded.save(tmp_path / "again", LEVELS[-1:])
    assert answers(tvm_sepconv.load(tmp_path / "again")) == answers(loaded)


# ---- saving -----------------------------------------------------------------------------------


def state(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("moment", "error"),
    [("_libraries", ValueError), ("_runtimes", KeyboardInterrupt), ("_example", ValueError)],
)
def test_a_save_that_fails_leaves_what_was_there(
    copy, compiles_nothing, monkeypatch, moment, error
):
    def fail(*_):
        raise error("in the middle")

    before, layer = state(copy), native.layer_of(12, filters=4, kernel_size=2)
    monkeypatch.setattr(package, moment, fail)
    with pytest.raises(error, match="in the middle"):
        layer.save(copy, LEVELS[-1:])
    with pytest.raises(error, match="in the middle"):
        layer.save(copy.parent / "new", LEVELS[-1:])
    assert state(copy) == before
    assert os.listdir(copy.parent) == [copy.name]  # and nothing half-made beside it


def test_a_save_that_fails_at_the_last_step_puts_the_old_bundle_back(
    copy, compiles_nothing, monkeypatch
):
    before, rename = state(copy), Path.rename

    def fail(self, target):
        if self.name == "bundle":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        native.layer_of(12, filters=3, kernel_size=2).save(copy, LEVELS[-1:])
    assert state(copy) == before


def test_saving_over_a_bundle_replaces_all_of_it(copy, compiles_nothing):
    native.layer_of(12, filters=3, kernel_size=2, name="alone").save(copy, LEVELS[-1:])
    assert list(open_bundle(copy)[0].layers) == ["alone"]
    assert len(list(copy.rglob("*.so"))) == 2
    assert os.listdir(copy.parent) == [copy.name]


def test_saving_over_a_damaged_bundle_repairs_it(copy):
    (copy / "weights.safetensors").unlink()
    native.layer_of(12, filters=3, kernel_size=2, name="alone").save(copy, LEVELS[-1:])
    assert tvm_sepconv.load(copy).name == "alone"


def test_saving_through_a_link_keeps_the_link(copy, compiles_nothing):
    link = copy.parent / "current"
    link.symlink_to(copy.name)
    native.layer_of(12, filters=3, kernel_size=2, name="alone").save(link, LEVELS[-1:])
    assert link.is_symlink()
    assert list(open_bundle(copy)[0].layers) == ["alone"]


@pytest.mark.parametrize("manifest", [None, "{}", '{"manifest_version": 3}', "[]", "nonsense"])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path, manifest):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    if manifest is not None:  # web applications have one of that name
        (tmp_path / "mine" / "manifest.json").write_text(manifest)
    before = state(tmp_path)
    with pytest.raises(FileExistsError, match=f"`path`.*Received: {tmp_path}/mine"):
        native.layer_of(12, filters=3, kernel_size=2).save(tmp_path / "mine", LEVELS[-1:])
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        native.layer_of(12, filters=3, kernel_size=2).save(tmp_path / "mine" / "thesis.tex")
    assert state(tmp_path) == before


def test_what_cannot_be_saved(tmp_path):
    layer = native.layer_of(12, filters=3, kernel_size=2)
    with pytest.raises(ValueError, match=r"at least one target.*Received: \[\]"):
        layer.save(tmp_path / "b", [])
    with pytest.raises(ValueError, match=r"`target`.*Received: target=x87"):
        layer.save(tmp_path / "b", ["x87"])
    with pytest.raises(ValueError, match="at least one layer"):
        tvm_sepconv.save({}, tmp_path / "b")
    with pytest.raises(ValueError, match="isn't built"):
        tvm_sepconv.SeparableConv1D(3, 2).save(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_target_may_be_named_twice_or_alone(tmp_path, compiles_nothing):
    layer = native.layer_of(12, filters=3, kernel_size=2)
    layer.save(tmp_path / "b", LEVELS[-1])
    assert open_bundle(tmp_path / "b")[0].targets == LEVELS[-1:]
    layer.save(tmp_path / "b", [LEVELS[-1], LEVELS[-1]])
    assert open_bundle(tmp_path / "b")[0].targets == LEVELS[-1:]


def test_what_c_programs_need_is_put_beside_on_request(tmp_path, compiles_nothing):
    layer = native.layer_of(12, filters=3, kernel_size=2)
    layer.save(tmp_path / "b", LEVELS[-1:])
    assert not (tmp_path / "b/c").exists()
    for _ in range(2):  # over itself too
        tvm_sepconv.save({"one": layer}, tmp_path / "b", LEVELS[-1:], with_c=True)
        for name in ("tvm_sepconv.h", "example.c"):
            assert (tmp_path / "b/c" / name).read_bytes() == (native.NATIVE / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "b/c")) == ["example.c", "tvm_sepconv.h"]
