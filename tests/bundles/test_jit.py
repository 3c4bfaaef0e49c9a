"""Compiling on first use: the cache, and what is missing to compile with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import native
import pytest
from waiting import LIMIT_SECS

import tvm_sepconv
from tvm_sepconv import jit, targets
from tvm_sepconv.config import KernelConfig, SepConvConfig

pytest.importorskip("tvm")

from tvm_sepconv.compiler.tuning import logs

CONFIG = SepConvConfig.parse(3, 2, 2, activation="relu")
KERNEL = CONFIG.kernel_config(12)
HERE = targets.runnable()[0]
ORIGIN = logs.described(KERNEL, logs.lookup(KERNEL, HERE))  # there may be a record that applies
COMPILING = f"compiling SEED 12→3 k2 s2 for {HERE}, once: {ORIGIN}"
# Prints a hash of the answer, whether the compiler was loaded, and what was logged and warned.
RUN = """
    import hashlib, logging, native, sys, warnings
    warnings.simplefilter("always")
    logging.basicConfig(format="log: %(message)s")
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    y = layer(native.inputs(layer.config, 4, 10, 12))
    layer.set_weights(layer.get_weights())
    assert (layer(native.inputs(layer.config, 4, 10, 12)) == y).all()
    print(hashlib.sha256(y).hexdigest(), "tvm" in sys.modules)
"""


def start(code: str = RUN, **variables: str) -> subprocess.Popen[str]:
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def key_of(config: KernelConfig, target: str) -> str:
    return jit._key(config, target, logs.lookup(config, target))


def finish(process: subprocess.Popen[str]) -> tuple[str, bool, str]:
    """The answer's hash, whether TVM was imported, and standard error."""
    out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 0, err
    digest, imported = out.split()
    return digest, imported == "True", err


