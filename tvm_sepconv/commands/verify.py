"""``tvm-sepconv verify``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import activations, bundle, reference, saving
from tvm_sepconv.layer import SeparableConv1D

HELP = "run a bundle's self-test on this machine"
DESCRIPTION = (
    "Run every layer of a bundle with every library that this machine can run, on the small input "
    "in the bundle, and compare with the output that the float64 reference gave where it was made. "
    "Needs no compiler."
)
EPILOG = "Exit status: 0 if all are right, 1 if one is not, 2 if the bundle cannot be loaded here."

_EPS = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}
_LEAST = np.finfo(np.float64).tiny
_STEEPEST = 1.76  # slope of an activation: selu's; only an exponential's is more, its value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("bundle", type=Path, help="a folder that `layer.save` wrote")
    parser.add_argument("--target", metavar="T", help="only the libraries of this target")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    opened, chosen = bundle.open_bundle(options.bundle, options.target)
    able = [chosen] if options.target else bundle.usable(opened.targets)
    results = [result for target in able for result in check(opened, target)]
    if options.json:
        print(json.dumps({"bundle": str(opened.path), "results": results}, indent=1))
    else:
        _show(results)
    return 0 if all(result["ok"] for result in results) else 1


def check(opened: bundle.Bundle, target: str) -> list[dict[str, Any]]:
    """Run the self-test of each layer with the libraries of `target`.

    Returns
    -------
    list of dict
        layer, target, the difference that comes closest to what is allowed (None if it is not
        finite), what is allowed there, and whether that is ok.
    """
    loaded = saving.load(opened.path, target)
    layers = loaded if isinstance(loaded, dict) else {next(iter(opened.layers)): loaded}
    tests = opened.selftest()
    return [
        {"layer": name, "target": target, **_compare(layer, tests[name])}
        for name, layer in layers.items()
    ]


def _compare(layer: SeparableConv1D, test: dict[str, Any]) -> dict[str, Any]:
    x, expected = test["input"], np.asarray(test["output"], np.float64)
    y = np.asarray(layer(x), np.float64)
    with np.errstate(invalid="ignore"):  # an output may be infinite, and should be then
        difference = np.where(y == expected, 0.0, np.abs(y - expected))
        allowed = np.where(np.isfinite(expected), tolerance(layer, x, expected), 0.0)
    difference = np.where(np.isnan(difference), np.inf, difference)
    worst = int(np.argmax(difference / np.maximum(allowed, _LEAST)))
    found = float(difference.flat[worst])
    return {
        "difference": found if np.isfinite(found) else None,
        "allowed": float(allowed.flat[worst]),
        "ok": bool(found <= allowed.flat[worst]),
    }


def tolerance(layer: SeparableConv1D, x: Any, expected: Any) -> Any:
    """Return what each output may be off by: the rounding of its sums, through its activation."""
    config, (depthwise, pointwise, *bias) = layer.config, layer.get_weights()
    eps = _EPS[config.compute_dtype]
    terms = config.kernel_size + pointwise.shape[1]
    relative = 4 * _EPS[config.accumulation_dtype] * np.sqrt(terms)
    if config.compute_dtype != config.accumulation_dtype:
        relative += eps  # a mixed policy's weights are rounded to 16 bits
    last = bias[0] if bias else None
    sums = relative * reference.magnitude(x, depthwise, pointwise, last, config)
    if activations.name_of(config.activation) not in activations.ELEMENTWISE:
        sums = sums.max()  # softmax and its like mix the elements, glu drops half of them
    return np.maximum(_STEEPEST, np.abs(expected)) * sums + 4 * eps * np.abs(expected)


def _show(results: list[dict[str, Any]]) -> None:
    width = max(len(result["layer"]) for result in results)
    for result in results:
        difference = result["difference"]
        found = "not finite" if difference is None else f"{difference:.2g}"
        print(
            f"{result['layer']:{width}}  {result['target']:14}  largest difference {found}, "
            f"allowed {result['allowed']:.2g}  {'ok' if result['ok'] else 'FAILED'}"
        )
    failed = sum(not result["ok"] for result in results)
    print(f"{len(results) - failed} of {len(results)} right" + (", FAILED" if failed else ""))
