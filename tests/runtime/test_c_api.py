"""Bundles from C: opened by the runtime library as Python opens them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from pathlib import Path

import native
import numpy as np
import pytest
from bundles import rewrite

import tvm_sepconv
from tvm_sepconv import runtime, targets
from tvm_sepconv.bundle import open_bundle

pytest.importorskip("tvm")

STATUS = dict(library=1, abi=2, argument=4, bundle=7, machine=8)
LAYERS = {  # name: (layer, channels)
    "first": (dict(filters=3, kernel_size=2, strides=2, activation="relu"), 12),
    "é \"2\"/x": (
        dict(filters=5, kernel_size=3, padding=(4, 1), depth_multiplier=2, use_bias=False,
             data_format="channels_first", dtype="float64"), 4,
    ),
    "mixed": (dict(filters=4, kernel_size=3, padding="same", dtype="mixed_float16"), 5),
    "half": (dict(filters=4, kernel_size=3, padding="same", dtype="float16"), 5),
    "softmax": (dict(filters=4, kernel_size=2, activation="softmax"), 5),
}  # fmt: skip
BEST = targets.host_family()[-1]
each_layer = pytest.mark.parametrize("name", [name for name in LAYERS if name != "softmax"])


class Info(ctypes.Structure):
    """tvm_sepconv_layer_info."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("channels", "filters", "kernel_size", "strides")),
        *((n, ctypes.c_int64) for n in ("dilation_rate", "depth_multiplier")),
        ("padding", ctypes.c_int), ("left", ctypes.c_int64), ("right", ctypes.c_int64),
        *((n, ctypes.c_int) for n in ("channels_first", "use_bias", "dtype", "element_bytes")),
    )  # fmt: skip


