"""Writing into a given array."""

from __future__ import annotations

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
    at_byte_offset,
    inputs,
    layer_of,
    read_only,
)

# ---- out ----------------------------------------------------------------------------------------

OUTS = {
    "compact": lambda y: y,
    "inside": lambda y: np.pad(y, ((1, 1), (2, 3), (1, 2)))[1:-1, 2:-3, 1:-2],
    "odd bytes": lambda y: at_byte_offset(y, 3),
    "reversed": lambda y: y.copy()[::-1, ::-1, ::-1],
    "Fortran": np.asfortranarray,
    "every other row": lambda y: np.repeat(y, 2, axis=1)[:, ::2],
    "every other element": lambda y: np.repeat(y, 2, axis=2)[..., ::2],
}


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["linear", "softmax"])
@pytest.mark.parametrize("kind", OUTS)
def test_out(kind, activation, data_format):
    layer, x = layer_of(data_format, activation=activation), inputs(data_format)
    out = OUTS[kind](np.full(layer.compute_output_shape(x.shape), np.nan, np.float32))
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, layer(x))
    out[...] = np.nan
    assert layer(x.astype(np.float64), out=out) is out
    np.testing.assert_array_equal(out, layer(x))


def test_out_may_be_a_tensor():
    layer, x = layer_of(), inputs()
    out = FakeTensor(np.empty((BATCH, STEPS, FILTERS), np.float32))
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out.array, layer(x))


def test_a_tensor_may_be_read_only():
    layer, x = layer_of(), inputs()
    out = FakeTensor(read_only(layer(x)))
    for given in (x, x.astype(np.float64)):
        with pytest.raises(ValueError, match=r"must be writable.*read-only FakeTensor"):
            layer(given, out=out)


def test_out_may_lie_between_the_inputs():
    room = np.zeros((BATCH, STEPS, CHANNELS + FILTERS), np.float32)
    x, out = room[..., :CHANNELS], room[..., CHANNELS:]
    x[...] = inputs()
    layer = layer_of()
    layer(x, out=out)
    np.testing.assert_array_equal(x, inputs())
    np.testing.assert_array_equal(out, layer(inputs()))


def overlapping(shift):
    room = np.zeros(2 * BATCH * STEPS * FILTERS, np.float32)
    x = room[: BATCH * STEPS * CHANNELS].reshape(BATCH, STEPS, CHANNELS)
    return x, room[shift : shift + BATCH * STEPS * FILTERS].reshape(BATCH, STEPS, FILTERS)


@pytest.mark.parametrize("shift", [0, 1, BATCH * STEPS * CHANNELS - 1])
@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_out_must_not_overlap_the_inputs(activation, shift):
    x, out = overlapping(shift)
    with pytest.raises(ValueError, match="`out` argument must not overlap the inputs"):
        layer_of(activation=activation)(x, out=out)
    x, out = overlapping(BATCH * STEPS * CHANNELS)  # next to it is fine
    layer_of(activation=activation)(x, out=out)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((BATCH, STEPS, FILTERS)), TypeError, "dtype float32. Received.*dtype float64"),
        (np.empty((BATCH, STEPS, FILTERS), ">f4"), TypeError, "dtype float32. Received.*>f4"),
        (np.empty((BATCH, STEPS, FILTERS), object), TypeError, "Received.*of dtype object"),
        (np.zeros((BATCH, STEPS, FILTERS)).tolist(), TypeError, "must be an array.*list"),
        ("text", TypeError, "The `out` argument must be a NumPy array.*str"),
        (np.empty((BATCH, STEPS + 1, FILTERS), np.float32), ValueError, r"\(2, 9, 6\). Received: "
         r"out.shape=\(2, 10, 6\)"),
        (np.empty(BATCH * STEPS * FILTERS, np.float32), ValueError, r"out.shape=\(108,\)"),
        (read_only(np.empty((BATCH, STEPS, FILTERS), np.float32)), ValueError, "must be writable"),
    ],
    ids=["float64", "byte order", "objects", "list", "text", "shape", "rank", "read-only"],
)  # fmt: skip
def test_out_that_does_not_fit(out, error, message):
    layer = layer_of()
    for x in (inputs(), inputs().tolist(), inputs()[:, ::-1]):
        with pytest.raises(error, match=message):
            layer(x, out=out)
