"""The figures of our ARM kernels that need no board, from scratch."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tvm_sepconv
from tvm_sepconv.bench.case import Case
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning.modelled import inside, tools
from tvm_sepconv.compiler.tuning.modelled.cycles import (
    Block,
    Counts,
    Model,
    disassembled,
    executed,
    read_counts,
)
from tvm_sepconv.compiler.tuning.modelled.python import EmulatedPython, emulated_python
from tvm_sepconv.compiler.tuning.modelled.score import Scorer, shortened
from tvm_sepconv.subjects import Subject, of_table

LEAST_FLOPS = 1_000_000  # of the rows that the share of the floor is of
CORES = {"N1": "aarch64-neon@cortex-a76", "A55": "aarch64-neon@cortex-a55"}
PEERS = {"LiteRT": "litert", "ONNX Runtime": "onnxruntime"}
# Many taps, few, strides, a multiplier, dilation, narrow and wide.
COMPARED = ("QN-C1", "QN-B1", "QN-B5", "MB-0", "MB-1", "SWW-2", "EEG-SSVEP", "QA-7")
ARMV7 = ("QN-B1", "MB-1", "QA-7")
HOT = 0.9  # of all executed instructions: the blocks that make them up are the hot ones
BASE = ("numpy", "safetensors", "apache-tvm-ffi>=0.1.14.post0,<0.1.15")
FRAMEWORKS = ("onnx", "onnxruntime", "ai-edge-litert", "flatbuffers")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A line of the table: what, how much, and how much it should be."""

    what: str
    value: str
    wanted: str
    reached: bool


def figures(folder: Path, say: Say) -> list[Figure]:
    """Make all figures; each row goes to `say` as it comes.

    Parameters
    ----------
    folder
        Where the emulated Python is kept.

    Raises
    ------
    RuntimeError
        If a program or a package is missing, naming it.
    """
    result = []
    for (name, target), least in zip(CORES.items(), (0.85, 0.75), strict=True):
        mean = mean_share(target, of_table([], "channels_last"), say)
        what = f"share of the floor on {name}, geometric mean above 1 MFLOP"
        result.append(Figure(what, f"{mean:.1%}", f"≥ {least:.0%}", mean >= least))
    least = min(vector_share(subject, say) for subject in of_table(ARMV7, "channels_last"))
    what = "vector multiply-adds of what armv7's hot blocks execute, the least layer"
    result.append(Figure(what, f"{least:.1%}", "≥ 70 %", least >= 0.7))
    python = emulated_python(folder, [*BASE, *FRAMEWORKS])
    ratios = compared(python, of_table(COMPARED, "channels_last"), say)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    what = f"cycles of the better of {' and '.join(PEERS)} over ours, {len(ratios)} layers"
    result.append(Figure(f"{what}, geometric mean", f"{mean:.2f}×", "≥ 1.5×", mean >= 1.5))
    result.append(Figure(f"{what}, least", f"{min(ratios):.2f}×", "≥ 1×", min(ratios) >= 1))
    ratio = loading(python, say)
    what = "instructions from `import tvm_sepconv` to a bundle's first answer, over `import numpy`"
    result.append(Figure(what, f"{ratio:.2f}", "≤ 0.5", ratio <= 0.5))
    return result


def mean_share(target: str, subjects: Iterable[Subject], say: Say) -> float:
    """Return the geometric mean of layers' shares of the floor, those above `LEAST_FLOPS`."""
    logs = []
    with Scorer(cpu(target)) as scorer:
        for one in subjects:
            config = one.config.kernel_config(one.channels)
            if config.flops(one.batch, one.config.out_steps(one.steps)) < LEAST_FLOPS:
                continue
            found = scorer.score(config, one.batch, one.steps)
            steps = "" if found.steps == one.steps else f" ({found.steps} of {one.steps} steps)"
            say(f"{target}  {one.id}{steps}: {found.share:.1%} of the floor")
            logs.append(math.log(found.share))
    return math.exp(sum(logs) / len(logs))


def vector_share(subject: Subject, say: Say) -> float:
    """Return the share of vector multiply-adds in what an armv7 kernel's hot blocks execute."""
    config = subject.config.kernel_config(subject.channels)
    with Scorer(cpu("armv7-neon")) as scorer:
        counts = scorer.counts(config, subject.batch, subject.steps)
    share = multiply_add_share(tools.tools("armv7"), counts)
    say(f"armv7-neon  {subject.id}: {share:.1%} of the hot instructions are multiply-adds")
    return share


