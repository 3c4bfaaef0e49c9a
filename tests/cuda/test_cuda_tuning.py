"""Tuning on a GPU, without one: real candidates, built for the emulator and timed there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulator import library as emulated
from fake_gpu import HostClock
from tvm_sepconv.compiler.schedules import cuda
from waiting import LIMIT_SECS

from tvm_sepconv import cli, gpu, reference
from tvm_sepconv.bench import cuda_graphs
from tvm_sepconv.compiler import cuda as cuda_build
from tvm_sepconv.compiler import nvcc
from tvm_sepconv.compiler.gpu_session import cells, plan, tuning, worker
from tvm_sepconv.compiler.gpu_session.bench import Bench, Problem
from tvm_sepconv.compiler.gpu_session.child import Child
from tvm_sepconv.compiler.targets import CudaTarget
from tvm_sepconv.compiler.tuning import builder, cuda_measure, cuda_search, logs, measure, tune
from tvm_sepconv.compiler.tuning.history import read_history
from tvm_sepconv.options import BuildOptions

LAYER = "SEED"  # the smallest there is: emulation takes long
CONFIG = plan.Library("", LAYER, "float32", plan.DEFAULT).kernel
TARGET = CudaTarget("cuda-sm_80")
GPP = shutil.which("g++")
needs_gpp = pytest.mark.skipif(GPP is None, reason="the emulator needs g++")


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


class Here:
    """In the place of the builder's processes: this one."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # as TVM's processes send it
            future.set_exception(type(error)(traceback.format_exc()))
        return future

    def shutdown(self) -> None:
        pass


