"""The options that say which layers a command works on, and what may not be asked for together."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tvm_sepconv import subjects
from tvm_sepconv.subjects import Subject

FORMATS = ("channels_last", "channels_first")
# Arguments of the layer, as Keras has them; the first two are needed for a layer of one's own.
_LAYER = ("filters", "kernel_size", "strides", "dilation_rate", "depth_multiplier", "padding",
          "activation")  # fmt: skip
_SIZES = ("steps", "batch")


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options; `default` says which layers there are without any."""
    add_ids(parser, default)
    own = parser.add_argument_group("a layer of one's own, by Keras's arguments")
    for name in ("filters", "kernel-size", "strides", "dilation-rate", "depth-multiplier"):
        own.add_argument(f"--{name}", type=int, metavar="N")
    own.add_argument("--padding", metavar="P", help="valid, same, or zeros on both sides: 32,0")
    own.add_argument("--activation", metavar="A", help="by its Keras name; default: linear")
    own.add_argument("--channels", type=int, metavar="N", help="of the input")
    saved = parser.add_argument_group("layers of a saved model")
    saved.add_argument("--keras", type=Path, metavar="FILE", help="a .keras file")
    own.add_argument("--steps", type=int, metavar="N", help="of the input; also for --keras")
    own.add_argument("--batch", type=int, metavar="N", help="default: 1; also for --keras")
    own.add_argument(
        "--data-format", choices=FORMATS, help="default: channels_last; also for published layers"
    )


def add_ids(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that name published layers."""
    parser.add_argument(
        "workloads", nargs="*", metavar="IDS",
        help=f"of published layers, or patterns: QN-B1,CN-*; default: {default}",
    )  # fmt: skip
    parser.add_argument(
        "--workloads", action="append", default=[], dest="more_workloads", metavar="IDS",
        help="the same",
    )  # fmt: skip


def ids(options: argparse.Namespace) -> list[str]:
    """Return the patterns that name published layers; none at all if there are none."""
    return [*options.workloads, *options.more_workloads]


def given(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return those of the options that are there, as they are written."""
    return [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) not in (None, False)]


def given_layers(options: argparse.Namespace) -> list[str]:
    """Return the options of `add_arguments` that are there, as they are written."""
    names = (*_LAYER, "channels", *_SIZES, "keras", "data_format")
    return ["IDS"] * bool(ids(options)) + given(options, names)


def refuse(reason: str, *unwanted: Sequence[str]) -> None:
    """Refuse options that contradict others.

    Raises
    ------
    ValueError
        If there are any, naming them.
    """
    if words := [word for part in unwanted for word in part]:
        raise ValueError(f"{reason}. Received also: {', '.join(words)}")


def chosen(options: argparse.Namespace, default: Sequence[str] = ()) -> list[Subject]:
    """Return the layers that the options name.

    Parameters
    ----------
    default
        Patterns of published layers for when none is named; without any, all.

    Raises
    ------
    ValueError
        If none can be made of the options, or they name layers in two ways.
    """
    layer, sizes = given(options, (*_LAYER, "channels")), given(options, _SIZES)
    data_format = options.data_format or FORMATS[0]
    if ids(options):
        keras = given(options, ("keras",))
        refuse("IDS name published layers with their inputs", layer, sizes, keras)
    if options.keras is not None:
        refuse("`--keras` brings its layers' arguments", layer, given(options, ("data_format",)))
        if options.steps is None:
            raise ValueError("`--keras` needs --steps, those of each layer's input")
        return subjects.of_keras(options.keras, options.steps, _batch(options))
    if layer or sizes:
        return [_own(options, data_format)]
    return subjects.of_table(ids(options) or default, data_format)


def _own(options: argparse.Namespace, data_format: str) -> Subject:
    needed = ("filters", "kernel_size", "channels", "steps")
    missing = [f"--{n.replace('_', '-')}" for n in needed if getattr(options, n) is None]
    if missing:
        raise ValueError(f"A layer of one's own needs {', '.join(missing)} too")
    layer = {name: getattr(options, name) for name in _LAYER}
    layer = {name: value for name, value in layer.items() if value is not None}
    if "," in layer.get("padding", ""):
        layer["padding"] = _pair(layer["padding"])
    layer["data_format"] = data_format
    return subjects.of_arguments(layer, options.channels, options.steps, _batch(options))


def _pair(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(
            f"`--padding` must be valid, same or two numbers of zeros: 32,0. Received: {text}"
        ) from None


def _batch(options: argparse.Namespace) -> int:
    return 1 if options.batch is None else int(options.batch)
