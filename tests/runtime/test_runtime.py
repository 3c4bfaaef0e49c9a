"""The runtime library: its C API, threads, fork, scratch memory, and what it takes from others."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import native
import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import jit, runtime
from tvm_sepconv.config import SepConvConfig

pytest.importorskip("tvm")

STATUS = dict(library=1, abi=2, memory=3, argument=4, tensor=5, overlap=6, bundle=7, machine=8)
CASES = {  # name: (layer, channels, (batch, steps) …)
    "seed": (dict(filters=3, kernel_size=2, strides=2, activation="relu"), 12, [(4, 10), (1, 2)]),
    "same": (
        dict(filters=33, kernel_size=9, padding="same", depth_multiplier=2), 17,
        [(1, 1), (1, 300), (3, 5), (9, 130)],
    ),
    "causal": (dict(filters=64, kernel_size=9, padding=(8, 0)), 64, [(1, 1), (2, 700), (1, 65)]),
    "channels-first": (
        dict(filters=31, kernel_size=5, dilation_rate=3, strides=2, padding="same",
             data_format="channels_first", activation="gelu"),
        13, [(1, 1), (1, 700), (6, 66)],
    ),
    "float64": (
        dict(filters=9, kernel_size=4, padding="same", use_bias=False, dtype="float64"), 10,
        [(2, 500), (1, 3)],
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture
def default_threads():
    yield
    tvm_sepconv.set_num_threads(None)


def built(config: SepConvConfig, channels: int) -> tuple[Path, ctypes.CDLL]:
    """A library in the cache, and the C API of the runtime that this process has loaded."""
    library, path = jit.library(config.kernel_config(channels))
    return library, native.c_api(runtime.start(path).path)


def python(code: str, **environment: str) -> str:
    """Run code in a process of its own, with the tests' cache and helpers."""
    folders = map(str, Path(__file__).parents[:3])
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


# ---- the C API --------------------------------------------------------------------------------


@each_case
def test_the_c_api_gives_the_layers_own_bits(case):
    arguments, channels, sizes = case
    layer = native.layer_of(channels, **arguments)
    config, tensors = layer.config, layer.get_weights()
    library, c = built(config, channels)
    handle = native.create(c, library, config, tensors)
    for batch, steps in sizes:
        x = native.inputs(config, batch, steps, channels)
        expected = layer(x)
        y = np.full_like(expected, np.nan)
        assert c.tvm_sepconv_out_steps(handle, steps) == config.out_steps(steps)
        assert c.tvm_sepconv_run(handle, batch, steps, native.View.of(x), native.View.of(y)) == 0
        np.testing.assert_array_equal(y, expected)
        native.check(y, x, config, tensors)
    c.tvm_sepconv_layer_destroy(handle)


@needs_cc
@each_case
def test_a_c_program_gives_the_layers_own_bits(case, tmp_path):
    arguments, channels, sizes = case
    layer = native.layer_of(channels, **arguments)
    library, path = jit.library(layer.config.kernel_config(channels))
    shutil.copy(path, tmp_path / path.name)
    native.compile_host("cc", tmp_path / path.name, tmp_path / "host")
    for batch, steps in sizes:
        x = native.inputs(layer.config, batch, steps, channels)
        host = [str(tmp_path / "host")]
        y = native.run_host(host, library, layer.config, layer.get_weights(), x, tmp_path)
        np.testing.assert_array_equal(y, layer(x))


@pytest.mark.parametrize("padding", ["valid", "same", (0, 3), (5, 0), (40, 40)])
@pytest.mark.parametrize(("strides", "dilation_rate"), [(1, 1), (3, 2)])
def test_output_steps_are_the_configs(padding, strides, dilation_rate):
    config = SepConvConfig.parse(
        2, 4, strides=strides, dilation_rate=dilation_rate, padding=padding
    )
    library, c = built(config, 3)
    handle = native.create(c, library, config, native.weights(config, 3))
    for steps in range(30):
        assert c.tvm_sepconv_out_steps(handle, steps) == config.out_steps(steps), steps
    c.tvm_sepconv_layer_destroy(handle)


def create_status(c, library, padding=0, left=0, right=0) -> tuple[int, str]:
    config = SepConvConfig.parse(3, 2, 2)
    pointers = [tensor.ctypes.data for tensor in native.weights(config, 12)]
    handle = ctypes.c_void_p(1)
    status = c.tvm_sepconv_layer_create(
        str(library).encode(), *pointers, padding, left, right, ctypes.byref(handle)
    )
    assert (handle.value is None) == (status != 0)
    c.tvm_sepconv_layer_destroy(handle)
    return status, c.tvm_sepconv_last_error().decode() if status else ""


