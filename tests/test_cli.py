"""The command line: what it does, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import bundle, cli, display, gpu, jit, reference, targets
from tvm_sepconv.commands import inspect, scope, tune
from tvm_sepconv.compiler import logs, measure
from tvm_sepconv.compiler.search import Progress
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tune import Result
from tvm_sepconv.runtime import CompiledLayer
from tvm_sepconv.workloads import workloads

X86 = any(isa.startswith("x86_64") for isa in targets.runnable())
needs_x86 = pytest.mark.skipif(not X86, reason="runs what it builds for x86")


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses: one line, no traceback, status 2."""
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tvm-sepconv {arguments[0]}: error: ")
    assert len(err.splitlines()) == 1, err
    return err


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--target", "vax"), "must be one of .*x86_64-avx2.*Received: target=vax"),
        (("tune", "--workloads", "NOPE"), "No layer is called 'NOPE'. There are SEED, "),
        (("tune", "--workloads", "QN-B1,Z*"), r"No layer is called 'Z\*'"),
        (("tune", "--workloads", " ,"), "A layer must be named. There are SEED"),
        (("tune", "--trials", "1"), "`--trials` must be at least 2.*Received: 1"),
        (("tune", "--minutes", "0"), "`--minutes` must be positive. Received: 0"),
        (("tune", "--minutes", "nan"), "`--minutes` must be positive. Received: nan"),
        (("build", "--target", "vax"), "Received: target=vax"),
        (("build", "--workloads", "NOPE"), "No layer is called 'NOPE'"),
        (("build", "--target", "cuda"), "Building for CUDA is not part of this version yet"),
        (("inspect", "/nowhere/at/all"), "is not a bundle"),
    ],
)  # fmt: skip
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, *arguments))


@pytest.mark.parametrize("arguments", [(), ("fly",), ("tune", "--trials", "many"), ("inspect",)])
def test_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: tvm-sepconv" in capsys.readouterr().err


def test_tuning_for_cuda_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: "the driver finds none")
    message = refused(capsys, "tune", "--target", "cuda")
    assert (
        "measures kernels on an NVIDIA GPU, and this machine has none to use: the driver" in message
    )
    assert "Run it on a machine with a GPU and its driver, or tune for this machine's" in message
    assert f"--target {(*targets.runnable(), 'x86')[0]}" in message
    assert "not part of this version yet" in message


def test_tuning_for_cuda_with_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: None)
    message = refused(capsys, "tune", "--target", "cuda-sm_90")
    assert "Tuning for CUDA is not part of this version yet" in message
    assert "Run it on a machine with a GPU" not in message


def test_tuning_for_another_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "missing_features", lambda isa: ("avx9",))
    message = refused(capsys, "tune", "--target", "x86_64-avx512")
    assert "measures kernels on this machine, which lacks avx9. Run it on such a machine" in message


@pytest.mark.parametrize("command", ["tune", "build"])
def test_without_the_compiler(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "tvm" else find(n))
    assert "pip install 'tvm-sepconv[compiler]'" in refused(capsys, command)


@needs_x86
def test_without_the_tuner(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = ("xgboost", "psutil")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in missing else find(n))
    message = refused(capsys, "tune")
    assert "Tuning needs xgboost, psutil: pip install 'tvm-sepconv[compiler,tune]'" in message


def test_no_target_for_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "runnable", tuple)
    assert "`--target` is needed: there is none for" in refused(capsys, "build")
    message = refused(capsys, "build", "--target", "armv7-neon")
    assert "This machine cannot run armv7-neon: name a folder for it with --output" in message


def test_errors_of_tvm_itself_are_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    class InternalError(RuntimeError):
        pass

    def fail(patterns: str) -> None:
        raise InternalError("a bug")

    monkeypatch.setattr(scope, "select", fail)
    with pytest.raises(InternalError, match="a bug"):
        cli.main(["build"])


