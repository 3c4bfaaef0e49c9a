"""What tvm_sepconv needs of this machine, looked at piece by piece, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tvm_sepconv import gpu, jit, targets
from tvm_sepconv.bench.machine import OthersWork, cpu_name

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
BASE = ("numpy", "apache-tvm-ffi", "safetensors")
# Distributions of the extras that commands need; pyproject.toml says why each.
EXTRAS = {
    "tune": ("xgboost-cpu|xgboost", "cloudpickle", "psutil", "tornado", "rich"),
    "cross": ("ziglang",),
    "h5": ("h5py",),
}
TVM = (0, 27)
FFI_CRASHES = (0, 1, 15)  # the first, with that TVM
LAYER_LIMIT_SECS = 180
LISTEN_SECS = 0.4
BUSY_PROCESSORS = 0.3
_ON_A_BOARD = "Tune on a board: --rpc HOST:PORT --key KEY"
# In a process of its own, which may crash: the largest error of a small layer, and the threads.
_LAYER = """
import json, numpy, tvm_sepconv
from tvm_sepconv import reference, runtime
x = numpy.random.default_rng(0).standard_normal((2, 37, 4)).astype("float32")
layer = tvm_sepconv.SeparableConv1D(5, 3, padding="same", activation="relu", seed=0)
y = layer(x)
expected = reference.separable_conv1d(x, *layer.get_weights(), layer.config)
print(json.dumps([float(abs(y - expected).max()), runtime.num_threads()]))
"""
_LAYER_ERROR = 1e-5
_KERNEL = 'extern "C" __global__ void answer(int* y) { *y = 42; }\n'
_SOURCE = "#include <pthread.h>\n#include <stdio.h>\nint answer(void) { return 42; }\n"


@dataclass(frozen=True)
class Finding:
    """One line of a report; ``remedy`` is what to do."""

    status: str
    subject: str
    text: str
    remedy: str | None = None


def examine(target: str | None) -> Iterator[Finding]:
    """Examine this machine, for building for `target` too if there is one."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "extras": _extras,
        "processor": lambda: _processor(target),
        "linker": lambda: _linkers(target),
        "cuda": lambda: _cuda(target),
        "folders": _folders,
        "layer": _layer,
        "quiet": _quiet,
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a doctor does not faint
            text = f"could not be examined: {type(error).__name__}: {error}"
            yield Finding(PROBLEM, subject, text, "Please report this as a bug")


