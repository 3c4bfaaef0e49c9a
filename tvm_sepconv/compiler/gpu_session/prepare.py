"""Build, where there is nvcc, all that is measured where there is a GPU; what is there is kept.

The folder holds the package's own modules, tvm-ffi, and one archive of the libraries: each has the
CUDA runtime in it, which compression finds once in all of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm_sepconv
from tvm_sepconv import jit, workloads
from tvm_sepconv.compiler.gpu_session import plan
from tvm_sepconv.compiler.gpu_session.frameworks import BUNDLE
from tvm_sepconv.compiler.gpu_session.plan import (
    CANDIDATE,
    DEFAULT,
    FORM,
    TWO_KERNELS,
    Library,
    Plan,
)

ARCH = "sm_90"
CANDIDATES = 8  # of a layer at a precision
PYTHON = "3.12"
MOST_BYTES = 60 << 20
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
_SOURCES = ("schedules/cuda*.py", "compiler/*cuda*", "compiler/nvcc.py", "compiler/epilogue.py")
_MAIN = '''"""Measure on this machine's GPU: python3 {name}; nothing needs to be installed."""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
packages = os.path.join(here, "packages")
sys.path[:] = [here, *sys.path[1:], packages]
os.environ["PYTHONPATH"] = os.pathsep.join([here, packages])

from tvm_sepconv.cli import main

