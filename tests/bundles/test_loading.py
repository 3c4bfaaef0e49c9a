"""Bundles that are whole and yet do not fit together, loading side by side, and their size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native
import numpy as np
import pytest
from bundles import rewrite

import tvm_sepconv
from tvm_sepconv import layer as layer_module
from tvm_sepconv import runtime, targets, workloads
from tvm_sepconv.bundle import BundleError

pytest.importorskip("tvm")

LAYERS = {"first": (3, 2), "second": (5, 3)}  # name: (filters, kernel size), of 12 channels
BEST = targets.host_family()[-1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "two.sepconv"
    layers = {n: native.layer_of(12, filters=f, kernel_size=k) for n, (f, k) in LAYERS.items()}
    tvm_sepconv.save(layers, path, [BEST])
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def packs_nothing(monkeypatch):
    """Fail if a layer is made: weights of other shapes would be read beyond their end."""

    def made(*_):
        raise AssertionError("a layer was made")

    monkeypatch.setattr(runtime, "start", made)
    monkeypatch.setattr(layer_module, "CompiledLayer", made)


def test_weights_that_are_not_the_layers(copy, packs_nothing):
    from safetensors.numpy import load_file, save

    tensors, name = load_file(copy / "weights.safetensors"), "first/pointwise_kernel"
    for changed, found in [
        ({k: v for k, v in tensors.items() if k != name}, "none"),
        ({**tensors, name: tensors[name][:, :-1]}, r"one of shape \(1, 11, 3\)"),
    ]:
        content = save({k: np.ascontiguousarray(v) for k, v in changed.items()})
        rewrite(copy, lambda manifest: None, {"weights.safetensors": content})
        message = rf"'first' needs a pointwise_kernel of shape \(1, 12, 3\); .* has {found}"
        with pytest.raises(BundleError, match=message):
            tvm_sepconv.load(copy)


def test_a_library_of_another_layer(copy, packs_nothing):
    def swap(manifest):
        layers = manifest["layers"]
        layers["first"]["library"] = layers["second"]["library"]

    rewrite(copy, swap)
    with pytest.raises(BundleError, match="'first' names a library of another filters"):
        tvm_sepconv.load(copy)


def test_a_library_for_another_machine_under_this_ones_name(copy):
    file = sorted(copy.glob(f"lib/{BEST}/*.so"))[0]
    header = b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\xf3\0" + bytes(100)  # RISC-V
    rewrite(copy, lambda manifest: None, {str(file.relative_to(copy)): header})
    message = "is for another instruction set or word size than this process"
    with pytest.raises(RuntimeError, match=f"{re.escape(str(file))} {message}"):
        tvm_sepconv.load(copy)


def test_processes_that_load_at_once(saved):
    code = "import sys, tvm_sepconv; sys.stdin.read(); print(*tvm_sepconv.load(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, saved], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in processes:  # all are ready, or nearly so, and wait for this
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.read().decode().split() == list(LAYERS)
        assert process.wait() == 0


# ---- size -------------------------------------------------------------------------------------


def test_a_published_layer_is_small_for_every_target(tmp_path):
    # With all variants and the runtime; the weights come on top.
    work = workloads.workloads()["QN-B1"]
    layer = tvm_sepconv.SeparableConv1D.from_config(work.config().to_dict())
    layer.build((None, None, work.channels))
    wanted = [*targets.host_family(), "aarch64-neon"]
    layer.save(tmp_path / "b", wanted)
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    for target in dict.fromkeys(wanted):
        entries = [manifest["runtimes"][target.split("-")[0]]]
        entries += manifest["libraries"][target].values()
        sizes = {e["path"]: (tmp_path / "b" / e["path"]).stat().st_size for e in entries}
        assert len(sizes) == 2
        assert sum(sizes.values()) <= 120_000, sizes
    weights = (tmp_path / "b/weights.safetensors").stat().st_size
    assert weights < 4 * layer.count_params() + 1000
