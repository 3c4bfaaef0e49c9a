"""What every test starts from: nobody's settings, caches or tuning logs, and no GPU presumed."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from typing import Any

import cuda_counts
import hypothesis
import numpy as np
import pytest
from quick_searches import builds_here  # noqa: F401  # a fixture

from tvm_sepconv import gpu

# Before any test module is imported: keras and jax read these once, and a person's keras.json,
# cached libraries or tuned records must not decide what a test sees.
_home = tempfile.TemporaryDirectory(prefix="tvm-sepconv-tests-")
for _name in ("KERAS_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
    os.environ[_name] = os.path.join(_home.name, _name.lower())
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name in [name for name in os.environ if name.startswith("TVM_SEPCONV_")]:
    del os.environ[_name]

# Nothing here depends on how fast this machine is just now, nor on chance.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def no_chance() -> None:
    """Let what draws without a seed draw the same in every run, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


_cuda: Counter[str] = Counter()  # of the whole run, in the process that reports it


# These take longest: where files run side by side, they begin, so that none is alone at the end.
LONGEST = (
    "conformance", "runtime", "x86_code", "cuda_build", "search_faults", "tune_end_to_end", "jax",
    "keras_layer", "torch_pairs", "emulated_python", "keras_backends", "search", "jit", "arm",
    "tilings", "modelled_goldens", "tune", "bench_peers", "bench_baselines", "torch_operator",
    "demo", "cuda_boards", "boards_tune", "boards", "epilogue",
)  # fmt: skip
_order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist take files in this order, not those with most tests first."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip what is marked `cuda` where there is no GPU."""
    items.sort(key=lambda item: _order.get(item.path.name, len(_order)))
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and (reason := gpu.missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {reason}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Give the report what was counted, so that it reaches the process that reports."""
    outcome = yield
    report = outcome.get_result()
    counts = cuda_counts.taken()
    if item.get_closest_marker("cuda") and (report.when == "call" or report.skipped):
        counts["skipped" if report.skipped else "run"] = 1
    report.user_properties.append(("cuda", counts))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up, also what other processes counted."""
    for name, counts in report.user_properties:
        if name == "cuda":
            _cuda.update(counts)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that had a GPU and tests for it, none of which ran."""
    if _cuda["skipped"] and not _cuda["run"] and gpu.missing() is None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was done with CUDA kernels."""
    if not _cuda.total():
        return
    emulated, compiled, run, skipped = (
        _cuda[name] for name in ("emulated", "compiled", "run", "skipped")
    )
    terminalreporter.write_line(
        f"CUDA: {emulated} kernels emulated, {compiled} compiled by nvcc; {run} tests run on a "
        f"GPU, {skipped} not"
    )
    if skipped and not run and gpu.missing() is None:
        terminalreporter.write_line(
            "This machine has a GPU, and no test ran on it: the run fails", red=True
        )
