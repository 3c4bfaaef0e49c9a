"""The layer in OpenVINO, read from the same ONNX model that ONNX Runtime is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared
from tvm_sepconv.bench.contestants.onnxruntime import FORMS, onnx_model

Array = npt.NDArray[Any]


def prepare(case: Case, threads: int) -> list[Prepared]:
    """Return OpenVINO's forms of a case: static shapes, weights packed when it compiles.

    A request works on tensors. Copying to and from its own takes less time for small arrays, making
    tensors of the caller's arrays for large ones.
    """
    x = case.channels_first(case.x)
    result = []
    for form, height in FORMS.items():
        model = onnx_model(case.config, case.weights, (x.shape[0], case.steps), height)
        compiled = _compiled(model.SerializeToString(), threads)
        image = x[:, :, None] if height else x
        for how, bound in {
            "arrays copied": _copying(compiled),
            "shared": _sharing(compiled),
        }.items():
            result.append(Prepared(f"{form}, {how}", bound, image, case.from_channels_first))
    return result


def _compiled(model: bytes, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    return core.compile_model(core.read_model(model, b""), "CPU", config)


def _copying(compiled: Any) -> Callable[[Array], Array]:
    request = compiled.create_infer_request()
    source, result = request.get_input_tensor().data, request.get_output_tensor().data

    def run(x: Array) -> Array:
        source[...] = x
        request.infer()
        return result.copy()  # type: ignore[no-any-return]

    return run


def _sharing(compiled: Any) -> Callable[[Array], Array]:
    import openvino

    request = compiled.create_infer_request()
    shape = tuple(compiled.output(0).shape)

    def run(x: Array) -> Array:
        y = np.empty(shape, np.float32)
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
        request.infer()
        return y

    return run
