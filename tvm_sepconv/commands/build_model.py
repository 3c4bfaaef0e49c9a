"""``tvm-sepconv build --keras`` and ``--onnx``: a trained model's layers as a bundle."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import tvm_sepconv
from tvm_sepconv import paths, selection
from tvm_sepconv.commands import scope
from tvm_sepconv.options import BuildOptions

MODELS = ("keras", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model's layers."""
    model = parser.add_argument_group(
        "a trained model's separable layers, as a bundle in --output, by default for every "
        "instruction set of this machine's family; several targets with commas"
    )
    model.add_argument("--keras", type=Path, metavar="FILE", help="a .keras or legacy .h5 file")
    model.add_argument("--onnx", type=Path, metavar="FILE", help="an ONNX model")
    model.add_argument(
        "--fold", action="store_true", help="for --keras: fold the normalisation and the "
        "activation behind a layer into it; what calls the bundle then leaves them out",
    )  # fmt: skip
    model.add_argument("--with-c", action="store_true", help="add a header and example for C")


def run(options: argparse.Namespace) -> int:
    """Write the bundle; returns the exit status."""
    _check(options)
    scope.read_logs(options.logs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layers = _layers(options)
    for warning in said:
        print(f"warning: {warning.message}", file=sys.stderr)
    arithmetic = BuildOptions(allow_tf32=options.allow_tf32, fast_math=options.fast_math)
    targets = None if options.target is None else options.target.split(",")
    print(f"Compiling {', '.join(layers)} …", flush=True)
    tvm_sepconv.save(layers, options.output, targets, options.with_c, arithmetic)
    files = (path for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {sum(path.stat().st_size for path in files) / 1000:.0f} kB")
    return 0


def _check(options: argparse.Namespace) -> None:
    first, *others = selection.given(options, MODELS)
    others += selection.ids(options)
    if options.onnx is not None:
        others += selection.given(options, ("fold",))
    if others:
        raise ValueError(f"`{first}` names the layers. Received also: {', '.join(others)}")
    if options.output is None:
        raise ValueError(f"`{first}` needs --output, the bundle's folder")
    paths.file(first, options.keras or options.onnx)
    paths.new_folder("--output", options.output)


def _layers(options: argparse.Namespace) -> Mapping[str, tvm_sepconv.SeparableConv1D]:
    if options.onnx is not None:
        return tvm_sepconv.from_onnx(options.onnx)
    layers = tvm_sepconv.from_keras(
        options.keras, fold_batch_norm=options.fold, fold_activation=options.fold
    )
    for name, fold in layers.folds.items():
        print(f"{name}: {fold}")
    return layers
