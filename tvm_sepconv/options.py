"""How to compile, apart from what to compute: never part of a layer's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildOptions:
    """Choices for `SeparableConv1D.compile` and `save`.

    Parameters
    ----------
    target
        An instruction set of this machine, such as "x86_64-avx2", or "cuda"; None for its best
        instruction set.
    allow_tf32
        Whether the pointwise products of float32 layers may be rounded to TF32, 10 bits of
        fraction, which a GPU's tensor cores multiply several times faster. Only CUDA looks at it;
        GPUs before sm_80 have no TF32 and stay exact.
    fast_math
        nvcc's ``--use_fast_math``: quick, less accurate functions and divisions in activations, and
        denormals become zero. Only CUDA looks at it.
    """

    target: str | None = None
    allow_tf32: bool = False
    fast_math: bool = False

    def __post_init__(self) -> None:
        if self.target is not None and not isinstance(self.target, str):
            raise ValueError(
                "The `target` argument must be a name such as 'x86_64-avx2', or None. "
                f"Received: target={self.target!r}"
            )
        for name in ("allow_tf32", "fast_math"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(
                    f"The `{name}` argument must be True or False. Received: {name}={value!r}"
                )

    @property
    def arithmetic(self) -> dict[str, bool]:
        """What decides how a CUDA library computes, for manifests and keys."""
        return {"allow_tf32": self.allow_tf32, "fast_math": self.fast_math}

    @property
    def suffix(self) -> str:
        """What tells files of libraries apart that differ in these choices only."""
        return "_tf32" * self.allow_tf32 + "_fastmath" * self.fast_math


def checked(options: BuildOptions | None) -> BuildOptions:
    """Return `options`, the usual ones for None; a TypeError for anything else."""
    if options is not None and not isinstance(options, BuildOptions):
        raise TypeError(
            "The `options` argument must be a BuildOptions, such as "
            f"BuildOptions(allow_tf32=True), or None. Received: {options!r}"
        )
    return options or BuildOptions()
