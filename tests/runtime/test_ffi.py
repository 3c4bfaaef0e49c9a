"""The functions that measuring on a board calls, here in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import native
import numpy as np
import pytest
import tvm_ffi

from tvm_sepconv import runtime, targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.config import SepConvConfig

if not targets.runnable():
    pytest.skip("libraries are made for x86-64 and ARM machines", allow_module_level=True)
TARGET = cpu(targets.runnable()[0])
CONFIG = SepConvConfig.parse(8, 3, padding="same", activation="relu")
CHANNELS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ffi")
    build.build_runtime(TARGET, path / "runtime.so")
    kernel = CONFIG.kernel_config(CHANNELS)
    build.build_library(kernel, TARGET, path / "layer.so", build.variants(kernel, TARGET))
    return path


@pytest.fixture(scope="module")
def functions(folder: Path) -> Any:
    return tvm_ffi.load_module(str(folder / "runtime.so"))


def tensors(*arrays: np.ndarray) -> list[Any]:
    return [tvm_ffi.from_dlpack(array) for array in arrays]


@pytest.fixture
def layer(functions: Any, folder: Path) -> Iterator[int]:
    handle = functions["create"](
        str(folder / "layer.so"), *tensors(*native.weights(CONFIG, CHANNELS)), 1, 0, 0
    )
    assert handle
    yield handle
    assert functions["destroy"](handle) == 0


def text_of(functions: Any) -> str:
    room = np.zeros(512, np.uint8)
    size = functions["last_error"](*tensors(room))
    return room[:size].tobytes().decode()


def test_a_layer_made_through_them_is_right(functions: Any, layer: int) -> None:
    x = native.inputs(CONFIG, 2, 37, CHANNELS)
    y = np.full((2, 37, CONFIG.filters), np.nan, np.float32)
    assert functions["run"](layer, *tensors(x, y)) == 0
    native.check(y, x, CONFIG, native.weights(CONFIG, CHANNELS))


def with_rows_apart(array: np.ndarray) -> np.ndarray:
    room = np.full((*array.shape[:2], array.shape[2] + 3), np.nan, array.dtype)
    room[..., 1:-2] = array
    return room[..., 1:-2]


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


TAKEN = {"compact": lambda a: a, "rows apart": with_rows_apart}


@pytest.mark.parametrize("into", [*TAKEN.values(), read_only], ids=[*TAKEN, "read-only"])
@pytest.mark.parametrize("outof", TAKEN.values(), ids=TAKEN)
def test_arrays_are_taken_by_their_addresses(
    functions: Any,
    layer: int,
    into: Callable[[np.ndarray], np.ndarray],
    outof: Callable[[np.ndarray], np.ndarray],
) -> None:
    x = into(native.inputs(CONFIG, 2, 37, CHANNELS))
    y = outof(np.full((2, 37, CONFIG.filters), np.nan, np.float32))
    assert functions["run"](layer, id(x), id(y)) == 0
    native.check(y, x, CONFIG, native.weights(CONFIG, CHANNELS))
    assert y.base is None or np.isnan(y.base).sum() == y.base.size - y.size


REFUSED = {
    "of another rank": lambda a: a[0],
    "of another dtype": lambda a: a.astype(np.float64),
    "of integers": lambda a: a.view(np.int32),
    "of another byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "backwards": lambda a: a[..., ::-1],
    "between elements": lambda a: np.ndarray(
        a.shape, a.dtype, np.zeros(a.nbytes + 8 * a.size, np.uint8), 1
    ),
    "in parts of a record": lambda a: np.zeros(a.shape, "f4, u2")["f0"],
    "of other channels": lambda a: np.concatenate([a, a], axis=2),
}


@pytest.mark.parametrize("form", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("which", ["x", "output"])
def test_other_arrays_are_refused_by_their_addresses(
    functions: Any, layer: int, form: Callable[[np.ndarray], np.ndarray], which: str
) -> None:
    x = native.inputs(CONFIG, 2, 37, CHANNELS)
    y = np.zeros((2, 37, CONFIG.filters), np.float32)
    x, y = (form(x), y) if which == "x" else (x, form(y))
    before = y.copy()
    assert functions["run"](layer, id(x), id(y)) == 5
    np.testing.assert_array_equal(y, before)


def test_a_read_only_output_is_refused_by_its_address(functions: Any, layer: int) -> None:
    x = native.inputs(CONFIG, 2, 37, CHANNELS)
    y = read_only(np.zeros((2, 37, CONFIG.filters), np.float32))
    assert functions["run"](layer, id(x), id(y)) == 5
    assert not y.any()


def test_reading_arrays_is_tried_before_it_is_relied_on(functions: Any) -> None:
    def agrees(array: np.ndarray, frozen: np.ndarray, tensor: np.ndarray) -> bool:
        return bool(functions["reads_arrays"](id(array), id(frozen), tensor))

    array = np.zeros((4, 3, 2), np.float32)[1:, ::2]
    frozen = read_only(array.view())
    assert agrees(array, frozen, array)
    assert not agrees(array, array.view(), array)
    assert not agrees(frozen, frozen, array)
    assert not agrees(array, read_only(array[:2]), array)
    assert not agrees(array, frozen, array.copy())
    assert not agrees(array, frozen, array[:2])
    assert not agrees(array, frozen, array.view(np.int32))
    assert not agrees(array, frozen, array.base[1:, :2])
    assert not functions["reads_arrays"](id(array), id(frozen))


class OtherModule(dict[str, Any]):
    """A runtime library in which something else is called `reads_arrays`, or nothing."""

    implements_function = dict.__contains__


@pytest.mark.parametrize(
    "module", [OtherModule(), OtherModule(reads_arrays=lambda *_: 0)], ids=["older", "unlike"]
)
def test_arrays_go_as_they_are_to_a_runtime_that_does_not_read_them(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = native.layer_of(CHANNELS, filters=3, kernel_size=2)
    x = native.inputs(layer.config, 2, 9, CHANNELS)
    expected, out = layer(x), np.zeros((2, 8, 3), np.float32)
    assert layer._compiled is not None
    assert layer._compiled.at is id
    monkeypatch.setattr(layer._compiled, "at", runtime._address_or_itself(module))
    assert layer._compiled.at(x) is x
    for inputs in (x, read_only(x.copy())):
        np.testing.assert_array_equal(layer(inputs), expected)
        np.testing.assert_array_equal(layer(inputs, out=out), expected)


def test_arrays_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = native.layer_of(CHANNELS, filters=3, kernel_size=2)
    x = native.inputs(layer.config, 2, 9, CHANNELS)
    expected, out = layer(x), np.zeros((2, 8, 3), np.float32)
    monkeypatch.delattr(type(layer), "_call_any")
    for inputs in (x, read_only(x.copy()), with_rows_apart(x)):
        np.testing.assert_array_equal(layer(inputs), expected)
        out.fill(np.nan)
        assert layer(inputs, out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_addresses_are_those_of_cpython(functions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime._address_or_itself(functions) is id
    monkeypatch.setattr(sys, "implementation", SimpleNamespace(name="pypy"))
    assert runtime._address_or_itself(functions) is not id


def test_trying_leaves_the_output_alone_and_refuses_what_run_refuses(
    functions: Any, layer: int
) -> None:
    x = native.inputs(CONFIG, 2, 37, CHANNELS)
    y = np.full((2, 37, CONFIG.filters), np.nan, np.float32)
    assert functions["try_run"](layer, *tensors(x, y), 10) == 0
    assert np.isnan(y).all()
    assert functions["try_run"](layer, *tensors(x, y[:, 1:]), 10) == 5
    assert functions["run"](layer, *tensors(x, y[:, 1:])) == 5


def test_a_layer_without_bias_takes_none(functions: Any, folder: Path) -> None:
    depthwise, pointwise, _ = tensors(*native.weights(CONFIG, CHANNELS))
    path = str(folder / "layer.so")
    assert functions["create"](path, depthwise, pointwise, None, 1, 0, 0) == 0
    assert "`bias` must be given if the layer has one" in text_of(functions)


# A text of up to seven bytes comes in another form than a longer one.
@pytest.mark.parametrize("path", ["/no.so", "/no/such/library.so"])
def test_why_a_library_does_not_open_is_told(path: str, functions: Any) -> None:
    weights = tensors(*native.weights(CONFIG, CHANNELS))
    assert functions["create"](path, *weights, 1, 0, 0) == 0
    assert text_of(functions).startswith(f"The library cannot be opened: {path}")


def test_a_wrong_number_of_arguments_does_nothing(functions: Any, layer: int) -> None:
    assert functions["create"]("/no.so") == 0
    assert functions["try_run"](layer) == 5
    assert functions["read_file"]("/proc/cpuinfo") == -1
    assert functions["destroy"]() == 0


def test_threads_are_set(functions: Any) -> None:
    before = functions["set_num_threads"]()
    assert functions["set_num_threads"](3) == 3
    assert functions["set_num_threads"]() == 3
    functions["set_num_threads"](0)
    assert functions["set_num_threads"]() == before


def test_files_are_read(functions: Any, tmp_path: Path) -> None:
    (tmp_path / "some").write_text("0123456789")
    room = np.zeros(4, np.uint8)
    assert functions["read_file"](str(tmp_path / "some"), *tensors(room)) == 4
    assert room.tobytes() == b"0123"
    assert functions["read_file"](str(tmp_path / "none"), *tensors(room)) == -1
