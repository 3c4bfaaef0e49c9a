"""The layer by JAX's own operations: what derivatives are computed from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm_sepconv import activations
from tvm_sepconv.config import SepConvConfig


def differentiable(config: SepConvConfig, compiled: Callable[..., Any]) -> Any:
    """Return `compiled`, jitted, with the derivatives of `native`."""
    import jax

    own = functools.partial(native, config)
    function = jax.custom_jvp(compiled)
    function.defjvp(lambda primals, tangents: jax.jvp(own, primals, tangents))
    return jax.jit(function)


def native(config: SepConvConfig, x: Any, depthwise: Any, pointwise: Any, *bias: Any) -> Any:
    """What the kernel computes, by `jax.lax`."""
    from jax import lax

    layout = "NWC" if config.channel_axis == -1 else "NCW"
    steps, channels = (x.shape[1], x.shape[2]) if layout == "NWC" else (x.shape[2], x.shape[1])
    convolve = functools.partial(
        lax.conv_general_dilated, dimension_numbers=(layout, "WIO", layout)
    )
    y = convolve(
        x,
        depthwise.reshape(config.kernel_size, 1, -1),
        (config.strides,),
        [config.pad_amounts(steps)],
        rhs_dilation=(config.dilation_rate,),
        feature_group_count=channels,
    )
    y = convolve(y, pointwise, (1,), "VALID")
    if bias:
        y = y + (bias[0] if layout == "NWC" else bias[0][:, None])
    return elementwise(activations.name_of(config.activation) or "linear")(y)


def elementwise(name: str) -> Callable[[Any], Any]:
    """Return Keras's activation `name` as a function of JAX arrays."""
    from jax import nn, numpy

    special: dict[str, Callable[[Any], Any]] = {
        "linear": lambda y: y,
        "exponential": numpy.exp,
        "gelu": functools.partial(nn.gelu, approximate=False),
        "hard_shrink": lambda y: numpy.where(abs(y) > 0.5, y, 0),
        "leaky_relu": functools.partial(nn.leaky_relu, negative_slope=0.2),
        "soft_shrink": lambda y: numpy.sign(y) * nn.relu(abs(y) - 0.5),
        "softsign": nn.soft_sign,
        "tanh": numpy.tanh,
        "tanh_shrink": lambda y: y - numpy.tanh(y),
    }
    return special.get(name) or getattr(nn, name)
