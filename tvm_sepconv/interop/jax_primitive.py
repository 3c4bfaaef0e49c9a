"""The JAX primitive that runs a compiled kernel on the host, and how XLA gets to it.

Through the package jax-tvm-ffi where it is installed, XLA hands over its buffers and the kernel
writes into the result. Else XLA calls back with NumPy arrays and copies what comes back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TARGET = "tvm_sepconv_separable_conv1d"

# What XLA may ask for, by number. An entry stays: a compiled program may hold its number.
_in_place: list[Callable[..., None]] = []


def add_in_place(run: Callable[..., None]) -> int | None:
    """Return the number by which XLA can call `run(x, *weights, y)`, None without jax-tvm-ffi."""
    if not _has_bridge():
        return None
    _in_place.append(run)
    return len(_in_place) - 1


@functools.cache
def _has_bridge() -> bool:
    try:
        bridge = importlib.import_module("jax_tvm_ffi")
        import tvm_ffi
    except ImportError:
        return False
    # Owned tensors are those that NumPy can look into.
    bridge.register_ffi_target(
        TARGET,
        tvm_ffi.convert(lambda number, *tensors: _in_place[number](*tensors)),
        ["attrs.number", "args", "rets"],
        pass_owned_tensor=True,
    )
    return True


def bind(run: Callable[..., Any], aval: Any, operands: Sequence[Any], number: Any = None) -> Any:
    """Apply the primitive.

    Parameters
    ----------
    run
        Takes the operands as NumPy arrays and returns one.
    aval
        Shape and dtype of the result, whose first axis is the batch, as is the first operand's.
    number
        From `add_in_place`; None calls `run`.
    """
    import jax

    if 0 in aval.shape:
        return jax.numpy.zeros(aval.shape, aval.dtype)
    return _primitive().bind(*operands, run=run, aval=aval, number=number)


@functools.cache
def _primitive() -> Any:
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import batching, mlir

    kernel = Primitive(TARGET)
    kernel.def_impl(
        lambda *arrays, run, aval, number: jax.numpy.asarray(run(*map(np.asarray, arrays)))
    )
    kernel.def_abstract_eval(lambda *arrays, run, aval, number: aval)
    mlir.register_lowering(kernel, _lower, platform="cpu")
    mlir.register_lowering(kernel, _refuse)
    batching.primitive_batchers[kernel] = _batch
    return kernel


def _lower(ctx: Any, *operands: Any, run: Any, aval: Any, number: int | None) -> Any:
    """Call in place or, less quickly, back.

    `jax.pure_callback` first makes JAX arrays of the operands, which needs a free thread of XLA's
    pool: on one core, or with as many callbacks under way as there are cores, it waits for ever.
    """
    import jax
    from jax.interpreters import mlir

    if number is not None:
        return jax.ffi.ffi_lowering(TARGET)(ctx, *operands, number=np.int64(number))
    result, _, _ = mlir.emit_python_callback(
        ctx,
        lambda *arrays: (run(*map(np.asarray, arrays)),),
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return result


def _refuse(ctx: Any, *operands: Any, **parameters: Any) -> Any:
    platforms = ", ".join(ctx.module_context.platforms)
    raise ValueError(
        "The `x` argument must be on the CPU: tvm_sepconv has no kernels for JAX on other devices "
        f"yet. Received: a computation for {platforms}. Move the arrays with `jax.device_put(x, "
        "jax.devices('cpu')[0])`, or run all of JAX there with JAX_PLATFORMS=cpu"
    )


def _batch(arguments: Any, axes: Any, *, run: Any, aval: Any, number: int | None) -> Any:
    """Fold a mapped axis of the first operand into the batch; with mapped weights, one by one."""
    import jax

    mapped = {
        i: jax.numpy.moveaxis(a, axis, 0)
        for i, (a, axis) in enumerate(zip(arguments, axes, strict=True))
        if axis is not None
    }
    if list(mapped) == [0]:
        x = mapped[0]
        folded = aval.update(shape=(x.shape[0] * aval.shape[0], *aval.shape[1:]))
        operands = (x.reshape(-1, *x.shape[2:]), *arguments[1:])
        y = bind(run, folded, operands, number)
        return y.reshape(x.shape[0], *aval.shape), 0

    def one(parts: Any) -> Any:
        given = [parts.get(i, a) for i, a in enumerate(arguments)]
        return bind(run, aval, given, number)

    return jax.lax.map(one, mapped), 0
