"""The functions of `tvm_sepconv.activations`, as Keras 3.15 defines them.

Every function keeps the dtype of its input, and its shape (but glu). float16 and bfloat16 are
computed in float32 and rounded once. NaN and infinities give what Keras gives on JAX; no call
raises a NumPy warning.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, cast

import numpy as np
import numpy.typing as npt

__all__ = [
    "celu", "elu", "exponential", "gelu", "glu", "hard_shrink", "hard_sigmoid", "hard_silu",
    "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6",
    "selu", "sigmoid", "silu", "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus",
    "sparse_sigmoid", "sparsemax", "squareplus", "tanh", "tanh_shrink", "threshold",
]  # fmt: skip

Array = npt.NDArray[Any]
P = ParamSpec("P")

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _keeps_dtype(
    fn: Callable[Concatenate[Array, P], Array],
) -> Callable[Concatenate[npt.ArrayLike, P], Array]:
    """Run `fn` on a float32 or float64 array and give its result the input's dtype."""

    @functools.wraps(fn)
    def wrapper(x: npt.ArrayLike, *args: P.args, **kwargs: P.kwargs) -> Array:
        x = np.asarray(x)
        # Integers have no fractional results to give back: they become float32, Keras's floatx.
        dtype = np.dtype(np.float32) if x.dtype.kind in "iub" else x.dtype
        wide = x if dtype == np.float64 else x.astype(np.float32, copy=False)
        with np.errstate(all="ignore"):
            return np.asarray(fn(wide, *args, **kwargs)).astype(dtype, copy=False)

    return cast(Callable[Concatenate[npt.ArrayLike, P], Array], wrapper)


def linear(x: Any) -> Any:
    """Return `x` itself."""
    return x


@_keeps_dtype
def relu(
    x: Array,
    negative_slope: float = 0.0,
    max_value: float | None = None,
    threshold: float = 0.0,
) -> Array:
    """`x` above `threshold`, at most `max_value`; `negative_slope * (x - threshold)` below."""
    if negative_slope != 0.0 and max_value is None and threshold == 0:
        return np.where(x >= 0, x, negative_slope * x)
    y = np.where(x > threshold, x, 0) if threshold != 0 else np.maximum(x, 0)
    if max_value is not None:
        y = np.clip(y, 0, max_value)
    if negative_slope != 0.0:
        y = y - negative_slope * np.maximum(threshold - x, 0)
    return y


@_keeps_dtype
def leaky_relu(x: Array, negative_slope: float = 0.2) -> Array:
    """`x` where it is not negative, `negative_slope * x` elsewhere."""
    return np.where(x >= 0, x, negative_slope * x)


@_keeps_dtype
def relu6(x: Array) -> Array:
    """`min(max(x, 0), 6)`."""
    return np.minimum(np.maximum(x, 0), 6)


@_keeps_dtype
def elu(x: Array, alpha: float = 1.0) -> Array:
    """`x` above 0, `alpha * (exp(x) - 1)` elsewhere."""
    return np.where(x > 0, x, alpha * np.expm1(np.where(x > 0, 0, x)))


@_keeps_dtype
def celu(x: Array, alpha: float = 1.0) -> Array:
    """`max(x, 0) + alpha * (exp(min(x, 0) / alpha) - 1)`."""
    return np.asarray(np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha))


@_keeps_dtype
def selu(x: Array) -> Array:
    """The self-normalising `scale * elu(x, alpha)` (Klambauer et al., 2017)."""
    return np.asarray(_SELU_SCALE * elu(x, _SELU_ALPHA))


@_keeps_dtype
def softplus(x: Array) -> Array:
    """`log(exp(x) + 1)`."""
    return np.asarray(np.logaddexp(x, np.zeros_like(x)))


@_keeps_dtype
def softsign(x: Array) -> Array:
    """`x / (|x| + 1)`."""
    return np.asarray(x / (np.abs(x) + 1))


@_keeps_dtype
def squareplus(x: Array, b: float = 4) -> Array:
    """`(x + sqrt(x² + b)) / 2`."""
    return np.asarray((x + np.sqrt(np.square(x) + b)) / 2)


@_keeps_dtype
def soft_shrink(x: Array, threshold: float = 0.5) -> Array:
    """Move `x` towards 0 by `threshold`; 0 within it."""
    return np.where(x > threshold, x - threshold, np.where(x < -threshold, x + threshold, 0))


@_keeps_dtype
def sparse_plus(x: Array) -> Array:
    """0 up to -1, `(x + 1)² / 4` up to 1, `x` above."""
    return np.where(x <= -1, 0, np.where(x >= 1, x, np.square(x + 1) / 4))