@pytest.fixture(scope="module")
def expected() -> str:
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    x = native.inputs(layer.config, 4, 10, 12)
    y = layer(x)
    native.check(y, x, layer.config, layer.get_weights())
    return hashlib.sha256(y).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("TVM_SEPCONV_CACHE", str(tmp_path / "cache"))
    for cached in (jit.cache_root, jit._process_folder):
        cached.cache_clear()
    yield tmp_path / "cache"
    for cached in (jit.cache_root, jit._process_folder):
        cached.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A cache with the library of `KERNEL`."""
    root = tmp_path_factory.mktemp("compiled")
    entry = root / key_of(KERNEL, targets.runnable()[0])
    jit._build(KERNEL, targets.runnable()[0], entry)
    return root


@pytest.fixture
def filled(cache, compiled) -> Path:
    """The same in the cache of this test."""
    shutil.copytree(compiled, cache)
    cache.chmod(0o700)
    return cache


@pytest.fixture
def builds_fast(compiled, monkeypatch) -> None:
    """Compiling, for tests of what is around it: takes what was compiled before."""
    monkeypatch.setattr(
        jit, "_build", lambda _, __, entry, ___: shutil.copytree(entry_of(compiled), entry)
    )


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def written(file: Path) -> tuple[int, int]:
    """Which file it is, and when it was last written."""
    return file.stat().st_ino, file.stat().st_mtime_ns


# ---- the cache --------------------------------------------------------------------------------


def test_a_second_process_loads_no_compiler(cache, expected):
    digest, imported, text = finish(start())
    assert (digest, imported) == (expected, True)
    assert f"log: {COMPILING}" in text
    assert cache.stat().st_mode & 0o777 == 0o700
    before = {file: written(file) for file in entry_of(cache).iterdir()}
    digest, imported, text = finish(start())
    assert (digest, imported, text) == (expected, False, "")
    assert {file: written(file) for file in entry_of(cache).iterdir()} == before


def test_processes_at_once_on_an_empty_cache(cache, expected):
    processes = [start() for _ in range(2)]
    assert {finish(process)[0] for process in processes} == {expected}
    assert sorted(f.name for f in entry_of(cache).iterdir()) == [
        "entry.json", "layer.so", "libtvm_sepconv_runtime.so",
    ]  # fmt: skip


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000][:-9])


def alter(file: Path) -> None:
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("layer.so", remove), ("layer.so", cut), ("layer.so", alter),
     ("libtvm_sepconv_runtime.so", alter), ("entry.json", cut)],
)  # fmt: skip
def test_damage_is_found_and_compiled_anew(filled, name, damage):
    cache = filled
    file = entry_of(cache) / name
    before = file.read_bytes()
    damage(file)
    library, runtime = jit.library(KERNEL)
    assert library.parent == runtime.parent == entry_of(cache)
    assert file.read_bytes() == before  # code generation is deterministic
    assert jit._intact(entry_of(cache))


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", '{"sha256": 1}', "[" * 9999])
def test_hashes_that_are_none(filled, content):
    entry = entry_of(filled)
    assert jit._intact(entry)
    (entry / jit.ENTRY).write_text(content)
    assert not jit._intact(entry)


def test_an_entry_that_another_process_finished_first_is_kept(filled):
    entry = entry_of(filled)
    before = written(entry / "layer.so")
    jit._build(KERNEL, targets.runnable()[0], entry)  # as the slower process does
    assert written(entry / "layer.so") == before
    assert list(filled.iterdir()) == [entry]


def test_a_cache_that_was_tidied_up_is_made_again(filled):
    jit.library(KERNEL)
    shutil.rmtree(filled)
    library, _ = jit.library(KERNEL)
    assert library.is_file()


def test_a_relative_cache_stays_where_it_was(tmp_path, cache, builds_fast, monkeypatch):
    monkeypatch.setenv("TVM_SEPCONV_CACHE", "here")
    monkeypatch.chdir(tmp_path)
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    x = native.inputs(layer.config, 4, 10, 12)
    y = layer(x)
    monkeypatch.chdir("/")
    layer.set_weights(layer.get_weights())
    assert (layer(x) == y).all()


def test_a_library_is_kept_for_each_config_and_target(cache):
    others = [dict(filters=4), dict(kernel_size=3), dict(activation="gelu"), dict(use_bias=False)]
    base = dict(filters=3, kernel_size=2, strides=2, activation="relu")
    configs = [SepConvConfig.parse(**{**base, **other}).kernel_config(12) for other in others]
    best, other = "x86_64-avx512", "aarch64-neon"
    keys = {key_of(config, t) for config in [KERNEL, *configs] for t in (best, other)}
    assert len(keys) == 10
    # … but not for what the kernel does not depend on.
    same = SepConvConfig.parse(**base, padding="same", name="x").kernel_config(12)
    assert key_of(same, best) == key_of(KERNEL, best)


def test_what_is_compiled_for_is_chosen_and_checked(cache):
    worst = targets.host_family()[0]
    assert jit._host_target(None) == targets.runnable()[0]
    assert jit._host_target(worst) == worst
    foreign = "aarch64-neon" if targets.machine() == "x86_64" else "x86_64-avx2"
    with pytest.raises(ValueError, match=f"one this machine can run.*Received: target={foreign}"):
        jit.library(KERNEL, foreign)
    with pytest.raises(ValueError, match="Received: target=cuda"):
        jit.library(KERNEL, "cuda")
    with pytest.raises(ValueError, match="Received: target=x87"):
        jit.library(KERNEL, "x87")


def test_a_machine_without_any_known_instruction_set(monkeypatch):
    monkeypatch.setattr(targets, "cpu_features", frozenset)
    with pytest.raises(RuntimeError, match=r"has none of the instruction sets.*x86_64-avx2"):
        jit.library(KERNEL)


# ---- folders that cannot be used ----------------------------------------------------------------


def folder_of_a_file(cache: Path) -> None:
    cache.write_text("a file")


def below_a_file(cache: Path) -> None:
    cache.parent.joinpath("cache").write_text("")
    os.environ["TVM_SEPCONV_CACHE"] = str(cache / "below")


def writable_by_all(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def writable_by_the_group(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o770)


def of_somebody_else(cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    cache.mkdir(mode=0o700)
    os.chown(cache, 65534, 65534)


def read_only(cache: Path) -> None:
    # A permission bit would not stop root, a file system without room for files does.
    os.environ["TVM_SEPCONV_CACHE"] = "/proc/self/tvm_sepconv"


UNUSABLE = [
    folder_of_a_file, below_a_file, writable_by_all, writable_by_the_group, of_somebody_else,
    read_only,
]  # fmt: skip


@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_without_a_cache_it_works_and_warns_once(cache, spoil, builds_fast, monkeypatch):
    monkeypatch.setenv("TVM_SEPCONV_CACHE", os.environ["TVM_SEPCONV_CACHE"])  # undone at the end
    spoil(cache)
    message = "cache folder cannot be used.*compiled anew in every process.*TVM_SEPCONV_CACHE"
    with pytest.warns(UserWarning, match=message) as warned:
        library, _ = jit.library(KERNEL)
        again, _ = jit.library(KERNEL)
    assert len(warned) == 1
    assert library == again
    assert library.is_file()
    assert not cache.is_relative_to(library.parents[1]) and not library.is_relative_to(cache)


def test_an_uncached_process_leaves_nothing_behind(cache, tmp_path, expected):
    cache.write_text("a file")
    (tmp_path / "tmp").mkdir()
    digest, imported, text = finish(start(TMPDIR=str(tmp_path / "tmp")))
    assert (digest, imported) == (expected, True)
    assert text.count("cache folder cannot be used") == 1
    assert not list((tmp_path / "tmp").iterdir())


def test_a_user_without_a_home(cache, monkeypatch):
    monkeypatch.delenv("TVM_SEPCONV_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        assert jit.cache_root().is_dir()


@pytest.mark.parametrize(
    ("variables", "place"),
    [({"TVM_SEPCONV_CACHE": "{}/a/b"}, "a/b"), ({"XDG_CACHE_HOME": "{}/x"}, "x/tvm_sepconv"),
     ({"HOME": "{}"}, ".cache/tvm_sepconv")],
)  # fmt: skip
def test_where_the_cache_is(cache, tmp_path, monkeypatch, variables, place):
    for name in ("TVM_SEPCONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert jit.cache_root() == tmp_path / place


# ---- what it compiles with ----------------------------------------------------------------------


def test_it_says_that_it_compiles_and_from_what(cache, builds_fast, caplog, monkeypatch):
    monkeypatch.setattr(logs, "_announced", set())
    with caplog.at_level(logging.INFO, "tvm_sepconv"):
        jit.library(KERNEL)
        jit.library(KERNEL)
    said = [(r.levelname, r.message) for r in caplog.records if r.name == "tvm_sepconv"]
    assert said == [("WARNING", COMPILING)]


def test_a_library_found_in_the_cache_says_once_what_it_is_from(filled, caplog, monkeypatch):
    monkeypatch.setattr(logs, "_announced", set())
    with caplog.at_level(logging.INFO, "tvm_sepconv"):
        jit.library(KERNEL)
        jit.library(KERNEL)
    said = [(r.levelname, r.message) for r in caplog.records if r.name == "tvm_sepconv"]
    assert said == [("INFO", f"SEED 12→3 k2 s2 for {HERE}: {ORIGIN}")]


def test_what_an_entry_is_for_and_when_it_was_used_stand_in_it(filled):
    entry = entry_of(filled)
    description = json.loads((entry / jit.ENTRY).read_text())
    assert description["target"] == targets.runnable()[0]
    assert KernelConfig.from_dict(description["kernel"]) == KERNEL
    os.utime(entry, (1, 1))
    jit.library(KERNEL)
    assert entry.stat().st_mtime > 1e9


def test_without_the_compiler_the_ways_out_are_named():
    code = """
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "tvm":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        real = list(sys.meta_path)
        class Absent:  # as in an environment without it: nobody finds it
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "tvm":
                    return None
                for finder in real:
                    if spec := finder.find_spec(name, path, target):
                        return spec
        sys.meta_path[:] = [Absent()]
        import native, tvm_sepconv
        layer = native.layer_of(12, filters=7, kernel_size=2)
        for call in (lambda: layer(native.inputs(layer.config, 1, 9, 12)), layer.compile,
                     lambda: layer.save("nowhere")):
            try:
                call()
            except RuntimeError as error:
                assert "pip install 'tvm-sepconv[compiler]'" in str(error), error
                assert "tvm_sepconv.load(path)" in str(error), error
            else:
                raise SystemExit("no error")
        print("named", False)
    """
    assert finish(start(code))[0] == "named"


def test_options_choose_the_target(filled):
    layer = native.layer_of(12, filters=3, kernel_size=2, strides=2, activation="relu")
    x = native.inputs(layer.config, 4, 10, 12)
    layer(x)
    assert len(list(filled.iterdir())) == 1
    layer.compile(tvm_sepconv.BuildOptions(target=targets.host_family()[0]))
    native.check(layer(x), x, layer.config, layer.get_weights())
    assert len(list(filled.iterdir())) == min(2, len(targets.runnable()))
