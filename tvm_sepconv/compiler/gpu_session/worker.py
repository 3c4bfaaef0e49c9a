"""Do items of a prepared folder: ``python -m tvm_sepconv.compiler.gpu_session.worker FOLDER STEP``.

It reads an item's key from the standard input and answers with a line of JSON on the standard
output, ``{"found": …}`` or ``{"error": one line, "broken": whether the GPU's context is}``; an
empty key asks for the GPU's name. What frameworks print goes to the standard error stream. No TVM
is needed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tvm_sepconv.compiler.gpu_session import cells, frameworks, tuning
from tvm_sepconv.compiler.gpu_session.bench import Bench
from tvm_sepconv.compiler.gpu_session.plan import Item, Plan

_CHARACTERS = 300  # frameworks' messages can be pages; their beginning says what it is

STEPS: dict[str, Callable[[Bench, Item], Any]] = {
    "correctness": cells.correctness,
    "frameworks": frameworks.check,
    "comparison": cells.comparison,
    "tuning": tuning.tune,
    "compilers": cells.comparison,
    "rest": cells.rest,
}


def main(arguments: Sequence[str]) -> int:
    """Answer until the standard input ends."""
    folder, step = arguments
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    gc.freeze()  # PyTorch collects garbage before every capture: what is imported is none
    bench = Bench(Plan.load(Path(folder)))
    items = {item.key: item for item in bench.plan.items()}
    for key in map(str.strip, sys.stdin):
        do = partial(STEPS[step], bench, items[key]) if key else bench.name
        print(json.dumps(answer(bench, do)), file=answers, flush=True)
    return 0


def answer(bench: Bench, do: Callable[[], Any]) -> dict[str, Any]:
    """Do an item; what goes wrong is the answer, too."""
    try:
        with bench.on_stream():
            return {"found": do()}
    except Exception as error:  # of any kind: it is the item's
        traceback.print_exc()
        words = " ".join(f"{type(error).__name__}: {error}".split())[:_CHARACTERS]
        return {"error": words, "broken": not bench.works()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
