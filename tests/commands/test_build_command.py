"""``tvm-sepconv build``: libraries in the cache or in a folder, with the records there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import refused

from tvm_sepconv import bundle, cli, jit, reference, targets
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning import logs, measure
from tvm_sepconv.runtime import CompiledLayer
from tvm_sepconv.workloads import workloads

X86 = any(isa.startswith("x86_64") for isa in targets.runnable())
needs_x86 = pytest.mark.skipif(not X86, reason="runs what it builds for x86")


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "vax"), "must be one of .*x86_64-avx2.*Received: target=vax"),
        (("NOPE",), "No layer is called 'NOPE'. There are SEED, "),
        (("--workloads", "NOPE"), "No layer is called 'NOPE'. There are SEED, "),
    ],
)
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, "build", *arguments))


def test_without_the_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "tvm" else find(n))
    assert "pip install 'tvm-sepconv[compiler]'" in refused(capsys, "build")


def test_no_target_for_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "runnable", tuple)
    assert "`--target` is needed: there is none for" in refused(capsys, "build")
    message = refused(capsys, "build", "--target", "armv7-neon")
    assert "This machine cannot run armv7-neon: name a folder for it with --output" in message


@needs_x86
def test_build_into_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = workloads()["MB-1"].config().kernel_config(workloads()["MB-1"].channels)
    target = cpu("x86")
    tiling = target.family.candidates(config, target.isa)[-1]
    record = logs.Record(
        config=config, variant="long", target=target.name, threads=1, batch=1, steps=128,
        decisions=tiling.to_dict(), median_secs=1.25e-5, default_secs=2e-5, noise=0.0, trials=8,
        machine="", tvm="", date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    (tmp_path / "mine").mkdir()
    logs.write(record, tmp_path / "mine")
    arguments = ["build", "--target", "x86", "--workloads", "MB-1"]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    assert cli.main([*arguments, "--logs", str(tmp_path / "mine")]) == 0
    tuned = capsys.readouterr().out
    assert "tuned" not in plain
    assert f"MB-1: tiles of {tiling.step_tile} steps tuned (12.5 µs), tiles of " in tuned
    paths = [line.split("; ")[1].strip() for line in (plain, tuned)]
    assert paths[0] != paths[1]
    assert Path(paths[1]) == jit.library(config)[0]  # --logs holds for this process


@needs_x86
def test_build_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = workloads()["LITE-1"]
    arguments = ["--target", "x86_64-sse42", "--workloads", "LITE-1", "--output", str(tmp_path)]
    assert cli.main(["build", *arguments]) == 0
    folder = tmp_path / "x86_64-sse42"
    kernel = workload.config().kernel_config(workload.channels)
    library, runtime = folder / f"{kernel.key}.so", folder / bundle.RUNTIME
    assert sorted(folder.iterdir()) == sorted([library, runtime])
    assert str(library) in capsys.readouterr().out
    config = measure.layer_config(kernel)
    draw = np.random.default_rng(0)
    shapes = [(2, 50, workload.channels), config.depthwise_shape(workload.channels)]
    shapes += [config.pointwise_shape(workload.channels), config.bias_shape]
    x, *weights = (draw.standard_normal(shape, np.float32) for shape in shapes)
    y = np.empty((2, config.out_steps(50), config.filters), np.float32)
    CompiledLayer(library, runtime, config, *weights).run(x, y, 1)
    expected = reference.separable_conv1d(x, *weights, config)
    np.testing.assert_allclose(y, expected, 1e-4, 1e-4)