@_keeps_dtype
def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`."""
    # exp of a negative number only: 1 / (1 + exp(-x)) would lose every result below 1 / max(float).
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, e) / (1 + e))


@_keeps_dtype
def silu(x: Array) -> Array:
    """`x * sigmoid(x)`, also called swish."""
    return np.asarray(x * sigmoid(x))


@_keeps_dtype
def gelu(x: Array, approximate: bool = False) -> Array:
    """`x * P(X <= x)` for a normal X; `approximate` uses tanh (Hendrycks et al., 2016)."""
    if approximate:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        return np.asarray(x * (0.5 * (1 + np.tanh(inner))))
    scaled = (-x * math.sqrt(0.5)).ravel().tolist()
    # NumPy has no erfc; the C library's is exact to the last bit of float64.
    erfc = np.fromiter(map(math.erfc, scaled), np.float64, len(scaled)).reshape(x.shape)
    return np.asarray(0.5 * x * erfc.astype(x.dtype))


@_keeps_dtype
def glu(x: Array, axis: int = -1) -> Array:
    """Gate the first half of `axis` by the sigmoid of the second; the axis becomes half as long.

    Raises
    ------
    ValueError
        If `axis` has an odd length.
    """
    if x.shape[axis] % 2:
        raise ValueError(
            "The `glu` activation halves its axis, so the axis must have an even length. "
            f"Received: x.shape={x.shape}, axis={axis}"
        )
    a, b = np.split(x, 2, axis)
    return np.asarray(a * sigmoid(b))


@_keeps_dtype
def tanh(x: Array) -> Array:
    """Hyperbolic tangent."""
    return np.asarray(np.tanh(x))


@_keeps_dtype
def tanh_shrink(x: Array) -> Array:
    """`x - tanh(x)`."""
    return np.asarray(x - np.tanh(x))


@_keeps_dtype
def threshold(x: Array, threshold: float, default_value: float) -> Array:
    """`x` above `threshold`, `default_value` elsewhere."""
    return np.where(x > threshold, x, default_value)


@_keeps_dtype
def sparse_sigmoid(x: Array) -> Array:
    """0 up to -1, `(x + 1) / 2` up to 1, 1 above."""
    return np.asarray(0.5 * np.clip(x + 1, 0, 2))


@_keeps_dtype
def exponential(x: Array) -> Array:
    """`exp(x)`."""
    return np.asarray(np.exp(x))


@_keeps_dtype
def hard_sigmoid(x: Array) -> Array:
    """0 up to -3, `x / 6 + 0.5` up to 3, 1 above."""
    return np.asarray(relu6(x + 3) / 6)


@_keeps_dtype
def hard_silu(x: Array) -> Array:
    """`x * hard_sigmoid(x)`, also called hard_swish."""
    return np.asarray(x * hard_sigmoid(x))


@_keeps_dtype
def hard_tanh(x: Array) -> Array:
    """`x` limited to [-1, 1]."""
    return np.clip(x, -1, 1)


@_keeps_dtype
def hard_shrink(x: Array, threshold: float = 0.5) -> Array:
    """`x` where its magnitude is above `threshold`, 0 elsewhere."""
    return np.where(np.abs(x) > threshold, x, 0)


@_keeps_dtype
def mish(x: Array) -> Array:
    """`x * tanh(softplus(x))`."""
    return np.asarray(x * np.tanh(softplus(x)))


@_keeps_dtype
def log_sigmoid(x: Array) -> Array:
    """`log(sigmoid(x))`."""
    return -softplus(-x)


def _axes(axis: int | Sequence[int]) -> int | tuple[int, ...]:
    return axis if isinstance(axis, int) else tuple(axis)


@_keeps_dtype
def softmax(x: Array, axis: int | Sequence[int] = -1) -> Array:
    """`exp(x)` normalised to sum 1 over `axis` (one axis, or several together)."""
    axes = _axes(axis)
    e = np.exp(x - np.max(x, axis=axes, keepdims=True, initial=-np.inf))
    return np.asarray(e / np.sum(e, axis=axes, keepdims=True))


@_keeps_dtype
def log_softmax(x: Array, axis: int | Sequence[int] = -1) -> Array:
    """`log(softmax(x))` over `axis`."""
    axes = _axes(axis)
    shifted = x - np.max(x, axis=axes, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=axes, keepdims=True)))


@_keeps_dtype
def sparsemax(x: Array, axis: int = -1) -> Array:
    """Keras 3.15's sparsemax along `axis`.

    Martins et al. (2016) project on the probability simplex: the threshold is `(Σ z - 1) / k` over
    the k largest values z. Keras sums the cumulative sums of z instead, so that its results need
    not add up to 1 where k > 1. A network trained with that needs just that, so it is so here.
    """
    z = np.moveaxis(x, axis, -1)
    descending = -np.sort(-z, axis=-1)
    cumulative = np.cumsum(descending, axis=-1)
    rank = np.arange(1, z.shape[-1] + 1, dtype=x.dtype)
    support = descending - (cumulative - 1) / rank > 0
    size = np.sum(support, axis=-1, keepdims=True).astype(x.dtype)
    tau = (np.sum(np.where(support, cumulative, 0), axis=-1, keepdims=True) - 1) / size
    return np.moveaxis(np.maximum(z - tau, 0), -1, axis)
