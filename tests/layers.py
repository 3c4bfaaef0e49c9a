"""Small layers, inputs and tensors for the tests of the layer, and what is right for them."""

from __future__ import annotations

import numpy as np

from tvm_sepconv import SeparableConv1D, reference

BATCH, STEPS, CHANNELS, FILTERS = 2, 9, 5, 6
FORMATS = ("channels_last", "channels_first")


def normal(*shape: int, dtype="float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inputs(data_format: str = "channels_last", dtype="float32", steps: int = STEPS) -> np.ndarray:
    x = normal(BATCH, steps, CHANNELS, dtype=dtype)
    return x if data_format == "channels_last" else np.ascontiguousarray(x.swapaxes(1, 2))


def layer_of(data_format: str = "channels_last", **arguments) -> SeparableConv1D:
    """A built layer; few different ones, because each is compiled once a session."""
    given = {"filters": FILTERS, "kernel_size": 3, "padding": "same", "seed": 7}
    layer = SeparableConv1D(**{**given, **arguments}, data_format=data_format)
    layer.build(inputs(data_format).shape)
    return layer


def expected(layer: SeparableConv1D, x) -> np.ndarray:
    weights = [*layer.get_weights(), None]
    return reference.separable_conv1d(x, *weights[:3], layer.config)


def assert_right(layer, x, y, tolerance: float = 1e-5):
    np.testing.assert_allclose(np.asarray(y), expected(layer, x), rtol=tolerance, atol=tolerance)


def at_byte_offset(x, offset):
    room = np.zeros(x.nbytes + 64, np.uint8)
    view = room[offset : offset + x.nbytes].view(np.uint8)
    array = np.frombuffer(view.data, x.dtype).reshape(x.shape)
    array[...] = x
    return array


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


class FakeTensor:
    """What torch gives: DLPack, gradients that forbid the export, its own `from_dlpack`."""

    def __init__(self, array, device=(1, 0), requires_grad=False):
        self.array, self.device, self.requires_grad = array, device, requires_grad

    def __dlpack__(self, **keywords):
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        keywords.pop("dl_device", None)
        keywords.pop("copy", None)
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.device

    def detach(self):
        return FakeTensor(self.array, self.device)

    def __array_namespace__(self, api_version=None):
        return Namespace


class Namespace:
    @staticmethod
    def from_dlpack(array):
        return FakeTensor(np.from_dlpack(array))
