"""The benchmark as an instrument: that it compares what it should and times only what is right.

No test says how fast anything is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tvm_sepconv
from tvm_sepconv import jit, targets
from tvm_sepconv.bench import peers, run, timing
from tvm_sepconv.bench.case import Case, check, describe
from tvm_sepconv.bench.machine import OthersWork, cpu_name, versions, where
from tvm_sepconv.bench.peak import CHAINS, Peak
from tvm_sepconv.bench.report import OURS, Report, Row
from tvm_sepconv.bench.timing import Samples
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.workloads import Workload, workloads

FORMATS = ("channels_last", "channels_first")
SEED = workloads()["SEED"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WHOLE_CALL_SECS", 0.0)
    monkeypatch.setattr(run, "KERNEL_SECS", 0.0)
    monkeypatch.setattr(peers, "TRIAL_SECS", 0.0)


def samples(median_us: float) -> Samples:
    return Samples(median_us, median_us - 1, median_us + 1, median_us - 2, 9)


def row(name: str, ours_us: float, *others_us: float) -> Row:
    others = {f"peer {i}": samples(us) for i, us in enumerate(others_us)}
    whole_call = {OURS: samples(ours_us), **others}
    return Row(
        name, "1×9 2→3 k2", 8_000_000, whole_call, samples(100.0), dict.fromkeys(others, "f")
    )


def report(*rows: Row, missing: tuple[str, ...] = (), others: float = 0.0) -> Report:
    return Report(
        command="c", where="w", threads=1, target=targets.runnable()[0], data_format=FORMATS[0],
        others_processors=others, versions={"a": "1"}, peak_gflops=160.0, missing=list(missing),
        rows=list(rows),
    )  # fmt: skip


@pytest.mark.parametrize("isa", targets.runnable())
def test_peak_is_finite_and_above_one_gflops(isa: str) -> None:
    peak = Peak(isa)
    times = timing.interleave({"peak": peak.run}, 0.0)
    gflops = peak.flops / times["peak"].best_us / 1e3
    assert math.isfinite(gflops)
    assert gflops > 1


@pytest.mark.parametrize("isa", targets.runnable())
@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_peak_does_the_multiply_adds_it_counts(isa: str, rounds: int) -> None:
    chains = np.arange(CHAINS, dtype=np.float64)
    for _ in range(rounds):
        chains = chains * 0.75 + 0.5
    lanes = Peak(isa).run(rounds)
    np.testing.assert_allclose(lanes, np.full(lanes.shape, chains.sum()), rtol=1e-6)


def test_peaks_lanes_are_those_of_the_instruction_set() -> None:
    lanes = {isa: Peak(isa).lanes for isa in targets.runnable()}
    bits = {"sse42": 128, "avx2": 256, "avx512": 512, "neon": 128, "fp16": 128}
    assert lanes == {isa: bits[isa.partition("-")[2]] // 32 for isa in lanes}


@pytest.mark.parametrize("data_format", FORMATS)
def test_case_is_the_same_each_time(data_format: str) -> None:
    one, two = (Case.of(SEED, data_format) for _ in range(2))
    assert one.x.shape == SEED.input_shape(data_format)
    assert (one.steps, one.channels) == (SEED.steps, SEED.channels)
    np.testing.assert_array_equal(one.x, two.x)
    assert all(np.any(weights) for weights in one.weights)  # a zero bias would hide a missing one
    assert one.channels_first(one.x).shape == SEED.input_shape("channels_first")


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
    assert describe(plain, 64) == "64→256 k33"
    rare = SepConvConfig.parse(8, 5, strides=2, dilation_rate=3, depth_multiplier=4)
    assert describe(rare, 2) == "2→8 k5 s2 d3 m4"


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
    assert timing._turn(call, 1, warm_secs=0.005) == [2000.0] * timing.SAMPLES_A_TURN
    assert now[0] == pytest.approx(0.002 * (3 + timing.SAMPLES_A_TURN))


def test_where_names_machine_threads_and_date() -> None:
    assert re.fullmatch(
        re.escape(cpu_name()) + r", \d+ processors, 1 thread, \d{4}-\d\d-\d\d", where(1)
    )
    assert " 2 threads," in where(2)
    found = versions(["numpy", "no-such-distribution"])
    assert found["numpy"] == np.__version__
    assert found["tvm_sepconv"] == tvm_sepconv.__version__
    assert "no-such-distribution" not in found


def test_own_work_is_not_counted_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([(10.0, 100.0), (13.0, 102.0), (9.99, 104.0)])
    monkeypatch.setattr(OthersWork, "_now", staticmethod(lambda: next(now)))
    others = OthersWork()
    assert others.processors() == pytest.approx(1.5)
    assert others.processors() == 0  # the kernel counts in ticks and may be late


def test_select_keeps_the_tables_order() -> None:
    assert [w.id for w in run.select(["QN-B1", "SEED", "MB-?"])] == [
        "SEED", "QN-B1", "MB-0", "MB-1", "MB-e",
    ]  # fmt: skip
    assert run.select([]) == list(workloads().values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["QN-B1", "nobody*"], "ids or globs of SEED, .*Received: nobody"),
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--json", "no/such/folder/a.json"], "there is no folder no/such/folder"),
    ],
    ids=["workload", "threads", "json"],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(argv)
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_report_says_losses_as_loud_as_wins() -> None:
    both = report(row("fast", 10.0, 40.0, 20.0), row("slow", 10.0, 40.0, 5.0))
    assert [r.ratio for r in both.rows] == [2.0, 0.5]  # to the best peer, not the first
    assert both.losses == ["slow"]
    assert both.geometric_mean == pytest.approx(1.0)
    text = both.text()
    assert re.search(r"^fast .* 2\.00× won ", text, re.MULTILINE)
    assert re.search(r"^slow .* 0\.50× LOST ", text, re.MULTILINE)
    assert "best peer is 1.00×; 1 won, 1 lost: slow" in text
    assert "INCOMPLETE" not in text
    assert "DISTURBED" not in text


def test_report_gives_kernel_speed_and_share_of_peak() -> None:
    one = report(row("a", 110.0, 120.0))
    assert one.rows[0].kernel_gflops == pytest.approx(80.0)  # 8 MFLOP in 100 µs
    assert one.share_of_peak(one.rows[0]) == pytest.approx(0.5)
    assert re.search(r"^a .* 100\.0 +80\.0 +50\.0 %$", one.text(), re.MULTILINE)


def test_incomplete_report_is_headed_so_and_quotes_no_mean() -> None:
    text = report(row("a", 10.0), missing=("onnx",)).text()
    assert text.startswith("INCOMPLETE: onnx not installed")
    assert "geometric" not in text
    assert "×" not in text.replace("1×9", "")
    # One peer there and another not: the missing one might be the best.
    partial = report(row("a", 10.0, 20.0), missing=("onnx",))
    assert partial.geometric_mean is None
    assert "geometric" not in partial.text()


def test_report_says_that_others_were_at_work() -> None:
    assert "kept 1.2 processors busy" in report(row("a", 1.0, 2.0), others=1.2).text()


def test_report_says_that_ours_is_held_to_less() -> None:
    held = dataclasses.replace(report(row("a", 1.0, 2.0)), target="some-isa")
    assert "Ours is held to some-isa" in held.text()


def test_report_as_json_is_complete() -> None:
    one = report(row("a", 10.0, 20.0))
    plain = json.loads(json.dumps(one.to_dict()))
    assert plain["geometric_mean"] == pytest.approx(2.0)
    assert {"command", "where", "versions", "peak_gflops", "losses"} < set(plain)
    assert plain["rows"][0]["whole_call"][OURS]["median_us"] == 10.0
    assert set(plain["rows"][0]) >= {f.name for f in dataclasses.fields(Row)}


def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "missing_for_onnxruntime", lambda: ["onnx", "onnxruntime"])


@pytest.mark.usefixtures("quick")
def test_without_onnxruntime_ours_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm")
    without_onnxruntime(monkeypatch)
    assert run.main(["SEED"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("INCOMPLETE: onnx and onnxruntime not installed")
    assert re.search(r"^SEED +4×10 12→3 k2 s2 .*%$", printed, re.MULTILINE)
    assert "geometric" not in printed


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("data_format", FORMATS)
def test_command_end_to_end(
    data_format: str, threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    argv = ["SEED", "EEG-*", "--data-format", data_format, "--threads", str(threads)]
    argv += ["--json", str(tmp_path / "figures.json")]
    assert run.main(argv) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["command"].startswith("python -m tvm_sepconv.bench SEED 'EEG-*' --data-format")
    assert [r["id"] for r in figures["rows"]] == ["SEED", "EEG-SSVEP"]
    assert set(figures["rows"][0]["whole_call"]) == {OURS, peers.ONNXRUNTIME}
    assert figures["missing"] == []
    assert re.search(r"^EEG-SSVEP +1×64 8→16 k8 m2 .*× (won|LOST) ", printed, re.MULTILINE)
    assert f"geometric mean of the ratios to the best peer is {figures['geometric_mean']:.2f}×" in (
        printed
    )
    assert (figures["threads"], figures["data_format"]) == (threads, data_format)


@pytest.mark.usefixtures("quick")
def test_wrong_peer_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    right = peers.onnxruntime_layer

    def wrong(*args: object, **kwargs: object) -> Callable[[np.ndarray], np.ndarray]:
        layer = right(*args, **kwargs)  # type: ignore[arg-type]
        return lambda x: layer(x) * np.float32(1.001)

    monkeypatch.setattr(peers, "onnxruntime_layer", wrong)
    assert run.main(["SEED"]) == 1
    out, err = capsys.readouterr()
    assert "error: ONNX Runtime (1-D) is not the layer" in err
    assert out == ""


@pytest.mark.usefixtures("quick")
def test_wrong_layer_of_ours_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm")
    without_onnxruntime(monkeypatch)
    right = Case.of

    def other_bias(workload: Workload, data_format: str) -> Case:
        case = right(workload, data_format)
        return dataclasses.replace(case, weights=(*case.weights[:2], case.weights[2] + 1))

    monkeypatch.setattr(Case, "of", other_bias)
    assert run.main(["SEED"]) == 1
    assert "error: tvm_sepconv is not the layer" in capsys.readouterr().err


def test_without_the_compiler_its_error_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    assert run.main(["SEED"]) == 1
    assert "error: Compiling a layer needs the compiler" in capsys.readouterr().err


def test_kernel_that_fails_is_an_error() -> None:
    class Layer:
        name = "layer"
        _compiled = type("Compiled", (), {"call": staticmethod(lambda *args: 5), "handle": 1})

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return x

    case = Case.of(SEED, "channels_last")
    with pytest.raises(RuntimeError, match="the kernel of layer returned status 5"):
        run._kernel_alone(case, Layer(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("height", [False, True], ids=["1-D", "2-D"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding": "same"},
        {"padding": (3, 0), "activation": "silu"},
        {"strides": 1, "dilation_rate": 3, "depth_multiplier": 2, "activation": "elu"},
        {"use_bias": False, "activation": "linear"},
    ],
    ids=["seed", "same", "causal silu", "dilated, multiplied, elu", "no bias"],
)
def test_onnxruntime_peer_is_the_layer(changes: dict[str, object], height: bool) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    workload = dataclasses.replace(SEED, layer={**SEED.layer, **changes})
    case = Case.of(workload, "channels_last")
    x = case.channels_first(case.x)
    for shape in [(4, 10), *([(None, None)] * (changes.get("padding") != "same"))]:
        layer = peers.onnxruntime_layer(case.config, case.weights, 1, shape, height=height)
        y = layer(x[:, :, None])[:, :, 0] if height else layer(x)
        check("peer", y.swapaxes(1, 2), case.expected, 2 * case.allowed)  # silu stretches by 1.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": "same"}, "Received: steps=None, strides=2"),
        ({"activation": "gelu"}, r"one of \['linear', 'relu', .*Received: activation=gelu"),
        ({"activation": lambda y: y}, "Received: activation=None"),
    ],
    ids=["unknown steps", "activation", "custom activation"],
)
def test_what_the_onnxruntime_peer_cannot_be(changes: dict[str, object], message: str) -> None:
    pytest.importorskip("onnx")
    case = Case.of(SEED, "channels_last")
    config = SepConvConfig.parse(**{**SEED.layer, **changes})
    with pytest.raises(ValueError, match=message):
        peers.onnx_model(config, case.weights, (None, None), True)
