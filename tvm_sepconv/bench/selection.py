"""What the options of ``tvm-sepconv bench`` ask for, and what they may not ask for together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tvm_sepconv import activations, paths, selection, targets
from tvm_sepconv.bench import process
from tvm_sepconv.bench.contestants import CONTESTANTS
from tvm_sepconv.bench.report import OURS
from tvm_sepconv.selection import given, refuse
from tvm_sepconv.subjects import Subject


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises
    ------
    ValueError
        Naming them.
    """
    measuring = selection.given_layers(options)
    measuring += given(options, ("cold", "peers", "metaschedule"))
    measuring += ["--threads"] * (options.threads != "1")
    files, kinds = given(options, ("json", "html")), given(options, ("target",))
    source = ["--from"] * (options.source is not None)
    sweep = given(options, ("sweep", "spaces", "calls"))
    if options.setup is not None:
        others = [*measuring, *kinds, *files, *source, *sweep]
        refuse("`--setup` measures nothing and goes alone", others)
    if options.source is not None:
        others = [*measuring, *kinds, *sweep]
        refuse("`--from` shows an earlier run and takes --json and --html only", others)
    if options.sweep:
        others = [*measuring, *sweep[1:]]
        refuse("`--sweep` has shapes of its own and takes --target, --json, --html", others)
    if options.spaces is not None:
        contest = given(options, ("cold", "peers", "metaschedule", "html", "calls"))
        refuse("`--spaces` measures two searches and nobody else", contest)
    if options.calls:
        contest = given(options, ("cold", "peers", "metaschedule", "html", "json"))
        refuse("`--calls` measures ours alone, warm, and prints what it finds", contest)
    for name in ("json", "html"):
        if getattr(options, name) is not None:
            paths.new_file(f"--{name}", getattr(options, name))
    if options.metaschedule is not None and options.metaschedule < 1:
        raise ValueError(f"`--metaschedule` must be positive. Received: {options.metaschedule}")


def chosen_subjects(options: argparse.Namespace, default: Sequence[str] = ()) -> list[Subject]:
    """Return the layers to be measured: without a choice those of `default`, or else all.

    Raises
    ------
    ValueError
        If none can be made of the options, they name layers in two ways, or one computes in another
        dtype than float32 or has an activation that mixes channels or steps.
    """
    chosen = selection.chosen(options, default)
    for subject in chosen:
        config = subject.config
        if config.compute_dtype != "float32":
            raise ValueError(
                "Only layers that compute in float32 are measured. "
                f"Received: dtype={config.dtype} of {subject.id}"
            )
        if activations.name_of(config.activation) not in activations.ELEMENTWISE:
            raise ValueError(
                "Only layers with an element-wise activation by name are measured. Received: "
                f"activation={activations.serialize(config.activation)} of {subject.id}"
            )
    return chosen


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


def thread_count(option: str, text: str) -> int:
    """Return the one number in `text`.

    Raises
    ------
    ValueError
        If there are several: `option` measures one; and as `thread_counts` does.
    """
    threads, *more = thread_counts(text)
    if more:
        raise ValueError(f"`{option}` takes one number of --threads. Received: {text}")
    return threads


def trial_counts(text: str) -> list[int]:
    """Return the numbers in ``16,32,64``, rising.

    Raises
    ------
    ValueError
        If one is none, or leaves no trial beside the default's.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise ValueError(f"`--spaces` must be numbers of at least 2: 16,32,64. Received: {text}")
    return sorted(set(map(int, words)))


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
