"""Cases for the test of conformance: configs drawn from the whole argument space, and workloads."""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass
from typing import Any

from tvm_sepconv import activations, targets
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.workloads import workloads

CONFIGS, CONFIGS_PER_PART = 200, 20
LAYERS_PER_BUNDLE = 5
TARGETS = targets.runnable()
EDGES = (1, 15, 16, 17, 31, 32, 33, 64, 65)  # round whole vectors and pairs of them


@dataclass(frozen=True)
class Case:
    """A layer for a target and the (batch, steps) to call it with."""

    config: SepConvConfig
    channels: int
    target: str
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return self.config.name


# ---- drawing configs ----------------------------------------------------------------------------


def arguments(draw: random.Random) -> tuple[int, dict[str, Any], list[int], int]:
    """(channels, the layer's arguments, the output steps of four calls, extra input steps)."""
    layer = {
        "filters": draw.randint(1, 72),
        "kernel_size": draw.choice([draw.choice([3, 2, 1, 25, 33, 40]), draw.randint(1, 40)]),
        "strides": draw.randint(1, 4),
        "dilation_rate": draw.randint(1, 5),
        "depth_multiplier": draw.randint(1, 4),
        "padding": draw.choice(["valid", "same", pair(draw)]),
        "data_format": draw.choice(["channels_last", "channels_first"]),
        "activation": draw.choice(["linear", "relu"]),
        "use_bias": draw.choice([True, False]),
        "dtype": draw.choice(["float32", "float64"]),
    }
    edges = [(1, 1), (15, 17), (63, 65), (126, 133)]
    out_steps = [draw.randint(*edge) for edge in edges]
    return draw.randint(1, 72), layer, out_steps, draw.randint(0, 3)


def pair(draw: random.Random) -> tuple[int, int]:
    """Padding on both sides, or much of it on the left."""
    both = draw.randint(0, 12), draw.randint(0, 12)
    return draw.choice([both, (draw.randint(0, 90), 0)])


def steps_for(config: SepConvConfig, out_steps: int, extra: int) -> int:
    """Input steps for that many output steps, or the fewest above that the layer can take."""
    if config.padding == "same":
        steps = out_steps * config.strides - extra % config.strides
    else:
        steps = (out_steps - 1) * config.strides + config.effective_kernel + extra % config.strides
        steps = max(steps - sum(config.pad_amounts(0)), 0)
    gated = config.activation is activations.glu and config.data_format == "channels_first"
    while config.out_steps(steps) < 1 or (gated and config.out_steps(steps) % 2):
        steps += 1
    return steps


def drawn_cases(count: int, seed: int) -> list[Case]:
    """Draws as cases, in each of which activation, channels or filters are dealt in turn."""
    names = itertools.cycle(sorted(activations.NAMES - {"threshold"}))
    edges = itertools.cycle(itertools.product(EDGES, ("channels", "filters")))
    cases: dict[object, Case] = {}
    draw = random.Random(seed)
    while (number := len(cases)) < count:
        channels, layer, out_steps, extra = arguments(draw)
        if number % 3 == 0:
            layer["activation"] = next(names)
        elif (edge := next(edges))[1] == "channels":
            channels = edge[0]
        else:
            layer["filters"] = edge[0]
        layer["filters"] += (layer["activation"] == "glu") * (layer["filters"] % 2)
        config = SepConvConfig.parse(**layer)
        key = f"{config.kernel_config(channels).key}-{layer['activation']}"
        config = dataclasses.replace(config, name=f"{seed}.{number:03}-{key}")
        batches = [(1, 3, 1, 2)[(i + number) % 4] for i in range(4)]
        shapes = [(n, steps_for(config, t, extra)) for n, t in zip(batches, out_steps, strict=True)]
        shapes.append((0, shapes[1][1]))
        target = TARGETS[number // LAYERS_PER_BUNDLE % len(TARGETS)]
        cases.setdefault((key, config.padding), Case(config, channels, target, tuple(shapes)))
    return list(cases.values())


def part_of_draws(part: int) -> list[Case]:
    """More of them, for the full run."""
    return drawn_cases(CONFIGS_PER_PART, seed=1 + part)


# ---- the table of workloads ---------------------------------------------------------------------

FACTORS = (tuple(workloads()), ("channels_last", "channels_first"), ("float32", "float64"), TARGETS)
Row = tuple[str, str, str, str]


def pairs_in(row: Row) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def pairwise() -> list[Row]:
    """Few rows that hold every pair of values of two factors: greedily, most new pairs first."""
    rows: list[Row] = list(itertools.product(*FACTORS))
    missing, chosen = set().union(*map(pairs_in, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs_in(row) & missing)))
        missing -= pairs_in(chosen[-1])
    return chosen


def table_case(row: Row) -> Case:
    """The published shape, and a short call of the same library."""
    name, data_format, dtype, target = row
    work = workloads()[name]
    config = work.config(data_format=data_format, dtype=dtype, name="-".join(row))
    shapes = (work.batch, work.steps), (2, steps_for(config, 7, 0))
    return Case(config, work.channels, target, shapes)
