"""Regularizers and constraints against sums written out, and their identifiers."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from tvm_sepconv import constraints, regularizers

X = np.random.default_rng(0).normal(size=(3, 4, 2))
FLAT = X.ravel().tolist()
ABS, SQUARES = math.fsum(map(abs, FLAT)), math.fsum(v * v for v in FLAT)


@pytest.mark.parametrize(
    ("regularizer", "want"),
    [
        (regularizers.L1(), 0.01 * ABS),
        (regularizers.L1(None), 0.01 * ABS),
        (regularizers.L1(2), 2 * ABS),
        (regularizers.L2(), 0.01 * SQUARES),
        (regularizers.L2(0.5), 0.5 * SQUARES),
        (regularizers.L1L2(), 0),
        (regularizers.L1L2(None, 0.5), 0.5 * SQUARES),
        (regularizers.L1L2(0.25, 0.5), 0.25 * ABS + 0.5 * SQUARES),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_penalties(regularizer, want, dtype):
    penalty = regularizer(X.astype(dtype))
    assert penalty.shape == () and penalty.dtype == np.dtype(dtype)
    assert float(penalty) == pytest.approx(want, rel=4 * float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_orthogonal_regularizer(mode):
    matrix = X[:, :, 0]
    vectors = [v / np.linalg.norm(v) for v in (matrix if mode == "rows" else matrix.T)]
    cosines = [abs(a @ b) for i, a in enumerate(vectors) for b in vectors[:i]]
    penalty = regularizers.OrthogonalRegularizer(0.5, mode)(matrix)
    assert penalty == pytest.approx(0.5 * np.mean(cosines))


def test_orthogonal_regularizer_of_zeros_and_of_one_row():
    regularizer = regularizers.OrthogonalRegularizer()
    assert regularizer(np.zeros((2, 3))) == 0
    assert np.isnan(regularizer(np.ones((1, 3))))  # no pairs: 0 / 0, as in Keras


def test_penalties_of_infinite_weights():
    infinite = np.float32([np.inf, 1])
    assert regularizers.L2()(infinite) == np.inf
    assert regularizers.L1L2(l2=0.1)(infinite) == np.inf
    assert regularizers.L1L2()(infinite) == 0


def norms(w, axis):
    return np.sqrt((w**2).sum(axis=axis, keepdims=True))


@pytest.mark.parametrize("axis", [0, -1, (0, 1)], ids=str)
def test_constraints_bring_the_norms_where_they_should_be(axis):
    before = norms(X, axis)
    limit = float(np.median(before))
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(
        norms(constraints.MaxNorm(limit, axis)(X), axis), np.minimum(before, limit), **close
    )
    np.testing.assert_allclose(norms(constraints.UnitNorm(axis)(X), axis), 1, **close)
    between = constraints.MinMaxNorm(limit, 1.2 * limit, axis=axis)(X)
    np.testing.assert_allclose(norms(between, axis), np.clip(before, limit, 1.2 * limit), **close)
    half = constraints.MinMaxNorm(limit, 1.2 * limit, 0.5, axis)(X)
    want = (before + np.clip(before, limit, 1.2 * limit)) / 2
    np.testing.assert_allclose(norms(half, axis), want, **close)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["max_norm", "non_neg", "unit_norm", "min_max_norm"])
def test_constraints_keep_dtype_shape_and_direction(name, dtype):
    w = X.astype(dtype)
    projected = constraints.get(name)(w)
    assert projected.dtype == w.dtype and projected.shape == w.shape
    assert (projected.astype(float) * w.astype(float) >= 0).all()


def test_non_neg():
    np.testing.assert_array_equal(constraints.NonNeg()(np.float32([-1, 0, 2])), [0, 0, 2])
    assert np.isnan(constraints.NonNeg()(np.float32([np.nan]))).all()


def test_a_zero_weight_stays_zero():
    for name in ("max_norm", "unit_norm", "min_max_norm"):
        assert not constraints.get(name)(np.zeros((3, 2), np.float32)).any()


MODULES = {
    regularizers: ["L1", "L2", "L1L2", "OrthogonalRegularizer"],
    constraints: ["MaxNorm", "NonNeg", "UnitNorm", "MinMaxNorm"],
}
NAMES = [(module, name) for module, names in MODULES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda v: v if isinstance(v, str) else "")
def test_names_and_configs_round_trip(module, name):
    obj = module.get(name)
    config = json.loads(json.dumps(module.serialize(obj)))
    assert config["module"] == module.__name__.replace("tvm_sepconv", "keras")
    assert config["class_name"] == name
    assert module.deserialize(config) == obj == module.get(type(obj))
    assert module.get(obj) is obj


@pytest.mark.parametrize(
    ("module", "obj"),
    [
        (regularizers, regularizers.L1L2(0.5, 0.25)),
        (regularizers, regularizers.OrthogonalRegularizer(0.5, "columns")),
        (constraints, constraints.MaxNorm(3, (0, 1))),
        (constraints, constraints.MinMaxNorm(0.5, 2, 0.25, 1)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_arguments_round_trip_through_json(module, obj):
    assert module.deserialize(json.loads(json.dumps(module.serialize(obj)))) == obj


@pytest.mark.parametrize(
    ("module", "name", "cls"),
    [
        (regularizers, "l1l2", regularizers.L1L2),
        (regularizers, "l1_l2", regularizers.L1L2),
        (regularizers, "orthogonal_regularizer", regularizers.OrthogonalRegularizer),
        (constraints, "min_max_norm", constraints.MinMaxNorm),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_snake_case_names(module, name, cls):
    assert module.get(name) == cls()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_none_callables_and_unknown_identifiers(module):
    kind = module.__name__.rpartition(".")[2].removesuffix("s")
    assert module.get(None) is None and module.serialize(None) is None
    assert module.get(np.sum) is np.sum
    with pytest.raises(ValueError, match=f"Unknown {kind} .* a custom callable has no Keras name"):
        module.serialize(np.sum)
    for identifier in ("nope", 0.1, {"class_name": "Nope", "config": {}}):
        with pytest.raises(ValueError, match=f"Could not interpret {kind} identifier: ") as error:
            module.get(identifier)
        assert str(identifier) in str(error.value)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "1", np.float32(1)], ids=repr)
@pytest.mark.parametrize("cls", [regularizers.L1, regularizers.L2, regularizers.L1L2])
def test_factors_must_be_non_negative_floats(cls, value):
    with pytest.raises(
        ValueError, match=r"Invalid value for argument `l[12]`: expected a non-negative"
    ):
        cls(value)


def test_wrong_modes_and_ranks_of_the_orthogonal_regularizer():
    with pytest.raises(ValueError, match=r"Invalid value for argument `mode`.* Received: mode=x"):
        regularizers.OrthogonalRegularizer(mode="x")
    with pytest.raises(ValueError, match=r"must have rank 2. Received: inputs.shape=\(3, 4, 2\)"):
        regularizers.OrthogonalRegularizer()(X)