@pytest.mark.parametrize(
    ("status", "count", "expected"),
    [(100, 0, "reports error 100"), (0, 0, "finds none"), (0, 2, None)],
)
def test_the_driver_is_asked_for_gpus(
    status: int, count: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuInit(self, flags: int) -> int:
            return status

        def cuDeviceGetCount(self, result: Any) -> int:
            result._obj.value = count
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    message = gpu.missing()
    assert message is None if expected is None else expected in str(message)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "libcuda.so.1 is not installed" in str(gpu.missing())


# ---- tune --------------------------------------------------------------------------------------


def _sending_ctrl_c(after: int) -> Callable[[], Any]:
    """A display that types Ctrl-C after so many trials."""

    @contextmanager
    def fake() -> Iterator[Callable[[str], display.Reporter]]:
        def report(now: Progress) -> None:
            if now.trials == after:
                os.kill(os.getpid(), signal.SIGINT)

        yield lambda name: report

    return fake


@needs_x86
def test_ctrl_c_keeps_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "display", _sending_ctrl_c(after=2))
    before = signal.getsignal(signal.SIGINT)
    scope = ["--target", "x86", "--workloads", "MB-1,CN-21", "--logs", str(tmp_path / "mine")]
    search = ["--trials", "4", "--work-dir", str(tmp_path / "work")]
    assert cli.main(["tune", *scope, *search]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    lines = capsys.readouterr().out.splitlines()
    log = tmp_path / "mine" / f"{targets.resolve('x86')}.jsonl"
    assert lines[0] == f"Tuning CN-21, MB-1 for {log.stem}, up to 4 trials each"
    assert lines[1].startswith("Stopping")
    assert re.fullmatch(
        r"CN-21: default [\d.]+ µs, best [\d.]+ µs \(.+\), measured in turns, noise \d+%; "
        rf"2 trials, 0 builds and 0 runs failed; recorded in {re.escape(str(log))}",
        lines[2],
    )
    assert lines[3:] == ["MB-1: not started"]
    assert [r.steps for r in logs.read(log)] == [workloads()["CN-21"].steps]


@needs_x86
def test_time_and_short_inputs_leave_layers_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workloads", "SEED,QN-B1*", "--work-dir", str(tmp_path)]
    assert cli.main(["tune", *arguments, "--minutes", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert "QN-B1-b16 is left out: it has the kernel of QN-B1" in out
    assert "SEED: not started\nQN-B1: not started" in out
    assert cli.main(["tune", "--workloads", "SEED", "--work-dir", str(tmp_path)]) == 1
    assert "SEED: skipped. Only the variant for long inputs is tuned" in capsys.readouterr().out


def _result(best_us: float, path: Path | None = Path("x.jsonl"), **changes: Any) -> Result:
    record = logs.Record(
        config=workloads()["MB-1"].config().kernel_config(64), variant="long", target="x86_64-avx2",
        threads=1, batch=1, steps=1, decisions={}, median_secs=best_us / 1e6, default_secs=2e-4,
        noise=0.012, trials=8, machine="", tvm="", date="",
    )  # fmt: skip
    return Result(record, path, Progress(of=8, trials=8, **changes))


def test_the_summary_says_what_was_found_and_what_failed() -> None:
    assert display.summary(_result(100)) == (
        "default 200.0 µs, best 100.0 µs (2.00x), measured in turns, noise 1%; 8 trials, "
        "0 builds and 0 runs failed; recorded in x.jsonl"
    )
    assert "best 200.0 µs (the default stays the best)" in display.summary(_result(200))
    failing = {"build_failures": 64, "run_failures": 1, "failure": "Traceback:\nno such tile"}
    assert display.summary(_result(200, None, **failing)) == (
        "nothing but the default was measured; nothing recorded; 64 builds and 1 runs failed "
        "(the first: no such tile)"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    now = Progress(of=10, default_secs=2e-4, best_secs=1e-4, build_failures=3)
    with display.display() as show:
        report = show("QN-B1")
        for now.trials in range(1, 11):
            report(now)
    out = capsys.readouterr().out
    if terminal:
        assert "10/10" in out
    else:
        state = "trials, best 100.0 µs (default 200.0), 3 failed\n"
        assert out == f"QN-B1: 8/10 {state}QN-B1: 10/10 {state}"


# ---- build and inspect -------------------------------------------------------------------------


@needs_x86
def test_build_into_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = workloads()["MB-1"].config().kernel_config(workloads()["MB-1"].channels)
    target = cpu("x86")
    tiling = target.family.candidates(config, target.isa)[-1]
    record = logs.Record(
        config=config, variant="long", target=target.name, threads=1, batch=1, steps=128,
        decisions=tiling.to_dict(), median_secs=1.25e-5, default_secs=2e-5, noise=0.0, trials=8,
        machine="", tvm="", date="",
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "net.sepconv"
    layers = {}
    for name, filters in (("first", 4), ("second", 8)):
        layers[name] = tvm_sepconv.SeparableConv1D(filters, 3, name=name)
        layers[name].build((None, None, 4))
    here = targets.runnable()[0]
    other = "armv7-neon" if here.startswith("x86") else "x86_64-avx2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "folders", list)
        tvm_sepconv.save(layers, path, [other, here])
    return path


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_inspect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = targets.runnable()[0]
    assert cli.main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    assert f"{saved}: format 1, by tvm_sepconv {tvm_sepconv.__version__}, tvm 0.27" in out
    assert re.search(r"; \d+ files, intact\n", out)
    assert "layers\n  first: c4_f4_k3" in out
    assert f"\n{here} (used here)\n" in out
    assert re.search(r"c4_f8_k3\w+: tiles of [\d, ]+ steps default\n", out)


def test_inspect_tells_tuned_transferred_and_default() -> None:
    rows = [
        (96, "tuned", 1e-5, None), (64, "transferred", 1e-5, 1.31), (4, "default", None, None),
        (1, "default", None, None),
    ]  # fmt: skip
    names = ("decisions", "origin", "record_secs", "distance")
    variants = [dict(zip(names, ({"step_tile": n}, *rest), strict=True)) for n, *rest in rows]
    assert inspect.origins(variants) == (
        "tiles of 96 steps tuned (10.0 µs), tiles of 64 steps transferred (distance 1.3), "
        "tiles of 4, 1 steps default"
    )


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_inspect_finds_damage(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    victim = next(iter(next(iter(manifest["libraries"].values())).values()))["path"]
    copy = tmp_path / "copy.sepconv"
    for path in saved.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(saved)).write_bytes(path.read_bytes())
    (copy / victim).write_bytes((copy / victim).read_bytes()[:-1])
    assert "truncated or altered" in refused(capsys, "inspect", str(copy))


def test_the_command_starts_without_tvm() -> None:
    code = (
        "import sys; from tvm_sepconv import cli; cli.main(['inspect', '/nowhere'])\n"
        "assert not {'tvm', 'tvm_ffi', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
