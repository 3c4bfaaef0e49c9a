"""C programs: the example, here and on emulated devices; calls that never allocate."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import native
import numpy as np
import pytest
from test_runtime import python

import tvm_sepconv
from tvm_sepconv import targets

pytest.importorskip("tvm")

LAYERS = {  # name: (layer, channels)
    "first": (dict(filters=3, kernel_size=2, strides=2, activation="relu"), 12),
    "mixed": (dict(filters=4, kernel_size=3, padding="same", dtype="mixed_float16"), 5),
    "softmax": (dict(filters=4, kernel_size=2, activation="softmax"), 5),
}
BEST = targets.host_family()[-1]
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


def layers() -> dict[str, tvm_sepconv.SeparableConv1D]:
    return {name: native.layer_of(channels, **given) for name, (given, channels) in LAYERS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.sepconv"
    tvm_sepconv.save(layers(), path, [BEST], with_c=True)
    return path


def build_in(
    folder: Path, compiler: str, arch: str, source="example.c", output="example", strict=True
):
    """Compile as the example's own first lines say."""
    text = (folder / "example.c").read_text()
    (line,) = re.findall(r"^ \*   (cc -std=c99 .*)$", text, re.M)
    line = line.replace("cc ", f"{compiler} ", 1).replace("ARCH", arch)
    line = line.replace("example.c", source).replace("-o example", f"-o {output}")
    if strict:
        line += " -Wall -Wextra -Werror -pedantic"
    else:
        line = line.replace("-std=c99", "-std=gnu99")
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True)


def run_example(command: list[str], path: Path, name: str, x: np.ndarray, config, folder: Path):
    x.tofile(folder / "x.raw")
    batch, steps = x.shape[0], x.shape[1 if config.channel_axis == -1 else 2]
    arguments = [name, str(folder / "x.raw"), str(folder / "y.raw"), str(batch), str(steps), "2"]
    return subprocess.run([*command, str(path), *arguments], capture_output=True, text=True)


def right_from_the_example(command, path: Path, target: str, folder: Path) -> None:
    for name, layer in layers().items():
        if name == "softmax":
            continue
        x = native.inputs(layer.config, 2, 61, LAYERS[name][1])
        done = run_example(command, path, name, x, layer.config, folder)
        assert done.returncode == 0, done.stderr
        out_steps = layer.config.out_steps(61)
        assert (
            f"{name}: {target}, {LAYERS[name][1]} channels to {layer.config.filters} filters"
            in done.stdout
        )
        assert f"{out_steps} output steps, 2 threads" in done.stdout
        shape = layer.config.compute_output_shape(x.shape)
        y = np.fromfile(folder / "y.raw", layer.config.compute_dtype).reshape(shape)
        native.check(y, x, layer.config, layer.get_weights())