sys.exit(main(["gpu", "run", here, *sys.argv[1:]]))
'''


def prepare(
    folder: Path,
    work: Path,
    layers: Sequence[str] | None = None,
    candidates: int = CANDIDATES,
    python: str = PYTHON,
    arch: str = ARCH,
    show: Callable[[str], None] = print,
) -> Plan:
    """Build what is not built yet, and pack the folder.

    Parameters
    ----------
    work
        Where libraries stay for the next time.
    layers
        Of the workload table; None are `plan.rows`.
    candidates
        To build for each of `plan.NAMED` at each precision.
    python
        The version that will be there.
    arch
        Of the GPU that will be there, such as "sm_90".

    Raises
    ------
    RuntimeError
        If nvcc or pip's download of tvm-ffi fails, or the folder gets too large.
    """
    work.mkdir(parents=True, exist_ok=True)
    wanted = list(libraries(layers or plan.rows(), candidates, arch))
    kept, rejected = _built(wanted, work, arch, show)
    folder.mkdir(parents=True, exist_ok=True)
    _set_aside(folder)
    now = jit.compiler("tvm_sepconv.compiler.tuning.finalists").now()
    made = Plan(folder, arch, importlib.metadata.version("apache-tvm"), now, kept, rejected)
    made.save()
    _pack(made, work)
    _bundle(made)
    _packages(folder, python)
    (folder / "__main__.py").write_text(_MAIN.format(name=folder.name))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise RuntimeError(
            f"{folder} has {size >> 20} MiB, of {MOST_BYTES >> 20} that may travel. Prepare fewer "
            "`--workloads` or `--candidates`"
        )
    show(
        f"{len(kept)} libraries, {len(made.items())} measurements, {size / 2**20:.1f} MiB. On a "
        f"machine with a GPU: python3 {folder}"
    )
    return made


def libraries(layers: Sequence[str], candidates: int, arch: str = ARCH) -> Iterator[Library]:
    """What is to be built: the libraries as shipped and in two kernels, forms, candidates."""
    cuda = jit.compiler("tvm_sepconv.compiler.schedules.cuda")
    for layer in layers:
        for precision in plan.PRECISIONS:
            yield Library(f"{layer}.{precision}", layer, precision, DEFAULT)
    for layer in layers:
        for precision in plan.PRECISIONS:
            one = Library(f"{layer}.{precision}.two", layer, precision, TWO_KERNELS)
            for tiling in _two_kernels(one, arch):
                yield replace(one, decisions=tiling.to_dict())
    first = next((layer for layer in plan.NAMED if layer in layers), layers[0])
    for layer in dict.fromkeys((first, layers[-1])):  # what no row has: the other layout, bfloat16
        for precision in (*plan.PRECISIONS, "bfloat16"):
            for layout in ("channels_first", "channels_last")[: 1 + (precision == "bfloat16")]:
                name = f"{layer}.{precision}.{layout}"
                yield Library(name, layer, precision, FORM, data_format=layout)
    for layer in (name for name in plan.NAMED if name in layers):
        for precision in plan.PRECISIONS:
            one = Library("", layer, precision, CANDIDATE)
            every = cuda.candidates(one.kernel, one.allow_tf32, arch)
            for number, tiling in enumerate(every[:candidates]):
                name = f"{layer}.{precision}.{number}"
                yield Library(name, layer, precision, CANDIDATE, tiling.to_dict())


def _set_aside(folder: Path) -> None:
    """Keep what was found with other libraries than those to come, out of their way."""
    shutil.rmtree(folder / "libraries", ignore_errors=True)
    if (folder / "results").is_dir():
        before = "".join(filter(str.isdigit, Plan.load(folder).date))
        (folder / "results").rename(folder / f"results-{before}")


def _two_kernels(library: Library, arch: str) -> tuple[Any, ...]:
    """The tiling of the two kernels for much work; none where there is no such form."""
    form = jit.compiler("tvm_sepconv.compiler.schedules.cuda").FORMS.get("two_kernels")
    try:
        tilings = form.default_tilings(library.kernel, library.allow_tf32, arch) if form else ()
    except ValueError:  # not in this dtype
        return ()
    return tuple(tilings[:1])


def _built(
    wanted: Sequence[Library], work: Path, arch: str, show: Callable[[str], None]
) -> tuple[tuple[Library, ...], dict[str, int]]:
    """Build in as many processes as there are processors; returns what was, and why not."""
    builder = jit.compiler("tvm_sepconv.compiler.tuning.builder")
    state, kept, rejected = _state() + arch, [], Counter[str]()
    pool = builder.processes()
    try:
        futures = [(one, _building(pool, one, work, arch, state)) for one in wanted]
        for number, (library, future) in enumerate(futures, 1):
            try:
                why = future.result() if future else _verdict(library, work)
            except (RuntimeError, ValueError, TimeoutError, ChildProcessError) as error:
                words = _words(error)
                if library.kind == DEFAULT:
                    raise RuntimeError(f"{library.name} cannot be built: {words}") from error
                why = f"{type(error).__name__}: {words.splitlines()[0][:200]}"
            if why:
                rejected[why] += 1
            else:
                kept.append(library)
            if number % 10 == 0 or number == len(futures):
                show(f"  {number}/{len(futures)} built, {sum(rejected.values())} rejected")
    finally:
        pool.shutdown()
    return tuple(kept), dict(rejected)


def _words(error: Exception) -> str:
    """What an error says, without the traceback that it has from another process."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip() or type(error).__name__


def _building(pool: Any, library: Library, work: Path, arch: str, state: str) -> Future[str] | None:
    note = work / f"{library.name}.json"
    if note.is_file() and json.loads(note.read_text())["state"] == _of(library, state):
        return None
    future: Future[str] = pool.submit(build, library, str(work), arch, _of(library, state))
    return future


def _verdict(library: Library, work: Path) -> str:
    return str(json.loads((work / f"{library.name}.json").read_text())["rejected"])


def build(library: Library, work: str, arch: str, state: str) -> str:
    """Build a library and note for what state of the sources; returns why it is rejected, or ""."""
    from tvm_sepconv.compiler import cuda
    from tvm_sepconv.compiler.schedules import cuda as schedules
    from tvm_sepconv.compiler.targets import CudaTarget
    from tvm_sepconv.compiler.tuning import cuda_search
    from tvm_sepconv.options import BuildOptions

    kernel, target = library.kernel, CudaTarget(f"cuda-{arch}")
    options = BuildOptions(allow_tf32=library.allow_tf32)
    rejected: str | None = ""
    variants: Any
    if library.decisions is None:
        variants = cuda.variants(kernel, target, options)
    else:
        tiling = schedules.tiling_from_dict(library.decisions)
        rejected = schedules.refusal(kernel, library.allow_tf32, arch, tiling)
        variants = (cuda.Variant(tiling),)
    if not rejected:
        path = Path(work, library.file)
        kernels = cuda.build_library(kernel, target, path, variants, options)
        rejected = cuda_search.refusal(kernels.values()) if library.kind == CANDIDATE else ""
    note = {"state": state, "rejected": rejected or ""}
    Path(work, f"{library.name}.json").write_text(json.dumps(note))
    return rejected or ""


def _of(library: Library, state: str) -> str:
    return hashlib.sha256(f"{state}{library}".encode()).hexdigest()


def _state() -> str:
    """What libraries are made from, in short: another one makes them anew."""
    root, digest = Path(tvm_sepconv.__file__).parent, hashlib.sha256()
    schedules = _folder("schedules")
    found = [root / "native" / "cuda_host.cuh", *schedules.glob("cuda*.py")]
    found += [p for pattern in _SOURCES for p in root.glob(pattern)]
    logs = _folder("tuning_logs").glob("cuda-*.jsonl")
    for path in sorted({*found, *logs}):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _folder(name: str) -> Path:
    """A package that lies elsewhere in a checkout."""
    return Path(next(iter(jit.compiler(f"tvm_sepconv.compiler.{name}").__path__)))


def _pack(made: Plan, work: Path) -> None:
    """The libraries, one archive; neighbours are alike, so that it stays small."""
    with tarfile.open(made.folder / plan.LIBRARIES, "w:xz") as archive:
        for library in made.libraries:
            archive.add(work / library.file, library.file)


def _bundle(made: Plan) -> None:
    """A layer as it is shipped, for what a call takes."""
    if not any(library.layer == BUNDLE for library in made.libraries):
        return
    workload = workloads.workloads()[BUNDLE]
    layer = tvm_sepconv.SeparableConv1D.from_config(workload.config().to_dict())
    layer.build((1, workload.steps, workload.channels))
    layer.save(made.folder / f"{BUNDLE}.sepconv", targets=[f"cuda-{made.arch}"])


def _packages(folder: Path, python: str) -> None:
    """The package's own modules as they are here, and tvm-ffi for the Python that is there."""
    root, place = Path(tvm_sepconv.__file__).parent, folder / "tvm_sepconv"
    shutil.rmtree(place, ignore_errors=True)
    for path in [*root.rglob("*.py"), root / "workloads.json"]:
        _copy(path, place / path.relative_to(root))
    for name in ("schedules", "tuning_logs"):
        source = _folder(name)
        for path in [*source.glob("*.py"), *source.glob("cuda-*.jsonl")]:
            _copy(path, place / "compiler" / name / path.name)
    packages = folder / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    version = importlib.metadata.version("apache-tvm-ffi")
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                   downloads, "--only-binary=:all:", "--python-version", python,
                   *(f"--platform={name}" for name in _PLATFORMS)]  # fmt: skip
        wanted = [f"apache-tvm-ffi=={version}", "typing-extensions", "safetensors"]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"pip could not get tvm-ffi for Python {python}: {done.stderr.strip()[-500:]}"
            )
        for wheel in Path(downloads).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(packages)


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)
