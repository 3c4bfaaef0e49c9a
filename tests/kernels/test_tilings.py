"""What the runtime makes of a call: ranges around vectors and tiles, several samples at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import native
import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import reference, runtime, targets
from tvm_sepconv.config import SepConvConfig

pytest.importorskip("tvm")

from tvm_sepconv.compiler.schedules import arm, cpu, x86

from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.workloads import workloads

HERE = targets.runnable()
CANARY = 7
FORMATS = ("channels_last", "channels_first")


@pytest.fixture(autouse=True)
def default_threads() -> Iterator[None]:
    yield
    tvm_sepconv.set_num_threads(None)


# ---- decisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("isa", [*x86.UNITS, *arm.UNITS])
def test_every_default_is_legal(isa: str, data_format: str) -> None:
    family = CpuTarget(isa).family
    unit = family.UNITS[isa]
    for workload in workloads().values():
        for dtype in ("float32", "float64"):
            config = workload.config(data_format=data_format, dtype=dtype)
            kernel = config.kernel_config(workload.channels)
            defaults = family.default_tilings(kernel, isa)
            tiles = [tiling.step_tile for tiling in defaults]
            assert all(cpu.legal(kernel, unit, tiling) for tiling in defaults), defaults
            assert tiles == sorted(set(tiles), reverse=True)
            # What the runtime relies on to serve what is left of a sequence.
            shortest = 1 if data_format == "channels_last" else unit.lanes(dtype)
            assert tiles[-1] == shortest


@pytest.mark.parametrize("channels", [1, 3, 7, 17, 19, 33, 65])
@pytest.mark.parametrize("isa", [*x86.UNITS, *arm.UNITS])
def test_a_partial_vector_of_channels_is_never_a_block_of_its_own(isa: str, channels: int) -> None:
    family = CpuTarget(isa).family
    unit = family.UNITS[isa]
    config = SepConvConfig.parse(40, 3).kernel_config(channels)
    groups = -(-channels // unit.lanes("float32"))
    assert channels % unit.lanes("float32")
    tilings = family.candidates(config, isa) + family.default_tilings(config, isa)
    assert {tiling.channel_block for tiling in tilings} == {groups}
    for other in {1, 2, groups + 1} - {groups}:
        changed = dataclasses.replace(tilings[0], depthwise_block=(4, 1), channel_block=other)
        assert not cpu.legal(config, unit, changed)


# ---- around vectors and tiles --------------------------------------------------------------------

LANES = (2, 4, 8, 16)
AROUND = sorted(
    {1, 63, 64, 65, 127, 128, 129, 200}
    | {n * lanes + i for lanes in LANES for n in (1, 2) for i in (-1, 0, 1)}
)
TIMES = {
    "plain": dict(kernel_size=3),
    "strided": dict(kernel_size=3, strides=2, padding=(1, 1)),
    "dilated": dict(kernel_size=4, dilation_rate=5, activation="relu", padding="same"),
}


def between_canaries(layer: tvm_sepconv.SeparableConv1D, x: np.ndarray) -> np.ndarray:
    """Call on a view amid NaN, into a view amid canaries, between its rows and samples as well."""
    inner = (slice(1, -2), slice(2, -3), slice(19, -18))
    margin = np.array([3, 5, 37])
    around = np.full(margin + x.shape, np.nan, x.dtype)
    around[inner] = x
    canvas = np.full(margin + layer.compute_output_shape(x.shape), CANARY, x.dtype)
    out = canvas[inner]
    out[...] = np.nan
    assert layer(around[inner], out=out) is out
    y = out.copy()
    out[...] = CANARY
    assert (canvas == CANARY).all(), "written outside `out`"
    return y


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("target", HERE)
@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_any_number_of_steps(time: dict[str, object], target: str, data_format: str) -> None:
    # Wide enough for three threads to share a few samples of a few vectors of steps.
    arguments = {"filters": 50, "data_format": data_format, **time}
    layer = native.layer_of(48, **arguments)
    layer.compile(tvm_sepconv.BuildOptions(target=target))
    config, tensors = layer.config, layer.get_weights()
    for number, out_steps in enumerate(AROUND):
        steps = next(n for n in range(500) if config.out_steps(n) == out_steps)
        x = native.inputs(config, 3, steps, 48, seed=number)
        tvm_sepconv.set_num_threads(1 + number % 2 * 2)
        y = between_canaries(layer, x)
        native.check(y, x, config, tensors)
        tvm_sepconv.set_num_threads(3 - number % 2 * 2)
        np.testing.assert_array_equal(between_canaries(layer, x), y)


# ---- batches -------------------------------------------------------------------------------------

BATCH = 9
BATCHED = {  # name: (layer, channels)
    "last": (dict(filters=96, kernel_size=3, padding="same"), 64),
    "last-partial": (dict(filters=33, kernel_size=3, depth_multiplier=2), 19),
    "last-narrow": (dict(filters=20, kernel_size=2, strides=2, activation="gelu"), 3),
    "first": (dict(filters=96, kernel_size=3, data_format="channels_first"), 64),
    "first-strided": (
        dict(filters=33, kernel_size=5, strides=2, padding="same", data_format="channels_first"),
        19,
    ),
}


def spread(array: np.ndarray) -> np.ndarray:
    """The same samples with two others between them, that nobody may touch."""
    room = np.full((3 * len(array), *array.shape[1:]), np.nan, array.dtype)
    room[::3] = array
    return room[::3]


def inside_out(array: np.ndarray) -> np.ndarray:
    """The batch as the second axis in memory: rows lie further apart than samples."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


