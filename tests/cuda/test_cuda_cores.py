"""The CUDA-core form: right on the emulator, one launch, no spills; all without a GPU."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, replace

import cuda_emulator
import numpy as np
import pytest

pytest.importorskip("tvm")

from cuda_kernels import ALIGNMENTS, LAYOUTS, NO_SPILLS, Layer, emit, pairwise, usage
from tvm_sepconv.compiler.schedules import cuda, cuda_cores, cuda_two_kernels
from tvm_sepconv.compiler.schedules.cuda_cores import Tiling

from tvm_sepconv.config import KernelConfig, SepConvConfig


@dataclass(frozen=True)
class Shape:
    layer: dict[str, object]
    channels: int
    sizes: tuple[tuple[int, int], ...]  # (batch, steps), all from one kernel


SHAPES = {
    "even": Shape(dict(filters=64, kernel_size=13, padding="same", activation="relu"), 64,
                  ((2, 128), (1, 4))),
    "odd": Shape(dict(filters=70, kernel_size=5, strides=3, dilation_rate=2, depth_multiplier=2,
                      padding="same", activation="silu", use_bias=False), 37, ((2, 196), (1, 12))),
    "strided": Shape(dict(filters=32, kernel_size=33, strides=2, padding=(7, 2)), 48,
                     ((1, 160), (3, 24))),
    "dilated": Shape(dict(filters=44, kernel_size=4, dilation_rate=3, padding=(9, 0),
                          activation="gelu"), 20, ((1, 136), (2, 68))),
    "tiny": Shape(dict(filters=1, kernel_size=1, strides=5, depth_multiplier=2), 1, ((2, 20),)),
    "far": Shape(dict(filters=8, kernel_size=3, dilation_rate=800, padding="same"), 8, ((1, 68),)),
}  # fmt: skip
TILINGS = {
    "long": None,
    "short": None,
    "low": Tiling(16, 32, 16, 2, 8, 8, stages=1),
    "tall": Tiling(128, 32, 16, 16, 8, 8, stages=2, blocks=2),
    "two-kernels": cuda_two_kernels.Tiling(32, 32, 16, 4, 4, 4),
    "unstaged": Tiling(64, 32, 16, 8, 4, 4, stages=2, stage_input=False),
}
CASES = [  # two stages of 1600 rows of halo are more than a block's shared memory
    case
    for case in pairwise(list(SHAPES), list(TILINGS), LAYOUTS, ALIGNMENTS)
    if case[:2] != ("far", "tall")
]
DEFAULTS = {  # layers of workloads.json and of the figures
    "QN-B1": KernelConfig(256, 256, 33, activation="relu"),
    "QN-C1": KernelConfig(64, 256, 33, strides=2, activation="relu"),
    "CN-0": KernelConfig(80, 512, 5, activation="relu"),
    "EEG": KernelConfig(8, 16, 8, depth_multiplier=2, activation="elu"),
    "SEED": KernelConfig(12, 3, 2, strides=2, activation="relu"),
}

# By architecture, in KiB: shared memory of a block, and of a multiprocessor.
SHARED_KIB = {
    "sm_75": (64, 64), "sm_80": (163, 164), "sm_86": (99, 100), "sm_87": (163, 164),
    "sm_89": (99, 100), "sm_90": (227, 228),
}  # fmt: skip


@functools.cache
def emitted(config: KernelConfig, tiling: Tiling, aligned: bool) -> str:
    (source,) = emit(config, tiling, aligned).values()  # one kernel: one launch a layer
    return source


def build(name: str, tiling: str, layout: str, alignment: str, folder, source=None) -> Layer:
    shape = SHAPES[name]
    layer = SepConvConfig.parse(**shape.layer, data_format=layout)
    config = layer.kernel_config(shape.channels)
    aligned = alignment == "aligned" and cuda.can_align(config)
    chosen = TILINGS[tiling]
    if chosen is None:
        defaults = cuda.default_tilings(config, arch="sm_90")
        chosen = defaults[0] if tiling == "long" else defaults[-1]
    sources = {"sepconv1d": source} if source else None
    return Layer(layer, shape.channels, chosen, aligned, folder, sources)


@pytest.mark.parametrize(("shape", "tiling", "layout", "alignment"), CASES)
def test_is_right_in_every_order_of_its_threads(shape, tiling, layout, alignment, tmp_path):
    layer = build(shape, tiling, layout, alignment, tmp_path)
    for batch, steps in SHAPES[shape].sizes:
        x = layer.input(batch, steps)
        left, _ = layer.layer.pad_amounts(steps)
        out_steps = layer.layer.out_steps(steps)
        if layer.aligned and layout == "channels_first":
            out_steps -= out_steps % 4
        answers = [layer(x, left, out_steps, order) for order in cuda_emulator.ORDERS]
        assert len({answer.tobytes() for answer in answers}) == 1
        layer.check(answers[0], x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_negative_left_padding_skips_steps(layout, tmp_path):
    layer = build("strided", "short", layout, "scalar", tmp_path)
    valid = replace(layer.layer, padding="valid")
    x = layer.input(2, 90)
    rest = x[:, 7:] if layout == "channels_last" else x[..., 7:]
    layer.check(layer(x, -7, valid.out_steps(83), 0), rest, valid)


@pytest.mark.parametrize(("call", "number"), [("wait_group_1()", 0), ("__syncthreads()", 1)])
def test_emulator_notices_a_missing_wait_and_barrier(call, number, tmp_path):
    config = SepConvConfig.parse(**SHAPES["strided"].layer).kernel_config(48)
    source = emitted(config, TILINGS["tall"], True)
    body = source.rindex("__global__")
    # Barrier 1 is the loop's first; TVM 0.27 writes some that need not be there.
    found = [m.start() for m in re.finditer(re.escape(call) + ";", source) if m.start() > body]
    at = source.rindex("\n", 0, found[number]) + 1
    changed = source[:at] + source[source.index("\n", at) :]
    layer = build("strided", "tall", LAYOUTS[0], "aligned", tmp_path, changed)
    x = layer.input(1, 300)
    answers = [layer(x, 7, layer.layer.out_steps(300), order) for order in range(2)]
    unread = any(np.isnan(answer).any() for answer in answers)
    assert unread or answers[0].tobytes() != answers[1].tobytes()


def on_all_architectures(*factors):
    """Their product, and with each row the next architecture."""
    archs = itertools.cycle(SHARED_KIB)
    return [(*row, arch) for row, arch in zip(itertools.product(*factors), archs, strict=False)]


def check_resources(config, tiling, sources, threads, arch, folder):
    """No kernel spills, and so many blocks as planned fit a multiprocessor."""
    block, together = SHARED_KIB[arch]
    size = cuda.shared_bytes(config, tiling)
    assert size <= block * 1024
    assert tiling.blocks * size <= together * 1024
    for (name, source), count in zip(sources.items(), threads, strict=True):
        (folder / name).mkdir()
        used = usage(source, arch, folder / name)
        assert used.spills == NO_SPILLS, name
        assert used.registers * count * tiling.blocks <= 65536, name


@pytest.mark.parametrize(("name", "layout", "arch"), on_all_architectures(DEFAULTS, LAYOUTS))
def test_defaults_are_one_kernel_that_spills_nothing(name, layout, arch, tmp_path):
    config = replace(DEFAULTS[name], data_format=layout)
    tilings = cuda.default_tilings(config, arch=arch)
    tiling = tilings[len(name) % len(tilings)]
    source = emitted(config, tiling, cuda.can_align(config))
    assert len(re.findall(r"__global__ void .*?\(", source)) == 2  # declared and defined
    assert f", {tiling.blocks}) sepconv1d_kernel" in source or tiling.blocks == 1
    check_resources(config, tiling, {"one": source}, [tiling.threads], arch, tmp_path)


@pytest.mark.parametrize(
    ("layout", "name", "arch"), on_all_architectures(LAYOUTS, ["QN-B1", "QN-C1", "CN-0"])
)
def test_two_kernels_spill_nothing(name, layout, arch, tmp_path):
    config = replace(DEFAULTS[name], data_format=layout)
    tiling = cuda_two_kernels.default_tilings(config, arch=arch)[0]
    sources = emit(config, tiling, cuda.can_align(config))
    assert list(sources) == ["depthwise", "pointwise"]
    first = tiling.step_tile // tiling.run * cuda_two_kernels.depthwise_channels(config)
    check_resources(config, tiling, sources, [first, tiling.threads], arch, tmp_path)


def test_conditional_copies_have_no_branches(tmp_path):
    source = emitted(DEFAULTS["QN-B1"], TILINGS["tall"], False)
    called = re.findall(r"ptx_cp_async_legacy_pred_ca_4_4_4\(", source)
    assert len(called) > 1, "the helper and its calls"
    assert "@p" not in source
    assert "cp.async.ca.shared.global [%0], [%1], %2, n;" in source


@pytest.mark.parametrize(
    ("filters", "halo", "arch", "layout"),
    pairwise([1, 96, 512], [1, 300, 20000], ["sm_75", "sm_86", "sm_90"], LAYOUTS),
)
def test_defaults_and_candidates_serve_every_layer(filters, halo, arch, layout):
    for stride in (1, 7):
        config = KernelConfig(
            channels=80, filters=filters, kernel_size=2, dilation_rate=halo, strides=stride,
            data_format=layout,
        )  # fmt: skip
        defaults = cuda.default_tilings(config, arch=arch)
        tried = cuda.candidates(config, arch=arch)
        assert tried[: len(defaults)] == defaults
        assert 8 <= len(tried) <= 200
        assert {cuda.refusal(config, False, arch, tiling) for tiling in tried} == {None}
        assert defaults[0].stage_input or halo > 300


def test_much_work_takes_the_long_variant():
    config = DEFAULTS["QN-B1"]
    tilings = cuda.default_tilings(config, arch="sm_90")
    assert tilings[0].filter_tile == 256, "one block has all filters"
    assert cuda.choose(config, tilings, 32, 1024) == 0
    assert cuda.choose(config, tilings, 1, 100) == 1
    assert cuda.choose(config, tilings, 1, 640, multiprocessors=10) == 0


def test_tiling_survives_a_record():
    tiling = Tiling(64, 96, 16, 8, 12, 8, 2, 1, False)
    assert cuda.tiling_from_dict(tiling.to_dict()) == tiling
    for wrong in ({"rows": 8.0}, {"stage_input": 1}, {"taps": 3}):
        with pytest.raises(ValueError, match="The schedule's decisions are"):
            cuda.tiling_from_dict({**tiling.to_dict(), **wrong})
    with pytest.raises(ValueError, match=r"`form` decision must be one of .*Received: {}"):
        cuda.tiling_from_dict({})


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_tile", 48), ("step_tile", 512), ("filter_tile", 48), ("channel_tile", 24), ("rows", 3),
     ("columns", 6), ("columns", 128), ("run", 32), ("stages", 3), ("blocks", 0)],
)  # fmt: skip
def test_tiling_refuses_numbers_that_break_a_rule(name, value):
    decisions = {**Tiling(64, 256, 32, 8, 8, 8).to_dict(), name: value}
    with pytest.raises(ValueError, match=f"`{name}` decision must be .*{name}={value}"):
        cuda.tiling_from_dict(decisions)
    with pytest.raises(ValueError, match=r"whole warps.*Received: 8 threads"):
        Tiling(8, 32, 16, 4, 8, 4)


@pytest.mark.parametrize(
    ("changed", "arch", "reason"),
    [(dict(filter_tile=96, columns=12), "sm_90", "its tiles do not divide the filters"),
     (dict(channel_tile=48, run=4), "sm_90", "its chunks do not divide the channels"),
     (dict(), "sm_75", "no asynchronous copies before sm_80"),
     (dict(channel_tile=64), "sm_86", "more shared memory than a block may have"),
     (dict(blocks=4), "sm_90", "more shared memory than a multiprocessor has"),
     (dict(rows=16, columns=16, step_tile=128), "sm_90", "more registers than a thread may have"),
     (dict(blocks=3, channel_tile=16, run=4), "sm_90", "more registers than a multiprocessor has")],
)  # fmt: skip
def test_refusal_names_what_is_exceeded(changed, arch, reason):
    config = KernelConfig(channels=64, filters=256, kernel_size=33)
    tiling = replace(Tiling(64, 256, 32, 8, 8, 8), **changed)
    assert cuda.refusal(config, False, arch, tiling) == reason


@pytest.mark.parametrize(
    ("tiling", "reason"),
    [((64, 32, 16, 8, 4, 4, 2, 1, False), "the two kernels read their input from shared memory"),
     ((32, 32, 16, 4, 4, 4), None)],
)  # fmt: skip
def test_two_kernels_are_refused_and_recorded_as_such(tiling, reason):
    chosen = cuda_two_kernels.Tiling(*tiling)
    config = KernelConfig(channels=16, filters=32, kernel_size=3)
    assert cuda.refusal(config, False, "sm_80", chosen) == reason
    assert cuda.tiling_from_dict(chosen.to_dict()) == chosen != Tiling(*tiling)


def test_candidates_have_both_forms():
    forms = [cuda.form_of(tiling).FORM for tiling in cuda.candidates(DEFAULTS["QN-B1"])]
    assert forms == ["cores"] * 40 + ["two_kernels"] * 8


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_only_float32_is_served(dtype):
    config = KernelConfig(channels=8, filters=8, kernel_size=3, dtype=dtype)
    with pytest.raises(ValueError, match=f"ordinary cores of sm_75.*dtype={dtype}"):
        cuda_cores.default_tilings(config, arch="sm_75")


def test_tf32_is_allowed_and_not_demanded():
    config = DEFAULTS["QN-B1"]
    strict = cuda.default_tilings(config, False, "sm_75")
    assert cuda.default_tilings(config, True, "sm_75") == strict
    assert {cuda.form_of(tiling) for tiling in cuda.candidates(config, True, "sm_75")} == {
        cuda_cores, cuda_two_kernels,
    }  # fmt: skip
    assert cuda.form_of(cuda.default_tilings(config, True, "sm_80")[0]) is not cuda_cores
