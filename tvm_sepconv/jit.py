"""Libraries compiled on first use, kept in a cache; a cached one is found without loading TVM.

The cache is ``$TVM_SEPCONV_CACHE``, else ``$XDG_CACHE_HOME/tvm_sepconv`` or
``~/.cache/tvm_sepconv``. An entry is keyed by all of ours and TVM's that its code depends on,
written under another name and renamed when it is complete, so that concurrent processes never see
half of one.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tvm_sepconv import bundle, gpu, targets
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.options import BuildOptions

if TYPE_CHECKING:
    from tvm_sepconv.compiler.tuning.logs import Match

LIBRARY = "layer.so"
ENTRY = "entry.json"  # what it is for, and the other files' hashes
_USUAL = BuildOptions()
_building = threading.Lock()  # threads that need the same library compile it once


def library(config: KernelConfig, target: str | None = None) -> tuple[Path, Path]:
    """Return the layer's and the runtime's library for this machine, compiling them if needed.

    Parameters
    ----------
    target
        A target this machine runs; None for its best.

    Raises
    ------
    RuntimeError
        If the compiler is not installed, cached or not, or no linker is found.
    ValueError
        If `target` is unknown or cannot run here.
    """
    name = _host_target(target)
    logs = compiler("tvm_sepconv.compiler.tuning.logs")
    match = logs.lookup(config, name)  # which needs no TVM
    entry = _entry(config, name, [match], _USUAL)
    return entry / LIBRARY, entry / bundle.RUNTIME


def cuda_library(config: KernelConfig, index: int, options: BuildOptions) -> Path:
    """Return the layer's library for GPU `index`, compiling it if needed.

    Parameters
    ----------
    options
        A target other than CUDA's means the architecture of that GPU.

    Raises
    ------
    RuntimeError
        If no GPU can be used, the compiler is not installed, cached or not, or there is no nvcc.
    ValueError
        If there is no GPU `index`, or CUDA has no kernel for `config`.
    """
    gpu.need(index)
    target = options.target or ""
    if not target.startswith("cuda"):
        able = [arch for arch in targets.CUDA_ARCHS if int(arch[3:]) <= gpu.capability(index)]
        target = f"cuda-{able[-1] if able else targets.CUDA_ARCHS[0]}"  # whose PTX newer ones run
    return cuda_library_for(config, target, options)


def cuda_library_for(config: KernelConfig, target: str, options: BuildOptions) -> Path:
    """Return the layer's library for a CUDA target, compiling it if needed; no GPU is asked.

    Raises
    ------
    RuntimeError
        If the compiler is not installed, cached or not, or there is no nvcc.
    ValueError
        If `target` is unknown, or CUDA has no kernel for `config`.
    """
    target = targets.resolve(target)
    isa = target.partition("@")[0]
    logs = compiler("tvm_sepconv.compiler.tuning.logs")
    suffix = compiler("tvm_sepconv.compiler.tuning.records").TF32 if options.allow_tf32 else ""
    variants = compiler("tvm_sepconv.compiler.schedules.cuda").VARIANTS
    whole = [f"cuda-{arch}" for arch in targets.CUDA_ARCHS] if isa == "cuda" else [isa]
    found = [logs.lookup(config, one, variant=name + suffix) for one in whole for name in variants]
    return _entry(config, target, found, options) / LIBRARY


def _entry(
    config: KernelConfig, target: str, matches: Sequence[Match | None], options: BuildOptions
) -> Path:
    """Return the folder of what is compiled from these, compiled now if it is not there."""
    logs = compiler("tvm_sepconv.compiler.tuning.logs")
    entry = cache_root() / _key(config, target, *matches, options=options)
    with _building:
        found = _intact(entry)
        logs.announce(config, target, matches[0], compiling=not found)
        if not found:
            _build(config, target, entry, options)
        with contextlib.suppress(OSError):
            os.utime(entry)  # when it was last used: `tvm-sepconv cache` goes by it
    return entry


def need_compiler() -> None:
    """Raise a RuntimeError that names the ways out if TVM is not installed."""
    if importlib.util.find_spec("tvm") is None:
        raise RuntimeError(
            "Compiling a layer needs the compiler, which is not installed: "
            "pip install 'tvm-sepconv[compiler]'. A device without it runs bundles: save the layer "
            "with `layer.save(path)` where the compiler is, and `tvm_sepconv.load(path)` it here."
        )


def compiler(module: str) -> ModuleType:
    """Import a module of the compiler, the one place where the device side reaches it."""
    need_compiler()
    return importlib.import_module(module)


def _host_target(target: str | None) -> str:
    here = targets.runnable()
    if target is None:
        if not here:
            raise RuntimeError(
                f"This machine ({targets.machine()}) has none of the instruction sets "
                f"{sorted(targets.FEATURES)}"
            )
        return here[0]
    name = targets.resolve(target)
    if name.partition("@")[0] not in here:
        raise ValueError(
            f"The `target` argument must be one this machine can run, one of {list(here)}. "
            f"Received: target={target}"
        )
    return name


def _key(
    config: KernelConfig, target: str, *matches: Match | None, options: BuildOptions = _USUAL
) -> str:
    parts = {
        "config": config.to_dict(),
        "target": target,
        "tvm": importlib.metadata.version("apache-tvm"),
        "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        "sources": _sources_digest(),
        "options": {**dataclasses.asdict(options), "target": None},  # which stands above
        "records": [match and [match.record.to_dict(), match.distance] for match in matches],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _sources_digest() -> str:
    """Hash everything of ours that decides what code comes out."""
    digest = hashlib.sha256()
    package = files("tvm_sepconv")
    for folder in ("compiler", "native"):
        for item in sorted((package / folder).iterdir(), key=lambda item: item.name):
            if item.name.endswith((".py", ".c", ".h", ".cuh")):
                digest.update(item.read_bytes())
    for item in sorted(files("tvm_sepconv.compiler.schedules").iterdir(), key=lambda i: i.name):
        if item.name.endswith(".py"):
            digest.update(item.read_bytes())
    return digest.hexdigest()


@functools.cache
def cache_root() -> Path:
    """Return the cache, made for this user alone; this process's own if that cannot be had."""
    try:
        return users_cache()
    except OSError as error:
        warnings.warn(
            f"The cache folder cannot be used ({error}); layers are compiled anew in every "
            "process. Set TVM_SEPCONV_CACHE to a folder of your own.",
            stacklevel=2,
        )
        return _process_folder()


