"""What the machine can do: that the loops do the work they count, and buffers lie where they say.

No test says how fast anything is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tvm_sepconv import jit, targets
from tvm_sepconv.bench import limits, timing
from tvm_sepconv.bench.limits import CHAINS, Limits, Peak, Read

KIB, MIB = 1 << 10, 1 << 20
EPYC = {"L1": 32 * KIB, "L2": MIB, "L3": 32 * MIB}


@pytest.fixture(autouse=True)
def compiler() -> None:
    pytest.importorskip("tvm")  # its package has the linker


@pytest.mark.parametrize("isa", targets.runnable())
def test_peak_is_finite_and_above_one_gflops(isa: str) -> None:
    peak = Peak(isa)
    times = timing.interleave({"peak": peak.run}, 0.0)
    gflops = peak.flops / times["peak"].best_us / 1e3
    assert math.isfinite(gflops)
    assert gflops > 1


@pytest.mark.parametrize("isa", targets.runnable())
@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_peak_does_the_multiply_adds_it_counts(isa: str, rounds: int) -> None:
    chains = np.arange(CHAINS, dtype=np.float64)
    for _ in range(rounds):
        chains = chains * 0.75 + 0.5
    lanes = Peak(isa).run(rounds)
    np.testing.assert_allclose(lanes, np.full(lanes.shape, chains.sum()), rtol=1e-6)


def test_peaks_lanes_are_those_of_the_instruction_set() -> None:
    lanes = {isa: Peak(isa).lanes for isa in targets.runnable()}
    bits = {"sse42": 128, "avx2": 256, "avx512": 512, "neon": 128, "fp16": 128}
    assert lanes == {isa: bits[isa.partition("-")[2]] // 32 for isa in lanes}


@pytest.mark.parametrize("isa", targets.runnable())
@pytest.mark.parametrize("size", [1, 512, 100_000, 3 * MIB])
def test_read_reads_all_the_bytes_it_counts(isa: str, size: int) -> None:
    read = Read(isa, size)
    sums = read.run()
    assert read.bytes == 4 * int(sums.sum(dtype=np.uint64))  # a buffer of ones
    assert size * read.passes <= read.bytes < (size + 1024) * read.passes
    assert read.bytes >= 8 * MIB


@pytest.mark.parametrize("isa", targets.runnable())
def test_read_sums_what_lies_in_each_lane(isa: str) -> None:
    read = Read(isa, 4096)
    read._data[:] = values = np.arange(1024, dtype=np.uint32) ** 2
    expected = values.reshape(-1, len(read._out)).sum(0, dtype=np.uint32)
    np.testing.assert_array_equal(read.run(), expected * np.uint32(read.passes))


def write_cache(folder: Path, index: int, level: str, kind: str, size: str | None) -> None:
    cache = folder / f"index{index}"
    cache.mkdir(parents=True)
    (cache / "level").write_text(f"{level}\n")
    (cache / "type").write_text(f"{kind}\n")
    if size is not None:
        (cache / "size").write_text(f"{size}\n")


def test_cache_sizes_are_linux_data_caches(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"),
         ("3", "Unified", "105M"), ("4", "Unified", "128M")]
    ):  # fmt: skip
        write_cache(tmp_path, index, level, kind, size)
    assert limits.cache_bytes(tmp_path) == {"L1": 48 * KIB, "L2": 2 * MIB, "L3": 105 * MIB}


@pytest.mark.parametrize("size", [None, "", "unknown"], ids=["absent", "empty", "nonsense"])
def test_cache_sizes_without_linux_are_the_c_librarys(
    size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path, 0, "1", "Data", "48K")
    write_cache(tmp_path, 1, "2", "Unified", size)
    known = {"SC_LEVEL1_DCACHE_SIZE": 1, "SC_LEVEL2_CACHE_SIZE": 2, "SC_LEVEL3_CACHE_SIZE": 3}
    monkeypatch.setattr(limits.os, "sysconf_names", known)
    answers = {"SC_LEVEL1_DCACHE_SIZE": 64 * KIB, "SC_LEVEL2_CACHE_SIZE": MIB}
    monkeypatch.setattr(limits.os, "sysconf", lambda name: answers.get(name, 0))
    assert limits.cache_bytes(tmp_path) == {"L1": 64 * KIB, "L2": MIB}


@pytest.mark.parametrize("answer", [0, -1])
def test_cache_sizes_that_nobody_knows_are_typical(
    answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits.os, "sysconf", lambda name: answer)
    assert limits.cache_bytes(tmp_path / "none") == {"L1": 32 * KIB, "L2": 512 * KIB}


@pytest.mark.parametrize(
    "caches",
    [
        EPYC,
        {"L1": 48 * KIB, "L2": 2 * MIB, "L3": 6 * MIB},
        {"L1": 32 * KIB, "L2": MIB},
        {"L1": 64 * KIB, "L2": 512 * KIB, "L3": 96 * MIB},
    ],
    ids=["epyc", "small L3", "cortex-a72", "3-D cache"],
)
def test_buffers_fit_their_level_and_exceed_the_nearer_one(caches: dict[str, int]) -> None:
    sizes = limits.buffer_bytes(caches)
    assert list(sizes) == [*caches, "DRAM"]
    for level, size in caches.items():
        assert sizes[level] < size
    for nearer, further in zip(sizes, list(sizes)[1:], strict=False):
        assert sizes[further] >= 2 * caches[nearer]


def test_measure_gives_every_isa_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET_SECS", 0.0)
    measured = limits.measure()
    assert set(measured.peak_gflops) == set(targets.runnable())
    assert list(measured.bandwidth) == [*measured.cache_bytes, "DRAM"]
    values = [*measured.peak_gflops.values(), *measured.bandwidth.values()]
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert 0 < measured.steadiness <= 1
    assert Limits.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "runnable", lambda: ())
    with pytest.raises(RuntimeError, match=r"has none of the instruction sets .*nothing to meas"):
        limits.measure()


def test_without_the_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    limits._library.cache_clear()
    with pytest.raises(RuntimeError, match="needs the compiler"):
        Peak(targets.runnable()[0])
