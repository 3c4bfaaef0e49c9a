"""A machine with GPUs that are not there: the product's own CUDA libraries, built for this CPU."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_tensors
import pytest

from tvm_sepconv import SeparableConv1D, cuda_tensors, gpu, jit

FRAMEWORKS = {
    "PyTorch": gpu_tensors.Torch,
    "CuPy": gpu_tensors.CuPy,
    "JAX": gpu_tensors.Jax,
    "other": gpu_tensors.Tensor,
}
STREAM = 5  # PyTorch's and CuPy's current one; JAX and others take the default one, 1


class Gpus:
    """The machine as the driver and as every library loaded so far sees it."""

    def __init__(self, driver: Path) -> None:
        from cuda_emulator.library import Machine

        self._machine = Machine
        self._parts = {driver: Machine(driver)}

    def set(self, *layers: SeparableConv1D, **settings: int) -> None:
        """Change the machine, as `layers` see it too."""
        for layer in layers:
            self._part(layer)
        for part in self._parts.values():
            part.set(**settings)

    def log(self, layer: SeparableConv1D | Path, *kinds: str) -> list[str]:
        """What the layer's library did since it was last asked; only lines that start so."""
        lines = self._part(layer).log()
        return [line for line in lines if not kinds or line.startswith(kinds)]

    def reset(self) -> None:
        for part in self._parts.values():
            part.reset()

    def _part(self, layer: SeparableConv1D | Path) -> Any:
        path = layer if isinstance(layer, Path) else layer._cuda.library.path
        return self._parts.setdefault(path, self._machine(path))


@pytest.fixture(scope="module")
def emulated_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpus]:
    if shutil.which("g++") is None:
        pytest.skip("the emulation of CUDA libraries needs g++")
    pytest.importorskip("tvm")
    from cuda_emulator import library

    from tvm_sepconv.compiler import nvcc

    folder = tmp_path_factory.mktemp("gpus")
    library.build_driver(folder / "driver.so")
    torch, cupy = gpu_tensors.torch_module(), gpu_tensors.cupy_module(STREAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc, "find", library.Nvcc)
        patch.setattr(jit, "cache_root", lambda: folder)  # nobody else may find these libraries
        patch.setattr(gpu, "_DRIVER", str(folder / "driver.so"))
        patch.setattr(cuda_tensors, "sys", SimpleNamespace(modules={"torch": torch, "cupy": cupy}))
        yield Gpus(folder / "driver.so")


@pytest.fixture
def gpus(emulated_gpus: Gpus) -> Iterator[Gpus]:
    """Two GPUs of sm_80 whose kernels run on this CPU."""
    gc.collect()  # what other tests left is freed now, and not while this one counts
    gc.disable()
    emulated_gpus.reset()
    yield emulated_gpus
    emulated_gpus.reset()
    gc.enable()
