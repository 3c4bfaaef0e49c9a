"""Measuring through a real tracker and two real servers, and what goes wrong there."""

from __future__ import annotations

import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rpc_fleet
from rpc_fleet import KEY, Fleet, Process
from waiting import until

import tvm_sepconv
from tvm_sepconv import targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.link import toolchain
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning import board, boards, measure
from tvm_sepconv.compiler.tuning.board import CandidateError, session, within
from tvm_sepconv.compiler.tuning.boards import Boards
from tvm_sepconv.compiler.tuning.cpu_board import CpuBoard
from tvm_sepconv.compiler.tuning.measure import RunnerError
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.tracker import Address, Tracker

if not targets.runnable():
    pytest.skip("libraries are made for x86-64 and ARM machines", allow_module_level=True)
TARGET = cpu(targets.runnable()[0])
OTHER = "aarch64-neon" if TARGET.arch != "aarch64" else "armv7-neon"
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5, activation="relu")
STEPS = 130


fleet = rpc_fleet.fleet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("libraries")
    measure.write_task(path / "task.npz", CONFIG, 1, STEPS)
    variants = build.variants(CONFIG, TARGET)
    for name in ("good", "short"):
        build.build_library(CONFIG, TARGET, path / f"{name}.so", variants)
        variants = variants[-1:]
    return path


@pytest.fixture(scope="module")
def two(fleet: Fleet) -> Boards:
    fleet.need(2)
    return Boards(fleet.address, KEY, TARGET)


class Place:
    """Two servers, and libraries to measure there."""

    def __init__(self, fleet: Fleet, boards: Boards, folder: Path) -> None:
        self.fleet, self.boards, self.folder = fleet, boards, folder
        self.servers = fleet.need(2)
        self._before = {server.port: server.sessions() for server in self.servers}

    def measure(self, *names: str, rounds: int = 3) -> list[list[float]]:
        libraries = [str(self.folder / f"{name}.so") for name in names or ["good"]]
        return self.boards.measure(self.folder / "task.npz", libraries, rounds)

    def used(self) -> list[int]:
        """Sessions of each server since the test began."""
        return [server.sessions() - self._before[server.port] for server in self.servers]


@pytest.fixture
def place(fleet: Fleet, two: Boards, folder: Path) -> Place:
    return Place(fleet, two, folder)


def _bad_library(path: Path, body: str) -> str:
    """A library of CONFIG whose kernels do `body`."""
    description = build._description(CONFIG, TARGET, build.variants(CONFIG, TARGET))
    path.with_suffix(".c").write_text(description)
    kernels = "".join(
        f"int {name}(void* self, const TVMFFIAny* a, int32_t n, TVMFFIAny* r) {{"
        f"(void)self; (void)a; (void)n; (void)r; {body} }}\n"
        for name in dict.fromkeys(re.findall(r"__tvm_ffi_\w+", description))
    )
    source = path.with_name(f"{path.stem}_kernels.c")
    source.write_text(f"#include <tvm/ffi/c_api.h>\n{kernels}")
    include = (Path(tvm_sepconv.__file__).parent / "native", build._ffi_include())
    tools = toolchain(TARGET.triple)
    objects = []
    for file in (path.with_suffix(".c"), source):
        objects.append(file.with_suffix(".o"))
        tools.object_file(file, objects[-1], include)
    tools.shared_library(objects, path)
    return path.stem


# ---- what it is for ----------------------------------------------------------------------------


def test_both_servers_measure_at_once(place: Place) -> None:
    assert place.boards.workers == 2
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: place.measure(rounds=100), range(4)))
    assert [np.shape(result) for result in results] == [(1, 100)] * 4
    assert all(0 < np.median(result) < 1 for result in results)
    assert sum(place.used()) == 4
    assert min(place.used()) >= 1


def test_an_alternation_is_one_servers(place: Place) -> None:
    good, short = place.measure("good", "short", rounds=30)
    assert (len(good), len(short)) == (30, 30)
    assert sorted(place.used()) == [0, 1]


def test_a_board_says_what_it_is(place: Place) -> None:
    assert re.fullmatch(r".+, \d+ processors", place.boards.machine)
    assert f"{place.boards.visit()[0].port}" in f"{[server.port for server in place.servers]}"


# ---- what is wrong with a candidate ------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 0;", r"\d+ of \d+ outputs are wrong"),
        ("return 1;", r"the call fails with status 3 of the runtime library"),
        ("__builtin_trap();", rf"the call crashes: signal {int(signal.SIGILL)}"),
        ("for (volatile int i = 0;; i = i) {}", r"no result after 1 s"),
    ],
    ids=["wrong", "fails", "crash", "hang"],
)
def test_a_bad_candidate_is_named_and_its_server_measures_on(
    body: str, message: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = _bad_library(place.folder / "bad.so", body)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=message):
        if "after 1 s" in message:  # no limit for who is only slow
            patch.setattr(board, "CALL_LIMIT_SECS", 1)
        place.measure(bad)
    assert sum(place.used()) == 1  # on one server, and once
    assert len(place.fleet.need(2)) == 2
    assert [len(place.measure()[0]) for _ in range(2)] == [3, 3]
    assert place.used() in ([1, 2], [2, 1])


def test_a_file_that_is_no_library_is_named(place: Place) -> None:
    (place.folder / "text.so").write_text("no library")
    with pytest.raises(RuntimeError, match=r"The library cannot be opened: .* is truncated"):
        place.measure("text")


# ---- what is wrong with a board ----------------------------------------------------------------


