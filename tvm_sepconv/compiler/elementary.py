"""exp, expm1, log1p, tanh and the normal distribution as vectorisable TVM expressions.

Nothing here becomes a library call on any target: the functions are polynomials or rationals,
powers of two are made by shifting bits, and branches are selects, so that LLVM vectorises it
(32-bit ARM has no vector division and no float64 vectors) and the same expression is valid CUDA C.
Multiplications and additions are left apart: LLVM and nvcc contract them where the machine has a
fused multiply-add, and every form is right either way.

Forms
-----
exp(x) = 2ⁿ·(1 + q), q = expm1(r) = r + r²·P(r), r = x - n·ln 2 with ln 2 in two parts (Cody and
Waite, "Software Manual for the Elementary Functions", 1980; the parts are those of Cephes).
expm1(x) = 2ⁿ·q + (2ⁿ - 1). tanh|x| = -t / (2 + t), t = expm1(-2|x|). log1p(u) = 2·atanh(s) =
2s + 2s·z·R(z), s = u / (2 + u), z = s². The normal distribution below x < 0 is exp(-x²/2)·G(|x|),
G(t) = erfc(t/√2)·exp(t²/2) / 2 = A(t) / B(t).

Coefficients: P minimises the largest relative error of expm1 on |r| ≤ 0.376 (float32: beyond
ln 2 / 2, for the split square of `normal_tail`) and 0.3467 (float64), R that of log1p for u in
[0, 1], both by a Remez exchange; A / B that of G on [0, 15] and [0, 39] by linearised least squares
with Lawson's weights; all in 60 digits or more, then rounded. Largest relative errors before
rounding, float32 and float64: P 2.2e-8, 1.8e-17; R 4.5e-9, 1.4e-18; A / B 6.3e-9, 9.3e-19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27


@dataclass(frozen=True)
class Format:
    """The constants of one IEEE format; polynomials from the lowest power up."""

    dtype: str
    bits: str
    mantissa: int
    bias: int
    # 2ⁿ is built as 2^(n ± shift), so that a subnormal result is rounded once. TVM's script, which
    # `compute` goes through, has no literals above float32's largest: 2^shift must stay below it.
    shift: int
    ln2: tuple[float, float]
    exp_range: tuple[float, float]  # outside, exp is 0 or infinite
    expm1_low: float  # below, expm1 is -1
    exp_p: tuple[float, ...]
    log1p_r: tuple[float, ...]
    tail_limit: float  # beyond, the normal distribution's tail is 0
    tail_a: tuple[float, ...]
    tail_b: tuple[float, ...]


# fmt: off
_FLOAT32 = Format(
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
_FLOAT64 = Format(
    dtype="float64", bits="uint64", mantissa=52, bias=1023, shift=64,
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

FORMATS = {f.dtype: f for f in (_FLOAT32, _FLOAT64)}


class Scope:
    """Arithmetic in one format, with its intermediate values: each is computed once, in order."""

    def __init__(self, form: Format) -> None:
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
    s: Scope, x: PrimExpr, exponent: PrimExpr, low: PrimExpr | None = None
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


def exp_negative(
    s: Scope, x: PrimExpr, low: PrimExpr | None = None, factor: PrimExpr | None = None
) -> PrimExpr:
    """Return factor·exp(x + low) of an x ≤ 0 and a tiny low."""
    f = s.form
    x = s.at_least(x, f.exp_range[0])
    q, power = _reduce(s, x, s.const(f.shift), low)
    near = s.const(1) + q if factor is None else factor * q + factor
    return s.bind(near * power * s.const(2.0**-f.shift))


def expm1_negative(s: Scope, x: PrimExpr) -> PrimExpr:
    """Return exp(x) - 1 of an x ≤ 0; of a positive x, anything."""
    x = s.at_least(x, s.form.expm1_low)
    q, power = _reduce(s, x, s.const(0))
    return s.bind(power * q + (power - s.const(1)))


def exp(s: Scope, x: PrimExpr) -> PrimExpr:
    """Return exp(x) of any x."""
    low, high = s.form.exp_range
    x = s.at_most(s.at_least(x, low), high)
    shift, negative = s.form.shift, x < s.const(0)
    q, power = _reduce(s, x, s.where(negative, shift, -shift))
    return (s.const(1) + q) * power * s.where(negative, 2.0**-shift, 2.0**shift)


def log1p(s: Scope, u: PrimExpr) -> PrimExpr:
    """Return log(1 + u) of a u in [0, 1]."""
    root = s.bind(u / (u + s.const(2)))
    twice, z = s.bind(root + root), s.bind(root * root)
    return twice * (z * s.polynomial(z, s.form.log1p_r)) + twice


def tanh(s: Scope, x: PrimExpr) -> PrimExpr:
    """Return tanh(x), with the sign of x even at 0."""
    size = s.bind(tirx.abs(x))
    t = expm1_negative(s, size * s.const(-2))
    sign = s.to_bits(x) ^ s.to_bits(size)
    return s.from_bits(s.to_bits(-t / (t + s.const(2))) | sign)


def normal_tail(s: Scope, t: PrimExpr) -> PrimExpr:
    """Return the probability of a normal variable above a t ≥ 0, to relative precision."""
    f = s.form
    t = s.at_most(t, f.tail_limit)
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
    return exp_negative(s, head * head * s.const(-0.5), low, g)
