"""A small reader of x86-64 assembly in AT&T's syntax: functions, their loops, what those do.

An operand in memory is ``displacement(base,index,scale)``; the last operand is the one written.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_LABEL = re.compile(r"([\w.$@]+):$")
_JUMP = re.compile(r"j[a-z]+$")
_VECTOR = re.compile(r"%[xyz]mm(\d+)")
_FUSED = re.compile(r"vfn?m(?:add|sub)(132|213|231)[ps][sd]$")
_PRODUCT = re.compile(r"v?mul[ps][sd]$")
_SUM = re.compile(r"v?(?:add|sub)[ps][sd]$")
_COPY = re.compile(r"v?mov[au]p[sd]$|v?movdq[au]\d*$")
_LANES = re.compile(r"v?p?(gather|scatter|insert|insr|extract|extr|mask)")  # lane by lane
_CONVERT = re.compile(r"v?(cvt|pmov[sz]x)")
_ADDEND = {"132": -2, "213": 0, "231": -1}  # which operand of a fused multiply-add is added


@dataclass(frozen=True)
class Instruction:
    """One line; `text` is the whole of it with single spaces."""

    name: str
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def memory(self) -> str | None:
        """The operand in memory, if it has one that it reads or writes."""
        if self.name.startswith(("lea", "prefetch", "nop", "j", "call")):
            return None
        return next((o for o in self.operands if "(" in o), None)

    @functools.cached_property
    def is_vector(self) -> bool:
        return any(_VECTOR.match(o) for o in self.operands)

    @property
    def stores(self) -> bool:
        return self.memory is not None and self.operands[-1] == self.memory

    @property
    def broadcasts(self) -> bool:
        """Whether it reads one number for all lanes; `movss` is how SSE begins that."""
        return "broadcast" in self.name or "{1to" in self.text or self.name == "movss"

    @property
    def spilled(self) -> str | None:
        """The stack slot it touches: an address that no register but the stack's decides.

        What is indexed is an array: the compiler keeps scratch below 1 KiB on the stack.
        """
        slot = self.memory and re.fullmatch(r"-?\w*\(%rsp\)", self.memory)
        return slot[0] if slot else None


@dataclass
class Block:
    """Instructions that run one after the other, and the labels where they may go on."""

    label: str
    body: list[Instruction] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)


@dataclass
class Loop:
    """A cycle of blocks; those of loops inside it are theirs alone."""

    header: str
    own: list[Block]
    inner: list[Loop]

    def walk(self) -> Iterator[Loop]:
        """This loop and all inside, outermost first."""
        yield self
        for loop in self.inner:
            yield from loop.walk()

    @property
    def body(self) -> list[Instruction]:
        return [i for block in self.own for i in block.body]


@dataclass(frozen=True)
class Work:
    """What a run of instructions does.

    ``chains`` counts sums of products by their length here and by whether they begin with what a
    former turn left: a register tile of 6 x 2, unrolled twice, is ``{(2, True): 12}``. Fully
    unrolled over 8 channels it is ``{(8, False): 12}``.
    """

    body: tuple[Instruction, ...]
    multiply_adds: int
    chains: Counter[tuple[int, bool]]
    vector_loads: int
    vector_stores: int
    broadcasts: int
    copies: int
    spills: tuple[str, ...]
    lanewise: tuple[str, ...]
    calls: tuple[str, ...]
    conversions: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(i.text for i in self.body)


def read(line: str) -> Instruction:
    """One instruction from its line."""
    name, _, rest = line.strip().partition("\t")
    operands = re.findall(r"(?:[^,()]|\([^)]*\))+", rest)
    return Instruction(name, tuple(o.strip() for o in operands), " ".join(line.split()))


def functions(text: str) -> dict[str, list[Block]]:
    """The blocks of each function of a file, in its order."""
    kinds = dict(re.findall(r"^\s*\.type\s+([\w.$]+),@(\w+)", text, re.M))
    found: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            name = label[1]
            if name in kinds:
                blocks = []
                if kinds[name] == "function":
                    found[name] = blocks
            if not name.startswith((".Ltmp", ".Lfunc")):  # marks for a debugger
                blocks.append(Block(name))
        elif re.match(r"\t[a-z]", line) and blocks:
            if blocks[-1].body and _JUMP.match(blocks[-1].body[-1].name):
                blocks.append(Block(f"{blocks[-1].label}+"))
            blocks[-1].body.append(read(line))
    for blocks in found.values():
        _connect(blocks)
    return found


def _connect(blocks: list[Block]) -> None:
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        name = block.body[-1].name if block.body else ""
        if _JUMP.match(name):
            block.successors.append(block.body[-1].operands[0])
        if after is not None and name not in ("jmp", "retq"):
            block.successors.append(after.label)


def loops(blocks: list[Block]) -> list[Loop]:
    """The outermost loops among `blocks`, each with those inside it."""
    found = []
    for part in _cycles(blocks):
        inside = {b.label for b in part}
        entered = {s for b in blocks if b.label not in inside for s in b.successors}
        header = next((b.label for b in part if b.label in entered), part[0].label)
        turn = [Block(b.label, b.body, [s for s in b.successors if s != header]) for b in part]
        inner = loops(turn)
        theirs = {b.label for outer in inner for loop in outer.walk() for b in loop.own}
        found.append(Loop(header, [b for b in part if b.label not in theirs], inner))
    return found


def _cycles(blocks: list[Block]) -> list[list[Block]]:
    """The sets of blocks that reach each other, and blocks that reach themselves."""
    labels = {b.label for b in blocks}
    onward = {b.label: [s for s in b.successors if s in labels] for b in blocks}
    back: dict[str, list[str]] = {label: [] for label in onward}
    for label, successors in onward.items():
        for successor in successors:
            back[successor].append(label)
    part_of: dict[str, int] = {}
    finished = list(_finishing_order(onward))
    for number, label in enumerate(reversed(finished)):
        waiting = [label]
        while waiting:
            at = waiting.pop()
            if at not in part_of:
                part_of[at] = number
                waiting += back[at]
    parts: dict[int, list[Block]] = {}
    for block in blocks:
        parts.setdefault(part_of[block.label], []).append(block)
    return [p for p in parts.values() if len(p) > 1 or p[0].label in onward[p[0].label]]


def _finishing_order(onward: dict[str, list[str]]) -> Iterator[str]:
    seen: set[str] = set()
    for start in onward:
        path = [] if start in seen else [(start, iter(onward[start]))]
        seen.add(start)
        while path:
            label, successors = path[-1]
            fresh = next((s for s in successors if s not in seen), None)
            if fresh is None:
                path.pop()
                yield label
            else:
                seen.add(fresh)
                path.append((fresh, iter(onward[fresh])))


def work(body: list[Instruction]) -> Work:
    """Count what `body` does, read as straight-line code."""
    moved = [i for i in body if i.memory is not None and i.is_vector]
    chains, count = _chains(body)
    return Work(
        body=tuple(body),
        multiply_adds=count,
        chains=chains,
        vector_loads=sum(not i.stores for i in moved),
        vector_stores=sum(i.stores for i in moved),
        broadcasts=sum(i.broadcasts for i in moved),
        copies=sum(i.memory is None and bool(_COPY.match(i.name)) for i in body),
        spills=tuple(i.text for i in body if i.spilled),
        lanewise=tuple(i.text for i in body if _LANES.match(i.name)),
        calls=tuple(i.text for i in body if i.name.startswith("call")),
        conversions=tuple(i.text for i in body if _CONVERT.match(i.name)),
    )


def _chains(body: list[Instruction]) -> tuple[Counter[tuple[int, bool]], int]:
    """Follow sums through registers: each multiply-add lengthens the one that it adds to."""
    holds: dict[str, int] = {}  # register -> its chain
    products: set[str] = set()  # registers that hold a product not yet added
    written: set[str] = set()
    begun: list[str] = []  # chain -> the register or the memory that it began with
    lengths: list[int] = []
    for i in body:
        if not i.operands:
            continue
        names = [m[1] if (m := _VECTOR.match(o)) else o for o in i.operands]
        target, chain = names[-1], None
        if fused := _FUSED.match(i.name):
            addend: str | None = names[_ADDEND[fused[1]]]
        elif _SUM.match(i.name) and products.intersection(names):
            # SSE: the sum of a product and what is no product
            addend = next((n for n in names if n not in products), target)
        else:
            addend = None
            if _COPY.match(i.name):
                chain = holds.get(names[0])
        if addend is not None:
            chain = holds.get(addend)
            if chain is None:
                chain = len(begun)
                begun.append("" if addend in written else addend)
                lengths.append(0)
            lengths[chain] += 1
        written.add(target)
        products.discard(target)
        if _PRODUCT.match(i.name):
            products.add(target)
        holds.pop(target, None)
        if chain is not None:
            holds[target] = chain
    carried = [holds.get(start) == chain for chain, start in enumerate(begun)]
    return Counter(zip(lengths, carried, strict=True)), sum(lengths)
