"""What the options of ``tvm-sepconv bench`` ask for, and what they may not ask for together."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from tvm_sepconv import targets
from tvm_sepconv.bench import process, subjects
from tvm_sepconv.bench.contestants import CONTESTANTS
from tvm_sepconv.bench.report import OURS
from tvm_sepconv.bench.subjects import Subject

FORMATS = ("channels_last", "channels_first")
# Arguments of the layer, as Keras has them; the first two are needed for a layer of one's own.
_LAYER = ("filters", "kernel_size", "strides", "dilation_rate", "depth_multiplier", "padding",
          "activation")  # fmt: skip
_MEASURING = (*_LAYER, "channels", "steps", "batch", "keras", "data_format", "cold", "peers",
              "metaschedule")  # fmt: skip


def _given(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the options that are there, as they are written."""
    return [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) not in (None, False)]


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises
    ------
    ValueError
        Naming them.
    """
    measuring = ["IDS"] * bool(options.workloads) + _given(options, _MEASURING)
    measuring += ["--threads"] * (options.threads != "1")
    files, kinds = _given(options, ("json", "html")), _given(options, ("target",))
    source = ["--from"] * (options.source is not None)
    sweep = ["--sweep"] * bool(options.sweep)
    if options.setup is not None:
        others = [*measuring, *kinds, *files, *source, *sweep]
        _refuse("`--setup` measures nothing and goes alone", others)
    if options.source is not None:
        others = [*measuring, *kinds, *sweep]
        _refuse("`--from` shows an earlier run and takes --json and --html only", others)
    if options.sweep:
        _refuse("`--sweep` has shapes of its own and takes --target, --json, --html", measuring)
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"`--{name}` must lie in a folder. There is none called {path.parent}")
    if options.metaschedule is not None and options.metaschedule < 1:
        raise ValueError(f"`--metaschedule` must be positive. Received: {options.metaschedule}")


def _refuse(reason: str, *unwanted: Sequence[str]) -> None:
    if words := [word for part in unwanted for word in part]:
        raise ValueError(f"{reason}. Received also: {', '.join(words)}")


def chosen_subjects(options: argparse.Namespace) -> list[Subject]:
    """Return the layers to be measured.

    Raises
    ------
    ValueError
        If none can be made of the options, or they name layers in two ways.
    """
    layer, sizes = _given(options, (*_LAYER, "channels")), _given(options, ("steps", "batch"))
    data_format = options.data_format or FORMATS[0]
    if options.workloads:
        keras = _given(options, ("keras",))
        _refuse("IDS name published layers with their inputs", layer, sizes, keras)
    if options.keras is not None:
        _refuse("`--keras` brings its layers' arguments", layer, _given(options, ("data_format",)))
        if options.steps is None:
            raise ValueError("`--keras` needs --steps, those of each layer's input")
        return subjects.of_keras(options.keras, options.steps, _batch(options))
    if layer or sizes:
        return [_own(options, data_format)]
    return subjects.of_table(options.workloads, data_format)


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


def thread_counts(text: str) -> list[int]:
    """Return the numbers in ``1,2``, each once.

    Raises
    ------
    ValueError
        If one is none, or more than this process may use.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"`--threads` must be positive numbers: 1 or 1,2. Received: {text}")
    counts = list(dict.fromkeys(map(int, words)))
    for count in counts:
        process.processors(count)  # refuses more than there are before anything is measured
    return counts


def target(name: str | None) -> str:
    """Return the target's full name; this machine's best for None.

    Raises
    ------
    ValueError
        If there is none of that name, or it does not run here.
    """
    here = targets.runnable()
    if not here:
        raise ValueError(f"There is no target for {targets.machine()} machines to measure")
    if name is None:
        return here[0]
    chosen = targets.resolve(name)
    if chosen.partition("@")[0] not in here:
        raise ValueError(f"`--target` must be one of {', '.join(here)} here. Received: {name}")
    return chosen


def contestant_keys(text: str | None) -> tuple[str, ...] | None:
    """Return the keys in ``pytorch,openvino``; nobody's for ``none``, and None, all, for None.

    Raises
    ------
    ValueError
        If there is no contestant of a name.
    """
    if text is None:
        return None
    keys = [c.key for c in CONTESTANTS if c.name != OURS]
    words: Sequence[str] = [] if text == "none" else text.split(",")
    for word in words:
        if word not in keys:
            raise ValueError(f"`--peers` must be of {', '.join(keys)}, or none. Received: {word}")
    return tuple(words)
