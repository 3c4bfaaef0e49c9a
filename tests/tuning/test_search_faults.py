"""What goes wrong in a search: bad candidates, processes that end, a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from quick_searches import Inventing
from tvm_sepconv.compiler.schedules.cpu import Tiling
from waiting import until

import tvm_sepconv
from tvm_sepconv import targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning import builder, history, logs, measure, runner, tune
from tvm_sepconv.compiler.tuning.history import Trial, Writer, read_history
from tvm_sepconv.compiler.tuning.runner import Local, here
from tvm_sepconv.compiler.tuning.search import Progress
from tvm_sepconv.compiler.tuning.space import tiling_of
from tvm_sepconv.config import KernelConfig

HERE = [isa for isa in targets.runnable() if isa.startswith("x86_64")]
pytestmark = pytest.mark.skipif(not HERE, reason="kernels are measured on an x86 machine")
TARGET = CpuTarget(HERE[0] if HERE else "x86_64-avx2")
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
DEFAULT = TARGET.family.default_tilings(CONFIG, TARGET.isa)[0]
STEPS = 130


@pytest.fixture(autouse=True)
def no_other_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def _tune(folder: Path, trials: int = 4, **more: Any) -> tune.Result:
    return tune.tune(CONFIG, TARGET, 1, STEPS, trials=trials, work_dir=folder, **more)


# ---- libraries that are no good ----------------------------------------------------------------

BODIES = {
    "wrong": ("return 0;", r"ValueError: 4160 of 4160 outputs are wrong"),
    "crash": ("*(volatile int*)0 = 1; return 0;", "The measuring process died, twice"),
    "hang": ("for (volatile int i = 0;; i = i) {}", "No result after 1 s"),
}


def _library(output: Path, body: str) -> str:
    """A library of CONFIG whose kernels do `body`."""
    folder = output.parent
    description = build._description(CONFIG, TARGET, build.variants(CONFIG, TARGET))
    (folder / "library.c").write_text(description)
    kernels = "".join(
        f"int {name}(void* self, const TVMFFIAny* a, int32_t n, TVMFFIAny* r) {{"
        f"(void)self; (void)a; (void)n; (void)r; {body} }}\n"
        for name in dict.fromkeys(re.findall(r"__tvm_ffi_\w+", description))
    )
    (folder / "kernel.c").write_text(f"#include <tvm/ffi/c_api.h>\n{kernels}")
    tools = toolchain(TARGET.triple)
    native = Path(tvm_sepconv.__file__).parent / "native"
    for name in ("kernel", "library"):
        include = (native, build._ffi_include())
        tools.object_file(folder / f"{name}.c", folder / f"{name}.o", include)
    tools.shared_library([folder / "kernel.o", folder / "library.o"], output)
    return str(output)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Local, Path, str]]:
    folder = tmp_path_factory.mktemp("place")
    task, good = folder / "task.npz", folder / "good.so"
    measure.write_task(task, CONFIG, 1, STEPS)
    build.build_runtime(TARGET, folder / "runtime.so")
    build.build_library(CONFIG, TARGET, good, build.variants(CONFIG, TARGET))
    local = here(folder / "runtime.so")
    yield local, task, str(good)
    local.close()


@pytest.fixture
def place(lasting: tuple[Local, Path, str]) -> tuple[Local, Path, str]:
    """A process that measures and does not know yet how long that takes; a task, a good library."""
    lasting[0]._fastest_secs = None
    return lasting


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_library_is_named_and_the_next_is_measured(
    name: str, place: tuple[Local, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, task, good = place
    body, message = BODIES[name]
    bad = _library(tmp_path / "bad.so", body)
    # Before and after it is known how long a call takes; no limit for who is only slow.
    limits = ("FIRST_LIMIT_SECS", "RUN_LIMIT_SECS") if name == "hang" else ("",)
    for limit in limits:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=message):
            if limit:
                patch.setattr(runner, limit, 1)
            local.measure(task, [bad], 3)
        (samples,) = local.measure(task, [good], 3)
        assert len(samples) == 3
        assert min(samples) > 0


def test_a_kernel_that_is_right_at_the_measured_length_only_is_refused(
    place: tuple[Local, Path, str], tmp_path: Path
) -> None:
    local, path, good = place
    with_others = measure.Task(path)
    assert [case.x.shape[1] for case in with_others.cases] == [STEPS, 37, 331]
    weights = dict(zip(("depthwise", "pointwise", "bias"), with_others.weights, strict=True))
    for number in range(3):
        cases = list(with_others.cases)
        cases[number] = measure.Case(cases[number].x, cases[number].expected + 1, cases[0].allowed)
        if number:
            cases[number] = measure.Case(
                cases[number].x, cases[number].expected, with_others.cases[number].allowed
            )
        other = tmp_path / f"task{number}.npz"
        measure.save_task(other, CONFIG, weights, cases)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=f"outputs are wrong.*{cases[number].x.shape[1]}"):
            local.measure(other, [good], 3)


def test_who_kills_the_measuring_process_stops_no_search(place: tuple[Local, Path, str]) -> None:
    local, task, good = place
    local.measure(task, [good], 1)
    os.kill(local._worker._proc.pid, signal.SIGKILL)
    assert len(local.measure(task, [good], 2)[0]) == 2


class Faulty(Inventing):
    """The second and third candidate are bad."""

    workers = 1

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        times = super().measure(task, libraries, rounds)
        if len(self.asked) in (2, 3):
            raise RuntimeError(f"candidate {len(self.asked)} is wrong, says the test")
        return times


def test_bad_candidates_are_counted_and_named_and_the_search_goes_on(
    builds_here: None, tmp_path: Path
) -> None:
    result = _tune(tmp_path / "work", runner=Faulty())
    trials = read_history(result.history).trials
    assert [bool(trial.error) for trial in trials] == [False, True, True, False]
    assert all(f"candidate {trial.trial} is wrong" in str(trial.error) for trial in trials[1:3])
    assert (result.progress.run_failures, result.progress.trials) == (2, 4)
    assert result.path is not None
    assert result.decisions not in [trial.decisions for trial in trials[1:3]]


# ---- builds ------------------------------------------------------------------------------------


_build_candidate = builder.build_candidate


def _only_the_default(mod: Any, **arguments: Any) -> str:
    if tiling_of(mod) != DEFAULT:
        raise ValueError("no such tile, says the test")
    return _build_candidate(mod, **arguments)


def _nothing(mod: Any, **more: Any) -> str:
    raise ValueError("nothing builds, says the test")


def _dies_once(mod: Any, **arguments: Any) -> str:
    """As if somebody had killed the process in the middle of its first build."""
    try:
        os.close(os.open(Path(arguments["folder"], "died"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return _build_candidate(mod, **arguments)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Put another function in the place of the builder's."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # the builder's processes cannot import tests
    yield lambda function: monkeypatch.setattr(builder, "build_candidate", function)
    cloudpickle.unregister_pickle_by_value(module)


def test_failed_builds_are_counted_and_shown(
    builds: Callable[[Any], None], builds_here: None, tmp_path: Path
) -> None:
    builds(_only_the_default)
    result = _tune(tmp_path, runner=Inventing())
    now = result.progress
    assert (now.trials, now.build_failures, now.run_failures) == (4, 3, 0)
    assert "no such tile, says the test" in now.failure
    assert result.path is None  # only the default worked
    assert not list((tmp_path / "logs").glob("*.jsonl"))
    final = read_history(result.history).final
    assert final is not None and final["recorded"] is None


def test_a_default_that_fails_ends_the_search(
    builds: Callable[[Any], None], builds_here: None, tmp_path: Path
) -> None:
    builds(_nothing)
    with pytest.raises(RuntimeError, match=r"(?s)the default kernel fails.*nothing builds"):
        _tune(tmp_path)


def test_who_kills_a_builder_costs_no_candidate(
    builds: Callable[[Any], None], tmp_path: Path
) -> None:
    builds(_dies_once)
    result = _tune(tmp_path, runner=Inventing())
    assert (result.progress.trials, result.progress.build_failures) == (4, 0)
    assert list(tmp_path.rglob("died"))


# ---- the search itself -------------------------------------------------------------------------

SEARCH = """
import sys
from pathlib import Path
from tvm_sepconv.compiler.tuning import tune
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.config import KernelConfig
config = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
tune.tune(config, CpuTarget(sys.argv[1]), 1, 130, trials=500, work_dir=Path(sys.argv[2]))
"""


def _alive(process: psutil.Process) -> bool:
    """Not one that only waits for its parent to ask how it ended: not every system's does."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_search_that_is_killed_loses_nothing_and_can_go_on(
    builds_here: None, tmp_path: Path
) -> None:
    path = history.folder(tmp_path, TARGET.name, CONFIG.key, "tvm_sepconv") / history.NAME
    process = subprocess.Popen([sys.executable, "-c", SEARCH, TARGET.name, str(tmp_path)])
    try:
        until(lambda: path.is_file() and path.read_text().count('"trial"') >= 3, "three trials")
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    done = len(read_history(path).trials)
    assert done >= 3
    assert not list((tmp_path / "logs").glob("*.jsonl"))
    before = path.read_bytes()
    result = _tune(tmp_path, done + 2, resume=True)
    assert path.read_bytes().startswith(before)
    assert result.progress.trials == done + 2
    assert result.path is not None
    until(lambda: not any(map(_alive, children)), "the end of what it started")


