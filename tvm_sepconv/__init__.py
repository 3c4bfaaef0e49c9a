"""Keras's SeparableConv1D as one fused, auto-tuned kernel, with a light runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm_sepconv.bundle import BundleError
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.functional import layer_separable_conv_1d
from tvm_sepconv.layer import SeparableConv1D
from tvm_sepconv.options import BuildOptions
from tvm_sepconv.runtime import num_threads, set_num_threads
from tvm_sepconv.saving import load, save

if TYPE_CHECKING:
    from tvm_sepconv.interop.keras import from_keras

__version__ = "0.1.0"
__all__ = [
    "BuildOptions",
    "BundleError",
    "SepConvConfig",
    "SeparableConv1D",
    "from_keras",
    "layer_separable_conv_1d",
    "load",
    "num_threads",
    "save",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name == "from_keras":  # reads files of another package: imported when it is asked for
        from tvm_sepconv.interop.keras import from_keras

        return from_keras
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
