"""``tvm-sepconv verify`` and ``run``: a bundle on this machine, from the shell."""

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
from command_line import refused

import tvm_sepconv
from tvm_sepconv import cli, reference, targets
from tvm_sepconv.commands import verify

pytest.importorskip("tvm")

LEVELS = targets.host_family()[-2:]
LAYERS = {  # name: (layer, channels)
    "plain": (dict(filters=3, kernel_size=2, activation="relu"), 12),
    "gated/é": (dict(filters=4, kernel_size=3, activation="glu", use_bias=False), 5),
    "mixed": (dict(filters=4, kernel_size=3, dtype="mixed_float16", activation="exponential"), 5),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.sepconv"
    layers = {
        name: native.layer_of(channels, seed, **arguments)
        for seed, (name, (arguments, channels)) in enumerate(LAYERS.items())
    }
    tvm_sepconv.save(layers, path, LEVELS)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ---- verify --------------------------------------------------------------------------------------


def test_every_layer_with_every_library(saved, capsys):
    assert cli.main(["verify", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(LEVELS) * len(LAYERS)} of {len(LEVELS) * len(LAYERS)} right"
    rows = [re.fullmatch(r"(\S+) +(\S+) +largest difference (\S+), allowed (\S+)  ok", line)
            for line in lines[:-1]]  # fmt: skip
    assert [(row[2], row[1]) for row in rows] == [(t, n) for t in reversed(LEVELS) for n in LAYERS]
    assert all(0 <= float(row[3]) <= float(row[4]) < 0.1 for row in rows)


def test_one_target_as_json(saved, capsys):
    assert cli.main(["verify", str(saved), "--target", LEVELS[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == str(saved)
    assert [(r["layer"], r["target"], r["ok"]) for r in found["results"]] == [
        (name, LEVELS[0], True) for name in LAYERS
    ]
    assert all(0 <= r["difference"] <= r["allowed"] for r in found["results"])


@pytest.mark.parametrize("name", LAYERS)
def test_the_tolerance_is_that_of_the_self_test_and_no_wider(name, saved):
    # One weight of many off by a tenth is found.
    layer = tvm_sepconv.load(saved)[name]
    test = tvm_sepconv.bundle.open_bundle(saved)[0].selftest()[name]
    assert verify._compare(layer, test)["ok"]
    depthwise, *others = layer.get_weights()
    tap = np.unravel_index(np.argmax(np.abs(depthwise)), depthwise.shape)
    depthwise[tap] *= 1.1
    layer.set_weights([depthwise, *others])
    assert not verify._compare(layer, test)["ok"]


@pytest.mark.parametrize("wrong", [1.0, np.nan, np.inf])
def test_a_wrong_answer_is_found(wrong, copy, capsys):
    from safetensors.numpy import load_file, save

    tests = {k: v.copy() for k, v in load_file(copy / "selftest.safetensors").items()}
    tests["plain/output"][1, 2, 0] += wrong
    rewrite(copy, lambda manifest: None, {"selftest.safetensors": save(tests)})
    assert cli.main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    found = "1" if wrong == 1.0 else "not finite"
    for target in LEVELS:
        assert re.search(f"plain +{target} +largest difference {found}, allowed .*  FAILED\n", out)
    count = len(LEVELS) * len(LAYERS)
    assert f"{count - len(LEVELS)} of {count} right, FAILED" in out
    assert cli.main(["verify", str(copy), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [r["layer"] for r in rows if not r["ok"]] == ["plain"] * len(LEVELS)


def test_what_cannot_be_verified(copy, capsys):
    other = next(t for t in targets.FEATURES if t not in LEVELS)
    text = refused(capsys, "verify", str(copy), "--target", other)
    assert f"has no library for {other}" in text
    (copy / "selftest.safetensors").unlink()
    assert "selftest.safetensors cannot be read" in refused(capsys, "verify", str(copy))
    assert "is not a bundle" in refused(capsys, "verify", "/nowhere")


def test_a_bundle_of_one_layer(tmp_path, capsys):
    native.layer_of(12, filters=3, kernel_size=2, name="alone").save(tmp_path / "b", LEVELS[-1:])
    assert cli.main(["verify", str(tmp_path / "b")]) == 0
    assert "alone  " in capsys.readouterr().out


# ---- run -----------------------------------------------------------------------------------------


def test_run_writes_the_layers_answer(saved, tmp_path, capsys):
    layer = tvm_sepconv.load(saved)["plain"]
    x = native.inputs(layer.config, 2, 9, 12)
    np.save(tmp_path / "x.npy", x)
    files = ["--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "answer")]
    assert cli.main(["run", str(saved), *files, "--layer", "plain", "--threads", "1"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "answer"), layer(x))
    expected = reference.separable_conv1d(x, *layer.get_weights(), layer.config)
    out = capsys.readouterr().out
    assert "(2, 9, 12) float32 in [" in out and "-> (2, 8, 3) float32 in [0, " in out
    assert out.startswith("plain: ") and f"{expected.max():.4g}], threads: 1\n" in out
    assert f"wrote {tmp_path / 'answer'}" in out
    tvm_sepconv.set_num_threads(None)


def test_run_without_output_and_with_more_threads_than_there_are(saved, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((1, 9, 5), np.nan))
    command = ["run", str(saved), "--input", str(tmp_path / "x.npy"), "--layer", "gated/é"]
    assert cli.main([*command, "--threads", "100000"]) == 0
    out = capsys.readouterr().out
    assert "(1, 9, 5) float64 -> (1, 7, 2) float32, threads: 256\n" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy"]
    tvm_sepconv.set_num_threads(None)


def test_what_run_refuses(saved, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((1, 9, 12), "float32"))
    np.save(tmp_path / "int.npy", np.zeros((1, 9, 12), "int32"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "empty.npy").write_bytes(b"")

    def said(file="x.npy", *arguments, layer="plain"):
        chosen = ("--layer", layer) if layer else ()
        return refused(
            capsys, "run", str(saved), "--input", str(tmp_path / file), *chosen, *arguments
        )

    assert "`--layer` must be one of plain, gated/é, mixed. Received: none" in said(layer="")
    assert "Received: sixth" in said(layer="sixth")
    assert "expected axis -1 of input shape to have value 5" in said(layer="gated/é")
    assert "`--input` must hold floating-point numbers. Received: int32" in said("int.npy")
    np.savez(tmp_path / "several.npz", x=np.zeros(3))
    for file in ("objects.npy", "empty.npy", "several.npz"):
        assert "`--input` must be a .npy file of floating-point numbers" in said(file)
    assert "`--input` must be a file. There is none called" in said("none.npy")
    assert "at least 1. Received: threads=0" in said("x.npy", "--threads", "0")
    answer = said("x.npy", "--output", "/nowhere/y.npy")
    assert "`--output` must lie in a folder. There is none called /nowhere" in answer


def test_a_name_for_the_only_layer_is_checked(tmp_path, capsys):
    native.layer_of(12, filters=3, kernel_size=2, name="alone").save(tmp_path / "b", LEVELS[-1:])
    np.save(tmp_path / "x.npy", np.zeros((1, 9, 12), "float32"))
    command = ["run", str(tmp_path / "b"), "--input", str(tmp_path / "x.npy")]
    assert cli.main(command) == 0
    assert cli.main([*command, "--layer", "alone"]) == 0
    capsys.readouterr()
    assert "must be one of alone. Received: other" in refused(capsys, *command, "--layer", "other")


@pytest.mark.parametrize("without", [{"tvm"}, {"tvm", "tvm_ffi"}], ids=sorted)
def test_both_need_no_compiler(without, saved, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 9, 12), "float32"))
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {without}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from tvm_sepconv import cli
saved, x = {str(saved)!r}, {str(tmp_path / "x.npy")!r}
assert cli.main(["verify", saved]) == 0
assert cli.main(["run", saved, "--input", x, "--layer", "plain"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
