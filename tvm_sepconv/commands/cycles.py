"""``tvm-sepconv cycles``."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from tvm_sepconv import jit, selection
from tvm_sepconv.commands import scope

HELP = "modelled cycles of layers on an ARM core, without a board"
DESCRIPTION = (
    "Compile layers for a 64-bit ARM core, run them under emulation, check their answers, and "
    "model the cycles of what was executed: how often each block of instructions ran, times what "
    "llvm-mca gives it on that core. There is no cache and no memory in it: it ranks kernels and "
    "is no time. The floor is what the multiply-adds alone would take."
)
EPILOG = None
DEFAULT_TARGET = "arm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    selection.add_arguments(parser, "all")
    parser.add_argument(
        "--target", default=DEFAULT_TARGET, metavar="T",
        help="such as aarch64-neon@cortex-a55; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--logs", metavar="DIR", help="look for records here first")
    parser.add_argument(
        "--decisions", metavar="JSON", help="of the long kernel, in the place of the default's"
    )
    parser.add_argument(
        "--blocks", type=int, default=0, metavar="N", help="show the N blocks of most cycles"
    )
    parser.add_argument(
        "--figures", action="store_true",
        help="instead: all figures of our ARM kernels, other people's frameworks in an emulated "
        "Python beside them; downloads 60 MB, once",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    decisions = _decisions(options.decisions)
    scope.read_logs(options.logs)
    if options.figures:
        others = ["--decisions"] * (decisions is not None) + ["--blocks"] * (options.blocks > 0)
        layers = selection.given_layers(options)
        selection.refuse("`--figures` are of layers of its own", layers, others)
        return _figures()
    kernels = scope.kernels(selection.chosen(options))
    target = jit.compiler("tvm_sepconv.compiler.targets").cpu(scope.target(options.target))
    score = jit.compiler("tvm_sepconv.compiler.tuning.modelled.score")
    score.model_of(target)  # refused before anything is built
    shares = []
    with score.Scorer(target) as scorer:
        print(f"{target.name}, modelled as {scorer.model.core}; cycles are no time", flush=True)
        for subject, config in kernels:
            found = scorer.score(config, subject.batch, subject.steps, decisions)
            short = "" if found.steps == subject.steps else f", {found.steps} steps"
            print(
                f"{subject.id + short:<20}{found.instructions:>12,} instructions"
                f"{found.cycles:>14,.0f} cycles{found.share:>7.1%} of the floor",
                flush=True,
            )
            shares.append(found.share)
            for hot in scorer.hot(found, options.blocks):
                print(
                    f"\n  {hot.share:.1%} of the cycles: {hot.count:,} × {hot.block.instructions} "
                    f"instructions in {hot.cycles:.2f} cycles"
                )
                print(*(f"    {line}" for line in hot.text), sep="\n")
    mean = math.exp(sum(map(math.log, shares)) / len(shares))
    print(f"{mean:.1%} of the floor in the geometric mean of {len(shares)}")
    return 0


def _figures() -> int:
    """Make all figures; returns 0 if all are as they should be."""
    made = jit.compiler("tvm_sepconv.compiler.tuning.modelled.figures")
    found = made.figures(jit.cache_root() / "emulated", lambda row: print(row, flush=True))
    width = max(len(figure.what) for figure in found)
    print()
    for figure in found:
        mark = "reached" if figure.reached else "NOT REACHED"
        print(f"{figure.what:<{width}}  {figure.value:>7}  {figure.wanted:>7}  {mark}")
    return 0 if all(figure.reached for figure in found) else 1


def _decisions(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f'`--decisions` must be a JSON object: {{"step_tile": 32}}. Received: {text}'
        )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