def layers_of_c() -> dict[str, tvm_sepconv.SeparableConv1D]:
    return {
        name: native.layer_of(channels, seed, **arguments, name=f"layer{seed}")
        for seed, (name, (arguments, channels)) in enumerate(LAYERS.items())
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.sepconv"
    tvm_sepconv.save(layers_of_c(), path, [BEST])
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def c(saved) -> ctypes.CDLL:
    opened, chosen = open_bundle(saved)
    c = native.c_api(runtime.start(opened.libraries(chosen)[0]).path)
    pointer = ctypes.c_void_p
    c.tvm_sepconv_bundle_open.argtypes = ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(pointer)
    for name in ("bundle_target", "bundle_layer_name", "bundle_layer_count", "bundle_close"):
        getattr(c, f"tvm_sepconv_{name}").argtypes = (pointer,)
    c.tvm_sepconv_bundle_target.restype = c.tvm_sepconv_bundle_layer_name.restype = ctypes.c_char_p
    c.tvm_sepconv_bundle_layer_name.argtypes = pointer, ctypes.c_int
    c.tvm_sepconv_bundle_layer.argtypes = pointer, ctypes.c_char_p, ctypes.POINTER(pointer)
    c.tvm_sepconv_layer_describe.argtypes = pointer, ctypes.POINTER(Info)
    c.tvm_sepconv_layer_describe.restype = None
    c.tvm_sepconv_prepare.argtypes = (pointer,)
    return c


def opened_in_c(c, path, target: str | None = None) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    chosen = None if target is None else target.encode()
    status = c.tvm_sepconv_bundle_open(os.fsencode(path), chosen, ctypes.byref(handle))
    assert status == 0, c.tvm_sepconv_last_error()
    return handle


def refusal(c, path, target: str | None = None) -> tuple[int, str]:
    handle = ctypes.c_void_p(1)
    chosen = None if target is None else target.encode()
    status = c.tvm_sepconv_bundle_open(os.fsencode(path), chosen, ctypes.byref(handle))
    assert status and handle.value is None
    return status, c.tvm_sepconv_last_error().decode()


def layer_in_c(c, opened, name: str | None) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    encoded = None if name is None else name.encode()
    status = c.tvm_sepconv_bundle_layer(opened, encoded, ctypes.byref(handle))
    assert status == 0, c.tvm_sepconv_last_error()
    return handle


def layer_refusal(c, path, name: str | None) -> tuple[int, str]:
    opened, handle = opened_in_c(c, path), ctypes.c_void_p(1)
    encoded = None if name is None else name.encode()
    status = c.tvm_sepconv_bundle_layer(opened, encoded, ctypes.byref(handle))
    assert status and handle.value is None
    c.tvm_sepconv_bundle_close(opened)
    return status, c.tvm_sepconv_last_error().decode()


# ---- what a bundle says -------------------------------------------------------------------------


def test_names_and_target(c, saved):
    opened = opened_in_c(c, saved)
    assert c.tvm_sepconv_bundle_target(opened).decode() == BEST
    count = c.tvm_sepconv_bundle_layer_count(opened)
    names = [c.tvm_sepconv_bundle_layer_name(opened, i).decode() for i in range(count)]
    assert names == list(LAYERS)
    assert c.tvm_sepconv_bundle_layer_name(opened, count) is None
    assert c.tvm_sepconv_bundle_layer_name(opened, -1) is None
    c.tvm_sepconv_bundle_close(opened)
    opened = opened_in_c(c, saved, BEST)
    c.tvm_sepconv_bundle_close(opened)
    c.tvm_sepconv_bundle_close(None)


@each_layer
def test_a_layer_gives_pythons_bits(name, c, saved):
    layer = tvm_sepconv.load(saved)[name]
    config, channels = layer.config, LAYERS[name][1]
    opened = opened_in_c(c, saved)
    handle = layer_in_c(c, opened, name)
    c.tvm_sepconv_bundle_close(opened)  # the layer does not need it any more
    assert c.tvm_sepconv_prepare(handle) == 0
    for batch, steps in [(1, 3), (2, 64), (3, 201)]:
        x = native.inputs(config, batch, steps, channels)
        expected = layer(x)
        y = np.full_like(expected, np.nan)
        assert c.tvm_sepconv_out_steps(handle, steps) == config.out_steps(steps)
        assert c.tvm_sepconv_run(handle, batch, steps, native.View.of(x), native.View.of(y)) == 0
        np.testing.assert_array_equal(y, expected)
    c.tvm_sepconv_layer_destroy(handle)


@each_layer
def test_a_layer_describes_itself(name, c, saved):
    layer = tvm_sepconv.load(saved)[name]
    config = layer.config
    opened, info = opened_in_c(c, saved), Info()
    handle = layer_in_c(c, opened, name)
    c.tvm_sepconv_layer_describe(handle, ctypes.byref(info))
    explicit = not isinstance(config.padding, str)
    assert {key: getattr(info, key) for key, _ in Info._fields_} == dict(
        channels=LAYERS[name][1], filters=config.filters, kernel_size=config.kernel_size,
        strides=config.strides, dilation_rate=1, depth_multiplier=config.depth_multiplier,
        padding=2 if explicit else native.PADDINGS[config.padding],
        left=config.padding[0] if explicit else 0, right=config.padding[1] if explicit else 0,
        channels_first=config.data_format == "channels_first", use_bias=config.use_bias,
        dtype=dict(float16=0, bfloat16=1, float32=2, float64=3)[config.compute_dtype],
        element_bytes=np.dtype(config.compute_dtype).itemsize,
    )  # fmt: skip
    c.tvm_sepconv_layer_destroy(handle)
    c.tvm_sepconv_bundle_close(opened)


def test_the_only_layer_needs_no_name(c, tmp_path, saved):
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    layer.save(tmp_path / "one", [BEST])
    opened = opened_in_c(c, tmp_path / "one")
    c.tvm_sepconv_layer_destroy(layer_in_c(c, opened, None))
    c.tvm_sepconv_bundle_close(opened)
    status, text = layer_refusal(c, saved, None)
    assert status == STATUS["argument"] and "`name` must be given" in text and "5 layers" in text


def test_any_number_of_threads_may_be_asked_for(c, saved):
    opened = opened_in_c(c, saved)
    handle, config = layer_in_c(c, opened, "first"), tvm_sepconv.load(saved)["first"].config
    x = native.inputs(config, 40, 2000, 12)
    answers = []
    for threads, allowed in [(1, 1), (3, 3), (100_000, 256)]:
        c.tvm_sepconv_set_num_threads(threads)
        assert c.tvm_sepconv_num_threads() == allowed
        y = np.full((40, config.out_steps(2000), 3), np.nan, "float32")
        assert c.tvm_sepconv_run(handle, 40, 2000, native.View.of(x), native.View.of(y)) == 0
        answers.append(y)
    c.tvm_sepconv_set_num_threads(0)
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    c.tvm_sepconv_layer_destroy(handle)
    c.tvm_sepconv_bundle_close(opened)


# ---- what is refused ----------------------------------------------------------------------------


def test_what_is_no_bundle(c, tmp_path, saved):
    for path in (tmp_path / "none", tmp_path, saved / "manifest.json"):
        status, text = refusal(c, path)
        assert status == STATUS["bundle"] and "is not a bundle: it has no manifest.json" in text
    assert refusal(c, "x" * 2048)[0] == STATUS["argument"]
    handle = ctypes.c_void_p(1)
    assert c.tvm_sepconv_bundle_open(None, None, ctypes.byref(handle)) == STATUS["argument"]
    assert b"`path` must name a folder" in c.tvm_sepconv_last_error()


@pytest.mark.parametrize("pattern", [f"lib/{BEST}/*_relu_*.so", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_damaged_files(pattern, damage, c, copy):
    (file,) = copy.glob(pattern)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:1000])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    status, text = refusal(c, copy)
    assert status == STATUS["bundle"]
    expected = "is incomplete: .* cannot be read" if damage == "missing" else "truncated or altered"
    assert re.search(f"{file.name}.*" if damage != "missing" else "", text)
    assert re.search(expected, text)


def test_altered_bytes_all_over_the_manifest(c, copy):
    # Python's digest, computed by C: whatever is altered is found, unless it is a blank.
    file = copy / "manifest.json"
    original = file.read_bytes()
    before = json.loads(original)
    harmless = 0
    positions = range(0, len(original), 97)
    for position in positions:
        data = bytearray(original)
        data[position] ^= 1 << position % 7
        file.write_bytes(data)
        handle = ctypes.c_void_p()
        status = c.tvm_sepconv_bundle_open(os.fsencode(copy), None, ctypes.byref(handle))
        if status:
            assert status == STATUS["bundle"], c.tvm_sepconv_last_error()
        else:
            assert json.loads(data) == before, position
            harmless += 1
            c.tvm_sepconv_bundle_close(handle)
    assert harmless < len(positions) / 10


def test_a_newer_format(c, copy):
    (copy / "manifest.json").write_text('{"format_version": 2, "everything": "else"}')
    status, text = refusal(c, copy)
    assert status == STATUS["bundle"]
    assert "has format version 2; this runtime reads up to 1" in text
    (copy / "manifest.json").write_text('{"name": "app"}')
    assert "no bundle's manifest: it has no `format_version`" in refusal(c, copy)[1]
    (copy / "manifest.json").write_text('{"format_version": 1,}')
    assert "manifest.json is damaged at byte 21" in refusal(c, copy)[1]


def test_a_runtime_of_another_abi(c, copy):
    rewrite(copy, lambda manifest: manifest["runtimes"][targets.machine()].update(abi=7))
    status, text = refusal(c, copy)
    assert status == STATUS["abi"]
    assert f"runtime ABI 7; the runtime library in this process has ABI {runtime.ABI}" in text


def test_machines(c, copy):
    def only(name: str, **changes):
        def change(manifest):
            ((_, group),) = manifest["libraries"].items()
            manifest["libraries"] = {name: {k: {**e, **changes} for k, e in group.items()}}

        rewrite(copy, change)

    status, text = refusal(c, copy, "armv7-neon@cortex-a53")
    assert status == STATUS["machine"] and "has no library for armv7-neon@cortex-a53" in text
    only("riscv64-rvv")
    status, text = refusal(c, copy)
    assert status == STATUS["machine"]
    assert "riscv64-rvv needs another architecture, or a newer runtime" in text
    only(BEST, cpu_features=["neither"])
    for target in (None, BEST):
        status, text = refusal(c, copy, target)
        assert status == STATUS["machine"] and f"{BEST} needs neither" in text
    only(f"{BEST}@some-core", cpu_features=list(targets.FEATURES[BEST]))
    opened = opened_in_c(c, copy)
    assert c.tvm_sepconv_bundle_target(opened) == f"{BEST}@some-core".encode()
    c.tvm_sepconv_bundle_close(opened)


def test_the_best_of_several_targets_is_taken(c, copy):
    def several(manifest):
        ((_, group),) = manifest["libraries"].items()
        none = {k: {**e, "cpu_features": []} for k, e in group.items()}
        never = {k: {**e, "cpu_features": ["neither"]} for k, e in group.items()}
        names = sorted(t for t in targets.FEATURES if t.split("-")[0] == targets.machine())
        best = [t for t in reversed(targets.FEATURES) if t in names]
        manifest["libraries"] = {best[-1]: none, f"{best[0]}@b": none, f"{best[0]}@a": none}
        manifest["libraries"][best[0]] = never

    rewrite(copy, several)
    opened = opened_in_c(c, copy)
    assert c.tvm_sepconv_bundle_target(opened).endswith(b"@a")
    c.tvm_sepconv_bundle_close(opened)


def test_layers_that_are_not_there_or_not_for_c(c, copy):
    status, text = layer_refusal(c, copy, "fourth")
    assert status == STATUS["bundle"] and "has no layer 'fourth'" in text
    status, text = layer_refusal(c, copy, "softmax")
    assert status == STATUS["bundle"]
    assert "'softmax' is computed in Python, after the kernel: \"softmax\"" in text


@pytest.mark.parametrize("offsets", [[0, 4], [4, 148], [10**6, 10**6 + 144], [144, 0], [0], []])
def test_weights_that_lie_elsewhere(offsets, c, copy):
    # No library writes such headers. The tensor has 144 bytes, which is all that is there.
    depthwise = {"dtype": "F32", "shape": [2, 12, 1], "data_offsets": [0, 96]}
    bias = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}

    def content(offsets: list[int]) -> bytes:
        pointwise = {"dtype": "F32", "shape": [1, 12, 3], "data_offsets": offsets}
        tensors = dict(depthwise_kernel=depthwise, pointwise_kernel=pointwise, bias=bias)
        text = json.dumps({f"first/{name}": entry for name, entry in tensors.items()}).encode()
        return len(text).to_bytes(8, "little") + text + bytes(144)

    rewrite(copy, lambda manifest: None, {"weights.safetensors": content([0, 144])})
    opened = opened_in_c(c, copy)
    c.tvm_sepconv_layer_destroy(layer_in_c(c, opened, "first"))
    c.tvm_sepconv_bundle_close(opened)
    rewrite(copy, lambda manifest: None, {"weights.safetensors": content(offsets)})
    status, text = layer_refusal(c, copy, "first")
    assert status == STATUS["bundle"] and "has no first/pointwise_kernel of the shape" in text


