"""Keras's own layer, on JAX and on TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.contestants import Prepared

Array = npt.NDArray[Any]


def on_jax(case: Case, threads: int) -> list[Prepared]:
    """Return the layer compiled by XLA, in both data formats.

    JAX cannot be told a number of threads: it has one for each processor it is bound to.
    """
    import jax

    result = []
    for data_format in ("channels_last", "channels_first"):
        apply = jax.jit(_functional(_model(case, data_format)))
        call = functools.partial(_through_jax, apply)
        result.append(_prepared(case, data_format, data_format, call))
    return result


def _functional(model: Any) -> Callable[[Any], Any]:
    variables = [v.value for v in model.trainable_variables]
    return lambda x: model.stateless_call(variables, [], x)[0]


def _through_jax(apply: Callable[[Any], Any], x: Array) -> Array:
    return np.asarray(apply(x))


def on_tensorflow(case: Case, threads: int) -> list[Prepared]:
    """Return the layer as a tf.function, and compiled by XLA."""
    import tensorflow as tf

    if not _configured:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        _configured.append(threads)
    result = []
    for form, by_xla in {"tf.function": False, "tf.function, XLA": True}.items():
        model = _model(case, "channels_last")
        signature = tf.TensorSpec(case.channels_last(case.x).shape, tf.float32)
        function = tf.function(model, input_signature=[signature], jit_compile=by_xla)
        call = functools.partial(_through_tensorflow, function, tf.convert_to_tensor)
        result.append(_prepared(case, form, "channels_last", call))
    return result


def _through_tensorflow(
    function: Callable[[Any], Any], tensor: Callable[[Array], Any], x: Array
) -> Array:
    return function(tensor(x)).numpy()  # type: ignore[no-any-return]


_configured: list[int] = []  # TensorFlow takes its threads once


def _prepared(case: Case, form: str, data_format: str, call: Any) -> Prepared:
    if data_format == "channels_last":
        return Prepared(form, call, case.channels_last(case.x), case.from_channels_last)
    return Prepared(form, call, case.channels_first(case.x), case.from_channels_first)


def _model(case: Case, data_format: str) -> Any:
    """Keras's layer in a data format, with the case's weights."""
    import keras

    config = {**case.config.to_dict(), "data_format": data_format}
    layers: list[Any] = []
    if not isinstance(case.config.padding, str):  # which Keras's layer does not have
        layers = [keras.layers.ZeroPadding1D(case.config.padding, data_format=data_format)]
        config["padding"] = "valid"
    layers += [keras.layers.SeparableConv1D.from_config(config)]
    shape = (case.steps, case.channels)
    model = keras.Sequential(
        [keras.Input(shape[:: 1 if data_format == "channels_last" else -1]), *layers]
    )
    model.set_weights(case.weights)
    return model
