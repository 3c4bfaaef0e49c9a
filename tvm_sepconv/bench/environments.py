"""The peers' virtual environments: where they are, what is in them, making them.

They lie in ``$TVM_SEPCONV_PEERS``, else in ``peers`` of this user's cache. Nothing of ours is
installed there: a contestant's process finds this package by its path. A framework that the running
Python has itself needs no environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tvm_sepconv import jit

# PyTorch's CPU builds are the local versions "+cpu": the plain wheel for x86 Linux draws gigabytes
# of CUDA. This version is the one that the tests run with.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "torch": ("torch==2.13.0+cpu", "numpy"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "litert": ("ai-edge-litert", "flatbuffers"),
    "keras-jax": ("keras", "jax"),
    "keras-tensorflow": ("keras", "tensorflow-cpu; platform_machine == 'x86_64'",
                         "tensorflow; platform_machine != 'x86_64'"),
}  # fmt: skip
# Asked only if the configured indexes have no such build.
_INDEXES = {"torch": "https://download.pytorch.org/whl/cpu"}
_DONE = "complete.txt"  # what was installed, written last


def root() -> Path:
    """Return the folder of all environments, which may not exist yet."""
    chosen = os.environ.get("TVM_SEPCONV_PEERS")
    return Path(chosen).absolute() if chosen else jit.cache_root() / "peers"


def python(name: str | None, modules: Iterable[str]) -> Path | None:
    """Return a Python that has `modules`: the environment's, else this one; None if neither has."""
    if name is not None and complete(name):
        return _python(name)
    here = all(importlib.util.find_spec(module) is not None for module in modules)
    return Path(sys.executable) if here else None


def complete(name: str) -> bool:
    """Whether the environment was made, and with what is wanted of it today."""
    try:
        return (root() / name / _DONE).read_text() == _content(name)
    except OSError:
        return False


def set_up(names: Sequence[str]) -> list[Path]:
    """Make the environments of these names, all if there are none; returns their folders.

    pip's own settings and variables hold: ``PIP_INDEX_URL`` names another index.

    Raises
    ------
    ValueError
        If there is no environment of a name.
    RuntimeError
        If one cannot be made; what pip said stands above it.
    """
    for name in names:
        if name not in ENVIRONMENTS:
            raise ValueError(
                f"There is no environment {name!r} to set up. There are {', '.join(ENVIRONMENTS)}"
            )
    result = []
    for name in names or ENVIRONMENTS:
        result.append(root() / name)
        if complete(name):
            print(f"{name}: {result[-1]}, complete; remove the folder to have it made anew")
            continue
        print(f"{name}: {result[-1]}", flush=True)
        _make(name)
    return result


def _make(name: str) -> None:
    folder = root() / name
    shutil.rmtree(folder, ignore_errors=True)  # an older one, or half of one
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], name)
    install = [str(_python(name)), "-m", "pip", "install", "--disable-pip-version-check"]
    try:
        _run([*install, *ENVIRONMENTS[name]], name)
    except RuntimeError:
        if name not in _INDEXES:
            raise
        _run([*install, "--extra-index-url", _INDEXES[name], *ENVIRONMENTS[name]], name)
    (folder / _DONE).write_text(_content(name))


def _run(command: Sequence[str], name: str) -> None:
    # Another Python's settings would reach into the environment.
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if status := subprocess.run(command, env=variables).returncode:
        raise RuntimeError(
            f"The environment of {name} could not be made: `{' '.join(command)}` ended with "
            f"status {status}, see above. The benchmark runs without it; its table is then headed "
            "INCOMPLETE if a required peer is missing"
        )


def _content(name: str) -> str:
    return "\n".join(ENVIRONMENTS[name]) + "\n"


def _python(name: str) -> Path:
    return root() / name / "bin" / "python"