def test_weights_that_do_not_fit(c, copy):
    from safetensors.numpy import load_file, save

    tensors = load_file(copy / "weights.safetensors")
    name = "first/pointwise_kernel"
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, name: tensors[name][:, :-1]},
        {**tensors, name: tensors[name][0]},
        {**tensors, name: tensors[name].astype(np.int32)},
    ):
        content = save({k: np.ascontiguousarray(v) for k, v in changed.items()})
        rewrite(copy, lambda manifest: None, {"weights.safetensors": content})
        status, text = layer_refusal(c, copy, "first")
        assert status == STATUS["bundle"] and f"has no {name} of the shape" in text
    for content in (
        b"",
        b"\xff" * 8,
        (10**6).to_bytes(8, "little") + b"{}",
        b"\2" + b"\0" * 7 + b"{",
    ):
        rewrite(copy, lambda manifest: None, {"weights.safetensors": content})
        status, text = refusal(c, copy)
        assert status == STATUS["bundle"] and "is not in the safetensors format" in text


ELF_HEADERS = {  # what a library of another machine begins with
    "instruction set": b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\xf3\0" + bytes(100),
    "word size": b"\x7fELF\1\1\1" + bytes(9) + b"\3\0\x3e\0" + bytes(100),
}


@pytest.mark.parametrize("header", ELF_HEADERS.values(), ids=ELF_HEADERS)
def test_a_library_of_another_machine(header, c, copy):
    (file,) = copy.glob(f"lib/{BEST}/*_relu_*.so")
    rewrite(copy, lambda manifest: None, {str(file.relative_to(copy)): header})
    status, text = layer_refusal(c, copy, "first")
    assert status == STATUS["library"]
    assert f"{file} is for another instruction set or word size than this process" in text
    rewrite(copy, lambda manifest: None, {str(file.relative_to(copy)): b"#!/bin/sh\n" * 10})
    assert "is no shared library" in layer_refusal(c, copy, "first")[1]