def test_creating_a_layer_says_what_is_wrong(tmp_path):
    library, c = built(SepConvConfig.parse(3, 2, 2), 12)
    _, own = jit.library(SepConvConfig.parse(3, 2, 2).kernel_config(12))
    status, text = create_status(c, tmp_path / "none.so")
    assert status == STATUS["library"] and "none.so" in text
    status, text = create_status(c, own)
    assert status == STATUS["library"] and "not a compiled tvm_sepconv library" in text
    (tmp_path / "short.so").write_bytes(library.read_bytes()[:3000])
    status, text = create_status(c, tmp_path / "short.so")
    assert status == STATUS["library"] and "short.so" in text
    for left, right in [(-1, 0), (0, -1), (2**30, 0), (0, 2**62)]:
        status, text = create_status(c, library, 2, left, right)
        assert status == STATUS["argument"] and f"({left}, {right})" in text
    status, text = create_status(c, library, 3)
    assert status == STATUS["argument"] and "Received: 3" in text
    assert create_status(c, library, 0, -7, 2**40) == (0, "")  # only EXPLICIT reads them
    assert create_status(c, library, 2, 2**30 - 1, 2**30 - 1) == (0, "")


@needs_cc
def test_a_library_of_another_abi_is_refused(tmp_path):
    _, c = built(SepConvConfig.parse(3, 2, 2), 12)
    (tmp_path / "a.c").write_text("const int tvm_sepconv_description[64] = {999};")
    command = ["cc", "-shared", "-fPIC", "a.c", "-o", "a.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    status, text = create_status(c, tmp_path / "a.so")
    assert status == STATUS["abi"]
    assert f"ABI 999; the runtime library in this process has ABI {runtime.ABI}" in text


def test_abi_and_status_numbers_are_the_headers():
    from tvm_sepconv.compiler import build

    header = (native.NATIVE / "tvm_sepconv.h").read_text()
    (abi,) = re.findall(r"#define TVM_SEPCONV_ABI (\d+)", header)
    assert int(abi) == runtime.ABI == build.ABI
    codes = {name.lower(): int(n) for name, n in re.findall(r"SEPCONV_ERROR_(\w+) = (\d)", header)}
    assert codes == STATUS
    assert (codes["memory"], codes["argument"]) == (runtime.ERROR_MEMORY, runtime.ERROR_ARGUMENT)
    assert (codes["overlap"], codes["tensor"]) == (runtime.ERROR_OVERLAP, runtime.ERROR_TENSOR)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_spans_that_32_bit_indices_cannot_reach_are_refused(layout):
    arguments, channels, _ = CASES["seed" if layout == "channels_last" else "channels-first"]
    layer = native.layer_of(channels, **arguments)
    library, c = built(layer.config, channels)
    handle = native.create(c, library, layer.config, layer.get_weights())
    nowhere = 64  # refused before anything is read or written

    def status(x_row, y_row, batch=1, steps=1000):
        views = native.View(nowhere, 0, x_row), native.View(nowhere, 0, y_row)
        return c.tvm_sepconv_run(handle, batch, steps, *views)

    for rows in [(2**30, 12), (12, 2**30), (2**62, 2**62), (-12, 12), (12, -1)]:
        assert status(*rows) == STATUS["argument"], rows
        reason = b"2**30" if min(rows) > 0 else b"must not be negative"
        assert reason in c.tvm_sepconv_last_error()
    assert status(2**30, 2**30, batch=0) == 0
    assert status(2**30, 2**30, steps=0) == 0
    c.tvm_sepconv_layer_destroy(handle)


def test_few_rows_may_lie_far_apart(tmp_path):
    # A column of a large file: the rows are 1 GiB apart, and only these few are read.
    layer = native.layer_of(12, filters=3, kernel_size=2)
    apart = 2**28
    big = np.memmap(tmp_path / "x", "float32", "w+", shape=(2 * apart + 12,))  # a sparse file
    x = np.lib.stride_tricks.as_strided(big, (1, 3, 12), (0, 4 * apart, 4))
    x[...] = native.inputs(layer.config, 1, 3, 12)
    library, c = built(layer.config, 12)
    handle = native.create(c, library, layer.config, layer.get_weights())
    y = np.full((1, 2, 3), np.nan, "float32")
    assert c.tvm_sepconv_run(handle, 1, 3, native.View.of(x), native.View.of(y)) == 0
    native.check(y, np.array(x), layer.config, layer.get_weights())
    c.tvm_sepconv_layer_destroy(handle)
    np.testing.assert_array_equal(layer(x), y)


WINDOWS = {  # kernel_size, strides, padding, steps; of the first two, samples can be joined
    "pointwise": (1, 1, "same", 9),
    "patches": (2, 3, "valid", 15),
    "a step left over": (2, 2, "valid", 15),
    "a step lacking": (3, 3, "same", 14),
    "zeros before": (2, 2, (1, 0), 14),
    "overlapping": (3, 2, (0, 1), 14),
}
APART = {"compact": (1, 1, 1), "samples apart": (1, 2, 1), "rows apart": (1, 1, 2)}


@pytest.mark.parametrize("of", ["input", "output"])
@pytest.mark.parametrize("apart", APART.values(), ids=APART)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_samples_of_a_batch_are_what_each_is_alone(window, apart, of):
    kernel_size, strides, padding, steps = window
    layer = native.layer_of(
        12, filters=3, kernel_size=kernel_size, strides=strides, padding=padding
    )
    values = native.inputs(layer.config, 5, steps, 12)
    expected = np.concatenate([layer(values[i : i + 1]) for i in range(5)])
    x = _apart(values, apart if of == "input" else (1, 1, 1))
    y = _apart(np.full_like(expected, np.nan), apart if of == "output" else (1, 1, 1))
    np.testing.assert_array_equal(layer(x, out=y), expected)
    native.check(expected, values, layer.config, layer.get_weights())


def _apart(array, times):
    """A copy that is a part of an array so many times as long on each axis."""
    whole = np.full(
        [n * size for n, size in zip(times, array.shape, strict=True)], np.nan, "float32"
    )
    part = whole[tuple(slice(size) for size in array.shape)]
    part[...] = array
    return part


def test_a_layer_reads_and_writes_nothing_outside_its_arrays():
    # Unmapped pages before and behind: in a process of its own, which one byte too many would end.
    runs = python("""
        import ctypes, mmap, native, numpy as np
        from test_runtime import CASES
        c = ctypes.CDLL(None)
        c.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        kept = []

        def guarded(array, at_end):
            page = mmap.PAGESIZE
            pages = -(-array.nbytes // page)
            memory = mmap.mmap(-1, (pages + 2) * page)
            kept.append(memory)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for address in (start, start + (pages + 1) * page):
                assert c.mprotect(address, page, 0) == 0
            offset = page + (pages * page - array.nbytes if at_end else 0)
            view = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
            view[...] = array
            return view

        def inputs(x, at_end):
            yield guarded(x, at_end)
            # One row for all, rows that overlap, and rows beside something else.
            yield np.broadcast_to(guarded(x[:1, :1], at_end), x.shape)
            flat = guarded(np.resize(x, sum(x.shape) - 2), at_end)
            strides = (x.itemsize,) * 3
            yield np.lib.stride_tricks.as_strided(flat, x.shape, strides, writeable=False)
            wide = guarded(np.full((*x.shape[:2], x.shape[2] + 3), np.nan, x.dtype), at_end)
            wide[..., 3:] = x
            yield wide[..., 3:]

        runs = 0
        for arguments, channels, sizes in CASES.values():
            layer = native.layer_of(channels, **arguments)
            for batch, steps in sizes:
                x = native.inputs(layer.config, batch, steps, channels)
                for at_end in (False, True):
                    for given in inputs(x, at_end):
                        expected = layer(np.array(given))
                        out = guarded(np.full_like(expected, np.nan), at_end)
                        assert layer(given, out=out) is out
                        np.testing.assert_array_equal(out, expected)
                        runs += 1
        print(runs)
    """)
    assert int(runs) == 8 * sum(len(sizes) for *_, sizes in CASES.values())


# ---- threads ----------------------------------------------------------------------------------


def own_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@each_case
def test_any_number_of_threads_gives_the_same_bits(case, default_threads):
    arguments, channels, _ = case
    layer = native.layer_of(channels, **arguments)
    for batch, steps in [(1, 3000), (7, 500), (40, 60)]:
        x = native.inputs(layer.config, batch, steps, channels)
        answers = []
        for threads in (1, 2, 5):
            tvm_sepconv.set_num_threads(threads)
            assert tvm_sepconv.num_threads() == threads
            answers += [layer(x).tobytes() for _ in range(5)]
        assert len(set(answers)) == 1


def test_the_pool_grows_to_the_threads_asked_for_and_no_further(default_threads):
    layer = native.layer_of(64, filters=64, kernel_size=9)
    x = native.inputs(layer.config, 1, 4000, 64)
    tvm_sepconv.set_num_threads(6)
    for _ in range(20):
        layer(x)
    assert own_threads() >= 6
    before = own_threads()
    for threads in (6, 3, 1):
        tvm_sepconv.set_num_threads(threads)
        layer(x)
    assert own_threads() == before


def test_small_calls_stay_on_the_calling_thread():
    code = """
        import native, os, tvm_sepconv
        tvm_sepconv.set_num_threads(8)
        layer = native.layer_of(12, filters=3, kernel_size=2)
        layer(native.inputs(layer.config, 4, 10, 12))
        before = len(os.listdir("/proc/self/task"))
        layer(native.inputs(layer.config, 4, 10, 12))
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert python(code) == "0"


def test_an_idle_process_uses_no_cpu_time(default_threads):
    layer = native.layer_of(64, filters=64, kernel_size=9)
    tvm_sepconv.set_num_threads(4)
    layer(native.inputs(layer.config, 1, 4000, 64))
    time.sleep(0.05)  # the workers look for another job for some tens of microseconds
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


def test_a_forked_child_has_threads_of_its_own():
    code = """
        import native, os, tvm_sepconv, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about fork and threads
        tvm_sepconv.set_num_threads(4)
        layer = native.layer_of(64, filters=64, kernel_size=9)
        x = native.inputs(layer.config, 1, 4000, 64)
        expected = layer(x).tobytes()
        for generation in range(3):  # a child of a child too
            assert len(os.listdir("/proc/self/task")) >= 4
            child = os.fork()
            if child:
                _, status = os.waitpid(child, 0)
                assert layer(x).tobytes() == expected
                os._exit(0 if status == 0 and generation < 3 else 1)
            assert len(os.listdir("/proc/self/task")) == 1
            for _ in range(10):
                assert layer(x).tobytes() == expected
        os._exit(0)
    """
    python(code)


def test_forking_while_other_threads_run_layers():
    code = """
        import native, os, threading, tvm_sepconv, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        tvm_sepconv.set_num_threads(3)
        layer = native.layer_of(64, filters=64, kernel_size=9)
        x = native.inputs(layer.config, 1, 2000, 64)
        expected = layer(x).tobytes()
        stop, wrong = threading.Event(), []
        def work():
            while not stop.is_set():
                if layer(x).tobytes() != expected:
                    wrong.append(1)
        threads = [threading.Thread(target=work) for _ in range(3)]
        [t.start() for t in threads]
        for _ in range(20):
            child = os.fork()
            if not child:
                os._exit(0 if all(layer(x).tobytes() == expected for _ in range(3)) else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        [t.join() for t in threads]
        assert not wrong
    """
    python(code)


def test_eight_threads_run_a_layer_while_its_weights_change(default_threads):
    tvm_sepconv.set_num_threads(2)
    layer = native.layer_of(24, filters=40, kernel_size=9, padding="same")
    x = native.inputs(layer.config, 3, 400, 24)
    sets = [native.weights(layer.config, 24, seed) for seed in (1, 2, 3)]
    allowed = set()
    for tensors in sets:
        layer.set_weights(tensors)
        allowed.add(layer(x).tobytes())
    seen: list[set[bytes]] = [set() for _ in range(8)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(number):
        try:
            while not stop.is_set():
                seen[number].add(layer(x).tobytes())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 0.8
    while time.monotonic() < end or not all(seen):
        for tensors in sets:
            layer.set_weights(tensors)
            time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(seen)
    assert set().union(*seen) <= allowed  # never a mixture of two sets of weights
    assert layer(x).tobytes() == layer_answer(layer, x)


def layer_answer(layer, x) -> bytes:
    """What a fresh layer with the same weights answers."""
    fresh = tvm_sepconv.SeparableConv1D.from_config(layer.get_config())
    fresh.build(x.shape)
    fresh.set_weights(layer.get_weights())
    return fresh(x).tobytes()


def test_many_threads_compile_at_once():
    code = """
        import native, threading, tvm_sepconv
        layers = [native.layer_of(5 + i % 2, filters=4, kernel_size=3) for i in range(4)]
        answers = {}
        def work(i, layer):
            x = native.inputs(layer.config, 2, 30, 5 + i % 2)
            answers[i] = (layer(x), x)
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(layers)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for i, layer in enumerate(layers):
            y, x = answers[i]
            native.check(y, x, layer.config, layer.get_weights())
    """
    python(code)


NUMBER = """
    import native, os, sys, tvm_sepconv
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cpus}])
    native.layer_of(12, filters=3, kernel_size=2)(native.inputs(
        tvm_sepconv.SepConvConfig.parse(3, 2), 1, 9, 12))
    print(tvm_sepconv.num_threads())
