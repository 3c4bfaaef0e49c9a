"""Layers with their inputs: of the workload table, from arguments, or those of a saved model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import workloads
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.workloads import Workload

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """A layer and the size of its input.

    Parameters
    ----------
    weights
        In Keras's order and shapes, float32; None for drawn ones.

    Raises
    ------
    ValueError
        If a size is not positive or the output is empty.
    """

    id: str
    config: SepConvConfig
    channels: int
    batch: int
    steps: int
    weights: tuple[Array, ...] | None = None

    def __post_init__(self) -> None:
        config = self.config
        for name in ("channels", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1. Received: {getattr(self, name)}")
        if config.out_steps(self.steps) < 1:
            raise ValueError(
                f"The output of {self.id} is empty: its kernel reaches over "
                f"{config.effective_kernel} steps. Give more `--steps` or padding='same'. "
                f"Received: steps={self.steps}"
            )

    @property
    def sizes(self) -> str:
        """Of its kernel, for people: see `KernelConfig.sizes`."""
        return self.config.kernel_config(self.channels).sizes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The input's shape in the layer's data format."""
        if self.config.channel_axis == -1:
            return self.batch, self.steps, self.channels
        return self.batch, self.channels, self.steps


def of_workload(workload: Workload, data_format: str) -> Subject:
    """Return a published layer as a subject."""
    config = workload.config(data_format=data_format)
    return Subject(workload.id, config, workload.channels, workload.batch, workload.steps)


def of_table(patterns: Iterable[str], data_format: str) -> list[Subject]:
    """Return the layers of the workload table that patterns name; see `workloads.select`."""
    return [of_workload(workload, data_format) for workload in workloads.select(patterns)]


def of_arguments(layer: Mapping[str, Any], channels: int, steps: int, batch: int) -> Subject:
    """Return the layer of Keras's arguments `layer`.

    Raises
    ------
    ValueError
        For arguments that Keras's layer refuses.
    """
    return Subject("layer", SepConvConfig.parse(**layer, name="layer"), channels, batch, steps)


def of_keras(path: Path, steps: int, batch: int) -> list[Subject]:
    """Return every SeparableConv1D of a ``.keras`` file, with its weights.

    Parameters
    ----------
    steps, batch
        Of each layer's input.

    Raises
    ------
    ValueError
        If it is no such file, or a layer cannot be measured.
    """
    from tvm_sepconv.interop.keras import from_keras

    result = []
    for name, layer in from_keras(path).items():
        weights = tuple(np.asarray(w, np.float32) for w in layer.get_weights())
        channels = int(weights[0].shape[1])
        result.append(Subject(name, layer.config, channels, batch, steps, weights))
    return result