class Lost:
    """A runner whose place is gone after some candidates."""

    workers, machine = 2, "a board"

    def __init__(self, good: int) -> None:
        self.good, self.lock = good, threading.Lock()

    def measure(self, task: Path, libraries: Sequence[str], rounds: int) -> list[list[float]]:
        with self.lock:
            self.good -= 1
            if self.good < 0:
                raise measure.RunnerError("No board is left.")
        return [[1e-5] * rounds for _ in libraries]


def test_a_lost_place_of_measuring_ends_the_search_and_keeps_its_trials(
    builds_here: None, tmp_path: Path
) -> None:
    message = r"No board is left\. 3 trials are kept in .*history\.jsonl: go on with --resume"
    with pytest.raises(measure.RunnerError, match=message):
        _tune(tmp_path, 8, runner=Lost(3))
    (path,) = tmp_path.rglob("history.jsonl")
    assert len(read_history(path).trials) == 3


class Full:
    """A file on a disk that has room for a few lines, and for half of the next."""

    def __init__(self, file: Any, lines: int) -> None:
        self.file, self.lines = file, lines

    def write(self, text: bytes) -> int:
        self.lines -= 1
        if self.lines < -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(text if self.lines >= 0 else text[: len(text) // 2]))

    def close(self) -> None:
        self.file.close()


def _trial(number: int, tiling: Tiling = DEFAULT) -> Trial:
    return Trial(number, json.loads(json.dumps(tiling.to_dict())), [1e-5, 2e-5], None, 1.5)


@pytest.mark.parametrize("half", [True, False], ids=["a part of it", "nothing of it"])
def test_a_full_disk_says_what_to_do_and_what_is_kept(half: bool, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "history.jsonl", {"seed": 1})
    writer.trial(_trial(1))
    writer.file = Full(writer.file, 0 if half else -1)  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"No space left.*trials before are kept.*--resume") as caught:
        writer.trial(_trial(2))
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "history.jsonl") in str(caught.value)
    writer.close()
    again = Writer(tmp_path / "history.jsonl", None)
    again.trial(_trial(2))
    again.close()
    if half:
        with pytest.warns(UserWarning, match="line 3, is no trial"):
            found = read_history(tmp_path / "history.jsonl")
    else:
        found = read_history(tmp_path / "history.jsonl")
    assert found.trials == [_trial(1), _trial(2)]


def test_a_full_disk_ends_a_search_and_it_goes_on_with_room(
    builds_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(now: Progress) -> None:
        if now.trials == 2:
            monkeypatch.setattr(Writer, "_line", _full)

    def _full(writer: Writer, values: Any) -> None:
        file, writer.file = writer.file, Full(writer.file, -1)  # type: ignore[assignment]
        try:
            writer._write(b"x\n")
        finally:
            writer.file = file

    with pytest.raises(OSError, match="No space left"):
        _tune(tmp_path, 3, runner=Lost(99), report=fill)
    monkeypatch.undo()
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    result = _tune(tmp_path, 3, runner=Lost(99), resume=True)
    assert [trial.trial for trial in read_history(result.history).trials] == [1, 2, 3]
