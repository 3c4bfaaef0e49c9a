"""Blocks of executed instructions, and the cycles that llvm-mca gives them."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.compiler.tuning.modelled.tools import Tools
from tvm_sepconv.compiler.tuning.records import MODEL_HZ

ITERATIONS = 100
# LLVM's scheduling model for a target's core. Its cortex-a76 is an old core's; the in-order cores
# share the cortex-a55's. A target without a core is judged as most devices of today.
MODELS = {
    "": "neoverse-n1",
    "cortex-a53": "cortex-a55",
    "cortex-a55": "cortex-a55",
    "cortex-a72": "neoverse-n1",
    "cortex-a76": "neoverse-n1",
    "neoverse-n1": "neoverse-n1",
}
FMA_PIPES = 2  # of both models, each for 128 bits: eight independent FMLA take four cycles
PEAK_FLOPS = 2 * 4 * FMA_PIPES * MODEL_HZ  # float32
# hint #82, which no compiler emits, ends a block.
_APART = {"aarch64": bytes.fromhex("5f2a03d5"), "armv7": bytes.fromhex("52f020e3")}
_APART_TEXT = "hint\t#82"
_CYCLES = re.compile(r"Code Region - b(\d+)\n.*?Total Cycles: +(\d+)", re.S)


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other: where, how many, their bytes."""

    address: int
    instructions: int
    code: bytes


Counts = Counter[Block]


def read_counts(path: Path) -> list[Counts]:
    """Read what the plugin wrote: how often each block ran, for each pair of marks."""
    sections: list[Counts] = []
    for line in path.read_text().splitlines():
        if line == "=":
            sections.append(Counter())
        else:
            address, count, instructions, code = line.split()
            block = Block(int(address, 16), int(instructions), bytes.fromhex(code))
            sections[-1][block] += int(count)
    return sections


def executed(counts: Counts) -> int:
    """Return the number of instructions that ran."""
    return sum(block.instructions * count for block, count in counts.items())


class Model:
    """A core's cycles for blocks; each different one is analysed once.

    Parameters
    ----------
    core
        LLVM's name of it.
    """

    def __init__(self, found: Tools, core: str) -> None:
        self._tools, self.core = found, core
        self._known: dict[bytes, float] = {}

    def cycles(self, counts: Counts) -> float:
        """Return the modelled cycles of what ran.

        Raises
        ------
        RuntimeError
            If llvm-mca does not take the code.
        """
        new = {block.code: None for block in counts if block.code not in self._known}
        if new:
            self._known |= zip(new, self._analysed(list(new)), strict=True)
        return sum(self._known[block.code] * count for block, count in counts.items())

    def of_block(self, block: Block) -> float:
        """Return the modelled cycles of a block, once."""
        return self.cycles(Counter([block]))

    def _analysed(self, codes: Sequence[bytes]) -> Iterable[float]:
        texts = disassembled(self._tools, codes)
        regions = (
            f"# LLVM-MCA-BEGIN b{n}\n" + "\n".join(text) + f"\n# LLVM-MCA-END b{n}\n"
            for n, text in enumerate(texts)
        )
        out = _run(
            [
                self._tools.analyser, f"-mtriple={self._tools.arch}", self._tools.features,
                f"-mcpu={self.core}", f"-iterations={ITERATIONS}", "-instruction-info=false",
                "-resource-pressure=false", "-skip-unsupported-instructions=any",
            ],
            "".join(regions),
        )  # fmt: skip
        found = {int(n): int(cycles) / ITERATIONS for n, cycles in _CYCLES.findall(out)}
        # A block of nothing but what the model does not know (system calls) is left out.
        return [found.get(number, 0.0) for number in range(len(codes))]


def disassembled(found: Tools, codes: Sequence[bytes]) -> list[list[str]]:
    """Return the instructions of blocks as text; what LLVM does not know is left out."""
    apart = _APART[found.arch]
    whole = (code + bytes(-len(code) % 4) + apart for code in codes)  # Thumb's may be halves
    lines = "\n".join(" ".join(f"0x{byte:02x}" for byte in code) for code in whole)
    command = [found.disassembler, "--disassemble", f"-triple={found.arch}", found.features]
    texts: list[list[str]] = [[]]
    for line in _run(command, lines).splitlines():
        text = line.strip()
        if text == _APART_TEXT:
            texts.append([])
        elif text and not text.startswith("."):
            texts[-1].append(text)
    return texts[:-1]


def _run(command: Sequence[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"This command failed:\n  {' '.join(command)}\n{done.stderr.strip()[:2000]}"
        )
    return done.stdout


def model_of(target: CpuTarget) -> str:
    """Return LLVM's name of the core that a target's cycles are modelled for.

    Raises
    ------
    ValueError
        If it has none.
    """
    if target.arch != "aarch64":
        raise ValueError(
            "Cycles are modelled for 64-bit ARM, such as aarch64-neon@cortex-a55. "
            f"Received: target={target.name}"
        )
    return MODELS[target.name.partition("@")[2]]
