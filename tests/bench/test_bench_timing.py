"""Cases and turns: the same ones each time, nothing timed that is wrong, medians of calls in turns.

No test says how fast anything is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvm_sepconv import reference
from tvm_sepconv.bench import timing
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.timing import Turn, aligned_copies, rotating
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.subjects import Subject
from tvm_sepconv.workloads import workloads

FORMATS = ("channels_last", "channels_first")
SEED = workloads()["SEED"]


@pytest.mark.parametrize("data_format", FORMATS)
def test_case_is_the_same_each_time(data_format: str) -> None:
    one, two = (Case.of(SEED, data_format) for _ in range(2))
    assert one.x.shape == SEED.input_shape(data_format)
    assert (one.steps, one.channels) == (SEED.steps, SEED.channels)
    np.testing.assert_array_equal(one.x, two.x)
    assert all(np.any(weights) for weights in one.weights)  # a zero bias would hide a missing one
    assert one.channels_first(one.x).shape == SEED.input_shape("channels_first")
    assert one.channels_last(one.x).shape == SEED.input_shape("channels_last")
    for form in (one.channels_first, one.channels_last):
        back = getattr(one, f"from_{form.__name__}")
        np.testing.assert_array_equal(back(form(one.x)), one.x)


def test_allowed_error_is_small_beside_the_outputs() -> None:
    case = Case.of(workloads()["QA-7"], "channels_last")
    assert case.allowed.max() < 1e-3 * case.expected.std()


@pytest.mark.parametrize(
    ("spoil", "received"),
    [
        (lambda y: y + np.float32(0.1), "20 of 20 elements differ|Received"),
        (lambda y: np.where(y == y.max(), np.nan, y), r"1 of \d+ elements .* Received: nan"),
        (lambda y: y[:, :-1], r"expected an output of shape \(4, 5, 3\)\. Received: \(4, 4, 3\)"),
        (np.zeros_like, "Received: 0.0"),
    ],
    ids=["shifted", "nan", "shorter", "zeros"],
)
def test_wrong_outputs_are_refused(
    spoil: Callable[[np.ndarray], np.ndarray], received: str
) -> None:
    case = Case.of(SEED, "channels_last")
    right = case.expected.astype(np.float32)
    check("somebody", right, case.expected, case.allowed)
    with pytest.raises(AssertionError, match=f"somebody is not the layer: .*({received})"):
        check("somebody", spoil(right), case.expected, case.allowed)


def test_description_names_what_is_not_usual() -> None:
    plain = SepConvConfig.parse(256, 33)
    assert plain.kernel_config(64).sizes == "64→256 k33"
    rare = SepConvConfig.parse(8, 5, strides=2, dilation_rate=3, depth_multiplier=4)
    assert rare.kernel_config(2).sizes == "2→8 k5 s2 d3 m4"


def test_turns_alternate_and_start_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_NS", 0)  # a sample is one call
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleave(calls, budget_secs=60)
    turn = 1 + timing.SAMPLES_A_TURN
    assert "".join(order[8:]) == ("a" * turn + "b" * turn) * timing.MAX_ROUNDS
    number = timing.SAMPLES_A_TURN * timing.MAX_ROUNDS
    assert [times[name].number for name in "ab"] == [number, number]


def test_budget_ends_the_rounds_but_not_before_the_first() -> None:
    times = timing.interleave({"a": lambda: None, "b": lambda: None}, budget_secs=0.0)
    assert [t.number for t in times.values()] == [timing.SAMPLES_A_TURN] * 2
    for t in times.values():
        assert 0 < t.best_us <= t.p10_us <= t.median_us <= t.p90_us


def test_median_is_per_call_and_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 7_000))  # each look at the clock is 7 µs after the one before
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(clock))
    monkeypatch.setattr(timing, "SAMPLE_NS", 70_000)
    calls = []
    (result,) = timing.interleave({"a": lambda: calls.append(1)}, 0.0).values()
    assert len(calls) == 4 + 1 + timing.SAMPLES_A_TURN * 10
    assert result.median_us == pytest.approx(0.7)


@pytest.mark.parametrize(("busy_ms", "slept_ms"), [(0, 2), (7, 10), (10**6, 20)])
def test_waits_until_nothing_spins(
    busy_ms: int, slept_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which a thread spins for so long: it returns soon after, or at its limit."""
    now = [0.0]

    def sleep(secs: float) -> None:
        now[0] += secs

    monkeypatch.setattr(timing, "IDLE_LIMIT_SECS", 0.019)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: min(now[0], busy_ms / 1e3))
    monkeypatch.setattr(timing.time, "sleep", sleep)
    timing.wait_until_idle()
    assert now[0] == pytest.approx(slept_ms / 1e3)


