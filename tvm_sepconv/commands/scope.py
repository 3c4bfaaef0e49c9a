"""What subcommands have in common: which layers, for which target, with which records."""

from __future__ import annotations

import argparse
import os

from tvm_sepconv import targets, workloads
from tvm_sepconv.config import KernelConfig
from tvm_sepconv.workloads import Workload

# One layer each of the sizes that differ most: many taps, few steps, small.
DEFAULT_WORKLOADS = "QN-B1,CN-21,MB-1"
EPILOG = "Layers are named by id in the table of published layers, or by pattern: QN-B1,CN-*"
NO_CUDA = (
    "is not part of this version yet: of CUDA it has the schedule and the source code it makes"
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that say what a command works on."""
    best = "this machine's best"
    command.add_argument(
        "--target", metavar="T", help=f"such as x86 ({best}), x86_64-avx2, arm; default: {best}"
    )
    command.add_argument(
        "--workloads", default=DEFAULT_WORKLOADS, metavar="IDS", help="default: %(default)s"
    )
    command.add_argument(
        "--logs", metavar="DIR", help="look for records here first, and write them here"
    )


def select(patterns: str) -> list[tuple[Workload, KernelConfig]]:
    """Return the layers that ids or patterns name, a kernel once."""
    result: dict[KernelConfig, Workload] = {}
    for workload in workloads.select([patterns]):
        config = workload.config().kernel_config(workload.channels)
        if config in result:
            print(f"{workload.id} is left out: it has the kernel of {result[config].id}")
        result.setdefault(config, workload)
    return [(workload, config) for config, workload in result.items()]


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


def use_logs(folder: str | None) -> None:
    """Look for records in `folder` first, and write them there."""
    if folder is not None:
        others = os.environ.get("TVM_SEPCONV_LOGS")
        os.environ["TVM_SEPCONV_LOGS"] = os.pathsep.join(filter(None, [folder, others]))
