"""Half precision: inputs, weights and outputs in 16 bits, sums in float32."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import reference, targets

# Largest relative error of one rounding, and the smallest normal number.
FORMATS = {
    "float16": (np.finfo(np.float16).eps, np.finfo(np.float16).tiny),
    "bfloat16": tuple(float(v) for v in (2.0**-7, ml_dtypes.finfo("bfloat16").tiny)),
}


@pytest.mark.parametrize("target", targets.runnable())
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_half_precision(dtype: str, data_format: str, target: str) -> None:
    layer = tvm_sepconv.SeparableConv1D(
        33, 5, 2, "same", data_format, 3, 2, bias_initializer="ones", dtype=dtype, seed=1
    )
    shape = (2, 20, 200) if data_format == "channels_first" else (2, 200, 20)
    layer.build((None, *shape[1:]))
    layer.compile(tvm_sepconv.BuildOptions(target=target))
    eps, tiny = FORMATS[layer.dtype]
    x = np.random.default_rng(0).standard_normal(shape).astype(layer.dtype)
    # Keras rounds a mixed policy's float32 weights to the compute dtype before it uses them.
    weights = [w.astype(layer.dtype).astype(np.float64) for w in layer.get_weights()]
    expected = reference.separable_conv1d(x, *weights, layer.config)
    terms = 5 + 40
    sums = 4 * np.finfo(np.float32).eps * np.sqrt(terms)
    sums = sums * reference.magnitude(x, *weights, layer.config)
    y = layer(x)
    assert y.dtype == np.dtype(layer.dtype)
    assert (np.abs(y.astype(np.float64) - expected) <= sums + eps * np.abs(expected) + tiny).all()


def test_bfloat16_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"bfloat16 needs a package .*: pip install ml_dtypes"):
        tvm_sepconv.SeparableConv1D(4, 3, dtype="mixed_bfloat16")
