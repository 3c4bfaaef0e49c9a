"""``tvm-sepconv run``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sepconv import bundle, paths, runtime, saving

HELP = "run a bundle's layer on an array"
DESCRIPTION = (
    "Run a layer of a bundle on an array from a .npy file: (batch, steps, channels), or (batch, "
    "channels, steps) for a channels_first layer. Needs no compiler."
)
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("bundle", type=Path, help="a folder that `layer.save` wrote")
    parser.add_argument(
        "--input", type=Path, required=True, metavar="X.npy", help="what the layer is called on"
    )
    parser.add_argument("--output", type=Path, metavar="Y.npy", help="where the answer goes")
    parser.add_argument("--layer", metavar="NAME", help="needed if the bundle has several")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="default: as many as this process may use"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if options.output is not None:
        paths.new_file("--output", options.output)
    if options.threads is not None:
        runtime.set_num_threads(options.threads)
    x = _array(options.input)
    name, layer = _layer(options.bundle, options.layer)
    y = layer(x)
    threads = runtime.num_threads()
    print(f"{name}: {_summary(x)} -> {_summary(y)}, threads: {threads}", flush=True)
    if options.output is not None:
        with options.output.open("wb") as file:  # which has no name for bfloat16
            np.save(file, y.astype(np.float32) if y.dtype.name == "bfloat16" else y)
        print(f"wrote {options.output}")
    return 0


def _array(path: Path) -> Any:
    paths.file("--input", path)
    try:
        with path.open("rb") as file:  # numpy.load would take archives and pickles as well
            x = np.lib.format.read_array(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(
            f"`--input` must be a .npy file of floating-point numbers, as numpy.save writes it. "
            f"Received: {path} ({error})"
        ) from error
    if x.dtype.kind != "f":
        raise ValueError(f"`--input` must hold floating-point numbers. Received: {x.dtype}")
    return x


def _layer(path: Path, name: str | None) -> tuple[str, Any]:
    loaded = saving.load(path)
    names = list(bundle.read_manifest(path)["layers"])
    layers = loaded if isinstance(loaded, dict) else {names[0]: loaded}
    if name is None and len(names) == 1:
        name = names[0]
    if name is None or name not in layers:
        received = "none" if name is None else name
        raise ValueError(f"`--layer` must be one of {', '.join(names)}. Received: {received}")
    return name, layers[name]


def _summary(array: Any) -> str:
    shape = ", ".join(map(str, array.shape))
    values = array[np.isfinite(array)].astype(np.float64)
    range_ = f" in [{values.min():.4g}, {values.max():.4g}]" if values.size else ""
    return f"({shape}) {array.dtype}{range_}"
