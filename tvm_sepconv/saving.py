"""Layers to a bundle on disk and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_sepconv import cuda_runtime, cuda_tensors
from tvm_sepconv.bundle import Bundle, BundleError, open_bundle, read_manifest, usable
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.layer import SeparableConv1D
from tvm_sepconv.options import BuildOptions, checked

C_FILES = ("tvm_sepconv.h", "example.c")


def save(
    layers: Mapping[str, SeparableConv1D],
    path: str | Path,
    targets: Sequence[str] | None = None,
    with_c: bool = False,
    options: BuildOptions | None = None,
) -> None:
    """Write a bundle of several layers, by name, to the folder `path`.

    Parameters
    ----------
    targets
        Names such as "x86_64-avx2", "aarch64-neon" or "cuda"; None for every level of this host's
        family.
    with_c
        Put what a C program needs into the bundle's folder ``c``: the header and an example, whose
        first lines say how it is compiled.
    options
        How to compile for GPUs; without a target, which `targets` says.

    Raises
    ------
    TypeError
        If `layers` is no dict of layers of this package, or `options` are no `BuildOptions`.
    ValueError
        If a layer is not built, a target unknown, or CUDA has no kernel for a layer.
    RuntimeError
        If the compiler is not installed, naming the extra, or a linker or nvcc is missing.
    """
    options = checked(options)
    if options.target is not None:
        raise ValueError(
            "The `options` argument of `save` must have no target: the `targets` argument says "
            f"them. Received: options.target={options.target!r}"
        )
    from tvm_sepconv import jit  # here, as in layer.py

    if not isinstance(layers, Mapping):
        raise TypeError(
            "The `layers` argument must be a dict of layers by name; one layer alone has its own "
            f"`save`. Received: {type(layers)}"
        )
    for name, layer in layers.items():
        if not isinstance(layer, SeparableConv1D):
            raise TypeError(
                "The `layers` argument must have layers of `tvm_sepconv.SeparableConv1D`. "
                f"Received: {type(layer)} for {name!r}"
            )
        layer._need_built("save")
    contents = {name: layer._content() for name, layer in layers.items()}
    package = jit.compiler("tvm_sepconv.compiler.package")
    package.write_bundle(contents, path, targets, options)
    if with_c:  # no part of what is loaded: the bundle is complete without it
        from importlib.resources import files

        folder = Path(path, "c")
        folder.mkdir()
        for name in C_FILES:
            (folder / name).write_bytes((files("tvm_sepconv") / "native" / name).read_bytes())


def load(path: str | Path, target: str | None = None, device: Any = None) -> Any:
    """Load the layers of a bundle with the best libraries this machine can run.

    Parameters
    ----------
    target
        Use the libraries of this target instead.
    device
        Where arrays are computed: "cpu", "cuda" or "cuda:1". Weights are then on that GPU, and
        tensors on another one are refused. None: on the CPU if the bundle has a library for it,
        else on the first GPU. Tensors on a GPU are computed there by the bundle's CUDA library,
        whatever is said here.

    Returns
    -------
    SeparableConv1D or dict
        The layer, or, if the bundle has several, the layers by name.

    Raises
    ------
    BundleError
        If the bundle is damaged, of a newer format, or has no library for this machine.
    ValueError
        If `device` is none, or no such GPU is here.
    ImportError
        If a layer computes in bfloat16 and ml_dtypes is not installed.
    RuntimeError, MemoryError
        If a GPU is asked for and cannot be used; see `tvm_sepconv.cuda_runtime`.
    """
    bundle, chosen, index = _choose(path, target, device)
    # Before their weights are read: bfloat16 needs a package, which such a layer asks for.
    layers = {name: SeparableConv1D._of(config) for name, config in bundle.layers.items()}
    weights = bundle.weights()
    for name, layer in layers.items():
        kernel = bundle.kernel(chosen, name)
        values = _matching(weights[name], layer.config, kernel, f"{path}: layer '{name}'")
        layer._restore(kernel["channels"], values)
        layer._take_library(bundle, chosen, name)
        layer._gpu = index
        if index is None:
            layer._ready()
        else:
            cuda_tensors.ready(layer, index)
    return next(iter(layers.values())) if len(layers) == 1 else layers


def _choose(path: str | Path, target: str | None, device: Any) -> tuple[Bundle, str, int | None]:
    """The bundle, the target whose libraries are for arrays, and the GPU if they run on one."""
    index = None if device is None else cuda_runtime.index_of(device)
    on_gpu = target is not None and target.startswith("cuda")
    if target is None and device is None:
        names = read_manifest(Path(path))["libraries"]
        on_gpu = not usable(names) and any(name.startswith("cuda") for name in names)
    elif device is not None and target is not None and on_gpu != (index is not None):
        raise ValueError(
            "The `target` and `device` arguments must both be of a CPU or both of a GPU. Received: "
            f"target={target}, device={device}"
        )
    if on_gpu and index is None:
        index = 0
    if index is None:
        return *open_bundle(path, target), None
    return *open_bundle(path, target or cuda_tensors.bundle_target(path, index)), index


def _matching(
    tensors: Mapping[str, Any], config: SepConvConfig, kernel: Mapping[str, Any], what: str
) -> list[Any]:
    """A layer's weights, if they and its library fit its config: C reads as many as that says."""
    channels = kernel["channels"]
    ours = config.kernel_config(channels).to_dict()
    if different := [key for key, value in ours.items() if kernel.get(key) != value]:
        raise BundleError(f"{what} names a library of another {different[0]}. Save it anew")
    shapes = config.weight_shapes(channels)
    for key, shape in shapes.items():
        if key not in tensors or tensors[key].shape != shape:
            found = f"one of shape {tensors[key].shape}" if key in tensors else "none"
            raise BundleError(
                f"{what} needs a {key} of shape {shape}; weights.safetensors has {found}. "
                "Copy the bundle again or save it anew"
            )
    return [tensors[key] for key in shapes]
