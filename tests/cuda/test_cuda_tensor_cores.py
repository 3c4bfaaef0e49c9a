"""The tensor-core form of the CUDA kernels: right on the emulator, real instructions, no spills."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest

pytest.importorskip("tvm")
ml_dtypes = pytest.importorskip("ml_dtypes")

import cuda_kernels  # noqa: E402
from tvm_sepconv.compiler.schedules import cuda  # noqa: E402
from tvm_sepconv.compiler.schedules import cuda_tensor_cores as form  # noqa: E402

from tvm_sepconv import reference  # noqa: E402
from tvm_sepconv.config import KernelConfig, SepConvConfig  # noqa: E402

DTYPES = ("float16", "bfloat16", "float32")
# Of the tensor cores' operands: unit roundoffs of 11, 8 and 11 bits.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-11}


@dataclass(frozen=True)
class Shape:
    layer: Mapping[str, object]
    channels: int
    sizes: tuple[tuple[int, int], ...]  # (batch, steps), all from one kernel


SHAPES = {
    "even": Shape(dict(filters=64, kernel_size=13, padding="same", activation="relu"), 64,
                  ((2, 128), (1, 3))),
    "odd": Shape(dict(filters=33, kernel_size=5, strides=3, dilation_rate=2, depth_multiplier=2,
                      padding="same", activation="silu", use_bias=False), 37, ((2, 200), (1, 1))),
    "strided": Shape(dict(filters=96, kernel_size=11, strides=2, padding=(7, 2)), 80,
                     ((1, 160), (3, 16))),
    "dilated": Shape(dict(filters=40, kernel_size=4, dilation_rate=3, padding=(9, 0),
                          activation="gelu"), 24, ((1, 136), (2, 65))),
    "multiplied": Shape(dict(filters=32, kernel_size=3, depth_multiplier=3), 16, ((2, 72), (1, 5))),
    "tiny": Shape(dict(filters=1, kernel_size=1, strides=5, depth_multiplier=2), 1, ((2, 9),)),
    "far": Shape(dict(filters=8, kernel_size=3, dilation_rate=3000, padding="same"), 8, ((1, 66),)),
    "sparse": Shape(dict(filters=16, kernel_size=12, strides=9, padding="same"), 40, ((1, 300),)),
}  # fmt: skip
TILINGS = {
    "long": None,
    "short": None,
    "one-buffer": form.Tiling(32, 96, 32, 1, 2, run=2, buffers=1),
    "wide": form.Tiling(128, 64, 48, 4, 2, run=16),
}


CASES = [
    (*case, "sm_80")
    for case in cuda_kernels.pairwise(
        list(SHAPES), list(TILINGS), cuda_kernels.LAYOUTS, DTYPES, cuda_kernels.ALIGNMENTS
    )
]
OLD_CASES = [  # copies are synchronous there, and products made by other instructions
    *cuda_kernels.pairwise(
        list(TILINGS), cuda_kernels.LAYOUTS, ["float16"], cuda_kernels.ALIGNMENTS
    ),
    ("long", "channels_first", "bfloat16", "aligned"),
    ("one-buffer", "channels_last", "bfloat16", "scalar"),
    ("wide", "channels_last", "bfloat16", "aligned"),
]
CASES += [
    (shape, *case, "sm_75")
    for shape, case in zip([*SHAPES, "odd", "multiplied", "sparse"], OLD_CASES, strict=True)
]


def tiling_of(config: KernelConfig, name: str, arch: str) -> form.Tiling:
    """The tiling of that name, the default where it does not fit."""
    tiling = TILINGS[name]
    if tiling is not None and arch == "sm_75":
        tiling = replace(tiling, buffers=1)
    if tiling is not None and form.refusal(config, True, arch, tiling) is None:
        return tiling
    return form.default_tilings(config, True, arch)[-1 if name == "short" else 0]


def inset(shape: tuple[int, ...], dtype: np.dtype, aligned: bool) -> tuple[np.ndarray, np.ndarray]:
    """An array of NaN and a view of `shape` in it, 16-byte aligned in all rows or in none."""
    width = 8 if aligned else 1
    row = -(-shape[2] // width) * width + width
    flat = cuda_kernels.framed(np.full((shape[0] + 1) * (shape[1] + 2) * row, np.nan, dtype))
    base = flat.reshape(shape[0] + 1, shape[1] + 2, row)
    return base, base[1:, 1:-1, (0 if aligned else 1) :][..., : shape[2]]


def whole(extent: int, multiple: int) -> int:
    return -(-extent // multiple) * multiple


class Layer:
    """One variant's kernel on the emulator, its weights, and its reference."""

    def __init__(self, shape: Shape, tiling_name: str, layout: str, dtype: str, aligned: bool,
                 folder: Path, arch: str = "sm_80") -> None:  # fmt: skip
        if shutil.which("g++") is None:
            pytest.skip("the CUDA emulator needs g++")
        self.config = SepConvConfig.parse(**shape.layer, data_format=layout)
        self.kernel_config = replace(self.config.kernel_config(shape.channels), dtype=dtype)
        self.tiling = tiling_of(self.kernel_config, tiling_name, arch)
        self.aligned = aligned and cuda.can_align(self.kernel_config)
        self.rng = np.random.default_rng(0)
        self.dtype = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
        self.weights = self._weights(shape.channels)
        self.packed = {name: cuda_kernels.framed(array) for name, array in self._pack().items()}
        (self.source,) = cuda_kernels.emit(self.kernel_config, self.tiling, self.aligned).values()
        self.kernel = cuda_emulator.Kernel(self.source, folder, old=arch == "sm_75")

    def _weights(self, channels: int):
        depthwise, pointwise = (
            self.rng.standard_normal(shape).astype("float32")
            for shape in (self.config.depthwise_shape(channels),
                          self.config.pointwise_shape(channels))
        )  # fmt: skip
        bias = self.rng.standard_normal(self.config.filters).astype("float32")
        return depthwise, pointwise.astype(self.dtype), bias if self.config.use_bias else None

    def _pack(self) -> dict[str, np.ndarray]:
        """From Keras's layout to the kernel's, element by element."""
        depthwise, pointwise, bias = self.weights
        taps, channels, multiplier = depthwise.shape
        filters, lined = pointwise.shape[2], whole(channels, 16)
        d = np.zeros((taps, multiplier, lined), "float32")
        p = np.zeros((whole(filters, 32) // 32, multiplier * lined, 32), self.dtype)
        for c, m in np.ndindex(channels, multiplier):
            d[:, m, c] = depthwise[:, c, m]
            for f in range(filters):
                p[f // 32, m * lined + c, f % 32] = pointwise[0, c * multiplier + m, f]
        arrays = {"depthwise_kernel_ptr": d, "pointwise_kernel_ptr": p}
        if bias is not None:
            arrays["bias_ptr"] = np.pad(bias, (0, whole(filters, 32) - filters))
        return arrays

    def _shape(self, batch: int, steps: int, channels: int) -> tuple[int, int, int]:
        last = self.config.data_format == "channels_last"
        return (batch, steps, channels) if last else (batch, channels, steps)

    def input(self, batch: int, steps: int) -> np.ndarray:
        shape = self._shape(batch, steps, self.kernel_config.channels)
        values = self.rng.standard_normal(shape).astype(self.dtype)
        _, view = inset(shape, self.dtype, self.aligned)
        view[...] = values
        return view

    def __call__(self, x: np.ndarray, left: int, out_steps: int, order: int) -> np.ndarray:
        steps = x.shape[1 if self.config.data_format == "channels_last" else 2]
        shape = self._shape(len(x), out_steps, self.config.filters)
        around, output = inset(shape, self.dtype, self.aligned)
        (x_batch, x_row, _), (y_batch, y_row, _) = (
            [stride // view.itemsize for stride in view.strides] for view in (x, output)
        )
        sizes = dict(
            batch=len(x), steps=steps, out_steps=out_steps, left=left,
            x_batch=x_batch, x_row=x_row, y_batch=y_batch, y_row=y_row,
        )  # fmt: skip
        t = self.tiling
        grid = (-(-out_steps // t.step_tile), -(-self.config.filters // t.filter_tile), len(x))
        self.kernel.launch(
            grid, (32, t.warps, 1), {**self.packed, **sizes, "x_ptr": x, "output_ptr": output},
            order, form.shared_bytes(self.kernel_config, t),
        )  # fmt: skip
        answer = output.astype("float64")
        output[...] = np.nan
        assert np.isnan(around.astype("float32")).all(), "wrote outside the output"
        return answer

    def check(self, answer: np.ndarray, x: np.ndarray, config: SepConvConfig | None = None) -> None:
        """Each output within six deviations of its roundings.

        The roundings of the depthwise results (and of TF32's weights) are independent and uniform
        within one unit of each product, so their sum deviates by √(Σ products²) / √3 units. To it
        come the float32 sums and the rounding of the result.
        """
        config = config or self.config
        wide = [None if a is None else np.asarray(a, "float64") for a in (x, *self.weights)]
        expected = reference.separable_conv1d(*wide, config)
        scale = reference.magnitude(*wide, config)
        mid = replace(config, filters=wide[2].shape[1], use_bias=False)
        identity = np.eye(wide[2].shape[1])[None]
        middle = reference.separable_conv1d(*wide[:2], identity, None, mid, activate=False)
        last = config.data_format == "channels_last"
        squares = np.square(middle if last else middle.swapaxes(1, 2)) @ np.square(wide[2][0])
        products = np.sqrt(squares if last else squares.swapaxes(1, 2))
        unit = ROUNDOFF[self.kernel_config.dtype]
        twice = np.sqrt(2) if self.kernel_config.dtype == "float32" else 1.0
        sums = 4 * 2.0**-23 * np.sqrt(config.kernel_size + wide[2].shape[1]) * scale
        out = 2.0**-23 if self.kernel_config.dtype == "float32" else unit
        rounded = 6 / np.sqrt(3) * twice * unit * products
        allowed = 1.13 * (rounded + sums) + (out + 4 * 2.0**-23) * np.abs(expected)
        both = tuple(slice(min(pair)) for pair in zip(answer.shape, expected.shape, strict=True))
        wrong = ~(np.abs(answer[both] - expected[both]) <= allowed[both])  # a NaN is wrong too
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size}"


@pytest.mark.parametrize(("shape", "tiling", "layout", "dtype", "moves", "arch"), CASES)
def test_is_right_in_every_order_of_its_threads(
    shape, tiling, layout, dtype, moves, arch, tmp_path
):
    layer = Layer(SHAPES[shape], tiling, layout, dtype, moves == "aligned", tmp_path, arch)
    assert layer.tiling.stage_input or shape == "far"
    for batch, steps in SHAPES[shape].sizes:
        x = layer.input(batch, steps)
        left, _ = layer.config.pad_amounts(steps)
        out_steps = layer.config.out_steps(steps)
        if layer.aligned and layout == "channels_first":  # then only whole vectors of output steps
            out_steps = out_steps // 8 * 8 or 8
        answers = [layer(x, left, out_steps, order) for order in (0, 2)]
        layer.check(answers[0], x)
        assert len({answer.tobytes() for answer in answers}) == 1


def test_negative_left_padding_skips_steps(tmp_path):
    layer = Layer(SHAPES["dilated"], "short", "channels_first", "float16", True, tmp_path)
    valid = replace(layer.config, padding="valid")
    x = layer.input(2, 92)
    layer.check(layer(x, -7, 72, 0), x[..., 7:], valid)


@pytest.mark.parametrize(
    ("tiling", "line"),
    [("long", "sepconv_wait();"), ("long", "__syncthreads();"), ("one-buffer", "__syncthreads();")],
)
def test_emulator_notices_every_missing_wait_and_barrier(tiling, line, tmp_path):
    layer = Layer(SHAPES["strided"], tiling, "channels_last", "float16", True, tmp_path)
    x = layer.input(1, 80)
    right = layer(x, 7, 39, 0).tobytes()
    start = layer.source.index('extern "C" __global__')
    places = [m.span() for m in re.compile(re.escape(line)).finditer(layer.source, start)]
    assert places
    for number, (start, end) in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        layer.kernel = cuda_emulator.Kernel(layer.source[:start] + layer.source[end:], folder)
        try:
            answers = {layer(x, 7, 39, order).tobytes() for order in cuda_emulator.ORDERS}
        except cuda_emulator.EmulationError as error:
            assert re.search("waits for (its|an) asynchronous cop", str(error))
        else:
            assert answers != {right}, f"{line} {number}"


@pytest.mark.parametrize("layout", cuda_kernels.LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        pair
        for pair in itertools.product(DTYPES, ["sm_75", "sm_80", "sm_86", "sm_90"])
        if pair != ("float32", "sm_75")
    ],
)
def test_candidates_serve_and_begin_with_the_defaults(dtype, arch, layout):
    for channels, filters, taps, dilation in (
        (256, 256, 33, 1), (512, 512, 51, 1), (37, 70, 5, 3), (1, 1, 1, 1), (64, 64, 3, 4000),
    ):  # fmt: skip
        config = KernelConfig(
            channels=channels, filters=filters, kernel_size=taps, dilation_rate=dilation,
            dtype=dtype, data_format=layout,
        )  # fmt: skip
        defaults = form.default_tilings(config, True, arch)
        found = form.candidates(config, True, arch)
        assert found[: len(defaults)] == defaults
        assert len(set(found)) == len(found) <= 192
        assert len(found) >= 10 or dilation > 1 or channels == 1
        if channels > 64:  # the first few serve much work and little
            assert {tiling.step_tile <= 32 for tiling in found[len(defaults) :][:3]} == {
                True,
                False,
            }
        assert {form.refusal(config, True, arch, tiling) for tiling in found} == {None}


@pytest.mark.parametrize(
    ("change", "allow_tf32", "arch", "tiling", "reason"),
    [
        ({"dtype": "float32"}, True, "sm_75", {"buffers": 1}, "no TF32 before sm_80"),
        ({}, False, "sm_75", {"channel_tile": 32}, "no asynchronous copies before sm_80"),
        ({}, False, "sm_75", {"channel_tile": 32, "buffers": 1}, None),
        (
            {"dtype": "float64", "accumulation_dtype": "float64"},
            True,
            "sm_90",
            {},
            "add in float32",
        ),
        ({"accumulation_dtype": "float64"}, True, "sm_90", {}, "add in float32"),
        ({"dtype": "float32"}, False, "sm_90", {}, "TF32 is not allowed"),
        ({}, False, "sm_86", {"channel_tile": 128}, "more shared memory than a block may have"),
        ({}, False, "sm_90", {"step_tile": 256}, "more registers than a thread may have"),
        ({}, False, "sm_86", {}, None),
    ],
)
def test_refuses_what_cannot_serve(change, allow_tf32, arch, tiling, reason):
    config = replace(
        KernelConfig(channels=256, filters=256, kernel_size=33, dtype="float16"), **change
    )
    said = form.refusal(config, allow_tf32, arch, replace(TILING, **tiling))
    assert said == reason if reason is None else reason in said
    if not tiling and reason:
        with pytest.raises(ValueError, match=f"{arch} do not serve .*{config.dtype}.*{reason}"):
            form.default_tilings(config, allow_tf32, arch)


TILING = form.Tiling(64, 256, 64, 2, 4)


def test_tiling_survives_a_record():
    assert form.Tiling.from_dict(TILING.to_dict()) == TILING
    for wrong in ({"form": "cores"}, {"run": 8.0}, {"stage_input": 1}, {"more": 1}):
        with pytest.raises(ValueError, match="decision"):
            form.Tiling.from_dict({**TILING.to_dict(), **wrong})


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_tile", 48), ("step_tile", 0), ("step_tile", 288), ("filter_tile", 96),
     ("filter_tile", 0), ("channel_tile", 24), ("channel_tile", 0), ("step_warps", 3),
     ("filter_warps", 16), ("run", 3), ("buffers", 3)],
)  # fmt: skip
def test_tiling_refuses_numbers_that_do_not_divide(name, value):
    with pytest.raises(ValueError, match=f"`{name}` decision must be .*{name}={value}"):
        replace(TILING, **{name: value})
