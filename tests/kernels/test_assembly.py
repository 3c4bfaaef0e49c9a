"""The reader of assembly, on code written for it."""

from __future__ import annotations

from collections import Counter

import assembly
import pytest

NEST = """
\t.type\tkernel,@function
kernel:
.Lfunc_begin0:
\tpushq\t%rbx
.LBB0_1:
\tvxorps\t%xmm1, %xmm1, %xmm1
\txorl\t%eax, %eax
.LBB0_2:
\tvmovups\t(%rsi,%rax), %zmm2
.Ltmp7:
\tvfmadd231ps\t(%rdi,%rax), %zmm2, %zmm1
\tcmpq\t$128, %rax
\tje\t.LBB0_3
\tvfmadd231ps\t64(%rdi,%rax){1to16}, %zmm2, %zmm1
\taddq\t$128, %rax
\tjmp\t.LBB0_2
.LBB0_3:
\tvmovups\t%zmm1, (%rdx)
\tdecq\t%rcx
\tjne\t.LBB0_1
\tretq
.Lfunc_end0:
\t.size\tkernel, .Lfunc_end0-kernel
"""


def body(text: str) -> list[assembly.Instruction]:
    return [assembly.read(line.strip().replace(" ", "\t", 1)) for line in text.split("; ")]


def test_finds_loops_in_loops_and_whose_instructions_are_whose() -> None:
    (outer,) = assembly.loops(assembly.functions(NEST)["kernel"])
    (inner,) = outer.inner
    assert [loop.header for loop in outer.walk()] == [".LBB0_1", ".LBB0_2"]
    assert len(inner.own) == 2  # the way out in the middle parts it
    assert [i.name for i in outer.body] == ["vxorps", "xorl", "vmovups", "decq", "jne"]
    done = assembly.work(inner.body)
    assert done.chains == Counter({(2, True): 1})
    assert (done.multiply_adds, done.vector_loads, done.broadcasts, done.vector_stores) == (
        2,
        3,
        1,
        0,
    )


@pytest.mark.parametrize(
    ("text", "chains"),
    [
        ("vfmadd231ps %ymm1, %ymm2, %ymm0; vfmadd231ps %ymm3, %ymm2, %ymm0", {(2, True): 1}),
        ("vfmadd231ps %ymm1, %ymm2, %ymm0; vfmadd231ps %ymm3, %ymm2, %ymm5", {(1, True): 2}),
        # from a register of zeros into others, and a copy on the way
        ("vfmadd213ps %ymm0, %ymm1, %ymm2; vmovaps %ymm2, %ymm3; "
         "vfmadd132ps (%rax), %ymm3, %ymm4", {(2, False): 1}),
        ("vxorps %xmm0, %xmm0, %xmm0; vfmadd231ps %ymm1, %ymm2, %ymm0", {(1, False): 1}),
        # SSE: the product is the one or the other operand of the sum; a bias is no product
        ("movaps %xmm1, %xmm2; mulps (%rax), %xmm2; addps %xmm2, %xmm0", {(1, True): 1}),
        ("mulps %xmm1, %xmm2; addps %xmm0, %xmm2; mulps %xmm3, %xmm4; addps %xmm2, %xmm4",
         {(2, False): 1}),
        ("addps (%rax), %xmm0", {}),
    ],
)  # fmt: skip
def test_follows_sums_through_registers(text: str, chains: dict[tuple[int, bool], int]) -> None:
    assert assembly.work(body(text)).chains == Counter(chains)


@pytest.mark.parametrize(
    ("text", "spills"),
    [
        ("vmovups %ymm1, 64(%rsp)", 1),
        ("vfmadd231ps (%rsp), %ymm1, %ymm2", 1),
        ("movq 8(%rsp), %rax", 1),
        ("vbroadcastss 160(%rsp,%rax,4), %ymm0", 0),  # an array
        ("vmovups (%rbp,%rax), %ymm0", 0),
        ("leaq 64(%rsp), %rdi", 0),
    ],
)
def test_tells_spills_from_arrays_on_the_stack(text: str, spills: int) -> None:
    assert len(assembly.work(body(text)).spills) == spills


@pytest.mark.parametrize(
    "name",
    ["vgatherdps", "vpgatherqd", "vscatterdps", "vinsertps", "pinsrw", "vpextrq", "vextractf128",
     "vmaskmovps"],
)  # fmt: skip
def test_sees_what_goes_lane_by_lane(name: str) -> None:
    assert assembly.work(body(f"{name} $1, %xmm0, %xmm1")).lanewise


def test_sees_calls_and_conversions() -> None:
    done = assembly.work(body("callq memset@PLT; vcvtph2ps %xmm0, %ymm0; vpmovsxdq %xmm0, %ymm1"))
    assert (len(done.calls), len(done.conversions)) == (1, 2)
