"""Sweeps: regular neighbours, what is compared with what, and a small one from end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from bench_reports import swept

from tvm_sepconv import jit, runtime, targets
from tvm_sepconv.bench import drawing, sweep, sweep_page
from tvm_sepconv.bench.case import Case
from tvm_sepconv.bench.sweep import Grid, Point, Sweep, measure_sweep


def test_default_grid_is_every_irregular_shape_and_its_regular_ones() -> None:
    grid = Grid()
    assert len(grid.shapes(16)) == 33 * 5 * 3 * 2 + 3 * 3 * 3 * 2
    assert len(set(grid.shapes(4))) == len(grid.shapes(4))
    assert {(16, 16, 1, 1), (32, 32, 4, 2), (48, 48, 1, 1), (48, 16, 2, 1)} <= set(grid.shapes(16))


def test_regular_neighbour_has_whole_vectors() -> None:
    one = swept(Grid(channels=(3, 4, 5), filters=(1, 4), depth_multipliers=(2,), strides=(1,)))
    for point in one.asked:
        regular = one.regular(point)
        assert (regular.channels, regular.filters) == (-(-point.channels // 4) * 4, 4)
        assert (regular.depth_multiplier, regular.strides) == (2, 1)
    assert {p.channels for p in one.asked} == {3, 4, 5}
    assert {p.channels for p in one.points} == {3, 4, 5, 8}


def test_rates_and_speeds_are_over_the_regular_ones() -> None:
    one = swept()
    point = next(p for p in one.asked if p.shape == (1, 3, 2, 1))
    assert point.gflops == pytest.approx(6000 / 2.0 / 1e3)
    assert one.relative_rate(point) == pytest.approx(3 / 16)
    assert one.relative_speed(point) == pytest.approx(1.0)
    slow = Point(*point.shape, kernel_us=4.0, flops=point.flops)
    points = tuple(slow if p == point else p for p in one.points)
    slower = Sweep(**{**vars(swept()), "points": points})
    assert slower.relative_speed(slow) == pytest.approx(0.5)
    assert slower.worst(1, slower.relative_speed) == [slow]
    assert "Slower than the next regular shape: 1;" in slower.text()


def test_text_names_the_worst() -> None:
    text = swept().text()
    assert "4 shapes, 256 steps, kernel size 3" in text
    assert "Below 60 % of the rate of the next regular shape: 4; the least:\n  1→3 m2 " in text
    assert "1→3 s2 m2" in text
    assert "Slower than the next regular shape: 0;" in text


def test_sweep_survives_json() -> None:
    one = swept(Grid())
    assert Sweep.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize("changes", [{"sweep_format": 99}, {"sweep_format": None}, {"grid": None}])
def test_json_of_another_version_is_refused(changes: dict[str, object]) -> None:
    plain = {k: v for k, v in {**swept().to_dict(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=r"bench --sweep --json` .* Measure again"):
        Sweep.from_dict(plain)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_page_has_a_panel_for_each_multiplier_and_stride() -> None:
    one = swept(Grid(), lanes=16)
    text = sweep_page.html(one)
    assert text.count("<svg") == 3
    for multiplier, strides in itertools.product((1, 2, 4), (1, 2)):
        assert text.count(f">multiplier {multiplier}, strides {strides}<") == 3
    with drawing.style():
        made = sweep_page.panels(one, one.relative_rate, 0.6, "rates")
    lines = [line for area in made.axes for line in area.lines if len(line.get_xdata()) > 2]
    assert len(lines) == 5 * 6
    drawn = sorted((x, y) for line in lines for x, y in line.get_xydata())
    assert drawn == sorted((p.channels, one.relative_rate(p)) for p in one.asked)
    assert made.axes[0].get_ylim()[1] > max(y for _, y in drawn)
    assert len(text) < 500_000
    assert "https:" not in text
    assert "1→1 m4" in text


def test_small_sweep_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(sweep, "POINT_SECS", 0.0)
    checked = []
    right = sweep.check
    monkeypatch.setattr(sweep, "check", lambda *a: checked.append(a[0]) or right(*a))
    progress: list[str] = []
    target = targets.runnable()[0]
    grid = Grid(channels=(3,), filters=(3,), depth_multipliers=(2,), strides=(2,))
    one = measure_sweep(target, "command", progress.append, grid, steps=20)
    assert [p.shape for p in one.points] == [(3, 3, 2, 2), (one.lanes, one.lanes, 2, 2)]
    assert [p.flops for p in one.points] == [2 * 10 * 2 * c * (3 + c) for c in (3, one.lanes)]
    assert all(p.kernel_us > 0 for p in one.points)
    assert len(checked) == 2
    assert {"compiling 2 of 2", "measuring 2 of 2"} < set(progress)
    assert progress[-1] == ""
    assert (one.target, one.command, one.steps) == (target, "command", 20)
    assert one.peak_gflops > 1


def test_wrong_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(sweep.concurrent.futures, "ProcessPoolExecutor", _here)
    right = Case.of_subject
    other_bias = lambda subject, target: _spoiled(right(subject, target))  # noqa: E731
    monkeypatch.setattr(Case, "of_subject", other_bias)
    grid = Grid(channels=(3,), filters=(4,), depth_multipliers=(1,), strides=(1,))
    with pytest.raises(AssertionError, match="c3_f4_k3_s1_d1_m1_cl_linear_bias_float32 is not the"):
        measure_sweep(targets.runnable()[0], grid=grid, steps=20)
    assert runtime._threads is None  # what a person set for the process is not ours to keep


def _here(workers: int, fresh: object) -> ThreadPoolExecutor:
    """Compile in this process: another one has to import TVM first."""
    return ThreadPoolExecutor(1)


def _spoiled(case: Case) -> Case:
    return Case(
        case.config, (*case.weights[:2], case.weights[2] + 1), case.x, case.expected, case.allowed
    )


def test_without_the_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the compiler"):
        measure_sweep(targets.runnable()[0], grid=Grid((1,), (1,)))
