"""What the compiler makes of the hot loops on x86: counted in the assembly, never timed.

Any machine can run these: the kernels are compiled for x86-64, not called. The numbers expected
come from a kernel's tiling (hot_loops.py).

x86_code.json holds the instructions of the hot loops as they were last accepted, and with which TVM
and LLVM. After a change that is meant to alter them, write it anew and look at the difference:

    REWRITE_COUNTS=1 python -m pytest tests/kernels/test_x86_code.py -k instructions_are_as_accepted
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("tvm")

import tvm
from hot_loops import Kernel, compiled
from tvm_sepconv.compiler.schedules.cpu import Tiling

from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.workloads import workloads

# One of each class: many taps, stride 2, dilation 2, 13 taps, channels that are no whole vectors,
# two filters a channel, 3 taps.
LAYERS = ("QN-B1", "CN-1d", "QN-C2", "MB-1", "LITE-1", "EEG-SSVEP", "SEP-1")
ISAS = ("avx512", "avx2", "sse42")
FORMATS = ("channels_last", "channels_first")
Counts = dict[str, dict[str, list[int]]]  # kernel: stage: instructions, multiply-adds
COUNTS = Path(__file__).with_name("x86_code.json")
COMPILER = {"tvm": tvm.__version__, "llvm": tvm.get_global_func("target.llvm_version_major")()}
SAME_COMPILER = json.loads(COUNTS.read_text())["compiler"] == COMPILER
PARKED = (
    "LLVM unrolls all taps and takes the weights out of the loop over steps; those that have no "
    "register wait on the stack: as many loads as from the weights themselves"
)
SPILLED = (
    "LLVM unrolls all taps and keeps the inputs that they share: more than there are registers"
)
CLEARED = (
    "the sums' first zeros are stored although all taps are unrolled: LLVM makes one memset of "
    "those side by side, which later hides that they are dead"
)
POINTER = "the weights' address is read from the stack once a turn, for want of a register"
MIXED = "8 channels and 8 taps: all is unrolled, and one turn takes the sums at different stages"
# Known to fail, by cause. One that passes must leave the list, if the compiler is the same.
STACK = {
    PARKED: "MB-1 avx512 channels_last long, MB-1 avx2 channels_last long, SEP-1 avx2 "
    "channels_last long, EEG-SSVEP avx2 channels_last long, CN-1d avx2 channels_first "
    "long, CN-1d avx2 channels_first interior",
    SPILLED: "CN-1d avx2 channels_last long, MB-1 avx2 channels_first long, EEG-SSVEP avx512 "
    "channels_last long, EEG-SSVEP avx2 channels_first long, EEG-SSVEP sse42 "
    "channels_first long, EEG-SSVEP sse42 channels_last long",
    POINTER: "MB-1 avx512 channels_first long, SEP-1 avx512 channels_first interior, "
    "EEG-SSVEP sse42 channels_last interior",
}
SUMS = {
    MIXED: "EEG-SSVEP sse42 channels_last long",
}
MEMORY = {
    CLEARED: "CN-1d avx2 channels_last one, CN-1d avx2 channels_first long, CN-1d avx2 "
    "channels_first interior, MB-1 avx2 channels_last long, SEP-1 avx2 channels_first long, SEP-1 "
    "sse42 channels_first long, SEP-1 avx2 channels_first interior, EEG-SSVEP sse42 channels_last "
    "interior",
    SPILLED: "CN-1d avx2 channels_last long, MB-1 avx2 channels_first long, EEG-SSVEP avx512 "
    "channels_last long, EEG-SSVEP avx2 channels_first long, EEG-SSVEP sse42 "
    "channels_first long",
}
INSTRUCTIONS = {
    SPILLED: "CN-1d avx2 channels_last long, EEG-SSVEP sse42 channels_first long",
    CLEARED: "MB-1 avx2 channels_last long, SEP-1 sse42 channels_last long, SEP-1 sse42 "
    "channels_last interior, EEG-SSVEP sse42 channels_last long, EEG-SSVEP sse42 channels_last "
    "interior",
    POINTER: "CN-1d sse42 channels_last interior",
}


def layer_config(layer: str, data_format: str) -> KernelConfig:
    workload = workloads()[layer]
    return workload.config(data_format=data_format).kernel_config(workload.channels)


def tilings(layer: str, isa: str, data_format: str) -> dict[str, tuple[Tiling, bool]]:
    """The long variant, in place where that pays, and in channels_last the one for single steps."""
    target = cpu(f"x86_64-{isa}")
    config = layer_config(layer, data_format)
    long, *_, short = target.family.default_tilings(config, target.isa)
    kernels = {"long": (long, False)}
    if long.in_place:
        kernels["interior"] = (long, True)
    if data_format == "channels_last":
        kernels["one"] = (short, False)
    return kernels


@functools.cache
def library(layer: str, isa: str, data_format: str) -> dict[str, Kernel]:
    config = layer_config(layer, data_format)
    return compiled(config, isa, tilings(layer, isa, data_format))


def cases(violations: dict[str, str] | None = None) -> pytest.MarkDecorator:
    """All kernels; those named are known to fail, for the reason that stands beside them."""
    known = {
        name: reason for reason, names in (violations or {}).items() for name in names.split(", ")
    }
    every = []
    for layer, isa, data_format in itertools.product(LAYERS, ISAS, FORMATS):
        for variant in tilings(layer, isa, data_format):
            name = f"{layer} {isa} {data_format} {variant}"
            reason = known.pop(name, None)
            marks = [pytest.mark.xfail(reason=reason, strict=SAME_COMPILER)] if reason else []
            values = (layer, isa, data_format, variant)
            every.append(pytest.param(*values, id=name.replace(" ", "-"), marks=marks))
    assert not known, f"no such kernels: {sorted(known)}"
    return pytest.mark.parametrize(("layer", "isa", "data_format", "variant"), every)


@cases(SUMS)
def test_every_multiply_add_is_of_a_register_tile(
    layer: str, isa: str, data_format: str, variant: str
) -> None:
    kernel = library(layer, isa, data_format)[variant]
    assert kernel.does(kernel.pointwise)
    assert kernel.does(kernel.depthwise)
    if kernel.config.activation in ("linear", "relu"):
        other = [str(w) for _, w in kernel.hot if kernel.stage_of(w) is None]
        assert not other, "\n\n".join(other)


@cases(STACK)
def test_hot_loops_touch_no_stack(layer: str, isa: str, data_format: str, variant: str) -> None:
    for loop in library(layer, isa, data_format)[variant].loops():
        assert not loop.done.spills, str(loop.done)


@cases()
def test_hot_loops_only_compute(layer: str, isa: str, data_format: str, variant: str) -> None:
    for loop in library(layer, isa, data_format)[variant].loops():
        done = loop.done
        assert not (done.lanewise + done.calls + done.conversions), str(done)


@cases(MEMORY)
def test_hot_loops_load_what_a_register_tile_needs(
    layer: str, isa: str, data_format: str, variant: str
) -> None:
    for loop in library(layer, isa, data_format)[variant].loops():
        done = loop.done
        if loop.is_pointwise:
            assert done.vector_loads == loop.loads, str(done)
        assert done.vector_loads <= loop.loads, str(done)
        assert done.vector_stores == loop.stores, str(done)


@cases(INSTRUCTIONS)
def test_hot_loops_take_no_more_instructions_than_their_tile(
    layer: str, isa: str, data_format: str, variant: str
) -> None:
    for loop in library(layer, isa, data_format)[variant].loops():
        assert len(loop.done.body) <= loop.instructions, str(loop.done)


@cases()
def test_nothing_is_gathered(layer: str, isa: str, data_format: str, variant: str) -> None:
    kernel = library(layer, isa, data_format)[variant]
    code = [kernel.code]
    if kernel.config.strides > 1 and data_format == "channels_first":
        # Neighbours in time are not neighbours in memory: `pad` may gather them, nothing else.
        code = [done for _, done in kernel.hot]
    found = [text for done in code for text in done.lanewise]
    assert not [text for text in found if "gather" in text or "scatter" in text]


def counted() -> Counts:
    """By kernel and stage: instructions and multiply-adds of the longest hot loop."""
    counts: Counts = {}
    for layer, isa, data_format in itertools.product(LAYERS, ISAS, FORMATS):
        if layer == "EEG-SSVEP":
            continue  # 8 channels and 8 taps: nothing is left of the loops
        for variant, kernel in library(layer, isa, data_format).items():
            row = counts[f"{layer} {isa} {data_format} {variant}"] = {}
            for loop in sorted(kernel.loops(), key=lambda loop: len(loop.done.body)):
                stage = "pointwise" if loop.is_pointwise else "depthwise"
                row[stage] = [len(loop.done.body), loop.done.multiply_adds]
    return counts


def differences(now: Counts, then: Counts) -> tuple[list[str], list[str]]:
    """Which loops take more instructions for a multiply-add than then, and which fewer."""
    more: list[str] = []
    fewer: list[str] = []
    for name, row in then.items():
        for stage, (old, old_sums) in row.items():
            new, sums = now[name].get(stage, (1, 0))
            line = f"{name} {stage}: {old} for {old_sums} multiply-adds, now {new} for {sums}"
            if new * old_sums != old * sums:
                (more if new * old_sums > old * sums else fewer).append(line)
    return more, fewer


def test_instructions_are_as_accepted() -> None:
    if os.environ.get("REWRITE_COUNTS"):
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in counted().items())
        COUNTS.write_text(f'{{"compiler": {json.dumps(COMPILER)}, "counts": {{\n{rows}\n}}}}\n')
    accepted = json.loads(COUNTS.read_text())
    if accepted["compiler"] != COMPILER:
        pytest.skip(f"counts are of {accepted['compiler']}, this is {COMPILER}")
    now = counted()
    assert now.keys() == accepted["counts"].keys()
    more, fewer = differences(now, accepted["counts"])
    assert not more, "\n".join(more)
    assert not fewer, "\n".join(["Better: rewrite the counts (see above).", *fewer])


def test_more_and_fewer_instructions_are_told_apart() -> None:
    then = {"a": {"pointwise": [27, 16]}}
    assert differences({"a": {"pointwise": [54, 32]}}, then) == ([], [])
    assert differences({"a": {"pointwise": [28, 16]}}, then)[0]
    assert differences({"a": {"pointwise": [53, 32]}}, then)[1]
    assert differences({"a": {}}, then)[0]  # the loop is gone, or no longer what it was


@pytest.mark.parametrize(
    ("channels", "filters", "dtype", "depthwise", "pointwise"),
    [
        (8, 8, "float32", "ymm", "ymm"),
        (8, 9, "float32", "ymm", "zmm"),
        (9, 1, "float32", "zmm", "ymm"),
        (9, 24, "float32", "zmm", "zmm"),
        (4, 5, "float64", "ymm", "zmm"),
        (5, 4, "float64", "zmm", "ymm"),
    ],
)
def test_vectors_are_halved_along_what_fills_only_half(
    channels: int, filters: int, dtype: str, depthwise: str, pointwise: str
) -> None:
    config = KernelConfig(channels, filters, 33, dtype=dtype, accumulation_dtype=dtype)
    tiling = cpu("x86_64-avx512").family.default_tilings(config, "x86_64-avx512")[0]
    kernel = compiled(config, "avx512", {"long": (tiling, False)})["long"]
    found = {
        (loop.is_pointwise, instruction.operands[-1].strip("%0123456789"))
        for loop in kernel.loops()
        for instruction in loop.done.body
        if instruction.name.startswith("vfmadd")
    }
    assert found == {(False, depthwise), (True, pointwise)}


@pytest.mark.parametrize(
    ("isa", "tile"), [("avx512", (16, 2)), ("avx2", (8, 2)), ("sse42", (4, 4))]
)
def test_a_register_tile_too_large_is_seen_to_spill(isa: str, tile: tuple[int, int]) -> None:
    config = layer_config("QN-B1", "channels_last")
    tiling = dataclasses.replace(
        tilings("QN-B1", isa, "channels_last")["long"][0], step_tile=48, register_tile=tile
    )
    kernel = compiled(config, isa, {"long": (tiling, False)})["long"]
    assert any(w.spills for loop, w in kernel.hot if not loop.inner)


@pytest.mark.parametrize("tile", [(4, 3), (2, 4), (8, 4)])
def test_another_register_tile_is_seen_to_be_another(tile: tuple[int, int]) -> None:
    kernel = library("QN-B1", "avx512", "channels_last")["long"]
    other = dataclasses.replace(kernel.tiling, register_tile=tile)
    expected = dataclasses.replace(kernel, tiling=other)
    assert not expected.does(expected.pointwise)
