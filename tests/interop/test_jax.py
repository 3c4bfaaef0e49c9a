"""The layer as a function of JAX, against the reference in float64 and against `jax.lax` itself.

Both ways from XLA to the kernel are tested where jax-tvm-ffi is installed, else the callback alone.
"""

from __future__ import annotations

import doctest
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("tvm")

import jax.numpy as jnp  # noqa: E402

import tvm_sepconv  # noqa: E402
from tvm_sepconv import activations, reference  # noqa: E402
from tvm_sepconv.config import SepConvConfig  # noqa: E402
from tvm_sepconv.interop import jax as interop  # noqa: E402
from tvm_sepconv.interop import jax_native, jax_primitive  # noqa: E402
from tvm_sepconv.interop.jax import separable_conv1d  # noqa: E402
from tvm_sepconv.runtime import CompiledLayer  # noqa: E402

HAS_BRIDGE = importlib.util.find_spec("jax_tvm_ffi") is not None
CHANNELS, FILTERS, KERNEL, STEPS = 5, 6, 3, 20
EPS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


_ran: list[Any] = []


@pytest.fixture(autouse=True, params=["callback", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run each test on both ways, with kernels of its own, whose runs are counted."""
    layer_of = interop._Kernel._layer

    def counted(kernel: Any, weights: Any) -> CompiledLayer:
        _ran.append(kernel)
        return layer_of(kernel, weights)

    monkeypatch.setattr(interop._Kernel, "_layer", counted)
    # Packed weights are kept by the kernel's address, which is another's when the kernel is gone.
    monkeypatch.setattr(interop, "_packed", interop._Packed())
    _ran.clear()
    if request.param == "callback":
        monkeypatch.setattr(jax_primitive, "_has_bridge", lambda: False)
    elif not HAS_BRIDGE:
        pytest.skip("jax-tvm-ffi is not installed")
    interop._kernel.cache_clear()
    yield request.param
    interop._kernel.cache_clear()


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weights(dtype: str = "float32", multiplier: int = 1) -> tuple[Any, Any, Any]:
    shapes = (KERNEL, CHANNELS, multiplier), (1, CHANNELS * multiplier, FILTERS), (FILTERS,)
    depthwise, pointwise, bias = (
        normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes, 1)
    )
    return depthwise, pointwise, bias


def expected(x: Any, depthwise: Any, pointwise: Any, bias: Any = None, **options: Any) -> Any:
    config = SepConvConfig.parse(
        pointwise.shape[2], depthwise.shape[0], depth_multiplier=depthwise.shape[2], **options
    )
    return reference.separable_conv1d(x, depthwise, pointwise, bias, config)


def composed(x: Any, depthwise: Any, pointwise: Any, bias: Any) -> Any:
    """The layer with "same" padding, by `jax.lax`."""
    layout = ("NWC", "WIO", "NWC")
    y = jax.lax.conv_general_dilated(
        x,
        depthwise.reshape(depthwise.shape[0], 1, -1),
        (1,),
        "SAME",
        feature_group_count=x.shape[2],
        dimension_numbers=layout,
    )
    return (
        jax.lax.conv_general_dilated(y, pointwise, (1,), "VALID", dimension_numbers=layout) + bias
    )


def calls() -> int:
    """How often kernels ran in this test."""
    return len(_ran)


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * abs(wanted).max())


OPTIONS: dict[str, dict[str, Any]] = {
    "valid": {},
    "same, strides": {"padding": "same", "strides": [2]},
    "pair, dilation": {"padding": [4, 1], "dilation_rate": 2},
    "channels_first": {"data_format": "channels_first", "padding": "same", "activation": "relu"},
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values(options: dict[str, Any], jitted: bool) -> None:
    first = options.get("data_format") == "channels_first"
    x = normal(2, CHANNELS, STEPS) if first else normal(2, STEPS, CHANNELS)

    def apply(x: Any, *weights: Any) -> Any:
        return separable_conv1d(x, *weights, **options)

    for params in (weights(multiplier=2), weights(multiplier=2)[:2]):
        y = (jax.jit(apply) if jitted else apply)(x, *params)
        assert isinstance(y, jax.Array) and y.dtype == x.dtype
        assert_close(y, expected(x, *params, **options))
    assert calls() == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(dtype: str) -> None:
    x, params = normal(2, STEPS, CHANNELS, dtype=dtype), weights(dtype)
    y = separable_conv1d(x, *params)
    assert y.dtype == dtype
    assert_close(y, expected(x, *params), EPS[dtype])
    assert separable_conv1d(x, *weights("float32")).dtype == dtype


def test_double() -> None:
    with jax.enable_x64(True):
        x, params = normal(2, STEPS, CHANNELS, dtype="float64"), weights("float64")
        y = separable_conv1d(x, *params)
        assert y.dtype == "float64"
        assert_close(y, expected(x, *params), 1e-13)


def test_numpy_arrays_give_what_jax_arrays_do() -> None:
    x, params = normal(2, STEPS, CHANNELS), weights()
    y = separable_conv1d(np.asarray(x), *map(np.asarray, params))
    np.testing.assert_array_equal(y, separable_conv1d(x, *params))


def test_activation_after_the_kernel() -> None:
    x, params = normal(2, STEPS, CHANNELS), weights()
    y = separable_conv1d(x, *params, activation=jax.nn.softmax)
    assert_close(y, expected(x, *params, activation="softmax"))


@pytest.mark.parametrize("name", sorted(activations.ELEMENTWISE))
def test_gradients_use_the_same_activation(name: str, way: str) -> None:
    if way == "callback":
        y = np.linspace(-4, 4, 41, dtype=np.float32)
        assert_close(jax_native.elementwise(name)(jnp.asarray(y)), activations.get(name)(y))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_along_with_derivatives(options: dict[str, Any]) -> None:
    first = options.get("data_format") == "channels_first"
    x = normal(2, CHANNELS, STEPS) if first else normal(2, STEPS, CHANNELS)
    params = weights(multiplier=2)
    y, _ = jax.jvp(lambda x: separable_conv1d(x, *params, **options), (x,), (x,))
    assert_close(y, expected(x, *params, **options))
    assert calls() == 0  # JAX computed them


def loss(function: Any) -> Any:
    return lambda *arrays: (function(*arrays) ** 2).sum()


def test_gradients_are_those_of_lax() -> None:
    arrays = (normal(2, STEPS, CHANNELS), *weights())

    def ours(*arrays: Any) -> Any:
        return separable_conv1d(*arrays, padding="same", activation="swish")

    def theirs(*arrays: Any) -> Any:
        return jax.nn.silu(composed(*arrays))

    for transform in (jax.grad, lambda f, n: jax.jit(jax.grad(f, n)), jax.jacfwd):
        got, wanted = (transform(loss(f), (0, 1, 2, 3))(*arrays) for f in (ours, theirs))
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, 1e-4)
    hessians = [jax.hessian(loss(f), 3)(*arrays) for f in (ours, theirs)]
    assert_close(*hessians, 1e-4)


@pytest.mark.parametrize("axis", [0, 2])
def test_vmap_over_inputs_is_one_call(axis: int) -> None:
    x, params = normal(4, 2, STEPS, CHANNELS), weights()
    function = jax.vmap(lambda x: separable_conv1d(x, *params), in_axes=axis)
    y = jax.jit(function)(jnp.moveaxis(x, 0, axis))
    assert_close(y, [expected(part, *params) for part in x])
    assert calls() == 1


def test_vmap_over_weights() -> None:
    x = normal(2, STEPS, CHANNELS)
    stacked = [jnp.stack([w, -2 * w, w + 1]) for w in weights()]
    y = jax.vmap(lambda *params: separable_conv1d(x, *params))(*stacked)
    assert_close(y, [expected(x, *params) for params in zip(*stacked, strict=True)])
    assert calls() == 3


def test_scan_and_training_change_the_weights() -> None:
    x, params = normal(2, STEPS, CHANNELS), weights()
    scales = jnp.asarray([1.0, 2.0, -3.0])

    def one(carry: Any, scale: Any) -> Any:
        return carry, separable_conv1d(x, params[0] * scale, *params[1:])

    _, y = jax.lax.scan(one, 0, scales)
    assert_close(y, [expected(x, params[0] * scale, *params[1:]) for scale in scales])

    @jax.jit
    def apply(x: Any, depthwise: Any) -> Any:
        return separable_conv1d(x, depthwise, *params[1:])

    for scale in scales:  # freed memory comes to hold others' weights
        assert_close(apply(x, params[0] * scale), expected(x, params[0] * scale, *params[1:]))


def test_weights_are_packed_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "_PACKED", 2)
    packed = []

    def pack(*arguments: Any) -> Any:
        packed.append(arguments)
        return CompiledLayer(*arguments)

    monkeypatch.setattr(interop, "CompiledLayer", pack)
    x, (depthwise, *others) = normal(2, STEPS, CHANNELS), weights()
    for scale, count in ((1, 1), (2, 2), (1, 2), (2, 2), (3, 3), (1, 4)):
        y = separable_conv1d(x, depthwise * scale, *others)
        assert_close(y, expected(x, depthwise * scale, *others))
        assert len(packed) == count
    assert len(interop._packed._kept) == 2


def test_weights_that_differ_little_are_told_apart() -> None:
    x, (depthwise, pointwise, bias) = normal(2, STEPS, CHANNELS), weights(multiplier=2)
    for i in range(pointwise.size):
        changed = pointwise.at[0, i // FILTERS, i % FILTERS].add(1)
        assert_close(
            separable_conv1d(x, depthwise, changed, bias), expected(x, depthwise, changed, bias)
        )


def test_nothing_to_compute() -> None:
    params = weights()
    assert separable_conv1d(normal(0, STEPS, CHANNELS), *params).shape == (0, STEPS - 2, FILTERS)
    assert separable_conv1d(normal(2, 0, CHANNELS), *params, padding="same").shape == (
        2,
        0,
        FILTERS,
    )


def test_without_jit() -> None:
    x, params = normal(2, STEPS, CHANNELS), weights()
    with jax.disable_jit():
        assert_close(separable_conv1d(x, *params), expected(x, *params))


def test_example() -> None:
    failed, tried = doctest.testmod(interop)
    assert (failed, tried) == (0, 5)


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, jax.numpy as jnp
from tvm_sepconv.interop import jax_primitive
from tvm_sepconv.interop.jax import separable_conv1d
if {callback}:
    jax_primitive._has_bridge = lambda: False
conv = jax.jit(lambda x, *w: separable_conv1d(jnp.sin(x), *w))
x = jnp.ones((8, 100_000, 5))
print(sum(conv(x, jnp.ones((3, 5, 1)), jnp.ones((1, 5, 6))) for _ in range(2)).shape)
"""


def test_one_core_is_enough(way: str) -> None:
    code = ON_ONE_CORE.format(callback=way == "callback")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(8, 99998, 6)", done.stderr


# ---- what it refuses -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"x": jnp.ones((2, 9, 5), "int32")}, TypeError, "`x` argument .* floating-point"),
    "integer weights": (
        {"pointwise_kernel": jnp.ones((1, 5, 6), "int8")},
        TypeError,
        "`pointwise_kernel` argument .* floating-point",
    ),
    "rank": ({"x": jnp.ones((9, 5))}, ValueError, r"`x` argument .* Received: x.shape=\(9, 5\)"),
    "kernel": ({"depthwise_kernel": jnp.ones((3, 5))}, ValueError, "`depthwise_kernel` argument"),
    "pointwise": (
        {"pointwise_kernel": jnp.ones((1, 4, 6))},
        ValueError,
        "depth_multiplier = 5, filters",
    ),
    "bias": ({"bias": jnp.ones(4)}, ValueError, r"`bias` argument .* = \(6,\)"),
    "channels": ({"x": jnp.ones((2, 9, 4))}, ValueError, "axis -1 of input shape to have value 5"),
    "steps": ({"x": jnp.ones((2, 2, 5))}, ValueError, "output size would be zero or negative"),
    "padding": ({"padding": "causal"}, ValueError, r"padding=\(\(kernel_size - 1\)"),
    "activation": ({"activation": "softmax"}, ValueError, "such as `jax.nn.softmax`"),
}


@pytest.mark.parametrize(("change", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(change: dict[str, Any], error: type[Exception], match: str) -> None:
    names = ("depthwise_kernel", "pointwise_kernel", "bias")
    arguments = {"x": normal(2, 9, CHANNELS), **dict(zip(names, weights(), strict=True)), **change}
    with pytest.raises(error, match=match):
        separable_conv1d(**arguments)


def test_refuses_another_device() -> None:
    x, params = normal(2, STEPS, CHANNELS), weights()
    traced = jax.jit(separable_conv1d).trace(x, *params)
    with pytest.raises(ValueError, match=r"`x` argument must be on the CPU.*cuda.*device_put"):
        traced.lower(lowering_platforms=("cuda",))


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"tvm-sepconv\[jax\]"):
        separable_conv1d(np.ones((2, 9, 5)), *map(np.asarray, weights()))


# ---- JAX's arrays in the layer -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_layer", ["float32", "bfloat16"])
def test_layer_returns_jax_arrays(dtype: str, of_layer: str, way: str) -> None:
    layer = tvm_sepconv.SeparableConv1D(FILTERS, KERNEL, dtype=of_layer)
    x = normal(2, STEPS, CHANNELS, dtype=dtype)
    for _ in range(2):  # the first call packs
        y = layer(x)
        assert isinstance(y, jax.Array) and y.dtype == of_layer and y.device == x.device
    narrow = "bfloat16" if "bfloat16" in (dtype, of_layer) else "float32"
    assert_close(y, expected(x, *layer.get_weights()), EPS[narrow])
