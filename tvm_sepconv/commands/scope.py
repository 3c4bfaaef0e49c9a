"""What subcommands have in common: for which target, with which records, which kernels."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tvm_sepconv import jit, paths, targets
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.subjects import Subject

# One layer each of the sizes that differ most: many taps, few steps, small.
DEFAULT_WORKLOADS = ("QN-B1", "CN-21", "MB-1")


def add_target(command: argparse.ArgumentParser) -> None:
    """Add the option that says what a command works for."""
    command.add_argument(
        "--target", metavar="T",
        help="such as x86 (the best level here), x86_64-avx2, arm (a Cortex-A76), aarch64-neon, "
        "cuda, cuda-sm_90; default: this machine's best instruction set",
    )  # fmt: skip


def kernels(subjects: Iterable[Subject]) -> list[tuple[Subject, KernelConfig]]:
    """Return the layers with what their kernels depend on, a kernel once."""
    result: dict[KernelConfig, Subject] = {}
    for subject in subjects:
        config = subject.config.kernel_config(subject.channels)
        if config in result:
            text = f"{subject.id} is left out: it has the kernel of {result[config].id}"
            print(text, file=sys.stderr)
        result.setdefault(config, subject)
    return [(subject, config) for config, subject in result.items()]


def target(name: str | None) -> str:
    """Return the target's full name; this machine's best for None.

    Raises
    ------
    ValueError
        If there is none of that name, or none for this machine.
    """
    here = targets.runnable()
    if name is None and not here:
        raise ValueError(f"`--target` is needed: there is none for {targets.machine()} machines")
    return targets.resolve(name) if name is not None else here[0]


def read_logs(folder: str | None) -> None:
    """Look for records in `folder` first; a ValueError if there is none."""
    if folder is not None:
        paths.folder("--logs", Path(folder))
    use_logs(folder)


def use_logs(folder: str | None) -> None:
    """Look for records in `folder` first, and write them there, where there may be none yet."""
    if folder is not None:
        others = os.environ.get("TVM_SEPCONV_LOGS")
        os.environ["TVM_SEPCONV_LOGS"] = os.pathsep.join(filter(None, [folder, others]))


def work_dir() -> Path:
    """Return where searches leave what they leave: work/ of a checkout, else of the cache."""
    root: Path | None = jit.compiler("tvm_sepconv.compiler.tuning.logs").checkout()
    return (root or jit.cache_root()) / "work"
