"""Runs in the emulated Python, and marks what is counted there.

usage::

    inside.py MARKS call KEY FOLDER   one call of each form of a contestant, for all cases there
    inside.py MARKS import            `import numpy`
    inside.py MARKS load BUNDLE       from `import tvm_sepconv`, tvm_ffi being there, to an answer

Prints a JSON line for each counted section, in their order.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_sepconv.bench.case import Case
    from tvm_sepconv.bench.contestants import Prepared

OURS = "ours"


def main(argv: list[str]) -> None:
    """Do what the command line says."""
    marks, (what, *arguments) = ctypes.CDLL(argv[0]), argv[1:]
    if what == "call":
        call(marks, *arguments)
    elif what == "import":
        import_numpy(marks)
    else:
        load(marks, *arguments)


def call(marks: Any, key: str, folder: str) -> None:
    """Count one call of each form, warm and checked."""
    from tvm_sepconv.bench.case import Case, check

    for path in sorted(Path(folder).glob("*.npz")):
        case = Case.load(path)
        for form in forms(key, case, path.with_suffix(".sepconv")):
            form.call(form.x)
            marks.begin()
            y = form.call(form.x)
            marks.end()
            check(key, form.restore(y), case.expected, case.allowed)
            print(json.dumps([path.stem, form.form]))


def forms(key: str, case: Case, bundle: Path) -> Iterator[Prepared]:
    """The contestant's forms on one thread; ours is what the bundle has."""
    from tvm_sepconv.bench.contestants import CONTESTANTS, Prepared

    if key == OURS:
        import tvm_sepconv

        tvm_sepconv.set_num_threads(1)
        layer: Any = tvm_sepconv.load(bundle)
        yield Prepared("a bundle", layer, case.x, lambda y: y)
    else:
        (contestant,) = (one for one in CONTESTANTS if one.key == key)
        yield from contestant.prepare(case, 1)


def import_numpy(marks: Any) -> None:
    """Count the import."""
    marks.begin()
    importlib.import_module("numpy")
    marks.end()
    print(json.dumps(["import", "numpy"]))


def load(marks: Any, bundle: str) -> None:
    """Count from the import of our package to the first answer."""
    import numpy as np

    importlib.import_module("tvm_ffi")
    x = np.load(Path(bundle).with_suffix(".npz"))["x"]
    marks.begin()
    loaded: Any = importlib.import_module("tvm_sepconv").load(bundle)
    loaded(x)
    marks.end()
    print(json.dumps(["load", "answer"]))


if __name__ == "__main__":
    main(sys.argv[1:])