def users_cache() -> Path:
    """Return the cache, made for this user alone.

    Raises
    ------
    OSError
        If it cannot be written, belongs to another user, or others can write it.
    """
    root = _cache_path().absolute()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{root} belongs to, or can be written by, another user")
    with tempfile.TemporaryFile(dir=root):
        pass
    return root


def _cache_path() -> Path:
    if chosen := os.environ.get("TVM_SEPCONV_CACHE"):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # this user has no home
        raise OSError(str(error)) from error
    return Path(base, "tvm_sepconv")


@functools.cache
def _process_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tvm_sepconv-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child that ends must not take it from its parent
        shutil.rmtree(folder, ignore_errors=True)


def _files(target: str) -> tuple[str, ...]:
    return (LIBRARY,) if target.startswith("cuda") else (LIBRARY, bundle.RUNTIME)


def _intact(entry: Path) -> bool:
    try:
        description = json.loads((entry / ENTRY).read_text())
        hashes = description["sha256"]
        files = {name: bundle.sha256(entry / name) for name in _files(description["target"])}
    except (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError):
        return False
    return bool(hashes == files)


def _build(config: KernelConfig, target: str, entry: Path, options: BuildOptions = _USUAL) -> None:
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have tidied up
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix="new-") as folder:
        work = Path(folder, "entry")
        work.mkdir()
        if target.startswith("cuda"):
            _compile_cuda(config, target, options, work)
        else:
            _compile(config, target, work)
        hashes = {name: bundle.sha256(work / name) for name in _files(target)}
        description = {"target": target, "kernel": config.to_dict(), "sha256": hashes}
        (work / ENTRY).write_text(json.dumps(description))
        if _intact(entry):  # another process was first; it may be about to open its files
            return
        try:
            if entry.exists():  # damaged: moved aside, not from under a process that uses it
                entry.rename(Path(folder, "damaged"))
            work.rename(entry)
        except OSError:  # … or was first just now
            if not _intact(entry):
                raise


def _compile(config: KernelConfig, target: str, work: Path) -> None:
    build = compiler("tvm_sepconv.compiler.build")
    chosen = compiler("tvm_sepconv.compiler.targets").cpu(target)
    build.build_library(config, chosen, work / LIBRARY, build.variants(config, chosen))
    build.build_runtime(chosen, work / bundle.RUNTIME)


def _compile_cuda(config: KernelConfig, target: str, options: BuildOptions, work: Path) -> None:
    cuda = compiler("tvm_sepconv.compiler.cuda")
    chosen = compiler("tvm_sepconv.compiler.targets").cuda(target)
    variants = cuda.variants(config, chosen, options)
    cuda.build_library(config, chosen, work / LIBRARY, variants, options)
