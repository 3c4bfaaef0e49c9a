"""Measure our layers beside ONNX Runtime's, and beside this core's peak.

Every output is compared with the reference before anything is timed. Whole calls take turns; the
kernel alone takes turns with the loop that measures the peak.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

import tvm_sepconv
from tvm_sepconv import targets
from tvm_sepconv.bench import machine, peers
from tvm_sepconv.bench.case import Case, check, describe
from tvm_sepconv.bench.peak import Peak
from tvm_sepconv.bench.report import OURS, Report, Row
from tvm_sepconv.bench.timing import Samples, interleave, wait_until_idle
from tvm_sepconv.workloads import Workload, workloads

PROGRAM = "python -m tvm_sepconv.bench"
WHOLE_CALL_SECS = 0.8  # a row's budgets; what it has to verify comes on top
KERNEL_SECS = 0.3
DISTRIBUTIONS = ("numpy", "apache-tvm", "apache-tvm-ffi", "onnx", "onnxruntime")

PeerMakers = Mapping[str, Callable[[Case, int], peers.Prepared]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if an output is wrong or a layer cannot be compiled."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    command = shlex.join([*PROGRAM.split(), *argv])
    try:
        report = measure(args.workloads, args.threads, args.data_format, args.target, command)
    except (AssertionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.text(), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="ids or globs, else all")
    parser.add_argument("--threads", type=int, default=1, help="of a whole call, everybody's")
    parser.add_argument(
        "--data-format", choices=("channels_last", "channels_first"), default="channels_last"
    )
    parser.add_argument("--target", choices=targets.runnable(), help="instruction set of ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {args.threads}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"argument --json: there is no folder {args.json.parent}")
    try:
        args.workloads = select(args.workloads)
    except ValueError as error:
        parser.error(str(error))
    return args


def select(patterns: Iterable[str]) -> list[Workload]:
    """Return the workloads that a pattern matches, in their own order; all without patterns.

    Raises
    ------
    ValueError
        If a pattern matches none, naming the ids there are.
    """
    table = workloads()
    chosen = set() if (patterns := list(patterns)) else set(table)
    for pattern in patterns:
        found = {name for name in table if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"The `WORKLOAD` arguments must be ids or globs of {', '.join(table)}. "
                f"Received: {pattern}"
            )
        chosen |= found
    return [workload for name, workload in table.items() if name in chosen]


def measure(
    chosen: Sequence[Workload],
    threads: int = 1,
    data_format: str = "channels_last",
    target: str | None = None,
    command: str = "",
) -> Report:
    """Measure workloads; progress goes to the standard error stream.

    Raises
    ------
    AssertionError
        If an output of ours or of a peer is not the layer's.
    RuntimeError
        If a layer has to be compiled and cannot be.
    """
    layers = [_compiled(workload, data_format, target) for workload in chosen]
    makers, missing = peers.available()
    isa = target or targets.runnable()[0]
    peak = Peak(isa)
    rows: list[Row] = []
    best_us = []
    others = machine.OthersWork()
    try:
        for workload, layer in zip(chosen, layers, strict=True):
            _progress(f"measuring {len(rows) + 1} of {len(chosen)}: {workload.id}")
            case = Case.of(workload, data_format)
            row, peak_us = measure_row(workload, case, layer, makers, peak, threads)
            rows.append(row)
            best_us.append(peak_us)
    finally:
        tvm_sepconv.set_num_threads(None)
    _progress("")
    return Report(
        command=command,
        where=machine.where(threads),
        threads=threads,
        target=isa,
        data_format=data_format,
        others_processors=others.processors(),
        versions=machine.versions(DISTRIBUTIONS),
        peak_gflops=peak.flops / min(best_us) / 1e3,
        missing=missing,
        rows=rows,
    )


def _compiled(
    workload: Workload, data_format: str, target: str | None
) -> tvm_sepconv.SeparableConv1D:
    layer = tvm_sepconv.SeparableConv1D(**workload.layer, data_format=data_format, name=workload.id)
    layer.build(workload.input_shape(data_format))
    layer.compile(tvm_sepconv.BuildOptions(target=target))
    return layer


def measure_row(
    workload: Workload,
    case: Case,
    layer: tvm_sepconv.SeparableConv1D,
    makers: PeerMakers,
    peak: Peak,
    threads: int,
) -> tuple[Row, float]:
    """Verify and time one workload; returns its row, and the peak loop's best time in µs.

    Raises
    ------
    AssertionError
        If an output of ours or of a peer is not the layer's.
    """
    layer.set_weights(case.weights)
    tvm_sepconv.set_num_threads(threads)
    x = case.x
    check(OURS, layer(x), case.expected, case.allowed)
    prepared = {name: make(case, threads) for name, make in makers.items()}
    calls = {OURS: lambda: layer(x), **{name: peer.call for name, peer in prepared.items()}}
    wait_until_idle()  # the reference's matrix products leave threads spinning
    whole_call = interleave(calls, WHOLE_CALL_SECS, settle=threads > 1)
    tvm_sepconv.set_num_threads(1)
    wait_until_idle()
    kernel, peak_samples = _kernel_alone(case, layer, peak)
    batch = x.shape[0]
    row = Row(
        id=workload.id,
        shape=f"{batch}×{case.steps} {describe(case.config, case.channels)}",
        flops=case.config.flops(batch, case.steps, case.channels),
        whole_call=whole_call,
        kernel=kernel,
        forms={name: peer.form for name, peer in prepared.items()},
    )
    return row, peak_samples.best_us


def _kernel_alone(
    case: Case, layer: tvm_sepconv.SeparableConv1D, peak: Peak
) -> tuple[Samples, Samples]:
    compiled = layer._compiled
    assert compiled is not None  # it has just been called
    call, handle, x, out = compiled.call, compiled.handle, case.x, np.empty_like(layer(case.x))
    if status := call(handle, x, out):
        raise RuntimeError(f"the kernel of {layer.name} returned status {status}")
    check(f"{OURS}'s kernel", out, case.expected, case.allowed)
    times = interleave({"kernel": lambda: call(handle, x, out), "peak": peak.run}, KERNEL_SECS)
    return times["kernel"], times["peak"]


def _progress(text: str) -> None:
    """Show what is being done; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
