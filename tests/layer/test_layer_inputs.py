"""What a layer takes: arrays of any layout, lists, tensors, special values; and what it refuses."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")

from layers import (
    BATCH,
    CHANNELS,
    FILTERS,
    FORMATS,
    STEPS,
    FakeTensor,
    assert_right,
    at_byte_offset,
    expected,
    inputs,
    layer_of,
    normal,
    read_only,
)

from tvm_sepconv import SeparableConv1D, layer_separable_conv_1d, tensors

# ---- inputs -------------------------------------------------------------------------------------


def in_file(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def with_wide_rows(x):
    """Rows so far apart that 32-bit offsets into a tile would overflow; the gaps take no memory."""
    room = np.zeros((*x.shape[:2], 2**24 + 3), x.dtype)
    room[..., : x.shape[2]] = x
    return room[..., : x.shape[2]]


LAYOUTS = {
    "byte offset 1": lambda x, _: at_byte_offset(x, 1),
    "byte offset 4": lambda x, _: at_byte_offset(x, 4),
    "byte offset 6": lambda x, _: at_byte_offset(x, 6),
    "reversed batch": lambda x, _: x[::-1].copy()[::-1],
    "reversed rows": lambda x, _: x[:, ::-1].copy()[:, ::-1],
    "reversed elements": lambda x, _: x[..., ::-1].copy()[..., ::-1],
    "every other batch": lambda x, _: np.repeat(x, 2, axis=0)[::2],
    "every third row": lambda x, _: np.repeat(x, 3, axis=1)[:, ::3],
    "every other element": lambda x, _: np.repeat(x, 2, axis=2)[..., ::2],
    "inside": lambda x, _: np.pad(x, ((1, 1), (2, 3), (1, 2)))[1:-1, 2:-3, 1:-2],
    "Fortran": lambda x, _: np.asfortranarray(x),
    "transposed": lambda x, _: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "steps first": lambda x, _: x.swapaxes(0, 1).copy().swapaxes(0, 1),
    "big-endian": lambda x, _: x.astype(x.dtype.newbyteorder(">")),
    "little-endian": lambda x, _: x.astype(x.dtype.newbyteorder("<")),
    "read-only": lambda x, _: read_only(x),
    "memory map": in_file,
    "wide rows": lambda x, _: with_wide_rows(x),
    "nested lists": lambda x, _: x.tolist(),
    "tuple of arrays": lambda x, _: tuple(x),
    "float16": lambda x, _: x.astype(np.float16),
    "float64": lambda x, _: x.astype(np.float64),
    "longdouble": lambda x, _: x.astype(np.longdouble),
    "field of records": lambda x, _: x.view([("re", x.dtype)])["re"],
}


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout, data_format, tmp_path):
    layer, plain = layer_of(data_format), inputs(data_format)
    x = LAYOUTS[layout](plain, tmp_path)
    y = layer(x)
    assert type(y) is np.ndarray and y.dtype == np.float32 and y.flags.c_contiguous
    assert_right(layer, np.asarray(x), y)
    assert_right(layer, plain, y, tolerance=5e-3 if layout == "float16" else 1e-5)


def test_equal_rows_may_share_memory():
    layer = layer_of()
    row = normal(CHANNELS)
    x = np.broadcast_to(row, (BATCH, STEPS, CHANNELS))
    assert x.strides[:2] == (0, 0)
    assert_right(layer, x, layer(x))


def test_bfloat16_arrays_are_cast():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer, x = layer_of(), inputs().astype(ml_dtypes.bfloat16)
    y = layer(x)
    assert y.dtype == np.float32
    assert_right(layer, x, y)


def test_float64_layer():
    layer, x = layer_of(dtype="float64"), inputs(dtype="float64")
    y = layer(x)
    assert y.dtype == np.float64
    assert_right(layer, x, y, tolerance=1e-13)
    y = layer(x.astype(np.float32))
    assert y.dtype == np.float64
    assert_right(layer, x.astype(np.float32), y, tolerance=1e-13)


def test_values_beyond_the_narrower_type_become_infinite():
    x = inputs(dtype="float64")
    x[0, 4, 2] = 1e300
    y = layer_of()(x)
    wrong = ~np.isfinite(y)
    assert wrong[0, 3:6].all() and wrong.sum() == 3 * FILTERS


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("activation", ["linear", "relu", "softmax"])
@pytest.mark.parametrize("data_format", FORMATS)
def test_nan_and_infinities_go_where_the_reference_has_them(activation, special, data_format):
    layer = layer_of(data_format, activation=activation, dilation_rate=2)
    x = inputs(data_format, steps=40)
    x[0, 3, 2] = x[1, 4, 4] = special
    y, right = layer(x), expected(layer, x)
    assert 0 < (~np.isfinite(right)).sum() < right.size or (activation, special) != ("linear", 0)
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)  # NaN equals NaN here


@pytest.mark.parametrize("data_format", FORMATS)
def test_empty_batch(data_format):
    layer = layer_of(data_format)
    for x in (inputs(data_format)[:0], inputs(data_format, "float64")[:0]):
        y = layer(x)
        assert y.shape == layer.compute_output_shape(x.shape) and y.shape[0] == 0
        assert y.dtype == np.float32


def test_zero_steps():
    no_steps = inputs()[:, :0]
    assert layer_of()(no_steps).shape == (BATCH, 0, FILTERS)  # "same" keeps the number
    with pytest.raises(ValueError, match="Computed output size would be zero or negative"):
        layer_of(padding="valid")(no_steps)
    layer = layer_of(padding=(2, 3))
    layer.bias.assign(np.arange(FILTERS))
    y = layer(no_steps)  # nothing but zeros: every output is the bias
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(FILTERS), (BATCH, 3, FILTERS)))


def test_activations_that_are_not_element_wise():
    layer = layer_of(activation="softmax")
    y = layer(inputs())
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-6)
    layer = layer_of("channels_first", activation="glu", strides=1)
    x = inputs("channels_first", steps=STEPS + 1)
    assert layer(x).shape == layer.compute_output_shape(x.shape) == (BATCH, FILTERS, 5)
    assert_right(layer, x, layer(x))
    with pytest.raises(ValueError, match=r"`glu` activation halves the last axis"):
        layer(inputs("channels_first"))


def test_custom_activations_are_called_with_the_outputs():
    layer = layer_of(activation=lambda y: np.abs(y).astype(np.float64) + 1)
    y = layer(inputs())
    assert y.dtype == np.float32 and (y >= 1).all()
    assert_right(layer, inputs(), y)


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dlpack_tensors_come_back_as_their_kind(requires_grad):
    layer, x = layer_of(), inputs()
    y = layer(FakeTensor(x, requires_grad=requires_grad))
    assert type(y) is FakeTensor
    np.testing.assert_array_equal(y.array, layer(x))
    assert type(layer_separable_conv_1d(FakeTensor(x), 3, 2)) is FakeTensor


class ShapedTensor(FakeTensor):
    """What every framework gives besides: the shape, without an export."""

    @property
    def shape(self):
        return self.array.shape


@pytest.mark.parametrize("data_format", FORMATS)
def test_tensors_that_need_no_conversion_take_the_short_way(data_format, monkeypatch):
    layer, x = layer_of(data_format), inputs(data_format)
    expected = layer(x)
    monkeypatch.setattr(layer, "_call_any", None)
    y = layer(ShapedTensor(x))
    assert type(y) is FakeTensor
    np.testing.assert_array_equal(y.array, expected)
    torch = type("Tensor", (ShapedTensor,), {"__module__": "torch"})
    for kind in (np.asarray, ShapedTensor, torch):
        out = kind(np.full_like(expected, np.nan))
        assert layer(ShapedTensor(x), out=out) is layer(x, out=out) is out
        np.testing.assert_array_equal(getattr(out, "array", out), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: ShapedTensor(x, requires_grad=True),
        lambda x: ShapedTensor(x.astype(np.float64)),
        lambda x: ShapedTensor(x[:, ::-1]),
        lambda x: ShapedTensor(x[..., ::-1].copy()[..., ::-1]),
    ],
    ids=["gradients", "float64", "reversed rows", "reversed elements"],
)
def test_tensors_that_need_a_conversion_get_it(change):
    layer, x = layer_of(), change(inputs())
    layer(inputs())  # compiled: the short way is open
    out = np.empty((BATCH, STEPS, FILTERS), np.float32)
    y = layer(x, out=out)
    assert y is out
    assert_right(layer, x.array, y)
    np.testing.assert_array_equal(layer(x).array, y)


def test_dlpack_tensors_are_read_in_place():
    array, _ = tensors.to_numpy(FakeTensor(x := inputs()))
    assert np.shares_memory(array, x)


@pytest.mark.parametrize("where", ["root", "tensorflow", "nowhere"])
def test_dlpack_tensors_of_frameworks_without_the_array_api(where, monkeypatch):
    module = ModuleType("tensorflow" if where == "tensorflow" else "framework")
    if where == "root":
        module.from_dlpack = lambda array: ("root", array)
    if where == "tensorflow":
        dlpack = SimpleNamespace(from_dlpack=lambda capsule: ("tensorflow", capsule))
        module.experimental = SimpleNamespace(dlpack=dlpack)
    kind = type("Tensor", (), {
        "__module__": f"{module.__name__}.tensors",
        "__dlpack__": lambda self, **keywords: inputs().__dlpack__(),
        "__dlpack_device__": lambda self: (1, 0),
    })  # fmt: skip
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer = layer_of()
    y = layer(kind())
    if where != "nowhere":
        origin, y = y
        assert origin == where
    if where == "tensorflow":  # the real one takes a capsule, and no array
        assert type(y).__name__ == "PyCapsule"
        return
    np.testing.assert_array_equal(y, layer(inputs()))


def test_tensors_on_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"on the CPU or an NVIDIA GPU. Received: a FakeTensor on "
                       r"DLPack device type 8, index 1; move it to the CPU"):  # fmt: skip
        layer_of()(FakeTensor(inputs(), device=(8, 1)))  # Apple's


def test_a_tensor_that_numpy_cannot_read_says_why():
    class Unreadable(FakeTensor):
        def __dlpack__(self, **keywords):
            raise BufferError("float8 has no DLPack type here")

    with pytest.raises(BufferError, match="float8"):
        layer_of()(Unreadable(inputs()))


def test_jax_arrays():
    jnp = pytest.importorskip("jax.numpy")
    jax = pytest.importorskip("jax")
    layer, x = layer_of(), inputs()
    y = layer(jnp.asarray(x))
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(np.asarray(y), layer(x))
    narrow = jnp.asarray(x).astype(jnp.bfloat16)
    y = layer(narrow)
    assert isinstance(y, jax.Array) and y.dtype == jnp.float32
    assert_right(layer, np.asarray(narrow), np.asarray(y))
    out = np.empty((BATCH, STEPS, FILTERS), np.float32)
    assert layer(jnp.asarray(x), out=out) is out
    for given in (x, jnp.asarray(x), x.tolist()):
        with pytest.raises(ValueError, match="must be writable"):
            layer(given, out=jnp.zeros(out.shape))
    with pytest.raises(TypeError, match=r"inputs\.dtype=int32"):
        layer(jnp.zeros(x.shape, jnp.int32))


# ---- wrong inputs -------------------------------------------------------------------------------

WRONG = {
    "rank 2": (np.zeros((STEPS, CHANNELS), "f4"), ValueError, "expected min_ndim=3, found ndim=2"),
    "rank 4": (np.zeros((1, 1, STEPS, CHANNELS), "f4"), ValueError, "must have the same length as"),
    "a number": (1.0, ValueError, "found ndim=0"),
    "channels": (np.zeros((1, STEPS, 4), "f4"), ValueError, "expected axis -1 of input shape "
                 r"to have value 5, but received input with shape \(1, 9, 4\)"),
    "integers": (np.zeros((1, STEPS, CHANNELS), int), TypeError, r"floating-point dtype. Received: "
                 r"inputs.dtype=int64. Convert it with `.astype\('float32'\)`"),
    "lists of integers": ([[[0] * CHANNELS] * STEPS], TypeError, "inputs.dtype=int64"),
    "bool": (np.zeros((1, STEPS, CHANNELS), bool), TypeError, "inputs.dtype=bool"),
    "complex": (np.zeros((1, STEPS, CHANNELS), "c8"), TypeError, "inputs.dtype=complex64"),
    "objects": (np.full((1, STEPS, CHANNELS), None), TypeError, "inputs.dtype=object"),
    "texts": (np.full((1, STEPS, CHANNELS), "1.0"), TypeError, "inputs.dtype=<U3"),
    "ragged lists": ([[[0.0] * 5], [[0.0] * 5] * 2], ValueError, "must be a rectangular array"),
    "text": ("text", TypeError, "must be a NumPy array, a nested list.*str"),
    "None": (None, TypeError, "The `inputs` argument must be.*NoneType"),
    "dict": ({"x": 1}, TypeError, "dict"),
}  # fmt: skip


# Of a layer that is not built, the first input says how many channels there are.
@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "channels"])
def test_wrong_first_inputs(kind):
    x, error, message = WRONG[kind]
    layer = SeparableConv1D(FILTERS, 3)
    with pytest.raises(error, match=message):
        layer(x)
    assert not layer.built


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_inputs(kind):
    x, error, message = WRONG[kind]
    layer = layer_of()
    layer(inputs())
    with pytest.raises(error, match=message):
        layer(x)
    assert_right(layer, inputs(), layer(inputs()))  # it works as before


def test_too_few_steps():
    layer = SeparableConv1D(FILTERS, 4, dilation_rate=3)
    assert layer(inputs(steps=10)).shape == (BATCH, 1, FILTERS)
    for steps in (9, 1):
        with pytest.raises(ValueError, match="Computed output size would be zero or negative"):
            layer(inputs(steps=steps))


@pytest.mark.parametrize("shape", [(None, None, None), (2, 9, None), (2, 9, 0)], ids=str)
def test_unknown_channels(shape):
    with pytest.raises(ValueError, match="channel dimension of the inputs must be a positive"):
        SeparableConv1D(3, 2).build(shape)
