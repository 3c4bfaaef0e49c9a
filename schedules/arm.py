"""ARM: NEON's units and default tilings, argued from registers, pipes and in-order cores.

A64's multiply-add takes its second factor from one lane of a register. The matrix product so loads
a vector of four channels of each row (channels_last), or of four filters of weights
(channels_first), and needs no broadcast: four channels of 4 x 4 accumulators take 20 loads for 64
multiply-adds, by broadcasts 32. Armv7 has that form only unfused, which LLVM does not choose where
it may fuse: there a number is loaded into all lanes, as on AVX2.

======== ========= =======================================================================
ISA      registers register tile (rows x vectors), channels_last
======== ========= =======================================================================
AArch64  32        4 x 4, 6 x 3, 8 x 2 or 12 x 1: 12 to 18 sums, a vector a row, weights in
                   advance; two pipes of four cycles each want eight sums
Armv7    16        6 x 2 or 8 x 1: 12 sums, 2 weights, 1 broadcast
======== ========= =======================================================================

In channels_first 4 x 4: one vector of weights, four of inputs, for 16 multiply-adds.

A core (``@cortex-a55``) gives 64-bit code LLVM's model of it for the order of instructions, without
what is beyond the instruction set, and with the tuning logs of its name; 32-bit code only those. Of
the defaults one tile serves all: see below. In-order cores need loads spread between multiply-adds,
which that model does, and no ``ldp`` of two vectors: one takes as long as six loads on a
Cortex-A55, by LLVM's model. Half precision is converted at the loads and the stores of all targets:
sums are float32, so native arithmetic would find nothing to do.

What was tried, in modelled cycles (executed blocks x llvm-mca 19; shares of multiply-adds / 4 lanes
/ 2 pipes on Neoverse N1, 1 on Cortex-A55, whole calls, layers by their id in workloads.json, long
ones cut to 20 M multiply-adds). Geometric mean of the table's layers above 1 MFLOP, channels_last:
N1 92 %, from 87; A55 118 %, from 83. LLVM's model of the A55 starts two multiply-adds a cycle, the
core itself one: of what the model could, 118 % is 59.

================================== ============================== ===============================
tried                              predicted                      modelled
================================== ============================== ===============================
lanes, not broadcasts              20 loads for 64, not 32        MB-1: N1 84 to 89 %, A55 87 to
                                                                  105 %; 86 instructions for 64
                                                                  multiply-adds, not 112
… the vectors in scope "local"     registers                      workspace: stored, half of the
                                                                  lanes read back; MB-1: 1.56
                                                                  instructions a multiply-add,
                                                                  not 1.47
the A55's model, no ``ldp``        loads ahead of their use       A55: MB-1 105 to 114 %
taps unrolled by 3, 4, 5 or 2      8 x 1 rows share their inputs: A55: QN-C1 64 to 74 %, QN-B5
                                   13 loads for 24, not 27        70 to 85 %, LITE-1 57 to 74 %
                                                                  (code for N1); N1 + 1 to 4 %
8 x 2, not 4 x 4                   16 loads, not 20               A55 + 2 to 3 %, N1 - 1 %: left
                                                                  to the logs
5 x 4                              21 loads for 80                N1 - 2 to - 3 %
6 x 4                              22 loads for 96                32 registers full: spills,
                                                                  N1 76 %
depthwise 8 x 2                    two vectors a tap              N1 - 3 to - 7 %
local sums                         no dead zeros                  the same as without
channels_first 4 x 4 by lane, not  5 loads for 16, not 6 of       N1: QN-B1 71 to 82 %, MB-1 54
4 x 2                              8, 4 of them broadcasts        to 66 %: the rest is ``pad``,
                                                                  copied number by number
Armv7: two or four channels        no additions for addresses     spills: 29 and 23 % of the
unrolled                                                          instructions are multiply-adds,
                                                                  not 43 %
Armv7: 4 x 2, 3 x 4, 2 x 4, 12 x 1 fewer loads, or fewer pointers 36 to 40 %, 6 x 2: 43 %; its 12
                                                                  need 8 loads: 60 % at most
================================== ============================== ===============================
"""

from __future__ import annotations

from tvm_sepconv.compiler.schedules import cpu
from tvm_sepconv.compiler.schedules.cpu import Tiling, VectorUnit, tilings

from tvm_sepconv.config import KernelConfig

UNITS = {
    "armv7-neon": VectorUnit(bytes=16, registers=16),
    "aarch64-neon": VectorUnit(bytes=16, registers=32, by_lane=True),
    "aarch64-fp16": VectorUnit(bytes=16, registers=32, by_lane=True),
}


def default_tilings(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the variants of a library, longest tile first."""
    variants: tuple[Tiling, ...] = tilings(config, UNITS[isa])
    return variants


def candidates(config: KernelConfig, isa: str) -> tuple[Tiling, ...]:
    """Return the design space of a library's long variant, the default first."""
    space: tuple[Tiling, ...] = cpu.candidates(config, UNITS[isa])
    return space
