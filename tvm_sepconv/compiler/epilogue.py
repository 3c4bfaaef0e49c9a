"""Keras's element-wise activations as TVM expressions, for the epilogue of a fused kernel.

No target gets a library call or a branch out of them; see `elementary` for how. Where Keras keeps
NaN they keep it, and so they use selects, not TVM's max and min, which lose it on CUDA.
With e = exp(-|x|), sigmoid, softplus and mish are made of positive terms only: nothing cancels and
nothing overflows.

Error: at most 4 ulp of the result, subnormal results included, and 8 ulp for gelu (its left tail
included, where the usual x·erfc(-x/√2)/2 in float32 loses 60). Besides, squareplus and tanh_shrink
may err by 4 ulp of x, as they cancel in Keras's own formulas too, and silu, gelu and mish by |x|
times the smallest subnormal, because a factor underflows before the product. NEON on 32-bit ARM
flushes subnormals to zero. A zero result may have the other sign.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27

from tvm_sepconv.compiler.elementary import (
    FORMATS,
    Scope,
    exp,
    exp_negative,
    expm1_negative,
    log1p,
    normal_tail,
    tanh,
)

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _relu(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x <= s.const(0), 0, x)


def _relu6(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(_relu(s, x), 6)


def _leaky_relu(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x < s.const(0), x * s.const(0.2), x)


def _elu(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x > s.const(0), x, expm1_negative(s, x))


def _selu(s: Scope, x: PrimExpr) -> PrimExpr:
    below = expm1_negative(s, x) * s.const(_SELU_SCALE * _SELU_ALPHA)
    return s.where(x > s.const(0), x * s.const(_SELU_SCALE), below)


def _softplus(s: Scope, x: PrimExpr) -> PrimExpr:
    return _relu(s, x) + log1p(s, exp_negative(s, -tirx.abs(x)))


def _log_sigmoid(s: Scope, x: PrimExpr) -> PrimExpr:
    return -_softplus(s, s.bind(-x))


def _sigmoid(s: Scope, x: PrimExpr) -> PrimExpr:
    e = exp_negative(s, -tirx.abs(x))
    return s.where(x < s.const(0), e, 1) / (e + s.const(1))


def _silu(s: Scope, x: PrimExpr) -> PrimExpr:
    return x * _sigmoid(s, x)


def _mish(s: Scope, x: PrimExpr) -> PrimExpr:
    """x·((1 + eˣ)² - 1) / ((1 + eˣ)² + 1), of a positive x with both divided by e²ˣ."""
    e, negative = exp_negative(s, -tirx.abs(x)), x < s.const(0)
    above = s.bind(s.where(negative, e * e + (e + e), e + e + s.const(1)))
    return x * (above / (above + s.where(negative, 2, (e + e) * e)))


def _gelu(s: Scope, x: PrimExpr) -> PrimExpr:
    tail = normal_tail(s, tirx.abs(x))
    return x * s.where(x < s.const(0), tail, s.const(1) - tail)


def _tanh_shrink(s: Scope, x: PrimExpr) -> PrimExpr:
    return x - tanh(s, x)


def _softsign(s: Scope, x: PrimExpr) -> PrimExpr:
    return x / (tirx.abs(x) + s.const(1))


def _squareplus(s: Scope, x: PrimExpr) -> PrimExpr:
    return (x + tirx.sqrt(x * x + s.const(4))) * s.const(0.5)


def _soft_shrink(s: Scope, x: PrimExpr) -> PrimExpr:
    half = s.const(0.5)
    return s.where(x > half, x - half, s.where(x < -half, x + half, 0))


def _hard_shrink(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.where(tirx.abs(x) > s.const(0.5), x, 0)


def _sparse_plus(s: Scope, x: PrimExpr) -> PrimExpr:
    y = s.bind(x + s.const(1))
    return s.where(x <= s.const(-1), 0, s.where(x >= s.const(1), x, y * y * s.const(0.25)))


def _sparse_sigmoid(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(_relu(s, s.bind(x + s.const(1))), 2) * s.const(0.5)


def _hard_sigmoid(s: Scope, x: PrimExpr) -> PrimExpr:
    return _relu6(s, s.bind(x + s.const(3))) / s.const(6)


def _hard_silu(s: Scope, x: PrimExpr) -> PrimExpr:
    return x * _hard_sigmoid(s, x)


def _hard_tanh(s: Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(s.at_least(x, -1), 1)


def _linear(s: Scope, x: PrimExpr) -> PrimExpr:
    return x


# fmt: off
_FUNCTIONS: dict[str, Callable[[Scope, PrimExpr], PrimExpr]] = {
    "relu": _relu, "leaky_relu": _leaky_relu, "relu6": _relu6, "celu": _elu, "elu": _elu,
    "selu": _selu, "softplus": _softplus, "softsign": _softsign, "squareplus": _squareplus,
    "soft_shrink": _soft_shrink, "sparse_plus": _sparse_plus, "silu": _silu, "gelu": _gelu,
    "tanh": tanh, "tanh_shrink": _tanh_shrink, "sigmoid": _sigmoid,
    "sparse_sigmoid": _sparse_sigmoid, "exponential": exp,
    "hard_sigmoid": _hard_sigmoid, "hard_silu": _hard_silu, "hard_tanh": _hard_tanh,
    "hard_shrink": _hard_shrink, "linear": _linear, "mish": _mish, "log_sigmoid": _log_sigmoid,
}
# fmt: on

NAMES = frozenset(_FUNCTIONS)
"""The activations `apply` knows, by Keras name."""


def apply(name: str, value: PrimExpr) -> PrimExpr:
    """Apply an activation, with Keras's default parameters, to one element.

    Parameters
    ----------
    name
        A Keras name, one of `NAMES`.
    value
        A float32 or float64 scalar.

    Returns
    -------
    PrimExpr
        The result, of the same dtype; see the module for its error.

    Raises
    ------
    ValueError
        If the name is not in `NAMES`, or the dtype is another.
    """
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ValueError(
            "The `name` argument must be an element-wise activation without required parameters, "
            f"one of {sorted(NAMES)}; apply others after the kernel. Received: name={name}"
        )
    value = tirx.convert(value)  # of a tensor's element
    form = FORMATS.get(str(value.ty.dtype))
    if form is None:
        raise ValueError(
            f"The `value` argument must have one of the dtypes {sorted(FORMATS)}; cast it first. "
            f"Received: value.dtype={value.ty.dtype}"
        )
    scope = Scope(form)
    return scope.close(function(scope, scope.bind(value)))
