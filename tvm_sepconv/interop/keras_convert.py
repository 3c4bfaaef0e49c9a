"""`convert`: a trained Keras model with compiled layers in the place of its SeparableConv1D."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras  # noqa: TID253  # this module is imported only by what is made for Keras
import numpy as np

from tvm_sepconv import activations
from tvm_sepconv.interop.keras import read_layers
from tvm_sepconv.interop.keras_layer import SeparableConv1D

_STEPS, _BATCH = 100, 1  # of random data, where the model leaves them open
_TIMING_SECS, _MOST_CALLS = 0.1, 50


class _Replaced(NamedTuple):
    """A layer of the new model, and the layers of the old one that it stands for."""

    name: str
    new: Any
    old: list[Any]
    weights: list[Any]


def convert(model: Any, data: Any = None) -> Any:
    """Return a copy of a model for inference that runs compiled kernels.

    Every SeparableConv1D is replaced by that of this module. A BatchNormalization and an
    element-wise activation layer behind it are folded into it, under the conditions of
    `tvm_sepconv.from_keras`; in their places stand layers of the same names that do nothing. All
    other layers are copied. Both models are run, and a table is printed: each layer's largest
    difference from the layers it stands for and the milliseconds of both, as in ``predict``.

    Parameters
    ----------
    model
        A built Sequential or Functional model, at any nesting.
    data
        Inputs to compare and time with, as the model takes them; by default one of random numbers,
        100 steps where the model leaves their number open.

    Returns
    -------
    keras.Model
        Compiled, in Keras's sense, if the original is. Its weights are copies.

    Raises
    ------
    ValueError
        If the model is not of those kinds, has no such layer, or the copy's outputs differ from the
        original's by more than rounding.
    """
    known = isinstance(model, keras.Sequential) or type(model).__name__ == "Functional"
    if not known or not model.built:
        raise ValueError(
            "`model` must be a built Sequential or Functional model, whose layers are known. Call "
            f"it once on data, or replace the layers of your own class yourself. Received: {model}"
        )
    replaced, gone = _replacements(model)
    copy = _copy(model, {id(r.old[0]): r.new for r in replaced}, gone)
    for one in replaced:
        one.new.set_weights(one.weights)
    inputs = _random(model) if data is None else data
    seen = _inputs_seen([r.new for r in replaced], lambda: copy(inputs, training=False))
    rows = [_row(r.name, _chain(r.old), r.new, x) for r, x in zip(replaced, seen, strict=True)]
    whole = _row("the model", _inference(model), _inference(copy), inputs)
    _print([*rows, whole], replaced)
    _check(whole, model)
    return copy


def _replacements(model: Any) -> tuple[list[_Replaced], set[int]]:
    """Return the new layers, and the layers (by id) that they make superfluous."""
    at = dict(_layers_by_path(model, ()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        model.save(file)
        found = read_layers(file, None, True, True)
    replaced, gone = [], set()
    for names, layer, fold in found:
        behind = [(*names[:-1], name) for name in (fold.layers if fold else ())]
        folded = [at[path] for path in behind]
        gone |= {id(part) for part in folded}
        config = {**at[names].get_config(), "use_bias": layer.config.use_bias}
        if folded:
            config["activation"] = activations.serialize(layer.config.activation)
        new = SeparableConv1D.from_config(config)
        replaced.append(_Replaced("/".join(names), new, [at[names], *folded], layer.get_weights()))
    return replaced, gone


def _layers_by_path(model: Any, outer: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for layer in model.layers:
        names = (*outer, layer.name)
        if isinstance(layer, keras.Model):
            yield from _layers_by_path(layer, names)
        else:
            yield names, layer


def _copy(model: Any, new: dict[int, Any], gone: set[int]) -> Any:
    pairs = []

    def clone(layer: Any) -> Any:
        if id(layer) in new:
            return new[id(layer)]
        if id(layer) in gone:
            return keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
        pairs.append((layer, type(layer).from_config(layer.get_config())))
        return pairs[-1][1]

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        # A normalization's call has arguments that the layer in its place does not have.
        return (
            layer(args[0]) if isinstance(layer, keras.layers.Identity) else layer(*args, **kwargs)
        )

    if isinstance(model, keras.Sequential):
        copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    else:
        inputs = keras.tree.map_structure(_same_input, model.input)
        copy = keras.models.clone_model(model, inputs, clone, call, recursive=True)
    for old, layer in pairs:
        if isinstance(layer, keras.Layer):  # not an operation such as keras.ops.add
            layer.set_weights(old.get_weights())
    return copy


def _same_input(tensor: Any) -> Any:
    # Keras's own copy would be named after the tensor; a dict of inputs goes by the layer's name.
    name = tensor._keras_history.operation.name
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)


def _random(model: Any) -> Any:
    rng = np.random.default_rng(0)

    def values(tensor: Any) -> Any:
        shape = (_BATCH, *(_STEPS if size is None else size for size in tensor.shape[1:]))
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        array = rng.standard_normal(shape) if "float" in dtype else rng.integers(0, 2, shape)
        return keras.ops.convert_to_tensor(array, dtype)

    sequential = isinstance(model, keras.Sequential)
    return keras.tree.map_structure(values, model.inputs[0] if sequential else model.input)


def _inputs_seen(layers: Sequence[Any], run: Callable[[], Any]) -> list[Any]:
    """Return what each layer was called with, the last time in `run`."""
    seen: dict[int, Any] = {}
    for layer in layers:
        own = layer.call

        def call(inputs: Any, training: Any = None, own: Any = own, key: int = id(layer)) -> Any:
            seen[key] = inputs
            return own(inputs, training=training)

        layer.call = call
    try:
        run()
    finally:
        for layer in layers:
            del layer.call
    return [seen[id(layer)] for layer in layers]


def _chain(layers: Sequence[Any]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return apply


def _inference(model: Any) -> Callable[[Any], Any]:
    return lambda x: model(x, training=False)


class _Row(NamedTuple):
    name: str
    difference: float
    magnitude: float
    before_ms: float
    after_ms: float


def _row(name: str, before: Callable[..., Any], after: Callable[..., Any], x: Any) -> _Row:
    old, new = _as_in_predict(before), _as_in_predict(after)
    pairs = list(zip(_arrays(old(x)), _arrays(new(x)), strict=True))
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    magnitude = max(float(np.abs(a).max()) for a, _ in pairs)
    return _Row(name, difference, magnitude, _milliseconds(old, x), _milliseconds(new, x))


def _as_in_predict(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` as Keras's backend runs it in ``predict``."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jax.jit(fn)
        return lambda x: jax.block_until_ready(compiled(x))
    if backend == "tensorflow":
        import tensorflow as tf

        graph = tf.function(fn)
        return lambda x: graph(keras.tree.map_structure(tf.convert_to_tensor, x))
    import torch

    return lambda x: torch.no_grad()(fn)(x)


def _arrays(outputs: Any) -> list[Any]:
    return [
        np.asarray(keras.ops.convert_to_numpy(y), np.float64) for y in keras.tree.flatten(outputs)
    ]


def _milliseconds(fn: Callable[..., Any], x: Any) -> float:
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < _TIMING_SECS and len(times) < _MOST_CALLS):
        start = time.perf_counter()
        fn(x)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _print(rows: Sequence[_Row], replaced: Sequence[_Replaced]) -> None:
    names = [" + ".join([r.name, *(part.name for part in r.old[1:])]) for r in replaced]
    width = max(map(len, [*names, rows[-1].name, "layer"]))
    print(f"{'layer':<{width}}  {'largest difference':<19}  {'before':>11}  {'after':>11}")
    for name, row in zip([*names, rows[-1].name], rows, strict=True):
        print(
            f"{name:<{width}}  {row.difference:8.1e} of {row.magnitude:<7.2g}  "
            f"{row.before_ms:8.3f} ms  {row.after_ms:8.3f} ms"
        )


def _check(whole: _Row, model: Any) -> None:
    digits = {"float16": 2e-2, "bfloat16": 1e-1}.get(model.compute_dtype, 1e-3)
    if not whole.difference <= digits * max(whole.magnitude, 1.0):
        raise ValueError(
            f"The converted model's outputs differ from the original's by {whole.difference:.2g} "
            f"(of up to {whole.magnitude:.2g}), which is more than rounding. Please report the "
            "model; it was not changed."
        )