class Emulated:
    """A runner whose GPU is the emulator."""

    workers, machine = 1, "the emulator"

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        try:
            return cuda_measure.sample(str(task), libraries, min(rounds, 3), clock=HostClock)
        except ValueError as error:
            raise RuntimeError(str(error)) from error


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "processes", Here)
    monkeypatch.setattr(nvcc, "find", emulated.Nvcc)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "need", lambda index: None)
    monkeypatch.setattr(gpu, "driver_version", lambda: 99990)
    monkeypatch.setattr(gpu, "capability", lambda index: 80)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer's library with the default decisions for little work."""
    path = tmp_path_factory.mktemp("built") / "short.so"
    one = (cuda_build.Variant(cuda_search.Grid(CONFIG, TARGET, 1, 64).default),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc, "find", emulated.Nvcc)
        cuda_build.build_library(CONFIG, TARGET, path, one, BuildOptions())
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 whose graphs are of emulated launches."""
    folder = tmp_path_factory.mktemp("driver")
    emulated.build_driver(folder / cuda_graphs.DRIVER)
    return folder


@needs_gpp
def test_a_search(
    built: Path, machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = CudaTarget("cuda-sm_80@aarch64")  # whose records are the GPU's
    grid = cuda_search.Grid(CONFIG, target, 1, 64)
    few = (grid.default, *[t for t in grid.tilings if t != grid.default][:3])
    monkeypatch.setattr(cuda, "candidates", lambda *arguments: few)
    refused, wrong = few[1], few[2]
    verify = cuda_measure.Loaded.verify

    def build(config: Any, built_for: Any, path: Path, variants: Any, options: Any) -> Any:
        assert (config, built_for, options) == (CONFIG, target, BuildOptions())
        shutil.copyfile(built, path)
        spill = 8 * (variants[0].tiling == refused)
        return {"sm_80/v0a": nvcc.Resources(32, 0, spill, 256)}

    def checked(loaded: Any, case: measure.Case) -> None:
        if builder.library(tmp_path, wrong).name == loaded.path.name:
            case = dataclasses.replace(case, expected=case.expected + 1)
        verify(loaded, case)

    monkeypatch.setattr(cuda_build, "build_library", build)
    monkeypatch.setattr(cuda_measure.Loaded, "verify", checked)
    reports = []
    result = tune.tune(
        CONFIG, target, 1, 64, trials=8, work_dir=tmp_path / "work", runner=Emulated(),
        report=lambda now: reports.append(dataclasses.replace(now)),
    )  # fmt: skip
    assert result.path == tmp_path / "logs" / "cuda-sm_80.jsonl"
    (record,) = logs.read(result.path)
    assert (record.target, record.variant) == ("cuda-sm_80", grid.variant)
    assert record.machine == Emulated.machine
    assert (record.batch, record.steps, record.trials) == (1, 64, 3)
    trials = read_history(result.history).trials
    assert [t.decisions for t in trials] == [t.to_dict() for t in (few[0], *few[2:])]
    assert [bool(t.error) for t in trials] == [False, True, False]
    assert "outputs are wrong" in str(trials[1].error)
    assert result.progress.rejections == {cuda_search.SPILLED: 1}
    assert (result.progress.run_failures, result.progress.build_failures) == (1, 0)
    # The next build uses it, and says so.
    match = logs.lookup(CONFIG, "cuda-sm_80", variant=grid.variant)
    assert match is not None and match.record == record
    variants = cuda_build.variants(CONFIG, TARGET, BuildOptions())["sm_80"]
    assert "tuned" in [v.origin for v in variants]


# ---- a session, its worker in this process -----------------------------------------------------


@pytest.fixture
def bench(
    built: Path, driver: Path, machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """A prepared folder whose libraries are all the same one."""
    decisions = cuda_search.Grid(CONFIG, TARGET, 1, 64).default.to_dict()
    names = {"a": plan.DEFAULT, "two": plan.TWO_KERNELS, "0": plan.CANDIDATE}
    libraries = tuple(
        plan.Library(name, LAYER, "float32", kind, decisions) for name, kind in names.items()
    )
    made = plan.Plan(tmp_path, "sm_80", "0.27", "", libraries, {})
    (tmp_path / "libraries").mkdir()
    (tmp_path / "results").mkdir()
    for library in libraries:
        shutil.copyfile(built, tmp_path / "libraries" / library.file)
    made.save()
    monkeypatch.setattr(cells, "ROUNDS", 2)
    monkeypatch.setattr(cells, "SIZES", ((2, 37), (3, 2)))
    monkeypatch.setattr(cells, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(cells, "on_gpu", lambda: False)
    monkeypatch.setattr(tuning, "SAMPLES", 2)
    monkeypatch.setattr(tuning, "FINAL_SAMPLES", 3)
    monkeypatch.setattr(cuda_graphs, "machine", lambda: "the emulator")
    monkeypatch.setattr(cuda_graphs, "DRIVER", str(driver / cuda_graphs.DRIVER))
    return Bench(made, cuda_graphs.Gpu())


def done(bench: Bench, item: plan.Item) -> Any:
    """What a worker answers, as its parent reads it."""
    do = partial(worker.STEPS[item.step], bench, item)
    return json.loads(json.dumps(worker.answer(bench, do)))


@needs_gpp
def test_items_of_every_step(bench: Bench) -> None:
    answer = done(bench, plan.Item("correctness", "a"))
    assert 0 < answer["found"]["error"] <= 1
    cell = done(bench, plan.Item("comparison", LAYER, "float32", 4, 10))["found"]
    assert set(cell["us"]) == {"tvm_sepconv", "two kernels"}
    assert min(cell["us"].values()) > 0
    # There is no GPU for them: named, and the rest goes on.
    assert [name.partition(":")[0] for name in cell["errors"]] == [
        "torch", "cuDNN channels_last", "cuDNN channels_last",
    ]  # fmt: skip
    assert done(bench, plan.Item("rest", "bandwidth"))["found"]["bytes_a_second"] > 0


@needs_gpp
def test_libraries_of_a_layer_have_the_same_problem(bench: Bench) -> None:
    one, two, other = bench.plan.libraries
    problem = bench.problem(one, 2, 37)
    assert problem is bench.problem(other, 2, 37) is bench.problem(two, 2, 37)
    half = dataclasses.replace(one, precision="float16")
    assert bench.problem(half, 2, 37).x.dtype == np.float16


@needs_gpp
def test_a_worker_in_its_process(
    bench: Bench, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    folder = bench.plan.folder
    other = folder / "checkout" / "tvm_sepconv"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('another one')")
    monkeypatch.chdir(other.parent)
    with closing(Child([str(folder), "correctness"], folder / "worker.log")) as one:
        assert one.ask("", LIMIT_SECS) == "an emulated GPU"
        assert 0 < one.ask("correctness/a", LIMIT_SECS)["error"] <= 1


@needs_gpp
def test_prebuilt_candidates_become_a_record_that_logs_merge_takes(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("float32", 1, 10)
    final = plan.Item("tuning", LAYER, *size, plan.FINALISTS)
    assert "the default was not measured" in done(bench, final)["error"]
    candidate = plan.Item("tuning", "0", *size)
    answer = done(bench, candidate)
    assert len(answer["found"]["secs"]) == 2
    (tmp_path / "results" / plan.RESULTS).write_text(json.dumps({"key": candidate.key, **answer}))
    assert done(bench, final)["found"]["trials"] == 1
    assert cli.main(["logs", "merge", f"{tmp_path}/results/records", "--into", f"{tmp_path}"]) == 0
    (one,) = logs.read(tmp_path / "cuda-sm_80.jsonl")
    variant = cuda_search.Grid(CONFIG, TARGET, 1, 5).variant
    assert (one.config, one.variant, one.batch, one.steps) == (CONFIG, variant, 1, 10)
    assert one.machine == "the emulator"


@needs_gpp
def test_a_wrong_library_is_named_and_never_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = cuda_measure.Loaded.output
    monkeypatch.setattr(cuda_measure.Loaded, "output", lambda *a: output(*a) + np.float32(0.1))
    for item in (plan.Item("correctness", "a"), plan.Item("tuning", "0", "float32", 1, 10)):
        answer = done(bench, item)
        assert "its output is wrong" in answer["error"]
        assert answer["broken"] is False


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda y: y[:1], "of shape"),
        (lambda y: np.where(np.arange(len(y))[:, None, None] == 1, np.nan, y), "output is wrong"),
        (lambda y: y + 1, "output is wrong"),
    ],
    ids=["shape", "a sample that is not compared", "ends"],
)
def test_outputs_are_compared_at_both_ends_and_finite_between(spoil: Any, words: str) -> None:
    one = plan.Library("", LAYER, "float32", plan.DEFAULT)
    problem = Problem.drawn(one.config, CONFIG, 3, 10, 0.0)
    y = reference.separable_conv1d(problem.x, *problem.weights, one.config)
    assert problem.error(y) < 1
    with pytest.raises(ValueError, match=words):
        problem.error(spoil(y))


def test_a_broken_context_is_told_to_the_parent(bench: Bench) -> None:
    class Broken(HostClock):
        def synchronize(self) -> None:
            raise RuntimeError("unspecified launch failure")

    bench = Bench(bench.plan, Broken())
    answer = worker.answer(bench, lambda: 1 // 0)
    assert answer == {"error": "ZeroDivisionError: integer division or modulo by zero",
                      "broken": True}  # fmt: skip


# ---- the grid ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "tf32", "variant"),
    [(32, False, "long"), (1, False, "short"), (32, True, "long+tf32"), (1, True, "short+tf32")],
)
def test_which_variant_is_tuned(batch: int, tf32: bool, variant: str) -> None:
    wide = dataclasses.replace(CONFIG, channels=256, filters=256, kernel_size=33)
    grid = cuda_search.Grid(wide, TARGET, batch, 500, tf32)
    assert grid.variant == variant
    assert grid.default in grid.tilings
    assert grid.tiling(grid.default.to_dict()) == grid.default
    assert grid.tiling({"form": "no such"}) is None
    assert grid.tiling(None) is None


def test_what_cannot_serve_is_counted_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = cuda_search.Grid(CONFIG, TARGET, 1, 64)
    bad = fits.tilings[-1]
    real = cuda.refusal
    monkeypatch.setattr(cuda, "refusal", lambda *a: "no room" if a[-1] == bad else real(*a))
    grid = cuda_search.Grid(CONFIG, TARGET, 1, 64)
    assert set(grid.tilings) == set(fits.tilings) - {bad}
    assert grid.rejections["no room"] == 1


@pytest.mark.parametrize(
    ("registers", "spilled", "threads", "why"),
    [
        (64, 0, 256, None),
        (64, 4, 256, cuda_search.SPILLED),
        (255, 0, 512, cuda_search.TOO_MANY),
        (128, 0, 512, None),
    ],
)
def test_what_nvcc_says_decides(
    registers: int, spilled: int, threads: int, why: str | None
) -> None:
    kernel = nvcc.Resources(registers, 0, spilled, threads)
    assert cuda_search.refusal([nvcc.Resources(32, 0, 0, 32), kernel]) == why


# ---- measuring ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1, 16), (8 << 20, 16), (50 << 20, 3), (1 << 30, 2)])
def test_large_inputs_pass_through_the_cache(size: int, count: int) -> None:
    assert cuda_measure.rotated(size, 50 << 20) == count


@pytest.mark.parametrize(("secs", "calls"), [(1e-6, 200), (5e-6, 102), (1e-4, 12), (1.0, 12)])
def test_a_replay_has_launches_enough_to_be_timed(secs: float, calls: int) -> None:
    """Whole turns of three, at least ten and at most about two hundred."""

    class Counted(HostClock):
        def graph(self, launches: Any) -> Any:
            self.count = len(launches)
            return lambda: None

        def seconds(self, action: Any) -> float:
            return secs * self.count

    clock = Counted()
    timer = cuda_measure.Timer([lambda: None] * 3, clock)
    assert clock.count in (calls, calls + 1)
    assert clock.count % 3 == 0
    assert timer.sample() == pytest.approx(secs)


@pytest.mark.parametrize("unit", [0.0, 2.0**-11])
def test_rounding_is_allowed_and_a_lost_tap_is_not(unit: float) -> None:
    config = dataclasses.replace(CONFIG, channels=64, filters=32, kernel_size=13)
    draw = np.random.default_rng(1)
    weights = measure.drawn_weights(config, draw)
    x = draw.standard_normal((1, 200, 64)).astype(np.float32)
    layer = measure.layer_config(config)

    def at(x: Any, taps: Any, mix: Any) -> Any:
        return cuda_measure.answer(unit, config, x, taps, mix, weights["bias"], layer)

    def rounded(a: Any) -> Any:
        return np.round(a / unit / 2) * unit * 2 if unit else a  # of numbers below two

    taps, mix = weights["depthwise"], weights["pointwise"]
    expected, allowed = at(x, taps, mix)
    near, _ = at(x, taps, rounded(mix))
    assert (np.abs(near - expected) <= allowed).all()
    lost = taps.copy()
    lost[0] = 0
    assert (np.abs(at(x, lost, mix)[0] - expected) > allowed).any()
