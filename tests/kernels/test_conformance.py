"""Compiled layers against the float64 reference, over the whole argument space and every workload.

What a kernel may be off by before the activation is ``4 * eps * sqrt(K) * Σ|terms|``, K being the
length of both reductions. An activation f makes of an error δ at most ``sup|f'| * δ`` (`SLOPES`)
and adds its own rounding. Activations that are not element-wise run after a linear kernel: there
the kernel has its bound, and what follows must be that activation, along the layer's last axis, of
what the same kernel gives a linear layer.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from conformance_cases import (
    CONFIGS,
    EDGES,
    FACTORS,
    LAYERS_PER_BUNDLE,
    TARGETS,
    Case,
    drawn_cases,
    pairs_in,
    pairwise,
    part_of_draws,
    table_case,
)

import tvm_sepconv
from tvm_sepconv import activations, reference
from tvm_sepconv.compiler.package import write_bundle
from tvm_sepconv.config import SepConvConfig

FULL_PARTS = 40

# sup|f'| over all x; that of `exponential` depends on x, and `hard_shrink` jumps at ±0.5.
SLOPES = {
    **dict.fromkeys(activations.ELEMENTWISE - {"exponential"}, 1.0),
    "gelu": 1.13, "hard_sigmoid": 1 / 6, "hard_silu": 1.5, "mish": 1.1, "selu": 1.7581,
    "sigmoid": 1 / 4, "silu": 1.1, "sparse_sigmoid": 1 / 2,
}  # fmt: skip
CANCELLING = ("squareplus", "tanh_shrink")  # sums of opposite signs: rounding is that of x

DRAWN = drawn_cases(CONFIGS, seed=0)
PAIRWISE = sorted(pairwise(), key=lambda row: row[3])  # by target, as bundles are
TABLE = [table_case(row) for row in PAIRWISE]
REST = [table_case(row) for row in itertools.product(*FACTORS) if row not in PAIRWISE]


# ---- compiling ----------------------------------------------------------------------------------


def weights_of(case: Case) -> dict[str, np.ndarray]:
    """Normal weights that make outputs of about unit size."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    config, middle = case.config, case.channels * case.config.depth_multiplier
    shapes = {
        "depthwise_kernel": (config.depthwise_shape(case.channels), config.kernel_size**-0.5),
        "pointwise_kernel": (config.pointwise_shape(case.channels), middle**-0.5),
        "bias": (config.bias_shape, 1.0),
    }
    if not config.use_bias:
        del shapes["bias"]
    return {
        name: (scale * rng.standard_normal(shape)).astype(config.variable_dtype)
        for name, (shape, scale) in shapes.items()
    }


def linear_twin(config: SepConvConfig) -> SepConvConfig:
    return dataclasses.replace(config, activation=activations.linear, name=f"{config.name}.linear")


def bundle_contents(cases):
    """Layers with weights by name; a linear twin costs nothing, it has its layer's library."""
    contents = {case.name: (case.config, weights_of(case)) for case in cases}
    for config, weights in list(contents.values()):
        if activations.name_of(config.activation) not in activations.ELEMENTWISE:
            contents[f"{config.name}.linear"] = linear_twin(config), weights
    return contents


def in_bundles(cases: list[Case]) -> dict[str, list[Case]]:
    """By case name, the cases it shares a bundle with."""
    result: dict[str, list[Case]] = {}
    for _, same in itertools.groupby(cases, key=lambda case: case.target):
        group = list(same)
        for start in range(0, len(group), LAYERS_PER_BUNDLE):
            together = group[start : start + LAYERS_PER_BUNDLE]
            result.update((case.name, together) for case in together)
    return result


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """A function from a case to its layers by name. Other processes compile while tests run."""
    folder = tmp_path_factory.mktemp("bundles")
    wanted = []
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == Path(__file__) and "compiled" in getattr(item, "fixturenames", ()):
            wanted += [params["case"]] if "case" in params else part_of_draws(params["part"])
    groups = in_bundles(wanted)
    with concurrent.futures.ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    ) as processes:
        futures = {}
        for together in groups.values():
            path = folder / together[0].name
            if path not in futures:
                futures[path] = processes.submit(
                    write_bundle, bundle_contents(together), path, [together[0].target]
                )
        loaded = {}

        def layers(case):
            path = folder / groups[case.name][0].name
            if path not in loaded:
                futures[path].result()
                loaded.clear()  # tests run in order: the bundles before are done with
                found = tvm_sepconv.load(path, case.target)
                loaded[path] = found if isinstance(found, dict) else {case.name: found}
            return loaded[path]

        yield layers
        processes.shutdown(cancel_futures=True)
    tvm_sepconv.set_num_threads(None)


# ---- comparing ----------------------------------------------------------------------------------


def call_between_guards(layer, x: np.ndarray) -> np.ndarray:
    """Call on a view amid NaN, into a view amid sevens: what is touched beside the views shows."""
    inner = (slice(1, -1), slice(2, -1), slice(3, -2))
    margin = np.array([2, 3, 5])
    around = np.full(margin + x.shape, np.nan, x.dtype)
    around[inner] = x
    canvas = np.full(margin + layer.compute_output_shape(x.shape), 7, x.dtype)
    y = layer(around[inner], out=canvas[inner]).copy()
    canvas[inner] = 7
    assert (canvas == 7).all(), "written outside `out`"
    return y


