"""What the compiler makes of the hot loops on ARM: counted in the assembly, never timed.

Any machine can run these: the kernels are compiled for ARM, not called. What a loop must hold comes
from its kernel's tiling.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import pytest

pytest.importorskip("tvm")

from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import CpuTarget, cpu
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.workloads import workloads

BIG, LITTLE = "aarch64-neon@neoverse-n1", "aarch64-neon@cortex-a55"
# Two pointers or three, a comparison, a jump; once more where LLVM takes several turns together.
TURN = 8
LOOP = re.compile(r"^(\.LBB\w+):((?:(?!^\.LBB\w+:).)*?\tb(?:\.\w+|ne|lt|lo)\t\1)$", re.M | re.S)


@dataclass(frozen=True)
class Body:
    """The instructions of a loop without branches inside."""

    lines: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, line)) for line in self.lines)

    @property
    def by_lane(self) -> int:
        return self.count(r"fmla .*\.s\[\d\]$")

    @property
    def multiply_adds(self) -> int:
        return self.count(r"fmla .*\.4s|vfma\.f32 q")

    @property
    def vector_loads(self) -> int:
        pairs = self.count(r"ldp q")
        return self.count(r"ldu?r q|ld1r|ld1 |vld1|vldmia") + 2 * pairs


def config_of(layer: str, data_format: str = "channels_last", **changes: object) -> KernelConfig:
    workload = workloads()[layer]
    return workload.config(data_format=data_format, **changes).kernel_config(workload.channels)


@functools.cache
def code(config: KernelConfig, name: str) -> str:
    """The assembly of a layer's long variant."""
    target = cpu(name)
    tiling = target.family.default_tilings(config, target.isa)[0]
    kernels = {"long": build.scheduled(config, target, tiling)}
    return str(build.compile_kernels(kernels, target).inspect_source("asm"))


def loops(text: str) -> list[Body]:
    """The innermost loops with multiply-adds."""
    found = []
    for _, body in LOOP.findall(text):
        lines = [" ".join(line.split()) for line in body.splitlines() if line.startswith("\t")]
        found.append(Body(tuple(line for line in lines if not line.startswith("."))))
    return [body for body in found if body.multiply_adds]


def pointwise(config: KernelConfig, target: CpuTarget) -> tuple[int, int]:
    """Sums and loads of the matrix product for one vector of the operand taken lane by lane."""
    rows, vectors = target.family.default_tilings(config, target.isa)[0].register_tile
    if config.data_format == "channels_last":
        return 4 * rows * vectors, rows + 4 * vectors
    return rows * vectors, 1 + vectors


@pytest.mark.parametrize("target", [BIG, LITTLE])
@pytest.mark.parametrize(
    ("layer", "data_format"),
    [("QN-B1", "channels_last"), ("MB-1", "channels_last"), ("CN-1d", "channels_last"),
     ("QN-B1", "channels_first"), ("MB-1", "channels_first")],
)  # fmt: skip
def test_the_matrix_product_is_multiply_adds_by_lane(
    layer: str, data_format: str, target: str
) -> None:
    config = config_of(layer, data_format)
    sums, loads = pointwise(config, cpu(target))
    found = [loop for loop in loops(code(config, target)) if loop.by_lane == loop.multiply_adds]
    # In channels_first the depthwise stage takes its weights by lane as well, for more loads.
    products = [w for w in found if w.vector_loads * sums == w.by_lane * loads]
    assert products, "\n\n".join("\n".join(loop.lines) for loop in found)
    assert data_format == "channels_first" or products == found
    for loop in products:
        times = loop.by_lane // sums
        assert len(loop.lines) <= times * (sums + loads) + TURN, "\n".join(loop.lines)


@pytest.mark.parametrize("target", [BIG, LITTLE, "armv7-neon"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_hot_loops_touch_no_stack(data_format: str, target: str) -> None:
    for layer in ("QN-B1", "MB-1"):
        for loop in loops(code(config_of(layer, data_format), target)):
            assert not loop.count(r".*\[sp"), "\n".join(loop.lines)
            # Where all taps are unrolled, a turn stores the sums that it began.
            begun = loop.count(r"movi v|fmul v|vmov|vmul")
            assert begun or not loop.count(r"st[rp] |vst"), "\n".join(loop.lines)


def test_taps_share_their_inputs() -> None:
    config = config_of("QN-B1")
    (steps, vectors) = cpu(BIG).family.default_tilings(config, "aarch64-neon")[0].depthwise_block
    together = [loop for loop in loops(code(config, BIG)) if not loop.by_lane]
    assert together
    for loop in together:
        taps = loop.multiply_adds // (steps * vectors)
        assert taps > 1
        assert loop.vector_loads == vectors * (taps + steps + taps - 1), "\n".join(loop.lines)


def test_armv7_multiplies_a_register_tile() -> None:
    config, target = config_of("QN-B1"), cpu("armv7-neon")
    rows, vectors = target.family.default_tilings(config, target.isa)[0].register_tile
    products = [
        loop for loop in loops(code(config, target.name)) if loop.multiply_adds == rows * vectors
    ]
    assert products
    for loop in products:
        assert loop.vector_loads == rows + vectors, "\n".join(loop.lines)


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a55"])
def test_little_cores_load_no_pairs_of_vectors(core: str) -> None:
    config = config_of("MB-1")
    assert not re.search(r"\tldp\tq", code(config, f"aarch64-neon@{core}"))
    assert re.search(r"\tldp\tq", code(config, BIG))


@pytest.mark.parametrize("target", [LITTLE, "aarch64-fp16@cortex-a76", "armv7-neon"])
@pytest.mark.parametrize("activation", ["gelu", "tanh", "softplus"])
def test_activations_call_nothing(activation: str, target: str) -> None:
    text = code(SepConvConfig.parse(8, 3, activation=activation).kernel_config(8), target)
    own = set(re.findall(r"^([\w.$]+):", text, re.M))
    assert set(re.findall(r"\tbl\t([\w.$]+)", text)) <= own


def test_half_precision_is_converted_natively_and_summed_in_float32() -> None:
    text = code(config_of("MB-1", dtype="float16"), "aarch64-fp16@cortex-a76")
    assert re.search(r"\tfcvtl\t", text)
    assert re.search(r"\tfcvtn\t", text)
    assert not re.search(r"\tfml[as]l?2?\tv\d+\.8h", text)
    assert "__extendhfsf2" not in set(re.findall(r"\tbl\t([\w.$]+)", text))


def test_channels_that_are_no_whole_vectors_are_taken_by_lane_too() -> None:
    config = config_of("LITE-1")
    assert config.channels % 4
    rows, vectors = cpu(BIG).family.default_tilings(config, "aarch64-neon")[0].register_tile
    by_lane = re.findall(r"\tfmla\t.*\.s\[\d\]", code(config, BIG))
    assert len(by_lane) >= 4 * math.prod((rows, vectors))