def test_another_architecture_is_called_so(fleet: Fleet) -> None:
    try:
        toolchain(cpu(OTHER).triple)
    except RuntimeError as error:
        pytest.skip(str(error))
    fleet.need(1)
    with pytest.raises(ValueError, match=rf"cannot run .* {OTHER}: .*another architecture"):
        Boards(fleet.address, KEY, cpu(OTHER))


def test_a_server_that_goes_while_it_loads_is_no_other_architecture() -> None:
    class Gone:
        def cpu(self, _: int) -> None: ...

        def load_module(self, _: str) -> None:
            raise RuntimeError("Connection reset by peer")

        get_function = load_module

    with pytest.raises(RuntimeError, match="Connection reset") as raised:
        CpuBoard(Gone())
    assert not isinstance(raised.value, CandidateError)


def test_a_processor_that_lacks_something_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.need(1)
    needed = {**targets.FEATURES, TARGET.isa: ("amx-bf16", "warp-drive")}
    monkeypatch.setattr(targets, "FEATURES", needed)
    with pytest.raises(ValueError, match=r"its processor lacks .*warp-drive, which .* uses"):
        Boards(fleet.address, KEY, TARGET)


class Paper(CpuBoard):
    """A board of which only /proc is there."""

    def __init__(self, **files: str) -> None:
        self.files = files

    def _file(self, path: str) -> str:
        return self.files.get(path.rpartition("/")[2], "")


PI = "processor\t: {}\nFeatures\t: fp asimd crc32\nCPU part\t: {}\n\n"


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("aarch64-neon@cortex-a72", ["0xd08"] * 4),
        ("aarch64-neon", ["0xd08"] * 4),
        ("aarch64-neon@cortex-a55", ["0xd05", "0xd0b"]),
        ("aarch64-neon@cortex-a55", ["0xfff"]),  # nobody knows it
    ],
)
def test_an_arm_board_is_known_by_its_cores(target: str, parts: list[str]) -> None:
    cpuinfo = "".join(PI.format(number, part) for number, part in enumerate(parts))
    pi = Paper(cpuinfo=cpuinfo, model="Raspberry Pi 4 Model B Rev 1.4\0")
    expected = f"Raspberry Pi 4 Model B Rev 1.4, {len(parts)} processors"
    assert pi.identity(cpu(target)) == (expected, cpu(target))


def test_another_core_than_the_targets_is_refused() -> None:
    pi = Paper(cpuinfo=PI.format(0, "0xd03"))
    with pytest.raises(CandidateError, match=r"its cores are cortex-a53, .*@cortex-a76"):
        pi.identity(cpu("aarch64-neon@cortex-a76"))
    assert pi.identity(cpu("aarch64-neon")).machine == "aarch64-neon, 1 processors"


def test_a_key_that_nobody_has_is_refused_with_those_there_are(place: Place) -> None:
    with pytest.raises(ValueError, match=rf"no server under the key 'rpi5'.*{KEY} \(2\)") as error:
        Boards(place.fleet.address, "rpi5", TARGET)
    assert f"--tracker {place.fleet.address} --key rpi5" in str(error.value)


def test_servers_that_others_have_are_waited_for_so_long_and_no_longer(place: Place) -> None:
    with ExitStack() as taken, Tracker(place.fleet.address) as tracker:
        for _ in range(2):
            server = tracker.request(KEY, lambda: None)
            taken.enter_context(session(server, CpuBoard, place.boards._native, 60))
        with pytest.raises(TimeoutError, match=rf"All servers \(2\) .*'{KEY}'.* after \d+ s"):
            Boards(place.fleet.address, KEY, TARGET, wait_secs=1)


def _started(place: Place) -> Process:
    """The server that serves next."""
    used = until(
        lambda: [server for server, used in zip(place.servers, place.used(), strict=True) if used],
        "a session",
    )
    return used[0]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_server_that_goes_costs_nothing_but_its_time(
    end: signal.Signals, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if end == signal.SIGSTOP:  # it is as if it were only slow: what ends that are the limits
        monkeypatch.setattr(boards, "RUN_LIMIT_SECS", 5.0)
        monkeypatch.setattr(boards, "CONNECT_SECS", 5.0)
        monkeypatch.setattr(board, "CONNECT_SECS", 5.0)
        monkeypatch.setattr(boards, "TRIES", 9)
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(place.measure, rounds=150) for _ in range(4)]
        victim = _started(place)
        victim.signal(end)
        lengths = [len(result.result()[0]) for result in results]
    victim.kill()
    assert lengths == [150] * 4
    again = sum(place.used()) - 4  # what ran there
    assert again == 1 if end == signal.SIGKILL else again >= 1


def test_when_all_are_gone_it_is_said(place: Place) -> None:
    for server in place.servers:
        server.kill()
    until(lambda: not place.fleet.registered()[0], "the tracker's noticing it")
    with pytest.raises(RunnerError, match=f"No server is left .*'{KEY}'.*so far is kept"):
        place.measure()


def test_a_trackers_end_is_said(fleet: Fleet, folder: Path, two: Boards) -> None:
    gone = object.__new__(Boards)
    gone.__dict__.update(two.__dict__, address=Address("127.0.0.1", 1))
    with pytest.raises(RunnerError, match=r"No RPC tracker answers at 127.0.0.1:1.*is kept"):
        gone.measure(folder / "task.npz", [str(folder / "good.so")], 3)


def test_a_time_limit_holds_for_what_never_ends() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.1, never.wait)
    never.set()
    assert within(1, lambda: 5) == 5
    with pytest.raises(KeyError, match="what"):
        within(1, lambda: {}["what"])
