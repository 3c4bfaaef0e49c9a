"""What bounds a call: byte counts against sums done by hand, and limits that take longest."""

from __future__ import annotations

import json

import pytest
from bench_reports import LIMITS, TILING

from tvm_sepconv.bench.roofline import Bound, Traffic, bound, memory_bound, traffic
from tvm_sepconv.kernel_config import KernelConfig

KIB, MIB = 1 << 10, 1 << 20
EPYC = {"L1": 32 * KIB, "L2": MIB, "L3": 32 * MIB}
ISA = "x86_64-avx512"


def moved(
    channels: int, filters: int, kernel_size: int, steps: int, *, batch: int = 1,
    cold: bool = False, caches: dict[str, int] = EPYC, tiling: dict[str, object] = TILING,
    data_format: str = "channels_last", **layer: int,
) -> Traffic:  # fmt: skip
    config = KernelConfig(channels, filters, kernel_size, data_format=data_format, **layer)
    out_steps = (steps - config.effective_kernel) // config.strides + 1
    return traffic(config, tiling, 16, batch, steps, out_steps, caches, cold)


def test_small_call_moves_each_array_once() -> None:
    """16 channels, 16 filters, 3 taps, 66 steps: one tile, and all of it in the first caches."""
    x, taps, pointwise, y = 66 * 16 * 4, 3 * 16 * 4, 16 * 16 * 4, 64 * 16 * 4
    small = moved(16, 16, 3, 66)
    assert small.bytes == {"L2": x + taps + pointwise + y, "L3": 0, "DRAM": 0}
    assert small.source == "L2"
    scratch = x + 64 * 16 * 4
    assert small.working_set_bytes == x + taps + pointwise + y + scratch


def test_long_strips_come_once_a_register_block() -> None:
    """256 channels: a strip of 4 vectors is 64 KiB, twice the first cache; 128 steps, 2 tiles."""
    big = moved(256, 256, 3, 130)
    x_tile, taps, pointwise = 66 * KIB, 3 * KIB, 256 * KIB
    intermediate = 128 * KIB * (1 + 4)  # written once, read for each of four strips
    blocks = 128 // 4
    y = 128 * KIB
    assert big.bytes["L2"] == 2 * (x_tile + taps) + intermediate + blocks * pointwise + y


def test_depthwise_blocks_read_their_rows_again_where_they_exceed_the_first_cache() -> None:
    """256 channels, 33 taps: 40 rows, 33 taps and 8 results of 1 KiB; 64 steps are 8 blocks."""
    long = moved(256, 16, 33, 96)
    narrow = moved(256, 16, 33, 96, tiling={**TILING, "channel_block": 64})
    again, once = 8 * (40 + 33) * KIB, (96 + 33) * KIB
    assert long.bytes["L2"] - narrow.bytes["L2"] == again - once


def test_dilated_taps_leave_gaps_unread() -> None:
    near, far = moved(16, 16, 3, 66), moved(16, 16, 3, 64 + 256, dilation_rate=128)
    assert far.bytes["L2"] - near.bytes["L2"] == (3 * 64 - 66) * 16 * 4


def test_weights_are_padded_to_whole_vectors() -> None:
    assert moved(8, 17, 1, 64).bytes["L2"] - moved(8, 16, 1, 64).bytes["L2"] == (
        8 * 16 * 4 + 64 * 4
    )


@pytest.mark.parametrize(
    ("steps", "cold", "source", "l3", "dram"),
    [
        (500, False, "L2", 0, 0),
        (4_000, False, "L3", 1, 0),
        (100_000, False, "DRAM", 1, 1),
        (500, True, "DRAM", 1, 1),
    ],
    ids=["second cache", "third", "memory", "cold"],
)
def test_ends_come_from_where_all_of_it_fits(
    steps: int, cold: bool, source: str, l3: int, dram: int
) -> None:
    call = moved(64, 64, 1, steps, cold=cold)
    ends = 2 * steps * 64 * 4
    assert call.source == source
    assert (call.bytes["L3"], call.bytes["DRAM"]) == (l3 * ends, dram * ends)


def test_weights_beyond_the_second_cache_come_once_a_tile() -> None:
    call = moved(1024, 1024, 1, 256)
    weights = 1024 * 1024 * 4 + 1024 * 4
    assert call.bytes["L3"] == 2 * 256 * 4 * KIB + 4 * weights
    assert call.bytes["DRAM"] == 0


def test_without_a_third_cache_memory_is_next() -> None:
    call = moved(1024, 1024, 1, 256, caches={"L1": 32 * KIB, "L2": MIB})
    assert list(call.bytes) == ["L2", "DRAM"]
    assert call.source == "DRAM"
    assert call.bytes["DRAM"] > 16 * MIB


def test_nearer_levels_pass_all_that_comes_from_further_away() -> None:
    for steps in (10, 1_000, 100_000):
        sizes = list(moved(64, 16, 3, steps, cold=True).bytes.values())
        assert sizes == sorted(sizes, reverse=True)


def test_work_grows_with_the_batch() -> None:
    one, many = (moved(32, 32, 5, 100, batch=n, cold=True).bytes for n in (1, 3))
    assert many["DRAM"] == 3 * one["DRAM"]
    assert one["L2"] < many["L2"] <= 3 * one["L2"]


def test_channels_first_has_steps_for_vectors() -> None:
    """256 channels, tiles of 8 filters x 2 vectors of steps: a strip of weights is 16 filters.

    A depthwise block of 32 steps has 32 rows, 1 tap and 32 results: 65 KiB, two of them a tile. A
    strip of weights is 16 KiB, one of the intermediate 32: together more than the first cache.
    """
    tiling = {"step_tile": 64, "register_tile": [8, 2], "depthwise_block": [4, 2]}
    call = moved(256, 64, 1, 64, tiling=tiling, data_format="channels_first")
    depthwise, intermediate, pointwise, y = 2 * (32 + 1), 64 * (1 + 8), 2 * 64, 16
    assert call.bytes["L2"] == (depthwise + intermediate + pointwise + y) * KIB


def test_traffic_survives_json() -> None:
    call = moved(16, 16, 3, 66)
    assert Traffic.from_dict(json.loads(json.dumps(call.to_dict()))) == call


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"L2": 1140, "L3": 98, "DRAM": 0}, Bound("FMA", 1.0, None)),
        ({"L2": 2 * 114_000, "L3": 98, "DRAM": 0}, Bound("L2", 2.0, 114.0)),
        ({"L2": 2 * 114_000, "L3": 3 * 98_000, "DRAM": 0}, Bound("L3", 3.0, 98.0)),
        ({"L2": 400_000, "L3": 400_000, "DRAM": 400_000}, Bound("DRAM", 400 / 31, 31.0)),
    ],
    ids=["FMA", "L2", "L3", "DRAM"],
)
def test_bound_is_what_takes_longest(sizes: dict[str, int], expected: Bound) -> None:
    found = bound(Traffic(sizes, 0, "L2"), 118_100, LIMITS, ISA)
    assert (found.level, found.gbps) == (expected.level, expected.gbps)
    assert found.time_us == pytest.approx(expected.time_us)


def test_memory_bound_leaves_arithmetic_out() -> None:
    call = Traffic({"L2": 114_000, "L3": 0, "DRAM": 0}, 0, "L2")
    assert memory_bound(call, LIMITS) == Bound("L2", pytest.approx(1.0), 114.0)