def version(distribution: str) -> str | None:
    """Return the version that is installed, None if none is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    parts = text.split(".")[:3]
    return tuple(int(part) for part in parts if part.isdigit())


def _python() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        yield Finding(PROBLEM, "python", f"{system}: only Linux is supported", "Use it in a Linux")
    else:
        yield Finding(OK, "python", system)


def _packages() -> Iterator[Finding]:
    found = {name: version(name) for name in (*BASE, "apache-tvm")}
    tvm, ffi = found.pop("apache-tvm"), found["apache-tvm-ffi"]
    if absent := [name for name, installed in found.items() if installed is None]:
        remedy = f"pip install {' '.join(absent)}"
        yield Finding(PROBLEM, "packages", f"{', '.join(absent)} not installed", remedy)
    else:
        text = ", ".join(f"{name} {installed}" for name, installed in found.items())
        yield Finding(OK, "packages", text)
    install = "pip install 'tvm-sepconv[compiler]'"
    if tvm is None:
        text = "apache-tvm is not installed: bundles run here, but no layer can be compiled"
        yield Finding(WARNING, "compiler", text, install)
    elif _numbers(tvm)[:2] != TVM:
        text = f"apache-tvm {tvm}: only {'.'.join(map(str, TVM))} is known to work"
        yield Finding(PROBLEM, "compiler", text, install)
    elif ffi is not None and _numbers(ffi) >= FFI_CRASHES:
        first = ".".join(map(str, FFI_CRASHES))
        text = f"apache-tvm-ffi {ffi} crashes with apache-tvm {tvm} when tuning"
        yield Finding(PROBLEM, "compiler", text, f"pip install 'apache-tvm-ffi<{first}'")
    else:
        yield Finding(OK, "compiler", f"apache-tvm {tvm}")


def _extras() -> Iterator[Finding]:
    complete = []
    for extra, distributions in EXTRAS.items():
        names = [(name, any(map(version, name.split("|")))) for name in distributions]
        absent = [name.partition("|")[0] for name, there in names if not there]
        install = f"pip install 'tvm-sepconv[{extra}]'"
        if not absent:
            complete.append(f"[{extra}]")
        elif len(absent) < len(names):
            text = f"[{extra}] lacks {', '.join(absent)}"
            yield Finding(WARNING, "extras", text, install)
        else:
            yield Finding(NOTE, "extras", f"[{extra}] is not installed", install)
    if complete:
        yield Finding(OK, "extras", ", ".join(complete))


def _processor(target: str | None) -> Iterator[Finding]:
    here = targets.runnable()
    if here:
        yield Finding(OK, "processor", f"{cpu_name()}, runs {', '.join(here)}")
    else:
        text = f"{cpu_name()} runs none of {', '.join(targets.FEATURES)}"
        yield Finding(PROBLEM, "processor", text, "Use a machine with one of these")
    if target and not target.startswith("cuda") and target.partition("@")[0] not in here:
        lacking = ", ".join(targets.missing_features(target.partition("@")[0]))
        text = f"{target} can be built, not run or tuned here, for lack of {lacking}"
        yield Finding(NOTE, "processor", text, _ON_A_BOARD)


def _linkers(target: str | None) -> Iterator[Finding]:
    if version("apache-tvm") is None:
        return
    link = jit.compiler("tvm_sepconv.compiler.link")
    cpu = jit.compiler("tvm_sepconv.compiler.targets").cpu
    wanted = [*targets.runnable()[:1], *([target] if target and "cuda" not in target else [])]
    seen = set()
    for name in dict.fromkeys([*wanted, "aarch64-neon", "armv7-neon", "x86_64-avx2"]):
        triple = cpu(name).triple
        if triple in seen:
            continue
        seen.add(triple)
        try:
            tools = link.toolchain(triple)
            with tempfile.TemporaryDirectory() as folder:
                source, made = Path(folder, "a.c"), Path(folder, "a.o")
                source.write_text(_SOURCE)
                tools.object_file(source, made)
                tools.shared_library([made], Path(folder, "a.so"))
        except RuntimeError as error:
            text, _, remedy = str(error).partition(". ")
            status = PROBLEM if name in wanted else NOTE
            yield Finding(status, "linker", text, remedy or None)
        else:
            yield Finding(OK, "linker", f"{triple}: {tools.name}")


def _cuda(target: str | None) -> Iterator[Finding]:
    wanted = target is not None and target.startswith("cuda")
    if missing := gpu.missing():
        yield Finding(NOTE, "cuda", f"no NVIDIA GPU: {missing}", _ON_A_BOARD if wanted else None)
    else:
        yield Finding(NOTE, "cuda", "an NVIDIA GPU")
    if version("apache-tvm") is None:
        return
    nvcc = jit.compiler("tvm_sepconv.compiler.nvcc")
    try:
        found = nvcc.find()
        text = f"{found.path}, {found.release}"
        if target is not None and wanted:  # for it alone: it takes seconds
            made = jit.compiler("tvm_sepconv.compiler.targets").cuda(target)
            with tempfile.TemporaryDirectory() as folder:
                found.library(_KERNEL, Path(folder, "a.so"), made.archs, made.host)
            text += f" builds for {', '.join(made.archs)} beside {made.host}"
    except RuntimeError as error:
        text, _, remedy = str(error).partition(". ")
        yield Finding(PROBLEM if wanted else NOTE, "cuda", text, remedy or None)
    else:
        yield Finding(OK, "cuda", text)


def _folders() -> Iterator[Finding]:
    try:
        yield Finding(OK, "cache", f"{jit.users_cache()} can be written")
    except OSError as error:
        remedy = "Set TVM_SEPCONV_CACHE to a folder of your own"
        yield Finding(WARNING, "cache", f"layers are compiled anew each time: {error}", remedy)
    if version("apache-tvm") is None:
        return
    try:
        folder = jit.compiler("tvm_sepconv.compiler.tuning.logs").writable()
        yield Finding(OK, "records", f"{folder} can be written")
    except OSError as error:
        yield Finding(PROBLEM, "records", "what is tuned cannot be recorded", str(error))


def _layer() -> Iterator[Finding]:
    """Compile a small layer, or take it from the cache, and run it."""
    if version("apache-tvm") is None:
        return
    start = time.monotonic()
    command = [sys.executable, "-c", _LAYER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LAYER_LIMIT_SECS)
    except subprocess.TimeoutExpired:
        text = f"a small layer was not compiled and run in {LAYER_LIMIT_SECS} s"
        yield Finding(PROBLEM, "layer", text, "Is another program using all processors?")
        return
    if done.returncode < 0:
        text = f"compiling and running a small layer crashes: signal {-done.returncode}"
        yield Finding(PROBLEM, "layer", text, "Look at the versions above; tvm-sepconv cache clear")
    elif done.returncode:
        text = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding(PROBLEM, "layer", f"a small layer does not compile and run: {text}")
    else:
        error, threads = json.loads(done.stdout)
        took = f"{time.monotonic() - start:.1f} s"
        if not error <= _LAYER_ERROR:
            text = f"a small layer is wrong by {error:.2g}"
            yield Finding(PROBLEM, "layer", text, "tvm-sepconv cache clear; if it stays, a bug")
        else:
            yield Finding(OK, "layer", f"a small layer compiles, runs and is right ({took})")
        yield _threads(threads)


def _threads(threads: int) -> Finding:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"a call uses {threads}, of {there} processors"
    if os.environ.get("TVM_SEPCONV_NUM_THREADS"):
        return Finding(OK, "threads", f"{text} (TVM_SEPCONV_NUM_THREADS)")
    if threads < allowed:
        return Finding(NOTE, "threads", f"{text}: the control group grants no more")
    limited = ": this process may use no more" if allowed < there else ""
    return Finding(OK, "threads", text + limited)


def _quiet() -> Iterator[Finding]:
    """What would make measured times vary."""
    cpu = Path("/sys/devices/system/cpu")
    governor = _word(cpu / "cpu0/cpufreq/scaling_governor")
    if governor not in (None, "performance"):
        text = f"the clock's governor is {governor}: times vary with the load"
        remedy = "For tuning: sudo cpupower frequency-set --governor performance"
        yield Finding(WARNING, "quiet", text, remedy)
    if _word(cpu / "smt/active") == "1":
        text = "two threads share a core: neighbours slow each other down"
        yield Finding(NOTE, "quiet", text, "Tune with at most a thread a core")
    others = OthersWork()
    time.sleep(LISTEN_SECS)
    busy = others.processors()
    if busy > BUSY_PROCESSORS:
        text = f"other programs keep {busy:.1f} of {os.cpu_count()} processors busy"
        yield Finding(WARNING, "quiet", text, "Tune and measure when they have ended")
    else:
        yield Finding(OK, "quiet", "nothing else runs")


def _word(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