def multiply_add_share(found: tools.Tools, counts: Counts) -> float:
    """Return the executed vector multiply-adds over all instructions of the hot blocks."""
    hot = hot_blocks(counts)
    texts = disassembled(found, [block.code for block in hot])
    named = zip(hot, texts, strict=True)
    products = sum(
        counts[b] * sum(line.startswith(("vfma.", "vmla.", "fmla")) for line in text)
        for b, text in named
    )
    return products / executed(Counter({block: counts[block] for block in hot}))


def hot_blocks(counts: Counts) -> list[Block]:
    """Return the blocks of most instructions, up to `HOT` of all."""
    order = sorted(counts, key=lambda block: -block.instructions * counts[block])
    whole, sum_, result = executed(counts), 0, []
    for block in order:
        if sum_ >= HOT * whole:
            break
        sum_ += block.instructions * counts[block]
        result.append(block)
    return result


def compared(python: EmulatedPython, subjects: Sequence[Subject], say: Say) -> list[float]:
    """Return the cycles of the best peer over ours for each layer, all called from one Python."""
    model = Model(tools.tools("aarch64"), "neoverse-n1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counter = Counting(python, folder)
        for subject in subjects:
            _save(subject, folder)
        found = {
            who: counter.cycles(model, ["call", key, str(folder)])
            for who, key in {"ours": inside.OURS, **PEERS}.items()
        }
    ratios = []
    for subject in subjects:
        ours = found["ours"][subject.id]
        peers = {who: cycles[subject.id] for who, cycles in found.items() if who != "ours"}
        best = min(peers, key=lambda who: peers[who])
        ratios.append(peers[best] / ours)
        words = ", ".join(f"{who} {cycles:,.0f}" for who, cycles in peers.items())
        say(f"{subject.id}: ours {ours:,.0f} cycles, {words}: {ratios[-1]:.2f}×")
    return ratios


def loading(python: EmulatedPython, say: Say) -> float:
    """Return the instructions of loading and calling a bundle over those of `import numpy`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counter = Counting(python, folder)
        (subject,) = of_table(["MB-1"], "channels_last")
        _save(subject, folder)
        bundle = folder / f"{subject.id}.sepconv"
        counts = {
            what: executed(counter.sections([what, *arguments])[0][1])
            for what, arguments in (("import", []), ("load", [str(bundle)]))
        }
    words = f"{counts['load']:,} instructions to an answer, {counts['import']:,} for numpy"
    say(f"{subject.id}: {words}")
    return counts["load"] / counts["import"]


def _save(subject: Subject, folder: Path) -> None:
    """Write a shortened layer as a bundle, and the case that everybody computes."""
    config = subject.config.kernel_config(subject.channels)
    short = replace(subject, steps=shortened(config, subject.batch, subject.steps))
    case = Case.of_subject(short)
    case.save(folder / f"{subject.id}.npz")
    layer = tvm_sepconv.SeparableConv1D.from_config(subject.config.to_dict())
    layer.build((None, None, subject.channels))
    layer.set_weights(list(case.weights))
    layer.save(folder / f"{subject.id}.sepconv", targets=[CORES["N1"]])


class Counting:
    """An emulated Python whose marked sections are counted.

    Parameters
    ----------
    folder
        For the plugin, the marks and what they write.
    """

    def __init__(self, python: EmulatedPython, folder: Path) -> None:
        self._python, self._folder = python, folder
        found = tools.tools("aarch64")
        tools.build_plugin(found, folder / "counter.so")
        tools.build_marks(found, folder / "marks.so")

    def sections(self, arguments: Sequence[str]) -> list[tuple[list[str], Counts]]:
        """Run `inside` and return what it says of each section, and what that executed.

        Raises
        ------
        RuntimeError
            If it fails.
        """
        output = self._folder / "counts"
        output.unlink(missing_ok=True)
        # Compiled files are kept here, apart from everybody's; the first run makes them.
        variables = {"PYTHONPYCACHEPREFIX": str(self._folder / "compiled")}
        command = [inside.__file__, str(self._folder / "marks.so"), *arguments]
        if arguments[0] != "call":
            self._python.run(command, variables)
        plugin = {"QEMU_PLUGIN": f"{self._folder / 'counter.so'},out={output}"}
        done = self._python.run(command, {**variables, **plugin})
        names = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        return list(zip(names, read_counts(output), strict=True))

    def cycles(self, model: Model, arguments: Sequence[str]) -> Mapping[str, float]:
        """Return the modelled cycles of the best form for each case."""
        best: dict[str, float] = {}
        for (case, _), counts in self.sections(arguments):
            best[case] = min(best.get(case, math.inf), model.cycles(counts))
        return best
