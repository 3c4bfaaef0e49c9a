"""What a SeparableConv1D layer is: Keras's arguments, parsed once, and what follows from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_sepconv import activations, arguments, constraints, initializers, regularizers
from tvm_sepconv.arguments import Padding
from tvm_sepconv.kernel_config import KernelConfig

__all__ = ["KernelConfig", "SepConvConfig"]

Shape = tuple[int | None, ...]

_KERNEL_ARGUMENTS = ("depthwise", "pointwise", "bias")

_names = itertools.count()  # of the layers without a name; next() is atomic


def _automatic_name() -> str:
    number = next(_names)
    return f"separable_conv1d_{number}" if number else "separable_conv1d"


@dataclass(frozen=True)
class SepConvConfig:
    """Keras's SeparableConv1D arguments in canonical form; make one with `parse` or `from_dict`.

    Every argument is resolved: names to callables, tuples of one to their element, None to its
    default.

    Parameters
    ----------
    padding
        "valid", "same" or (left, right), our extension: that many zeros before and after the steps.
    dtype
        The policy's name, one of `arguments.POLICIES`.
    """

    filters: int
    kernel_size: int
    strides: int = 1
    padding: Padding = "valid"
    data_format: str = "channels_last"
    dilation_rate: int = 1
    depth_multiplier: int = 1
    activation: Callable[..., Any] = activations.linear
    use_bias: bool = True
    depthwise_initializer: Callable[..., Any] = field(default_factory=initializers.GlorotUniform)
    pointwise_initializer: Callable[..., Any] = field(default_factory=initializers.GlorotUniform)
    bias_initializer: Callable[..., Any] = field(default_factory=initializers.Zeros)
    depthwise_regularizer: Callable[..., Any] | None = None
    pointwise_regularizer: Callable[..., Any] | None = None
    bias_regularizer: Callable[..., Any] | None = None
    activity_regularizer: Callable[..., Any] | None = None
    depthwise_constraint: Callable[..., Any] | None = None
    pointwise_constraint: Callable[..., Any] | None = None
    bias_constraint: Callable[..., Any] | None = None
    trainable: bool = True
    name: str = "separable_conv1d"
    dtype: str = "float32"

    @classmethod
    def parse(
        cls,
        filters: Any,
        kernel_size: Any,
        strides: Any = 1,
        padding: Any = "valid",
        data_format: Any = None,
        dilation_rate: Any = 1,
        depth_multiplier: Any = 1,
        activation: Any = None,
        use_bias: Any = True,
        depthwise_initializer: Any = "glorot_uniform",
        pointwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        pointwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        pointwise_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        trainable: Any = True,
        name: Any = None,
        dtype: Any = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> SepConvConfig:
        """Check the arguments of Keras 3.15's SeparableConv1D and bring them to canonical form.

        Parameters
        ----------
        seed
            Our extension: seeds the initializers that have no seed, each with a stream of its own.
        unknown
            `autocast` is accepted and has no effect: inputs are always cast to the compute dtype.
            `input_shape` and `input_dim` are accepted with a warning, as in Keras. Anything else is
            an error.

        Raises
        ------
        ValueError
            If an argument does not fit; the message is Keras's where Keras refuses it too. Refused
            here and only later or never in Keras: `filters`, `depth_multiplier` and elements of
            `kernel_size` that are not integers, a padding list that is no pair, integer dtypes, and
            the activation "threshold", which has two arguments without a default.
        """
        # The order is Keras's, so that of several wrong arguments the same one is reported.
        name = _automatic_name() if name is None else arguments.layer_name(name)
        dtype = arguments.policy(dtype)
        activity_regularizer = regularizers.get(activity_regularizer)
        arguments.check_keywords(unknown)
        if not isinstance(trainable, bool):
            raise ValueError(
                "Expected `trainable` to be a boolean. "
                f"Received: trainable={trainable} (of type {type(trainable)})"
            )
        kernel_size = arguments.one_integer(kernel_size, "kernel_size")
        strides = arguments.one_integer(strides, "strides")
        dilation_rate = arguments.one_integer(dilation_rate, "dilation_rate")
        padding = arguments.padding(padding)
        data_format = arguments.data_format(data_format)
        depthwise, pointwise, bias = arguments.weight_initializers(
            (depthwise_initializer, pointwise_initializer, bias_initializer), seed
        )
        return cls(
            kernel_size=kernel_size,
            strides=strides,
            dilation_rate=dilation_rate,
            padding=padding,
            data_format=data_format,
            activation=arguments.activation(activation),
            use_bias=bool(use_bias),
            depthwise_initializer=depthwise,
            pointwise_initializer=pointwise,
            bias_initializer=bias,
            depthwise_regularizer=regularizers.get(depthwise_regularizer),
            pointwise_regularizer=regularizers.get(pointwise_regularizer),
            bias_regularizer=regularizers.get(bias_regularizer),
            activity_regularizer=activity_regularizer,
            depthwise_constraint=constraints.get(depthwise_constraint),
            pointwise_constraint=constraints.get(pointwise_constraint),
            bias_constraint=constraints.get(bias_constraint),
            depth_multiplier=arguments.positive(depth_multiplier, "depth_multiplier"),
            filters=arguments.positive(filters, "filters"),
            trainable=trainable,
            name=name,
            dtype=dtype,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SepConvConfig:
        """Make the config that `to_dict` or Keras's `get_config` wrote, through JSON or not."""
        return cls.parse(**config)

    def to_dict(self) -> dict[str, Any]:
        """Return Keras's `get_config` form: its keys in its order; a padding pair stays, as a list.

        Raises
        ------
        ValueError
            If an activation, initializer, regularizer or constraint is a custom callable.
        """
        policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": self.dtype}}
        config: dict[str, Any] = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": {**policy, "registered_name": None},
            "depth_multiplier": self.depth_multiplier,
            "filters": self.filters,
            "kernel_size": (self.kernel_size,),
            "strides": (self.strides,),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "data_format": self.data_format,
            "dilation_rate": (self.dilation_rate,),
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
        for weight in _KERNEL_ARGUMENTS:
            key = f"{weight}_initializer"
            config[key] = initializers.serialize(getattr(self, key))
        for owner in (*_KERNEL_ARGUMENTS, "activity"):
            key = f"{owner}_regularizer"
            config[key] = regularizers.serialize(getattr(self, key))
        for weight in _KERNEL_ARGUMENTS:
            key = f"{weight}_constraint"
            config[key] = constraints.serialize(getattr(self, key))
        return config

    def keras_config(self) -> dict[str, Any]:
        """Return `to_dict` if Keras can build the layer from it, else raise a ValueError."""
        if not isinstance(self.padding, str):
            raise ValueError(
                f"The `padding` argument is {self.padding}, zeros to the left and right, which "
                "Keras's SeparableConv1D does not have. For Keras use a ZeroPadding1D layer before "
                "a layer with `padding='valid'`"
            )
        return self.to_dict()

    @property
    def compute_dtype(self) -> str:
        """Of inputs as computed with, and of outputs."""
        return self.dtype.removeprefix("mixed_")

    @property
    def variable_dtype(self) -> str:
        """Of the weights as kept."""
        return "float32" if self.dtype.startswith("mixed_") else self.dtype

    @property
    def accumulation_dtype(self) -> str:
        """Of the sums inside a kernel."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def channel_axis(self) -> int:
        """The axis of an input's channels and an output's filters: -1 or 1, as Keras has it."""
        return -1 if self.data_format == "channels_last" else 1

    @property
    def effective_kernel(self) -> int:
        """Steps from the first to the last tap, both included."""
        return (self.kernel_size - 1) * self.dilation_rate + 1

    def depthwise_shape(self, channels: int) -> tuple[int, int, int]:
        """Return the shape of `depthwise_kernel`."""
        return self.kernel_size, channels, self.depth_multiplier

    def pointwise_shape(self, channels: int) -> tuple[int, int, int]:
        """Return the shape of `pointwise_kernel`."""
        return 1, channels * self.depth_multiplier, self.filters

    @property
    def bias_shape(self) -> tuple[int]:
        """The shape of `bias`, whether the layer has one or not."""
        return (self.filters,)

    def weight_shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that the layer has, by name, in Keras's order."""
        shapes = {
            "depthwise_kernel": self.depthwise_shape(channels),
            "pointwise_kernel": self.pointwise_shape(channels),
        }
        return {**shapes, "bias": self.bias_shape} if self.use_bias else dict(shapes)

    def pad_amounts(self, steps: int) -> tuple[int, int]:
        """Return the zeros put (before, after) `steps`; for "same" the larger half is after."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return 0, 0
        total = max((self.out_steps(steps) - 1) * self.strides + self.effective_kernel - steps, 0)
        return total // 2, total - total // 2

    def out_steps(self, steps: int) -> int:
        """Return the output steps for `steps` input steps, 0 where the kernel does not fit."""
        if self.padding == "same":
            return -(-steps // self.strides)
        left, right = (0, 0) if isinstance(self.padding, str) else self.padding
        return max((left + steps + right - self.effective_kernel) // self.strides + 1, 0)

    def check_input_shape(
        self, input_shape: Sequence[int | None], channels: int | None = None
    ) -> None:
        """Check that the layer can take inputs of `input_shape`.

        Parameters
        ----------
        input_shape
            Batch and steps may be None, the channels may not.
        channels
            What a built layer has; None for one that is not built.

        Raises
        ------
        ValueError
            In Keras's words, if it cannot.
        """
        try:
            shape = tuple(input_shape)
        except TypeError as error:
            raise ValueError(
                "The `input_shape` argument must be three numbers: batch, steps and channels in "
                f"the order of data_format='{self.data_format}'. Received: {input_shape}"
            ) from error
        layer = f"Input 0 with name 'None' of layer '{self.name}' is incompatible with the layer: "
        if len(shape) < 3:
            raise ValueError(
                f"{layer}expected min_ndim=3, found ndim={len(shape)}. Full shape received: {shape}"
            )
        size = shape[self.channel_axis]
        if channels is not None and size != channels:
            raise ValueError(
                f"{layer}expected axis {self.channel_axis} of input shape to have value "
                f"{channels}, but received input with shape {shape}"
            )
        kernel_shape = (self.kernel_size, size, self.filters)
        if len(shape) != 3:
            raise ValueError(
                "Kernel shape must have the same length as input, but received kernel of shape "
                f"{kernel_shape} and input of shape {shape}."
            )
        if size is None or size < 1:
            raise ValueError(
                "The channel dimension of the inputs must be a positive number. "
                f"Received: input_shape={shape}, whose channels are at axis {self.channel_axis} "
                f"(data_format='{self.data_format}')"
            )
        steps = shape[1 if self.channel_axis == -1 else 2]
        if steps is not None and self.padding != "same" and self.out_steps(steps) < 1:
            raise ValueError(
                f"Computed output size would be zero or negative. Received `inputs shape={shape}`, "
                f"`kernel shape={kernel_shape}`, `dilation_rate=[{self.dilation_rate}]`, "
                f"`strides=({self.strides},)`, `padding={self.padding}`."
            )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Return the shape of the output; None stays None. A glu activation halves the last axis.

        Raises
        ------
        ValueError
            If `input_shape` does not fit (see `check_input_shape`) or glu has an odd number to
            halve.
        """
        self.check_input_shape(input_shape)
        last = self.data_format == "channels_last"
        batch, steps = input_shape[0], input_shape[1 if last else 2]
        out = None if steps is None else self.out_steps(steps)
        shape: Shape = (batch, out, self.filters) if last else (batch, self.filters, out)
        if activations.name_of(self.activation) == "glu" and (size := shape[-1]) is not None:
            if size % 2:
                raise ValueError(
                    "The `glu` activation halves the last axis, so it must have an even length. "
                    f"Received: output shape before the activation={shape}"
                )
            shape = (*shape[:-1], size // 2)
        return shape

    def flops(self, batch: int, steps: int, channels: int) -> int:
        """Return the floating-point operations of one call on `steps` input steps."""
        return self.kernel_config(channels).flops(batch, self.out_steps(steps))

    def kernel_config(self, channels: int) -> KernelConfig:
        """Return what a kernel for inputs of `channels` is compiled from."""
        name = activations.name_of(self.activation)
        return KernelConfig(
            channels=channels,
            filters=self.filters,
            kernel_size=self.kernel_size,
            strides=self.strides,
            dilation_rate=self.dilation_rate,
            depth_multiplier=self.depth_multiplier,
            data_format=self.data_format,
            use_bias=self.use_bias,
            activation=name if name in activations.ELEMENTWISE else "linear",
            dtype=self.compute_dtype,
            accumulation_dtype=self.accumulation_dtype,
        )
