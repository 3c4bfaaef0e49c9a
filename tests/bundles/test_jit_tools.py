"""What compiling on first use compiles with: the system's tools, pip's, or an error."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import native
import pytest

pytest.importorskip("tvm")

from tvm_sepconv import jit, targets
from tvm_sepconv.compiler import link
from tvm_sepconv.config import SepConvConfig

KERNEL = SepConvConfig.parse(3, 2, 2, activation="relu").kernel_config(12)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache in which nothing is."""
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setattr(jit, "cache_root", lambda: path)
    return path


@pytest.fixture
def toolchains():
    link.toolchain.cache_clear()
    yield
    link.toolchain.cache_clear()


def test_without_a_linker_the_ways_out_are_named(own_cache, toolchains, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "ziglang" else find(name, *more),
    )
    package = r"apt install gcc\).*pip install 'tvm-sepconv\[cross\]'"
    with pytest.raises(RuntimeError, match=f"No C compiler and linker for.*{package}"):
        jit.library(KERNEL)
    assert not list(own_cache.iterdir())
    for triple in ("aarch64-linux-gnu", "x86_64-linux-gnu"):
        if triple.split("-")[0] != targets.machine():
            name = triple.replace("_", "-")
            with pytest.raises(RuntimeError, match=rf"for {triple} .*apt install gcc-{name}\)"):
                link.toolchain(triple)


def test_a_compiler_that_fails_is_quoted(toolchains, tmp_path):
    tools = link.toolchain(f"{targets.machine()}-linux-gnu")
    (tmp_path / "a.c").write_text('#include "not_there.h"\n')
    with pytest.raises(
        RuntimeError, match=r"(?s)This command failed:.*a\.c.*not_there\.h.*libc6-dev"
    ):
        tools.object_file(tmp_path / "a.c", tmp_path / "a.o")


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")
def test_tools_from_pip_alone_give_a_right_layer(own_cache, toolchains, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    assert link.toolchain(f"{targets.machine()}-linux-gnu").name == "zig"
    library, runtime = jit.library(KERNEL)
    c = native.c_api(runtime)  # this very library, whatever the process loaded before
    handle = native.create(c, library, layer.config, layer.get_weights())
    x = native.inputs(layer.config, 4, 10, 12)
    y = x[:, :5, :3].copy()
    assert c.tvm_sepconv_run(handle, 4, 10, native.View.of(x), native.View.of(y)) == 0
    native.check(y, x, layer.config, layer.get_weights())
    c.tvm_sepconv_layer_destroy(handle)
    if shutil.which("nm"):
        assert native.undefined(library) <= {"memcpy", "memmove", "memset"}
        assert native.undefined(runtime) <= native.C_LIBRARY