def activated_bound(name: str, z: np.ndarray, delta: np.ndarray, eps: float) -> np.ndarray:
    """How far f(z') may be from f(z) for |z' - z| <= delta, f's own rounding included."""
    value = np.abs(np.asarray(activations.get(name)(z)))
    if name == "exponential":
        spread = value * np.expm1(delta)
    elif name == "hard_shrink":
        spread = delta + np.where(np.abs(np.abs(z) - 0.5) <= delta, 0.5, 0)
    else:
        spread = SLOPES[name] * delta
    rounding = 8 * eps * (value + (name in CANCELLING) * np.abs(z))
    return spread if name == "linear" else spread + rounding


def check(case: Case, layers) -> None:
    config, layer, weights = case.config, layers[case.name], weights_of(case)
    kernels = [weights["depthwise_kernel"], weights["pointwise_kernel"], weights.get("bias")]
    eps = np.finfo(config.compute_dtype).eps
    length = config.kernel_size + case.channels * config.depth_multiplier
    name = activations.name_of(config.activation)
    rng = np.random.default_rng(len(case.name))
    for number, (batch, steps) in enumerate(case.shapes):
        x = rng.standard_normal((batch, steps, case.channels)).astype(config.compute_dtype)
        if config.data_format == "channels_first":
            x = np.ascontiguousarray(x.swapaxes(1, 2))
        tvm_sepconv.set_num_threads(1 + number % 3)
        apply = call_between_guards if number % 2 else type(layer).__call__
        y = apply(layer, x)
        assert y.dtype == config.compute_dtype and y.shape == config.compute_output_shape(x.shape)
        z = reference.separable_conv1d(x, *kernels, config, activate=False)
        delta = 4 * eps * np.sqrt(length) * reference.magnitude(x, *kernels, config)
        if name in activations.ELEMENTWISE:
            error = np.abs(y - np.asarray(config.activation(z)))
            bound = activated_bound(name, z, delta, eps)
        else:
            linear = apply(layers[f"{case.name}.linear"], x)
            np.testing.assert_array_equal(y, config.activation(linear))
            error, bound = np.abs(linear - z), delta
        wrong = np.argwhere(~(error <= bound))  # NaN is wrong, too
        assert not len(wrong), (
            f"batch {batch}, steps {steps}: {len(wrong)} of {error.size} outputs, first at "
            f"{wrong[0]}: off by {error[tuple(wrong[0])]:.3g}, bound {bound[tuple(wrong[0])]:.3g}"
        )


# ---- the tests ----------------------------------------------------------------------------------


def test_the_draws_cover_the_argument_space():
    configs = [case.config for case in DRAWN]
    assert len({case.name.partition("-")[2] + str(case.config.padding) for case in DRAWN}) >= 200
    for name, values in {
        "strides": range(1, 5),
        "dilation_rate": range(1, 6),
        "depth_multiplier": range(1, 5),
        "data_format": ["channels_last", "channels_first"],
        "use_bias": [True, False],
        "dtype": ["float32", "float64"],
    }.items():
        assert {getattr(c, name) for c in configs} == set(values), name
    assert {activations.name_of(c.activation) for c in configs} == activations.NAMES - {"threshold"}
    assert {type(c.padding) is tuple or c.padding for c in configs} == {True, "valid", "same"}
    assert set(EDGES) <= {case.channels for case in DRAWN} & {c.filters for c in configs}
    assert {1, 2, 3, 25, 33} <= {c.kernel_size for c in configs} <= set(range(1, 41))
    assert {case.target for case in DRAWN} == set(TARGETS)
    uneven = [
        case.config.data_format
        for case in DRAWN
        if case.config.padding == "same"
        and any(np.ptp(case.config.pad_amounts(steps)) for _, steps in case.shapes[:4])
    ]
    assert min(map(uneven.count, FACTORS[1])) >= 5
    assert all(len(set(case.shapes)) >= 4 for case in DRAWN)
    assert all({0, 1, 2, 3} == {batch for batch, _ in case.shapes} for case in DRAWN)


def test_the_table_has_every_pair():
    rows = list(itertools.product(*FACTORS))
    assert set().union(*map(pairs_in, PAIRWISE)) == set().union(*map(pairs_in, rows))
    assert len(TABLE) + len(REST) == len(rows)


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_slopes_are_the_largest(name):
    x = np.linspace(-20, 20, 400_001)
    x = x[np.abs(np.abs(x) - 0.5) > 1e-3] if name == "hard_shrink" else x
    y = np.asarray(activations.get(name)(x))
    slope = np.abs(np.diff(y) / np.diff(x))[np.diff(x) < 1.5e-4].max()
    assert slope <= SLOPES[name] * (1 + 1e-6) and slope > 0.95 * SLOPES[name]


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_drawn(case, compiled):
    check(case, compiled(case))


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_workload(case, compiled):
    check(case, compiled(case))


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=lambda case: case.name)
def test_workload_in_full(case, compiled):
    check(case, compiled(case))


@pytest.mark.full
@pytest.mark.parametrize("part", range(FULL_PARTS))
def test_more_drawn(part, compiled):
    for case in part_of_draws(part):
        check(case, compiled(case))
