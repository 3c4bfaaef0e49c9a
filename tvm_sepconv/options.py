"""How to compile, apart from what to compute: never part of a layer's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildOptions:
    """Choices for `SeparableConv1D.compile`.

    Parameters
    ----------
    target
        An instruction set of this machine, such as "x86_64-avx2"; None for its best.
    """

    target: str | None = None
