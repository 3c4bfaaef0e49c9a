"""``tvm-sepconv inspect``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv import bundle, gpu

HELP = "verify a bundle and show what it holds"
DESCRIPTION = (
    "Verify a bundle and show its layers, its targets, and where each kernel's decisions are from: "
    "tuned, transferred from a similar layer's record, or default."
)
EPILOG = (
    "A kernel works in tiles of so many steps; a library has several, for long inputs and for "
    "short ones. The distance tells how much the layer differs whose record is used; the time is "
    "what tuning measured."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("bundle", type=Path, help="a folder that `layer.save` wrote")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    path: Path = options.bundle
    manifest = bundle.read_manifest(path)
    libraries: dict[str, dict[str, Any]] = manifest["libraries"]
    files = [*manifest["files"].values(), *manifest["runtimes"].values()]
    files += [entry for group in libraries.values() for entry in group.values()]
    for entry in files:
        bundle.verify(path, entry["path"], entry["sha256"])
    made_by = ", ".join(f"{name} {version}" for name, version in manifest["producer"].items())
    print(f"{path}: format {manifest['format_version']}, by {made_by}; {len(files)} files, intact")
    print("\nlayers")
    for name, entry in manifest["layers"].items():
        print(f"  {name}: {entry['library']}")
    able = bundle.usable(list(libraries))
    notes = {**dict.fromkeys(able, " (runs here)"), **dict.fromkeys(able[:1], " (used here)")}
    if gpu.missing() is None:
        with contextlib.suppress(bundle.BundleError):
            opened = bundle.Bundle(path, manifest)
            chosen = bundle.cuda_target(opened, gpu.capability(0), gpu.driver_version())
            notes[chosen] = " (used on cuda:0)"
    for target, group in libraries.items():
        print(f"\n{target}{notes.get(target, '')}")
        if bundle.is_cuda(target):
            for text in dict.fromkeys(map(bundle.gpu_needs, group.values())):
                print(f"  {text}")
        for key, entry in group.items():
            print(f"  {key}: {origins(entry['variants'])}")
    return 0


def origins(variants: Sequence[dict[str, Any]]) -> str:
    """Return kernels by the steps of their tiles, and where their decisions are from.

    Those of GPUs come by architecture, the ones that have the same together.
    """
    if any("archs" in variant for variant in variants):
        groups: dict[str, list[dict[str, Any]]] = {}
        for variant in variants:
            groups.setdefault(", ".join(variant["archs"]), []).append(variant)
        return "; ".join(f"{archs}: {_tiles(group)}" for archs, group in groups.items())
    return _tiles(variants)


def _tiles(variants: Sequence[dict[str, Any]]) -> str:
    tiles: dict[str, list[str]] = {}
    for variant in variants:
        origin = variant["origin"]
        if variant.get("distance"):
            origin += f" (distance {variant['distance']:.2g})"
        elif variant["record_secs"]:
            origin += f" ({variant['record_secs'] * 1e6:.1f} µs)"
        tiles.setdefault(origin, []).append(str(variant["decisions"]["step_tile"]))
    return ", ".join(f"tiles of {', '.join(n)} steps {origin}" for origin, n in tiles.items())
