"""Layers to a bundle on disk and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv.bundle import open_bundle
from tvm_sepconv.layer import WEIGHTS, SeparableConv1D


def save(
    layers: Mapping[str, SeparableConv1D], path: str | Path, targets: Sequence[str] | None = None
) -> None:
    """Write a bundle of several layers, by name, to the folder `path`.

    Parameters
    ----------
    targets
        Names such as "x86_64-avx2" or "aarch64-neon"; None for every level of this host's family.

    Raises
    ------
    ValueError
        If a layer is not built or a target unknown.
    RuntimeError
        If the compiler is not installed, naming the extra, or a linker is missing.
    """
    from tvm_sepconv import jit  # here, as in layer.py

    for layer in layers.values():
        layer._need_built("save")
    contents = {name: layer._content() for name, layer in layers.items()}
    package = jit.compiler("tvm_sepconv.compiler.package")
    package.write_bundle(contents, path, targets)


def load(path: str | Path, target: str | None = None) -> Any:
    """Load the layers of a bundle with the best libraries this machine can run.

    Parameters
    ----------
    target
        Use the libraries of this target instead.

    Returns
    -------
    SeparableConv1D or dict
        The layer, or, if the bundle has several, the layers by name.

    Raises
    ------
    BundleError
        If the bundle is damaged, of a newer format, or has no library for this machine.
    """
    bundle, chosen = open_bundle(path, target)
    runtime, libraries = bundle.libraries(chosen)
    weights = bundle.weights()
    layers = {}
    for name, config in bundle.layers.items():
        layer = SeparableConv1D._of(config)
        values = [weights[name][key] for key in WEIGHTS[: 2 + config.use_bias]]
        layer._restore(values[0].shape[1], values)
        layer._library = libraries[name], runtime
        layer._origin = bundle.path, chosen, name
        layer._ready()
        layers[name] = layer
    return next(iter(layers.values())) if len(layers) == 1 else layers