"""


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("3", 3), ("1", 1), ("100000", 256), ("99999999999999999999", 256), ("", 1), ("0", 1),
     ("-2", 1), ("many", 1)],
)  # fmt: skip
def test_the_environment_says_how_many_threads(variable, expected):
    code = NUMBER.format(cpus=1)
    assert python(code, TVM_SEPCONV_NUM_THREADS=variable) == str(expected)


CGROUPS = {
    "none": ({}, None),
    "v2": ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "100000 100000\n"}, 1),
    "v2-in-a-container": (
        {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "190000 100000\n"}, 1,
    ),
    "v2-a-parent-is-tighter": (
        {"/proc/self/cgroup": "1:name=x:/q\n0::/a/b\n",
         "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
         "/sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1,
    ),
    "v2-unlimited": (
        {"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None,
    ),
    "v2-generous": (
        {"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "9900000000 100000\n"}, None,
    ),
    "v2-damaged": (
        {"/proc/self/cgroup": "0::/a\n" + "x" * 2000, "/sys/fs/cgroup/a/cpu.max": "\n"}, None,
    ),
    "v2-long-name": (
        {"/proc/self/cgroup": "0::/" + "/".join(["a" * 90] * 6) + "\n",
         "/sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1,
    ),
    "v1": (
        {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
         "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 1,
    ),
    "v1-unlimited": (
        {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
         "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool_with_files_elsewhere(tmp_path_factory):
    """The thread pool alone, with every path it opens below $FILES."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "files.c").write_text("""
        #include <stdio.h>
        #include <stdlib.h>
        FILE* open_elsewhere(const char* path, const char* mode) {
          char name[4096];
          snprintf(name, sizeof name, "%s%s", getenv("FILES"), path);
          return fopen(name, mode);
        }""")
    command = ["cc", "-std=gnu99", "-shared", "-fPIC", f"-I{native.NATIVE}"]
    pool = ["-Dfopen=open_elsewhere", "-c", str(native.NATIVE / "pool.c"), "-o", "pool.o"]
    subprocess.run([*command[:2], "-fPIC", *pool], cwd=folder, check=True)
    subprocess.run([*command, "pool.o", "files.c", "-o", "pool.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "pool.so"))


@needs_cc
@pytest.mark.parametrize(("tree", "limit"), CGROUPS.values(), ids=CGROUPS)
def test_default_threads_are_within_affinity_and_quota(
    tree, limit, pool_with_files_elsewhere, tmp_path, monkeypatch
):
    for name, text in tree.items():
        path = Path(f"{tmp_path}{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("FILES", str(tmp_path))
    pool_with_files_elsewhere.tvm_sepconv_set_num_threads(0)
    cpus = len(os.sched_getaffinity(0))
    assert pool_with_files_elsewhere.tvm_sepconv_num_threads() == min(cpus, limit or cpus)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, [1]])
def test_a_number_of_threads_that_is_none_is_refused(threads):
    with pytest.raises(ValueError, match=re.escape(f"Received: threads={threads!r}")):
        tvm_sepconv.set_num_threads(threads)


def test_setting_threads_before_and_after_the_runtime_is_loaded():
    code = """
        import native, numpy as np, tvm_sepconv
        assert tvm_sepconv.num_threads() is None
        tvm_sepconv.set_num_threads(3)
        assert tvm_sepconv.num_threads() == 3
        layer = native.layer_of(12, filters=3, kernel_size=2)
        layer(native.inputs(layer.config, 1, 9, 12))
        assert tvm_sepconv.num_threads() == 3
        tvm_sepconv.set_num_threads(np.int32(2))
        assert tvm_sepconv.num_threads() == 2
        tvm_sepconv.set_num_threads(2**100)  # as many as the pool has
        assert tvm_sepconv.num_threads() == 256
        tvm_sepconv.set_num_threads(None)
        assert tvm_sepconv.num_threads() == 7
    """
    python(code, TVM_SEPCONV_NUM_THREADS="7")


# ---- scratch ----------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_scratch_and_weights_do_not_pile_up():
    layers = [
        (native.layer_of(channels, **arguments), channels)
        for arguments, channels, _ in CASES.values()
    ]
    data = [native.inputs(layer.config, 2, 70, channels) for layer, channels in layers]

    def round_():
        for (layer, channels), x in zip(layers, data, strict=True):
            layer.set_weights(native.weights(layer.config, channels))  # packed anew
            for _ in range(3):
                layer(x)

    for _ in range(20):
        round_()
    before = resident_bytes()
    for _ in range(200):
        round_()
    assert resident_bytes() - before < 2e6


def test_a_call_without_memory_fails_alone():
    # Its scratch is 130 MB, more than there is: a partial vector of channels is padded with the
    # whole ones. Nothing of it may be left, nor asked for again.
    code = """
        import native, numpy as np, resource, tvm_sepconv
        layer = native.layer_of(30, filters=2, kernel_size=2, dilation_rate=2**20, padding="same")
        small = native.layer_of(12, filters=3, kernel_size=2)
        x = native.inputs(layer.config, 1, 5, 30)
        y = native.inputs(small.config, 1, 9, 12)
        layer.compile(), small.compile()
        expected = small(y)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, -1))
        for _ in range(40):  # more often than the scratch has blocks
            try:
                layer(x)
            except MemoryError as error:
                assert "scratch" in str(error), error
            else:
                raise SystemExit("no error")
            np.testing.assert_array_equal(small(y), expected)
    """
    python(code)


# ---- what the libraries need ------------------------------------------------------------------


@needs_nm
@each_case
def test_a_kernel_library_needs_no_other_library(case):
    arguments, channels, _ = case
    library, _ = jit.library(SepConvConfig.parse(**arguments).kernel_config(channels))
    assert native.undefined(library) <= {"memcpy", "memmove", "memset"}  # of no particular version
    assert library.stat().st_size < 120_000


@needs_nm
def test_the_runtime_needs_a_c_library_of_any_version():
    _, path = jit.library(SepConvConfig.parse(3, 2).kernel_config(12))
    assert native.undefined(path) <= native.C_LIBRARY  # a version would be part of the name
    assert path.stat().st_size < 60_000


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_libraries_name_no_library_to_load():
    for path in jit.library(SepConvConfig.parse(3, 2).kernel_config(12)):
        command = ["readelf", "--dynamic", "--version-info", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "SYMTAB" in text
        assert "NEEDED" not in text
        assert "Version needs" not in text


@needs_cc
def test_a_host_may_unload_the_runtime_while_its_threads_sleep(tmp_path):
    # The workers and a thread's own scratch outlive dlclose, so the code they run has to stay.
    layer = native.layer_of(64, filters=64, kernel_size=9)
    library, path = jit.library(layer.config.kernel_config(64))
    tensors, x = layer.get_weights(), native.inputs(layer.config, 1, 4000, 64)
    for name, tensor in zip("dpbx", [*tensors, x], strict=True):
        tensor.tofile(tmp_path / name)
    code = f"""
        import _ctypes, ctypes, native, numpy as np, os, threading, time
        from pathlib import Path
        from tvm_sepconv.config import SepConvConfig
        config = SepConvConfig.parse(64, 9)
        load = lambda name: np.fromfile(os.path.join({str(tmp_path)!r}, name), "float32")
        def work():
            c = native.c_api(Path({str(path)!r}))
            c.tvm_sepconv_set_num_threads(4)
            handle = native.create(c, Path({str(library)!r}), config, [load(n) for n in "dpb"])
            x = load("x").reshape(1, 4000, 64)
            y = np.empty((1, 3992, 64), "float32")
            assert c.tvm_sepconv_run(handle, 1, 4000, native.View.of(x), native.View.of(y)) == 0
            c.tvm_sepconv_layer_destroy(handle)
            _ctypes.dlclose(c._handle)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(os.listdir("/proc/self/task")) >= 4
        time.sleep(0.05)
    """
    python(code)
