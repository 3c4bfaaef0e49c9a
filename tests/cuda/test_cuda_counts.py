"""A run of the tests tells what it did with CUDA, and fails where a GPU was left unused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm_ffi")

TESTS = Path(__file__).parents[1]
MODULE = """
import cuda_counts, pytest

def test_emulates():
    cuda_counts.add("emulated", 3)

def test_compiles():
    cuda_counts.add("compiled")

{marked}
"""
RUNS = "@pytest.mark.cuda\ndef test_runs(): pass"
SKIPS = "@pytest.mark.cuda\ndef test_skips(): pytest.skip('a toolkit is missing')"
USUAL = "CUDA: 3 kernels emulated, 1 compiled by nvcc; {} tests run on a GPU, {} not"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with a driver's library that finds two GPUs."""
    if shutil.which("g++") is None:
        pytest.skip("the driver's stand-in needs g++")
    from cuda_emulator.library import build_driver

    folder = tmp_path_factory.mktemp("driver")
    build_driver(folder / "libcuda.so.1")
    return folder


@pytest.mark.parametrize(
    ("has_gpu", "marked", "workers", "status", "run", "left"),
    [(False, RUNS, 0, 0, 0, 1), (True, RUNS + "\n" + SKIPS, 1, 0, 1, 1), (True, SKIPS, 0, 1, 0, 1),
     (True, SKIPS, 1, 1, 0, 1), (True, "", 0, 0, 0, 0)],
    ids=["no GPU", "a worker runs", "none runs", "no worker runs", "none marked"],
)  # fmt: skip
def test_counts(has_gpu, marked, workers, status, run, left, driver, tmp_path):
    (tmp_path / "test_it.py").write_text(MODULE.format(marked=marked))
    (tmp_path / "conftest.py").write_text("from real_conftest import *\n")
    shutil.copy(TESTS / "conftest.py", tmp_path / "real_conftest.py")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{TESTS}",
        "LD_LIBRARY_PATH": str(driver if has_gpu else tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-n", str(workers)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert USUAL.format(run, left) in done.stdout
    assert ("the run fails" in done.stdout) == bool(status)
