"""Keras's element-wise activations as TVM expressions, for the epilogue of a fused kernel.

Nothing here becomes a library call on any target: exp, expm1, log1p, tanh and the normal
distribution are polynomials or rationals, powers of two are made by shifting bits, and branches are
selects, so that LLVM vectorises all of it and the same expression is valid CUDA C. Multiplications
and additions are left apart: LLVM and nvcc contract them where the machine has a fused
multiply-add, and every form is right either way.

Forms
-----
exp(x) = 2ⁿ·(1 + q), q = expm1(r) = r + r²·P(r), r = x - n·ln 2 with ln 2 in two parts (Cody and
Waite, "Software Manual for the Elementary Functions", 1980; the parts are those of Cephes).
expm1(x) = 2ⁿ·q + (2ⁿ - 1). tanh|x| = -t / (2 + t), t = expm1(-2|x|). log1p(u) = 2·atanh(s) =
2s + 2s·z·R(z), s = u / (2 + u), z = s². The normal distribution below x < 0 is exp(-x²/2)·G(|x|),
G(t) = erfc(t/√2)·exp(t²/2) / 2 = A(t) / B(t). With e = exp(-|x|), sigmoid, softplus and mish are
made of positive terms only: nothing cancels and nothing overflows.

Coefficients: P minimises the largest relative error of expm1 on |r| ≤ 0.376 (float32: beyond
ln 2 / 2, for the split square of `_gelu`) and 0.3467 (float64), R that of log1p for u in [0, 1],
both by a Remez exchange; A / B that of G on [0, 15] and [0, 39] by linearised least squares with
Lawson's weights; all in 60 digits or more, then rounded. Largest relative errors before rounding,
float32 and float64: P 2.2e-8, 1.8e-17; R 4.5e-9, 1.4e-18; A / B 6.3e-9, 9.3e-19.

Error: at most 4 ulp of the result, subnormal results included, and 8 ulp for gelu (its left tail
included, where the usual x·erfc(-x/√2)/2 in float32 loses 60). Besides, squareplus and tanh_shrink
may err by 4 ulp of x, as they cancel in Keras's own formulas too, and silu, gelu and mish by |x|
times the smallest subnormal, because a factor underflows before the product. NEON on 32-bit ARM
flushes subnormals to zero. A zero result may have the other sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class _Format:
    """The constants of one IEEE format; polynomials from the lowest power up."""

    dtype: str
    bits: str
    mantissa: int
    bias: int
    shift: int  # 2ⁿ is built as 2^(n ± shift), so that a subnormal result is rounded once
    ln2: tuple[float, float]
    exp_range: tuple[float, float]  # outside, exp is 0 or infinite
    expm1_low: float  # below, expm1 is -1
    exp_p: tuple[float, ...]
    log1p_r: tuple[float, ...]
    tail_limit: float  # beyond, the normal distribution's tail is 0
    tail_a: tuple[float, ...]
    tail_b: tuple[float, ...]


# fmt: off
_FLOAT32 = _Format(
    dtype="float32", bits="uint32", mantissa=23, bias=127, shift=64,
    ln2=(0.693359375, -0.00021219444005469057),
    exp_range=(-105.0, 89.0), expm1_low=-18.0, tail_limit=15.0,
    exp_p=(
        0.49999997, 0.16666496, 0.04166741, 0.008372385, 0.0013881319,
    ),
    log1p_r=(
        0.3333321, 0.20010732, 0.14001343, 0.14004122,
    ),
    tail_a=(
        0.5, 0.43927535, 0.18396293, 0.04087897, 0.0041528917,
    ),
    tail_b=(
        1.0, 1.6764357, 1.205523, 0.47139227, 0.1024745, 0.010409645,
    ),
)
_FLOAT64 = _Format(
    dtype="float64", bits="uint64", mantissa=52, bias=1023, shift=512,
    ln2=(0.693145751953125, 1.4286068203094173e-06),
    exp_range=(-746.0, 710.0), expm1_low=-40.0, tail_limit=39.0,
    exp_p=(
        0.5000000000000006, 0.16666666666666588, 0.04166666666657656, 0.00833333333338967,
        0.0013888888931632257, 0.00019841269718811214, 2.4801505187346903e-05,
        2.7557407639267196e-06, 2.7626074135954156e-07, 2.5053774397714303e-08,
    ),
    log1p_r=(
        0.3333333333333316, 0.2000000000007569, 0.1428571427425738, 0.11111111966048251,
        0.0909087257913009, 0.07693267624521927, 0.06650639930322896, 0.06051892030256732,
        0.0417484942516561, 0.08500773217689371,
    ),
    tail_a=(
        0.5, 0.8279353479236689, 0.6796264119410574, 0.3573589305619225, 0.13205336192336087,
        0.035670332020361135, 0.007123506461518853, 0.0010398264861455834, 0.00010658609223761941,
        6.976985311891734e-06, 2.2422104317260735e-07,
    ),
    tail_b=(
        1.0, 2.453755256650203, 2.8170662591521767, 2.001495428002685, 0.9801403732139783,
        0.34833594320147976, 0.09198374415369374, 0.018122030336796966, 0.002623947179741538,
        0.00026773375128866174, 1.748870865450287e-05, 5.620388065835874e-07,
    ),
)
# fmt: on

_FORMATS = {f.dtype: f for f in (_FLOAT32, _FLOAT64)}


class _Scope:
    """Arithmetic in one format, with its intermediate values: each is computed once, in order."""

    def __init__(self, form: _Format) -> None:
        self.form = form
        self._bound: list[tuple[PrimExpr, PrimExpr]] = []

    def bind(self, value: PrimExpr) -> PrimExpr:
        """Name `value`: an expression is a tree, and what is used twice is generated twice."""
        var = tirx.Var(f"t{len(self._bound)}", value.ty.dtype)
        self._bound.append((var, value))
        return var

    def close(self, result: PrimExpr) -> PrimExpr:
        for var, value in reversed(self._bound):
            result = tirx.Let(var, value, result)
        return result

    def const(self, value: float) -> PrimExpr:
        return tirx.const(value, self.form.dtype)

    def where(self, condition: PrimExpr, yes: PrimExpr | float, no: PrimExpr | float) -> PrimExpr:
        """Select. A comparison with NaN is false, so the value that may be NaN goes last."""
        yes, no = (self.const(v) if isinstance(v, (int, float)) else v for v in (yes, no))
        return tirx.Select(condition, yes, no)

    def at_least(self, x: PrimExpr, low: float) -> PrimExpr:
        """max(x, low), and NaN of NaN: TVM's own max is fmaxf on CUDA, which drops it."""
        x = self.bind(x)
        return self.bind(self.where(x < self.const(low), low, x))

    def at_most(self, x: PrimExpr, high: float) -> PrimExpr:
        x = self.bind(x)
        return self.bind(self.where(x > self.const(high), high, x))

    def polynomial(self, x: PrimExpr, coefficients: Sequence[float]) -> PrimExpr:
        result = self.const(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = result * x + self.const(c)
        return self.bind(result)

    def to_bits(self, x: PrimExpr) -> PrimExpr:
        return tirx.reinterpret(self.form.bits, x)

    def from_bits(self, x: PrimExpr) -> PrimExpr:
        return tirx.reinterpret(self.form.dtype, x)


def _reduce(
    s: _Scope, x: PrimExpr, exponent: PrimExpr, low: PrimExpr | None = None
) -> tuple[PrimExpr, PrimExpr]:
    """Return expm1(r) and 2^(n + exponent), where exp(x + low) = 2ⁿ·exp(r)."""
    f = s.form
    # Adding 1.5·2^mantissa rounds to an integer and leaves it, biased, in the lowest bits.
    magic = s.bind(exponent + s.const(1.5 * 2.0**f.mantissa + f.bias))
    y = s.bind(x * s.const(1.4426950408889634074) + magic)
    n = s.bind(y - magic)
    r = x - n * s.const(f.ln2[0]) - n * s.const(f.ln2[1])
    r = s.bind(r if low is None else r + low)
    power = s.from_bits(s.to_bits(y) << tirx.const(f.mantissa, f.bits))
    return s.bind(r * r * s.polynomial(r, f.exp_p) + r), s.bind(power)


def _exp_negative(
    s: _Scope, x: PrimExpr, low: PrimExpr | None = None, factor: PrimExpr | None = None
) -> PrimExpr:
    """Return factor·exp(x + low) of an x ≤ 0 and a tiny low."""
    f = s.form
    x = s.at_least(x, f.exp_range[0])
    q, power = _reduce(s, x, s.const(f.shift), low)
    near = s.const(1) + q if factor is None else factor * q + factor
    return s.bind(near * power * s.const(2.0**-f.shift))


def _expm1_negative(s: _Scope, x: PrimExpr) -> PrimExpr:
    """Return exp(x) - 1 of an x ≤ 0; of a positive x, anything."""
    x = s.at_least(x, s.form.expm1_low)
    q, power = _reduce(s, x, s.const(0))
    return s.bind(power * q + (power - s.const(1)))


def _exponential(s: _Scope, x: PrimExpr) -> PrimExpr:
    low, high = s.form.exp_range
    x = s.at_most(s.at_least(x, low), high)
    shift, negative = s.form.shift, x < s.const(0)
    q, power = _reduce(s, x, s.where(negative, shift, -shift))
    return (s.const(1) + q) * power * s.where(negative, 2.0**-shift, 2.0**shift)


def _relu(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x <= s.const(0), 0, x)


def _relu6(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(_relu(s, x), 6)


def _leaky_relu(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x < s.const(0), x * s.const(0.2), x)


def _elu(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.where(x > s.const(0), x, _expm1_negative(s, x))


def _selu(s: _Scope, x: PrimExpr) -> PrimExpr:
    below = _expm1_negative(s, x) * s.const(_SELU_SCALE * _SELU_ALPHA)
    return s.where(x > s.const(0), x * s.const(_SELU_SCALE), below)


def _softplus(s: _Scope, x: PrimExpr) -> PrimExpr:
    u = _exp_negative(s, -tirx.abs(x))
    root = s.bind(u / (u + s.const(2)))
    twice, z = s.bind(root + root), s.bind(root * root)
    return _relu(s, x) + (twice * (z * s.polynomial(z, s.form.log1p_r)) + twice)


def _log_sigmoid(s: _Scope, x: PrimExpr) -> PrimExpr:
    return -_softplus(s, s.bind(-x))


def _sigmoid(s: _Scope, x: PrimExpr) -> PrimExpr:
    e = _exp_negative(s, -tirx.abs(x))
    return s.where(x < s.const(0), e, 1) / (e + s.const(1))


def _silu(s: _Scope, x: PrimExpr) -> PrimExpr:
    return x * _sigmoid(s, x)


def _mish(s: _Scope, x: PrimExpr) -> PrimExpr:
    """x·((1 + eˣ)² - 1) / ((1 + eˣ)² + 1), of a positive x with both divided by e²ˣ."""
    e, negative = _exp_negative(s, -tirx.abs(x)), x < s.const(0)
    above = s.bind(s.where(negative, e * e + (e + e), e + e + s.const(1)))
    return x * (above / (above + s.where(negative, 2, (e + e) * e)))


def _gelu(s: _Scope, x: PrimExpr) -> PrimExpr:
    f, size = s.form, s.bind(tirx.abs(x))
    t = s.at_most(size, f.tail_limit)
    # t² in two parts, the first exact (its root a multiple of 2⁻⁸, in float64 2⁻²⁰): rounding a
    # square near 200 once would be 100 ulp of its exponential.
    grid = s.const(1.5 * 2.0 ** (15 if f.mantissa == 23 else 32))
    head = s.bind(s.bind(t + grid) - grid)  # in two steps: TVM would simplify a + b - b
    low = (head - t) * (head + t) * s.const(0.5)
    square = s.bind(t * t)
    a, b = (
        # Even and odd powers apart: in one long chain every step's rounding would stay in the sum.
        s.polynomial(square, c[::2]) + t * s.polynomial(square, c[1::2])
        for c in (f.tail_a, f.tail_b)
    )
    g = s.bind(a / b)
    h = _exp_negative(s, head * head * s.const(-0.5), low, g)
    return x * s.where(x < s.const(0), h, s.const(1) - h)


def _tanh(s: _Scope, x: PrimExpr) -> PrimExpr:
    size = s.bind(tirx.abs(x))
    t = _expm1_negative(s, size * s.const(-2))
    sign = s.to_bits(x) ^ s.to_bits(size)
    return s.from_bits(s.to_bits(-t / (t + s.const(2))) | sign)


def _tanh_shrink(s: _Scope, x: PrimExpr) -> PrimExpr:
    return x - _tanh(s, x)


def _softsign(s: _Scope, x: PrimExpr) -> PrimExpr:
    return x / (tirx.abs(x) + s.const(1))


def _squareplus(s: _Scope, x: PrimExpr) -> PrimExpr:
    return (x + tirx.sqrt(x * x + s.const(4))) * s.const(0.5)


def _soft_shrink(s: _Scope, x: PrimExpr) -> PrimExpr:
    half = s.const(0.5)
    return s.where(x > half, x - half, s.where(x < -half, x + half, 0))


def _hard_shrink(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.where(tirx.abs(x) > s.const(0.5), x, 0)


def _sparse_plus(s: _Scope, x: PrimExpr) -> PrimExpr:
    y = s.bind(x + s.const(1))
    return s.where(x <= s.const(-1), 0, s.where(x >= s.const(1), x, y * y * s.const(0.25)))


def _sparse_sigmoid(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(_relu(s, s.bind(x + s.const(1))), 2) * s.const(0.5)


def _hard_sigmoid(s: _Scope, x: PrimExpr) -> PrimExpr:
    return _relu6(s, s.bind(x + s.const(3))) / s.const(6)


def _hard_silu(s: _Scope, x: PrimExpr) -> PrimExpr:
    return x * _hard_sigmoid(s, x)


def _hard_tanh(s: _Scope, x: PrimExpr) -> PrimExpr:
    return s.at_most(s.at_least(x, -1), 1)


def _linear(s: _Scope, x: PrimExpr) -> PrimExpr:
    return x


# fmt: off
_FUNCTIONS: dict[str, Callable[[_Scope, PrimExpr], PrimExpr]] = {
    "relu": _relu, "leaky_relu": _leaky_relu, "relu6": _relu6, "celu": _elu, "elu": _elu,
    "selu": _selu, "softplus": _softplus, "softsign": _softsign, "squareplus": _squareplus,
    "soft_shrink": _soft_shrink, "sparse_plus": _sparse_plus, "silu": _silu, "gelu": _gelu,
    "tanh": _tanh, "tanh_shrink": _tanh_shrink, "sigmoid": _sigmoid,
    "sparse_sigmoid": _sparse_sigmoid, "exponential": _exponential,
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
    form = _FORMATS.get(str(value.ty.dtype))
    if form is None:
        raise ValueError(
            f"The `value` argument must have one of the dtypes {sorted(_FORMATS)}; cast it first. "
            f"Received: value.dtype={value.ty.dtype}"
        )
    scope = _Scope(form)
    return scope.close(function(scope, scope.bind(value)))
