"""What ``tvm-sepconv tune`` asks of a GPU, and of the options that are about one."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tvm_sepconv import gpu, jit, selection, targets
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.subjects import Subject

PRECISIONS = ("float32", "tf32", "float16")
_WAYS = (
    "Build here and let a board or server that has one measure, through TVM's RPC tracker: "
    "`tvm-sepconv tune --target {target} --rpc HOST:PORT --key KEY`; or run it on a machine with a "
    "GPU, its driver and nvcc; or take what is built to one without a network: `tvm-sepconv gpu "
    "prepare FOLDER`, then there `python3 FOLDER`. `tvm-sepconv build --target cuda` needs no GPU"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command that are about GPUs."""
    group = parser.add_argument_group("measuring on a GPU")
    group.add_argument(
        "--precision", choices=PRECISIONS, default=None,
        help="what is computed in; tf32 multiplies float32 with fewer digits; default: the layer's",
    )  # fmt: skip


def target(name: str, options: argparse.Namespace) -> str:
    """Return the target to tune for: for "cuda" that of this machine's first GPU.

    With `--rpc` it is as it was given: what GPU there is the board knows.

    Raises
    ------
    ValueError
        If no GPU can be measured on here, it is another than the target's, or an option is of
        processors.
    RuntimeError
        If there is no nvcc.
    """
    if not name.startswith("cuda"):
        selection.refuse("`--precision` is of GPUs, --target cuda", _given(options))
        return name
    unfit = ["--space"] * (options.space != "tvm_sepconv")
    unfit += ["--num-threads"] * (options.num_threads != 1)
    selection.refuse("Kernels for CUDA have one design space and no threads of ours", unfit)
    if options.replay is not None:
        return _replayed(name)
    if options.rpc is None:
        name = _here(name)
    jit.compiler("tvm_sepconv.compiler.nvcc").find()
    return targets.resolve(name)


def _replayed(name: str) -> str:
    if "-" not in name:
        raise ValueError(
            "`--replay` measures nothing and asks no GPU what it is: name its architecture, "
            f"such as --target cuda-{targets.CUDA_ARCHS[-1]}. Received: --target {name}"
        )
    return name


def _here(name: str) -> str:
    """The target of this machine's GPU, which `name` must mean."""
    if reason := gpu.missing():
        raise ValueError(
            "Tuning for CUDA measures kernels on an NVIDIA GPU, and this machine has none to use: "
            f"{reason}. {_WAYS.format(target=name)}"
        )
    here = f"cuda-sm_{gpu.capability(0)}"
    if name not in ("cuda", here):
        raise ValueError(
            f"Tuning for {name} measures kernels on such a GPU, and this machine's is {here}: "
            "what is measured on one says little of another. Say `--target cuda`, or let such a "
            f"machine measure: `tvm-sepconv tune --target {name} --rpc HOST:PORT --key KEY`"
        )
    return here


def _given(options: argparse.Namespace) -> list[str]:
    return selection.given(options, ("precision",))


def subject(layer: Subject, precision: str | None) -> Subject:
    """The layer with what a precision stores."""
    if precision is None:
        return layer
    dtype = "float32" if precision == "tf32" else precision
    values = {**layer.config.to_dict(), "dtype": dtype}
    return replace(layer, config=SepConvConfig.from_dict(values), weights=None)
