"""channels_first with so many taps that several of them share the vectors they load."""

from __future__ import annotations

import native
import pytest

import tvm_sepconv
from tvm_sepconv import targets

pytest.importorskip("tvm")

from tvm_sepconv.compiler.schedules.fused import taps_sharing

from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.config import SepConvConfig

HERE = [name for name in targets.runnable() if name in ("x86_64-avx2", "x86_64-avx512")]
# With vectors of 8 and of 16: kernel, strides, dilation, and (taps together, steps between them).
TAPS = {
    "one left over": (33, 1, 1, (5, 8), (3, 16)),
    "several loops": (75, 1, 1, (5, 8), (5, 16)),
    "whole": (48, 1, 1, (6, 8), (3, 16)),
    "dilated": (87, 1, 2, (8, 4), (6, 8)),
    "strided": (50, 2, 1, (4, 16), (2, 32)),
    "too few": (23, 2, 1, (1, 1), (1, 1)),
    "dilation no part of a vector": (40, 1, 3, (1, 1), (1, 1)),
    "dilation of vectors": (40, 1, 32, (1, 1), (1, 1)),
}


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)
def test_taps_share_where_they_are_a_vector_apart(
    taps: tuple[int, int, int, tuple[int, int], tuple[int, int]],
) -> None:
    kernel, strides, dilation, *expected = taps
    config = SepConvConfig.parse(
        8, kernel, strides=strides, dilation_rate=dilation, data_format="channels_first"
    ).kernel_config(8)
    found = []
    for name in ("x86_64-avx2", "x86_64-avx512"):
        target = cpu(name)
        found.append(taps_sharing(config, target.family.UNITS[target.isa]))
    assert found == expected
    for name in ("x86_64-sse42", "aarch64-neon", "armv7-neon"):  # short vectors rarely cross lines
        target = cpu(name)
        assert taps_sharing(config, target.family.UNITS[target.isa]) == (1, 1)


@pytest.mark.skipif(not HERE, reason="needs AVX2")
@pytest.mark.parametrize("target", HERE)
@pytest.mark.parametrize("name", ["one left over", "several loops", "dilated", "strided"])
def test_they_compute_the_same_sums(name: str, target: str) -> None:
    kernel, strides, dilation, *_ = TAPS[name]
    layer = native.layer_of(
        6, filters=5, kernel_size=kernel, strides=strides, dilation_rate=dilation,
        padding="same", data_format="channels_first",
    )  # fmt: skip
    layer.compile(tvm_sepconv.BuildOptions(target=target))
    for steps in (1, 16, 33, 150, 300):  # none, one and several whole vectors and tiles
        x = native.inputs(layer.config, 2, steps, 6)
        native.check(layer(x), x, layer.config, layer.get_weights())
