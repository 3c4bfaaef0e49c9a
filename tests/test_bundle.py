"""Bundles: what is written, that it comes back, and a clear error for all that can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import native
import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import layer as layer_module
from tvm_sepconv import reference, runtime, targets
from tvm_sepconv.bundle import BundleError, open_bundle

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
def nothing_opens(monkeypatch):
    """Fail if a library is opened, by whatever way there is."""

    def opened(*_):
        raise AssertionError("a library was opened")

    monkeypatch.setattr(runtime, "start", opened)
    monkeypatch.setattr(layer_module, "CompiledLayer", opened)


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


def rewrite(path: Path, **changes) -> None:
    """Change the manifest as a program that writes bundles would: with a fitting digest."""
    manifest = {**manifest_of(path), **changes}
    manifest.pop("digest")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))


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


# ---- damage: each its own error, before anything is opened --------------------------------------


def best_library(path: Path) -> Path:
    entries = manifest_of(path)["libraries"][LEVELS[-1]]
    return path / entries[sorted(entries)[0]]["path"]


def runtime_of(path: Path) -> Path:
    return path / f"lib/{targets.machine()}/libtvm_sepconv_runtime.so"


FILES = {
    "library": best_library,
    "runtime": runtime_of,
    "weights": lambda path: path / "weights.safetensors",
    "self-test": lambda path: path / "selftest.safetensors",
}
each_file = pytest.mark.parametrize("find", FILES.values(), ids=FILES)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@each_file
@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_one_altered_byte(copy, find, position, nothing_opens):
    file = find(copy)
    flip(file, int(position * file.stat().st_size) if 0 < position < 1 else int(position))
    message = f"{re.escape(str(file))} is truncated or altered.*Copy the bundle again or save it"
    with pytest.raises(BundleError, match=message):
        tvm_sepconv.load(copy)


@each_file
@pytest.mark.parametrize("keep", [0, 1, 4096])
def test_a_truncated_file(copy, find, keep, nothing_opens):
    file = find(copy)
    file.write_bytes(file.read_bytes()[: min(keep, file.stat().st_size - 1)])
    with pytest.raises(BundleError, match=f"{re.escape(str(file))} is truncated or altered"):
        tvm_sepconv.load(copy)


@each_file
def test_a_missing_file(copy, find, nothing_opens):
    file = find(copy)
    file.unlink()
    name = re.escape(str(file.relative_to(copy)))
    with pytest.raises(BundleError, match=f"{copy} is incomplete: {name} cannot be read"):
        tvm_sepconv.load(copy)


def test_libraries_of_other_targets_are_not_read(copy):
    for target in LEVELS[:-1]:
        shutil.rmtree(copy / "lib" / target)
    assert list(tvm_sepconv.load(copy)) == list(LAYERS)


def test_altered_bytes_all_over_the_manifest(copy, nothing_opens):
    file, before = copy / "manifest.json", manifest_of(copy)
    original = file.read_bytes()
    harmless = 0
    positions = range(0, len(original), 13)
    for position in positions:
        data = bytearray(original)
        data[position] ^= 1 << position % 7
        file.write_bytes(data)
        try:
            open_bundle(copy)
        except BundleError as error:
            assert "manifest.json" in str(error) or "format version" in str(error)
        else:
            assert manifest_of(copy) == before, position
            harmless += 1  # a blank that became another one
    assert harmless < len(positions) / 10


DAMAGES = {
    "empty": (b"", r"manifest.json is damaged .*Copy the bundle again or save it anew"),
    "cut": (b'{"format_version": 1,', r"manifest.json is damaged"),
    "binary": (b"\xff\xfe\x00", r"manifest.json is damaged"),
    "nested": (b"[" * 100_000, r"manifest.json is damaged"),
    "endless number": (b"1" * 100_000, r"manifest.json is damaged"),
    "a list": (b"[1]", r"no bundle's manifest: it has no `format_version`"),
    "foreign": (b'{"name": "app"}', r"no bundle's manifest: it has no `format_version`"),
    "version is text": (b'{"format_version": "1"}', r"no bundle's manifest"),
    "version is true": (b'{"format_version": true}', r"no bundle's manifest"),
    "no digest": (b'{"format_version": 1}', r"manifest.json was altered: its digest is None"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_manifest_that_is_none(copy, content, message, nothing_opens):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        tvm_sepconv.load(copy)


def test_what_is_no_bundle(tmp_path, saved, nothing_opens):
    expected = "Expected a folder that `layer.save\\(path\\)` wrote"
    with pytest.raises(BundleError, match=f"none is not a bundle: it is not there. {expected}"):
        tvm_sepconv.load(tmp_path / "none")
    with pytest.raises(BundleError, match=f"it has no manifest.json. {expected}"):
        tvm_sepconv.load(tmp_path)
    with pytest.raises(BundleError, match=f"it is a file. {expected}"):
        tvm_sepconv.load(best_library(saved))
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest.json cannot be read.*permissions"):
        tvm_sepconv.load(tmp_path)


def test_a_newer_format(copy, nothing_opens):
    (copy / "manifest.json").write_text('{"format_version": 2, "everything": "else"}')
    message = "has format version 2; this tvm_sepconv reads up to 1. Install a newer tvm_sepconv"
    with pytest.raises(BundleError, match=message):
        tvm_sepconv.load(copy)


def test_a_runtime_of_another_abi(copy, nothing_opens):
    entries = {arch: {**e, "abi": 7} for arch, e in manifest_of(copy)["runtimes"].items()}
    rewrite(copy, runtimes=entries)
    message = f"runtime ABI 7; this tvm_sepconv has ABI {runtime.ABI}. Save the layers again"
    with pytest.raises(BundleError, match=message):
        tvm_sepconv.load(copy)


# ---- machines ---------------------------------------------------------------------------------


def test_the_best_that_this_machine_can_run_is_taken(saved, tmp_path, monkeypatch):
    assert open_bundle(saved)[1] == LEVELS[-1]
    monkeypatch.setattr(targets, "machine", lambda: "x86_64")
    fake = shutil.copytree(saved, tmp_path / "fake")
    library = manifest_of(saved)["libraries"][LEVELS[-1]]
    entry = next(iter(manifest_of(saved)["runtimes"].values()))
    levels = ("x86_64-sse42", "x86_64-avx2", "x86_64-avx512")
    names = ["x86_64-avx2", "aarch64-neon@cortex-a76", "x86_64-sse42", "x86_64-avx512"]
    rewrite(fake, libraries=dict.fromkeys(names, library), runtimes={"x86_64": entry})
    features: frozenset[str] = frozenset()
    for level in levels:  # each has what those before it have
        features |= set(targets.FEATURES[level])
        monkeypatch.setattr(targets, "cpu_features", lambda found=features: found)
        assert open_bundle(fake)[1] == level


def test_a_cpu_without_the_features(saved, monkeypatch, nothing_opens):
    monkeypatch.setattr(targets, "machine", lambda: "x86_64")
    monkeypatch.setattr(targets, "cpu_features", lambda: frozenset({"sse4_2", "fma"}))
    if LEVELS[0].startswith("x86_64"):
        with pytest.raises(BundleError) as caught:
            tvm_sepconv.load(saved)
        for target in LEVELS:
            lacking = [f for f in targets.FEATURES[target] if f not in ("sse4_2", "fma")]
            assert f"{target} needs {', '.join(lacking)}" in str(caught.value)
        assert "Save the layers with `targets=['x86_64']`" in str(caught.value)
        with pytest.raises(BundleError, match=f"{LEVELS[-1]} needs"):
            tvm_sepconv.load(saved, LEVELS[-1])


def test_a_machine_of_another_architecture(saved, monkeypatch, nothing_opens):
    monkeypatch.setattr(targets, "machine", lambda: "riscv64")
    with pytest.raises(BundleError, match=r"the \w+ architecture \(this machine is riscv64\)"):
        tvm_sepconv.load(saved)


@pytest.mark.parametrize(
    ("kernel", "flags", "expected"),
    [("aarch64", "fp asimd", ("armv7", ("armv7-neon",))), ("x86_64", "avx2", ("i686", ()))],
)
def test_a_32_bit_process_under_a_64_bit_kernel(kernel, flags, expected, monkeypatch):
    monkeypatch.setattr(targets.platform, "machine", lambda: kernel)
    monkeypatch.setattr(targets.sys, "maxsize", 2**31 - 1)
    monkeypatch.setattr(Path, "read_text", lambda self: f"Features\t: {flags}\n")
    monkeypatch.setattr(targets, "cpu_features", targets.cpu_features.__wrapped__)
    assert (targets.machine(), targets.runnable()) == expected


def test_a_bundle_with_targets_that_only_newer_versions_know(copy, monkeypatch, nothing_opens):
    library = next(iter(manifest_of(copy)["libraries"].values()))
    rewrite(copy, libraries={f"{targets.machine()}-future": library})
    with pytest.raises(BundleError, match="-future needs a newer tvm_sepconv"):
        tvm_sepconv.load(copy)


def test_an_explicit_target_that_is_not_there(saved, nothing_opens):
    other = next(t for t in targets.FEATURES if t not in LEVELS)
    with pytest.raises(BundleError, match=f"has no library for {other}; it has .*{LEVELS[-1]}"):
        tvm_sepconv.load(saved, other)
    with pytest.raises(ValueError, match=r"`target`.*Received: target=x87"):
        tvm_sepconv.load(saved, "x87")
