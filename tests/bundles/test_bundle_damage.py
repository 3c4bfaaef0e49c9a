"""Bundles that are damaged or for another machine: a clear error before anything is opened."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import native
import pytest
from bundles import rewrite

import tvm_sepconv
from tvm_sepconv import layer as layer_module
from tvm_sepconv import runtime, targets
from tvm_sepconv.bundle import BundleError, open_bundle

pytest.importorskip("tvm")

from tvm_sepconv.compiler import package

LEVELS = targets.host_family()[-2:]  # the two best of this machine
LIBRARY = b"no library" * 1000


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A bundle of two layers whose libraries only look like such."""
    path = tmp_path_factory.mktemp("saved") / "two.sepconv"
    layers = {
        "first": native.layer_of(12, filters=3, kernel_size=2, activation="relu"),
        "second/of.two": native.layer_of(4, filters=5, kernel_size=3, dtype="float64"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            package.build, "build_library", lambda _, __, output, ___: output.write_bytes(LIBRARY)
        )
        patch.setattr(package.build, "build_runtime", lambda _, output: output.write_bytes(LIBRARY))
        tvm_sepconv.save(layers, path, LEVELS)
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


def manifest_of(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


# ---- damage -------------------------------------------------------------------------------------


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


def test_altered_bytes_all_over_the_manifest(copy, nothing_opens):
    file, before = copy / "manifest.json", manifest_of(copy)
    original = file.read_bytes()
    harmless = 0
    positions = range(0, len(original), 37)
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
    rewrite(copy, lambda manifest: manifest.update(runtimes=entries))
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
    changes = {"libraries": dict.fromkeys(names, library), "runtimes": {"x86_64": entry}}
    rewrite(fake, lambda manifest: manifest.update(changes))
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
    future = {f"{targets.machine()}-future": library}
    rewrite(copy, lambda manifest: manifest.update(libraries=future))
    with pytest.raises(BundleError, match="-future needs a newer tvm_sepconv"):
        tvm_sepconv.load(copy)


def test_an_explicit_target_that_is_not_there(saved, nothing_opens):
    other = next(t for t in targets.FEATURES if t not in LEVELS)
    with pytest.raises(BundleError, match=f"has no library for {other}; it has .*{LEVELS[-1]}"):
        tvm_sepconv.load(saved, other)
    with pytest.raises(ValueError, match=r"`target`.*Received: target=x87"):
        tvm_sepconv.load(saved, "x87")