@needs_cc
def test_the_example_on_this_machine(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    done = build_in(copy / "c", "cc", targets.machine())
    assert done.returncode == 0, done.stderr
    right_from_the_example([str(copy / "c/example")], copy, BEST, tmp_path)


CROSS = {  # target: (compiler, folder of ../lib, emulator)
    "aarch64-neon": ("aarch64-linux-gnu-gcc", "aarch64",
                     ["qemu-aarch64-static", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu"]),
    "armv7-neon": ("arm-linux-gnueabihf-gcc", "armv7",
                   ["qemu-arm-static", "-cpu", "cortex-a7", "-L", "/usr/arm-linux-gnueabihf"]),
}  # fmt: skip


@pytest.mark.parametrize("target", CROSS)
def test_the_example_on_an_emulated_device(target, tmp_path):
    compiler, arch, emulator = CROSS[target]
    if absent := [name for name in (compiler, emulator[0]) if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(absent)}")
    path = tmp_path / "net.sepconv"
    tvm_sepconv.save(layers(), path, [target], with_c=True)
    done = build_in(path / "c", compiler, arch)
    assert done.returncode == 0, done.stderr
    right_from_the_example([*emulator, str(path / "c/example")], path, target, tmp_path)


def test_the_example_says_what_is_wrong(saved, tmp_path):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    assert build_in(copy / "c", "cc", targets.machine()).returncode == 0
    config = tvm_sepconv.load(copy)["first"].config
    example, x = [str(copy / "c/example")], native.inputs(config, 1, 9, 12)
    cases = [
        ((tmp_path / "none", "first", x), "is not a bundle"),
        ((copy, "softmax", x), "is computed in Python"),
        ((copy, "first", x[:, :1]), "STEPS are fewer than the kernel needs"),
        ((copy, "first", x[..., :5]), "INPUT is not a file of BATCH * STEPS * channels numbers"),
    ]
    for (path, name, data), message in cases:
        done = run_example(example, path, name, np.ascontiguousarray(data), config, tmp_path)
        assert done.returncode == 1
        assert re.search(f"^example: .*{re.escape(message)}", done.stderr)
    assert subprocess.run(example, capture_output=True).returncode == 1


# ---- without allocating ------------------------------------------------------------------------


@needs_cc
@pytest.mark.parametrize("prepared", [False, True])
def test_a_prepared_layer_runs_without_allocating(prepared, tmp_path):
    # A program whose allocating functions are its own: they count the calls of every thread.
    layer = native.layer_of(64, filters=64, kernel_size=9, padding="same")
    tvm_sepconv.save({"one": layer}, tmp_path / "one", [BEST], with_c=True)
    layer.get_weights()
    (tmp_path / "one/c/count.c").write_text("""
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <stdlib.h>
        #include "tvm_sepconv.h"
        void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
        void *__libc_realloc(void*, size_t), *__libc_memalign(size_t, size_t);
        static int counted;
        #define COUNT __atomic_add_fetch(&counted, 1, __ATOMIC_RELAXED)
        void* malloc(size_t n) { COUNT; return __libc_malloc(n); }
        void* calloc(size_t n, size_t m) { COUNT; return __libc_calloc(n, m); }
        void* realloc(void* p, size_t n) { COUNT; return __libc_realloc(p, n); }
        int posix_memalign(void** p, size_t a, size_t n) {
          COUNT;
          return !(*p = __libc_memalign(a, n));
        }
        static float input[4000 * 64], output[4000 * 64];
        int main(int argc, char** argv) {
          tvm_sepconv_bundle* bundle;
          tvm_sepconv_layer* layer;
          const tvm_sepconv_view x = {input, 0, 64}, y = {output, 0, 64};
          if (tvm_sepconv_bundle_open(argv[1], NULL, &bundle)) return 2;
          if (tvm_sepconv_bundle_layer(bundle, NULL, &layer)) return 3;
          tvm_sepconv_set_num_threads(4);
          if (argc == 3 && tvm_sepconv_prepare(layer)) return 4;
          const int before = counted;
          for (int steps = 1; steps <= 4000; steps = steps * 3 / 2 + 1)
            for (int i = 0; i < 20; ++i)
              if (tvm_sepconv_run(layer, 1, steps, x, y)) return 5;
          printf("%d %d\\n", before, counted - before);
          return 0;
        }""")
    done = build_in(tmp_path / "one/c", "cc", targets.machine(), "count.c", "count", strict=False)
    assert done.returncode == 0, done.stderr
    command = [tmp_path / "one/c/count", tmp_path / "one", *(["prepare"] if prepared else [])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.returncode
    before, during = map(int, run.stdout.split())
    assert before > 0
    assert (during == 0) == prepared, during


def test_preparing_while_threads_run_and_in_a_forked_child():
    code = """
        import native, os, threading, tvm_sepconv, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about fork and threads
        tvm_sepconv.set_num_threads(3)
        layer = native.layer_of(64, filters=64, kernel_size=9)
        x = native.inputs(layer.config, 1, 2000, 64)
        expected, c, handle = layer(x).tobytes(), layer._compiled.runtime.c, layer._compiled.handle
        c.tvm_sepconv_prepare.argtypes = (native.ctypes.c_void_p,)
        stop, wrong = threading.Event(), []
        def work():
            while not stop.is_set():
                if layer(x).tobytes() != expected:
                    wrong.append(1)
        threads = [threading.Thread(target=work) for _ in range(3)]
        [t.start() for t in threads]
        for wanted in (1, 2, 5, 3, 12):
            tvm_sepconv.set_num_threads(wanted)
            assert c.tvm_sepconv_prepare(handle) == 0
            assert len(os.listdir("/proc/self/task")) >= wanted
            child = os.fork()
            if not child:
                right = c.tvm_sepconv_prepare(handle) == 0 and layer(x).tobytes() == expected
                os._exit(0 if right and len(os.listdir("/proc/self/task")) == wanted else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        [t.join() for t in threads]
        assert not wrong
    """
    python(code)