LAYOUTS = {
    "compact": lambda a: a,
    "spread": spread,
    "inside-out": inside_out,
    "backwards": lambda a: a[::-1].copy()[::-1],
    "one": lambda a: np.broadcast_to(a[:1], a.shape),
}
OUTPUTS = [name for name in LAYOUTS if name != "one"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_a_batch_may_lie_in_memory_as_it_likes(
    case: tuple[dict[str, object], int], threads: int
) -> None:
    arguments, channels = case
    layer = native.layer_of(channels, **arguments)
    config, tensors = layer.config, layer.get_weights()
    layer.compile()
    tvm_sepconv.set_num_threads(threads)
    library, path = layer._library
    c = native.c_api(runtime.start(path).path)
    handle = native.create(c, library, config, tensors)
    for steps in (5, 21, 70, 150):
        data = native.inputs(config, BATCH, steps, channels)
        for into, outof in itertools.product(LAYOUTS, OUTPUTS):
            x = LAYOUTS[into](data)
            shape = config.compute_output_shape(x.shape)
            y = LAYOUTS[outof](np.full(shape, np.nan, "float32"))
            views = native.View.of(x), native.View.of(y)
            assert c.tvm_sepconv_run(handle, BATCH, steps, *views) == 0, (into, outof)
            np.testing.assert_array_equal(y, layer(np.array(x)), err_msg=f"{into} to {outof}")
            if outof == "spread":
                between = y.base.reshape(BATCH, 3, *y.shape[1:])[:, 1:]
                assert np.isnan(between).all(), into
        native.check(layer(data), data, config, tensors)
        np.testing.assert_array_equal(layer(data[::-1]), layer(data)[::-1])
    c.tvm_sepconv_layer_destroy(handle)


def test_the_samples_of_a_batch_are_those_of_single_calls() -> None:
    layer = native.layer_of(19, filters=33, kernel_size=3)
    x = native.inputs(layer.config, BATCH, 40, 19)
    single = np.concatenate([layer(sample[None]) for sample in x])
    np.testing.assert_array_equal(layer(x), single)
    expected = reference.separable_conv1d(x, *layer.get_weights(), layer.config)
    assert np.abs(single - expected).max() < 1e-3
