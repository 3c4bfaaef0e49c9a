"""Our own calls: verified before they are timed, and told as they were measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tvm_sepconv import targets
from tvm_sepconv.bench import calls
from tvm_sepconv.bench.calls import Calls
from tvm_sepconv.bench.contestants import ours
from tvm_sepconv.bench.timing import Samples
from tvm_sepconv.subjects import of_table

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not targets.runnable(), reason="no target for this machine")


def samples(median_us: float) -> Samples:
    return Samples(median_us, median_us, median_us, median_us, 9)


def row(id: str, mflop: float, kernel: float, alone: float = 0.0, threaded: float = 0.0) -> Calls:
    return Calls(
        id=id,
        shape="1×9 4→4 k3",
        flops=int(mflop * 1e6),
        kernel=samples(kernel),
        call=samples(kernel + 0.5),
        call_out=samples(kernel + 0.25),
        threaded=samples(threaded) if threaded else None,
        alone=samples(alone or kernel),
    )


def test_the_summary_tells_overheads_of_small_and_speedups_of_large_layers() -> None:
    small = dataclasses.replace(row("small", 1, 2.0, 2.0, 2.0), call=samples(3.75))
    text = calls.summary([small, row("a", 30, 100, 100, 50), row("b", 30, 99, 100, 80)], 2)
    assert "at most 1.75 µs (small)" in text
    assert "0.25 µs with out=" in text
    assert "the 2 layers from 20 MFLOP on: 1.58× in the geometric mean, 1.25× at least" in text
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["small", "a", "b"]


def test_one_thread_has_no_speedup() -> None:
    text = calls.summary([row("a", 30, 100)], 1)
    assert "threads" not in text
    assert np.isnan(row("a", 30, 100).speedup)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_are_measured(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ROW_SECS", 0.0)
    (subject,) = of_table(["EEG-SSVEP"], "channels_first")
    said: list[str] = []
    (measured,) = calls.measure([subject], targets.runnable()[0], threads, said.append)
    assert said == ["1 of 1, EEG-SSVEP", ""]
    assert (measured.threaded is None) == (threads == 1)
    assert min(measured.kernel.best_us, measured.call.best_us, measured.call_out.best_us) > 0
    assert measured.flops == subject.config.flops(1, 64, 8)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = ours.prepare

    def wrong(*arguments: Any) -> list[Any]:
        (prepared,) = prepare(*arguments)
        layer = prepared.call
        return [prepared._replace(call=lambda x, out: np.add(layer(x), 1, out=out))]

    monkeypatch.setattr(ours, "prepare", wrong)
    (subject,) = of_table(["EEG-SSVEP"], "channels_last")
    with pytest.raises(AssertionError, match="EEG-SSVEP is not the layer"):
        calls.measure([subject], targets.runnable()[0], 1)
