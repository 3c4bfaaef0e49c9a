"""Who is measured: our layer, other people's frameworks, and what is shown beside them.

A contestant's function is ``prepare(case, threads) -> list[Prepared]``: the forms in which the
layer may be computed, ready to be called. It runs in a process of its own and imports its framework
inside. All forms are checked against the reference; the fastest one is the contestant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt

from tvm_sepconv.bench.report import OURS

if TYPE_CHECKING:
    from tvm_sepconv.bench.case import Case

Array = npt.NDArray[Any]
DENSE = "dense Conv1D"


class Prepared(NamedTuple):
    """One form of a contestant, ready to be called.

    Attributes
    ----------
    form
        In a few words, such as "2-D, height 1".
    call
        The whole call, NumPy in and NumPy out: takes an input, returns an output that the next
        call does not overwrite.
    x
        The case's input as `call` takes it, in the form's own layout.
    restore
        From what `call` returns to the layer's data format.
    kernel
        Ours only: the kernel alone, from an input into an output of the layer's data format.
    """

    form: str
    call: Callable[[Array], Array]
    x: Array
    restore: Callable[[Array], Array]
    kernel: Callable[[Array, Array], object] | None = None


@dataclass(frozen=True)
class Contestant:
    """An entry of the table.

    Parameters
    ----------
    key
        Its short name, for the command line.
    function
        Module of this package and function in it.
    environment
        The virtual environment it runs in, of `environments.ENVIRONMENTS`; None for ours.
    modules
        What it imports, besides the standard library and NumPy.
    distributions
        Whose versions are reported.
    counts
        Whether it is a peer: somebody else's framework computing the same layer.
    variables
        Environment variables of its process.
    """

    name: str
    key: str
    function: str
    environment: str | None
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    counts: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)

    def prepare(self, case: Case, threads: int) -> list[Prepared]:
        """Import its module and prepare a case."""
        module, _, function = self.function.partition(".")
        loaded = importlib.import_module(f"{__name__}.{module}")
        forms: list[Prepared] = getattr(loaded, function)(case, threads)
        return forms

    def answer(self, case: Case) -> tuple[Array, Array]:
        """Return what must come out, and how far off each element may be."""
        if self.name != DENSE:
            return case.expected, case.allowed
        dense = importlib.import_module(f"{__name__}.dense")
        expected, allowed = dense.answer(case)
        return expected, allowed


_ONNX = ("onnx", "onnxruntime")
_TVM = ("apache-tvm", "apache-tvm-ffi")

CONTESTANTS = (
    Contestant(OURS, "ours", "ours.prepare", None, (), _TVM, counts=False),
    Contestant("PyTorch", "pytorch", "torch.eager", "torch", ("torch",), ("torch",)),
    Contestant("torch.compile", "torch-compile", "torch.compiled", "torch", ("torch",), ("torch",)),
    Contestant("ONNX Runtime", "onnxruntime", "onnxruntime.prepare", "onnxruntime", _ONNX, _ONNX),
    Contestant(
        "OpenVINO", "openvino", "openvino.prepare", "openvino", ("onnx", "openvino"), ("openvino",)
    ),
    Contestant(
        "LiteRT", "litert", "litert.prepare", "litert", ("ai_edge_litert", "flatbuffers"),
        ("ai-edge-litert",),
    ),
    Contestant(
        "Keras on JAX", "keras-jax", "keras.on_jax", "keras-jax", ("keras", "jax"),
        ("keras", "jax", "jaxlib"), variables={"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
    ),
    Contestant(
        "Keras on TensorFlow", "keras-tensorflow", "keras.on_tensorflow", "keras-tensorflow",
        ("keras", "tensorflow"), ("keras", "tensorflow", "tensorflow-cpu"),
        variables={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
    ),
    Contestant(
        "two kernels", "two-kernels", "two_kernel.prepare", None, (), _TVM, counts=False
    ),
    Contestant(DENSE, "dense", "dense.prepare", "onnxruntime", _ONNX, _ONNX, counts=False),
    Contestant(
        "MetaSchedule", "metaschedule", "metaschedule.prepare", None, (), _TVM, counts=False
    ),
)  # fmt: skip
