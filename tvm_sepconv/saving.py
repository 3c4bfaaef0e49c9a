"""Layers to a bundle on disk and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv.bundle import BundleError, open_bundle
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.layer import WEIGHTS, SeparableConv1D

C_FILES = ("tvm_sepconv.h", "example.c")


def save(
    layers: Mapping[str, SeparableConv1D],
    path: str | Path,
    targets: Sequence[str] | None = None,
    with_c: bool = False,
) -> None:
    """Write a bundle of several layers, by name, to the folder `path`.

    Parameters
    ----------
    targets
        Names such as "x86_64-avx2" or "aarch64-neon"; None for every level of this host's family.
    with_c
        Put what a C program needs into the bundle's folder ``c``: the header and an example, whose
        first lines say how it is compiled.

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
    if with_c:  # no part of what is loaded: the bundle is complete without it
        from importlib.resources import files

        folder = Path(path, "c")
        folder.mkdir()
        for name in C_FILES:
            (folder / name).write_bytes((files("tvm_sepconv") / "native" / name).read_bytes())


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
        kernel = bundle.kernel(chosen, name)
        values = _matching(weights[name], config, kernel, f"{path}: layer '{name}'")
        layer._restore(kernel["channels"], values)
        layer._library = libraries[name], runtime
        layer._origin = bundle.path, chosen, name
        layer._ready()
        layers[name] = layer
    return next(iter(layers.values())) if len(layers) == 1 else layers


def _matching(
    tensors: Mapping[str, Any], config: SepConvConfig, kernel: Mapping[str, Any], what: str
) -> list[Any]:
    """A layer's weights, if they and its library fit its config: C reads as many as that says."""
    channels = kernel["channels"]
    ours = config.kernel_config(channels).to_dict()
    if different := [key for key, value in ours.items() if kernel.get(key) != value]:
        raise BundleError(f"{what} names a library of another {different[0]}. Save it anew")
    shapes = config.depthwise_shape(channels), config.pointwise_shape(channels), config.bias_shape
    for key, shape in zip(WEIGHTS[: 2 + config.use_bias], shapes, strict=False):
        if key not in tensors or tensors[key].shape != shape:
            found = f"one of shape {tensors[key].shape}" if key in tensors else "none"
            raise BundleError(
                f"{what} needs a {key} of shape {shape}; weights.safetensors has {found}. "
                "Copy the bundle again or save it anew"
            )
    return [tensors[key] for key in WEIGHTS[: 2 + config.use_bias]]
