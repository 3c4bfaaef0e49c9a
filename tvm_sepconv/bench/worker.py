"""One contestant in a process of its own: ``python -m tvm_sepconv.bench.worker KEY CPUS``.

It is bound to the processors CPUS (``0,1``), reads requests from the standard input and answers
each with a line on the standard output, both JSON; what frameworks print goes to the standard error
stream. It answers when its threads have come to rest, so that it never disturbs the next one.

::

    {"op": "versions"}                                        {"torch": "2.13.0", …}
    {"op": "prepare", "case", "threads", "copies", "folder"}  {"forms": [[name, output file], …]}
    {"op": "choose", "secs"}                                  {"form": name, "call_us"}
    {"op": "turn", "repeats", "samples", "warm_secs"}         {"times_us": […]}
    {"op": "kernel", "isa", "secs"}                           {"kernel": Samples, "peak": Samples}

A failure is answered with ``{"error": one line}``.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import tvm_sepconv
from tvm_sepconv.bench import machine
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.contestants import CONTESTANTS, Contestant, Prepared
from tvm_sepconv.bench.timing import (
    Turn,
    aligned_copies,
    interleave,
    rotating,
    take,
    wait_until_idle,
)

ERROR_CHARACTERS = 300  # frameworks' messages can be pages; their beginning says what it is


class Session:
    """What a worker remembers from request to request; the methods are its operations."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._case: Case | None = None
        self._copies = 1
        self._threads = 1
        self._forms: list[Prepared] = []
        self._call: Callable[[], object] | None = None

    def versions(self) -> dict[str, str]:
        """Return the versions of its distributions."""
        found = machine.versions(self._contestant.distributions)
        return {name: found[name] for name in self._contestant.distributions if name in found}

    def prepare(self, case: str, threads: int, copies: int, folder: str) -> dict[str, Any]:
        """Make a case's forms, and the output of each in a file, for the parent to check."""
        self._forms, self._call = [], None
        gc.collect()
        self._case, self._threads, self._copies = Case.load(Path(case)), threads, copies
        self._forms = self._contestant.prepare(self._case, threads)
        files = []
        for number, form in enumerate(self._forms):
            (x,) = aligned_copies(form.x, 1)
            output = form.call(x)
            first = output.copy()
            form.call(np.zeros_like(x))
            if not np.array_equal(output, first, equal_nan=True):
                raise ValueError(f"{form.form}: its second call overwrites the first one's output")
            path = Path(folder, f"{self._contestant.key}-{number}.npy")
            np.save(path, form.restore(output))
            files.append([form.form, str(path)])
        return {"forms": files}

    def choose(self, secs: float) -> dict[str, Any]:
        """Keep the fastest form, and say what a call of it takes; `secs` for each of them."""
        calls = {form.form: self._rotating(form) for form in self._forms}
        times = interleave(calls, secs * len(calls), settle=self._threads > 1)
        best = min(calls, key=lambda form: times[form].median_us)
        self._forms = [form for form in self._forms if form.form == best]
        self._call = calls[best]
        return {"form": best, "call_us": times[best].median_us}

    def _rotating(self, form: Prepared) -> Callable[[], object]:
        return rotating(form.call, aligned_copies(form.x, self._copies))

    def turn(self, repeats: int, samples: int, warm_secs: float | None) -> dict[str, Any]:
        """Take a turn with the chosen form."""
        assert self._call is not None
        return {"times_us": take(self._call, Turn(repeats, samples, warm_secs))}

    def kernel(self, isa: str, secs: float) -> dict[str, Any]:
        """Time the kernel alone, on one thread, in turns with the loop that measures the peak."""
        from tvm_sepconv.bench.limits import Peak

        (form,), case = self._forms, self._case
        assert form.kernel is not None and case is not None
        kernel = form.kernel
        inputs = aligned_copies(case.x, self._copies)
        outputs = aligned_copies(np.zeros(case.expected.shape, np.float32), self._copies)
        tvm_sepconv.set_num_threads(1)
        try:
            kernel(inputs[0], outputs[0])
            check("tvm_sepconv's kernel", outputs[0], case.expected, case.allowed)
            peak = Peak(isa)
            if self._copies == 1:
                x, y = inputs[0], outputs[0]
                calls = {"kernel": lambda: kernel(x, y), "peak": peak.run}
            else:
                pairs = itertools.cycle(list(zip(inputs, outputs, strict=True)))
                calls = {"kernel": lambda: kernel(*next(pairs)), "peak": peak.run}
            times = interleave(calls, secs)
        finally:
            tvm_sepconv.set_num_threads(self._threads)
        return {name: samples._asdict() for name, samples in times.items()}


def one_line(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    message = " ".join(str(error).split())
    if len(message) > ERROR_CHARACTERS:
        message = message[:ERROR_CHARACTERS] + " …"
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"


def serve(contestant: Contestant, requests: Iterable[str], replies: TextIO) -> None:
    """Answer requests until there are no more."""
    session = Session(contestant)
    for line in requests:
        request = json.loads(line)
        operation = getattr(session, request.pop("op"))
        try:
            reply = operation(**request)
        except Exception as error:  # whatever a framework raises is the parent's to show
            reply = {"error": one_line(error)}
        wait_until_idle()
        print(json.dumps(reply), file=replies, flush=True)


def main(argv: Sequence[str]) -> None:
    """Serve the contestant that the command line names."""
    key, cpus = argv
    os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (contestant,) = (c for c in CONTESTANTS if c.key == key)
    serve(contestant, sys.stdin, replies)


if __name__ == "__main__":
    main(sys.argv[1:])
