"""The functions that measuring on a board calls, here in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
import tvm_ffi

from tvm_sepconv import targets
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