def test_interleave_settles_before_each_turn_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(timing, "wait_until_idle", lambda: waits.append(1))
    timing.interleave({"a": lambda: None, "b": lambda: None}, 0.0)
    assert waits == []
    timing.interleave({"a": lambda: None, "b": lambda: None}, 0.0, settle=True)
    assert waits == [1, 1]


def test_threads_get_time_to_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.002

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: round(now[0] * 1e9))
    assert (
        timing.take(call, Turn(1, timing.SAMPLES_A_TURN, 0.005)) == [2000.0] * timing.SAMPLES_A_TURN
    )
    assert now[0] == pytest.approx(0.002 * (3 + timing.SAMPLES_A_TURN))


@pytest.mark.parametrize("data_format", FORMATS)
def test_case_survives_its_file(data_format: str, tmp_path: Path) -> None:
    case = dataclasses.replace(Case.of(SEED, data_format), target="some-isa")
    case.save(tmp_path / "case.npz")
    again = Case.load(tmp_path / "case.npz")
    assert again.config.to_dict() == case.config.to_dict()
    assert again.target == "some-isa"
    for name in ("x", "expected", "allowed"):
        np.testing.assert_array_equal(getattr(again, name), getattr(case, name))
    assert len(again.weights) == 3
    for one, other in zip(again.weights, case.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("activation", ["linear", "relu", "silu", "exponential", "elu"])
def test_allowed_error_follows_the_activations_slope(activation: str) -> None:
    config = SepConvConfig.parse(3, 2, activation=activation)
    case = Case.of_subject(Subject("a", config, 4, 2, 9))
    sums = reference.separable_conv1d(case.x, *case.weights, config, activate=False)
    bound = (case.allowed / Case.of_subject(
        Subject("a", SepConvConfig.parse(3, 2), 4, 2, 9)).allowed)  # fmt: skip
    slope = np.exp(sums) if activation == "exponential" else np.ones_like(sums)
    assert np.all(bound >= 0.999)
    if activation != "silu":  # its slope reaches 1.1
        np.testing.assert_allclose(bound, np.maximum(slope, 1), rtol=1e-3)


def test_copies_start_on_cache_lines_and_share_nothing() -> None:
    array = np.arange(21, dtype=np.float32).reshape(1, 3, 7)
    copies = aligned_copies(array, 5)
    assert [c.ctypes.data % 64 for c in copies] == [0] * 5
    for number, copy in enumerate(copies):
        assert copy.flags.c_contiguous
        copy[...] = number
    assert [float(c.min()) for c in copies] == [float(c.max()) for c in copies] == [0, 1, 2, 3, 4]


def test_rotation_keeps_outputs_as_long_as_inputs_rest() -> None:
    inputs, outputs = [np.full(1, i) for i in range(3)], []
    call = rotating(lambda x: outputs.append(x + 0) or outputs[-1], inputs)
    for _ in range(7):
        call()
    assert [int(y[0]) for y in outputs] == [0, 1, 2, 0, 1, 2, 0]
    assert rotating(lambda x: x, inputs[:1])() is inputs[0]


def test_slow_calls_are_timed_once_and_never_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: round(now[0] * 1e9))
    (result,) = timing.interleave({"a": call}, 0.25).values()
    assert result.number == 2
    assert now[0] == pytest.approx(0.3)  # one to see how slow it is
