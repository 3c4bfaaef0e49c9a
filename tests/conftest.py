"""What every test starts from: nobody's settings, caches or tuning logs, and no GPU presumed."""

from __future__ import annotations

import ctypes
import os
import tempfile

import hypothesis
import pytest

# Before any test module is imported: keras and jax read these once, and a person's keras.json,
# cached libraries or tuned records must not decide what a test sees.
_home = tempfile.TemporaryDirectory(prefix="tvm-sepconv-tests-")
for _name in ("KERAS_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
    os.environ[_name] = os.path.join(_home.name, _name.lower())
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name in [name for name in os.environ if name.startswith("TVM_SEPCONV_")]:
    del os.environ[_name]

# The first example of a test compiles a kernel, the next one finds it: no time limit fits both.
hypothesis.settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tests")


def _has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
