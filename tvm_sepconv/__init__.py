"""Keras's SeparableConv1D as one fused, auto-tuned kernel, with a light runtime."""

from __future__ import annotations

import importlib
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
    from tvm_sepconv.interop.onnx import from_onnx
    from tvm_sepconv.interop.torch import from_torch

__version__ = "0.1.0"
__all__ = [
    "BuildOptions",
    "BundleError",
    "SepConvConfig",
    "SeparableConv1D",
    "from_keras",
    "from_onnx",
    "from_torch",
    "layer_separable_conv_1d",
    "load",
    "num_threads",
    "save",
    "set_num_threads",
]


# These read files and models of other packages: imported when they are asked for.
_READERS = {"from_keras": "keras", "from_onnx": "onnx", "from_torch": "torch"}


def __getattr__(name: str) -> Any:
    if name in _READERS:
        return getattr(importlib.import_module(f"tvm_sepconv.interop.{_READERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
