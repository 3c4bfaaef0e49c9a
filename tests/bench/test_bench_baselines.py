"""What is shown beside the peers: our two-kernel form and MetaSchedule's own space."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tvm_sepconv import jit, targets
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.contestants import metaschedule, two_kernel
from tvm_sepconv.compiler import default_library, default_space, plain, static
from tvm_sepconv.compiler.baselines import Shape, TwoKernels, depthwise_parts, even_tile
from tvm_sepconv.compiler.targets import CpuTarget
from tvm_sepconv.workloads import Workload, workloads

HERE = [isa for isa in targets.runnable() if isa.startswith("x86_64")]
pytestmark = pytest.mark.skipif(not HERE, reason="what is compiled is run on an x86 machine")
TARGET = CpuTarget(HERE[0] if HERE else "x86_64-avx2")
SEED = workloads()["SEED"]


def layer(
    channels: int, filters: int, kernel: int, steps: int, batch: int = 1, **changes: Any
) -> Workload:
    shape = {"filters": filters, "kernel_size": kernel, "strides": 1, "padding": "same"}
    sizes = {"channels": channels, "steps": steps, "batch": batch}
    return dataclasses.replace(SEED, layer={**SEED.layer, **shape, **changes}, **sizes)


# Ragged channels and filters, ends that are copied, short and long sequences, padding beyond them.
CASES = {
    "seed": SEED,
    "one": layer(5, 1, 1, steps=1),
    "in place": layer(32, 48, 3, steps=200, batch=3, depth_multiplier=2),
    "in place, ragged": layer(21, 33, 3, steps=150, batch=2, strides=2),
    "in place, valid": layer(3, 33, 4, steps=150, padding="valid", activation="linear"),
    "in place, dilated": layer(16, 16, 3, steps=300, dilation_rate=40, use_bias=False),
    "copied": layer(13, 7, 11, steps=130, batch=2, padding=(9, 0), activation="elu"),
    "copied, multiplied": layer(8, 16, 8, steps=64, depth_multiplier=3, activation="silu"),
    "mostly padding": layer(5, 20, 9, steps=9, strides=3, padding=(30, 40)),
}


def shape_of(case: Case) -> Shape:
    return Shape.of(case.config, case.x.shape[0], case.steps)


def before_a_hole(array: np.ndarray) -> np.ndarray:
    """A copy of `array` that ends where the process may not read on."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    hole = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(hole), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


# ---- two kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_two_kernels_are_the_layer(name: str, threads: int) -> None:
    case = Case.of(CASES[name], "channels_last")
    (form,) = two_kernel.prepare(case, threads)
    assert ("in place" in form.form) == name.startswith("in place")
    first = form.restore(form.call(before_a_hole(form.x)))
    check(name, first, case.expected, case.allowed)
    kept = first.copy()
    form.call(-form.x)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("isa", HERE)
def test_two_kernels_on_every_instruction_set(isa: str) -> None:
    case = dataclasses.replace(Case.of(CASES["in place, ragged"], "channels_last"), target=isa)
    (form,) = two_kernel.prepare(case, 1)
    check(isa, form.call(case.x), case.expected, case.allowed)


@pytest.mark.parametrize("offset", [1, 3])
def test_two_kernels_take_arrays_at_any_address(offset: int) -> None:
    case = Case.of(CASES["in place"], "channels_last")
    kernel = case.config.kernel_config(case.channels)
    kernels = TwoKernels(kernel, TARGET, shape_of(case), case.weights)
    x, y = (
        np.empty(a.size + 16, np.float32)[offset:][: a.size].reshape(a.shape)
        for a in (case.x, case.expected)
    )
    x[...] = case.x
    y[...] = np.nan
    kernels(x, y)
    check("unaligned", y, case.expected, case.allowed)


@pytest.mark.parametrize("granule", [1, 4, 6])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tiles_waste_least(threads: int, granule: int) -> None:
    for steps, longest in itertools.product((1, 3, 24, 500, 3999), (12, 60)):
        tile = even_tile(steps, longest, granule, threads)

        def most_rows(tile: int, steps: int = steps) -> int:
            return max(
                len(range(i, steps, tile * threads)) * tile for i in range(0, tile * threads, tile)
            )

        legal = [t for t in range(granule, longest + 1, granule) if 2 * t >= min(longest, steps)]
        assert tile in legal or tile == granule
        assert most_rows(tile) <= min(map(most_rows, legal), default=granule)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_cover_the_steps_and_read_only_the_input_in_place(isa: str, threads: int) -> None:
    target = CpuTarget(isa)
    lanes = target.lanes("float32")
    in_place = 0
    for workload in [*workloads().values(), *CASES.values()]:
        config = workload.config(data_format="channels_last")
        kernel, shape = config.kernel_config(workload.channels), Shape.of(config, 1, workload.steps)
        for tiling in target.family.default_tilings(kernel, isa):
            parts = depthwise_parts(kernel, lanes, tiling, shape, threads)
            done = 0
            for part in parts:
                assert part.first <= done
                assert part.rows % part.step_tile == 0 == part.step_tile % tiling.depthwise_block[0]
                done = part.first + part.rows
                if not part.copied:
                    in_place += 1
                    first = part.first * config.strides - shape.left
                    last = (done - 1) * config.strides - shape.left + config.effective_kernel - 1
                    read = last * kernel.channels + -(-kernel.channels // lanes) * lanes
                    assert first >= 0
                    assert read <= shape.steps * kernel.channels
            assert done >= shape.out_steps
    assert in_place > 10


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        (
            {"data_format": "channels_first"},
            {},
            "must be 'channels_last'.*Received: data_format=ch",
        ),
        ({"dtype": "float64"}, {}, "must be 'float32'.*Received: dtype=float64"),
        ({}, {"out_steps": 0}, "Received: batch=4, out_steps=0"),
    ],
    ids=["format", "dtype", "empty"],
)
def test_what_two_kernels_cannot_be(
    changes: dict[str, str], sizes: dict[str, int], message: str
) -> None:
    case = Case.of(SEED, "channels_last")
    kernel = dataclasses.replace(case.config.kernel_config(case.channels), **changes)  # type: ignore[arg-type]
    shape = dataclasses.replace(shape_of(case), **sizes)
    with pytest.raises(ValueError, match=message):
        TwoKernels(kernel, TARGET, shape, case.weights)


# ---- threads -----------------------------------------------------------------------------------


def test_threads_are_as_many_as_asked_for_and_bound_to_nothing() -> None:
    mine = os.sched_getaffinity(0)
    count = tvm.get_global_func("runtime.NumThreads")
    for threads in (1, len(mine), 1):
        static.set_threads(threads)
        assert count() == threads
        assert os.sched_getaffinity(0) == mine


def test_threads_that_the_pool_has_not_are_refused() -> None:
    static.set_threads(1)  # if this is the first call, it starts as many as there are processors
    with pytest.raises(RuntimeError, match=r"has \d+ threads and cannot grow.*threads=1000"):
        static.set_threads(1000)
    static.set_threads(1)


# ---- MetaSchedule's own space ------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random candidates: an evolution takes 24 s. And a cache of one's own."""
    monkeypatch.setattr(default_space, "STRATEGY", "replay-trace")
    monkeypatch.setattr(jit, "cache_root", lambda: tmp_path / "cache")


def candidates(case: Case, number: int) -> list[Schedule]:
    """The first spaces of a layer, each with decisions drawn by chance."""
    kernel = case.config.kernel_config(case.channels)
    context = default_space.started(plain.workload(kernel, shape_of(case)), TARGET.tvm())
    result = []
    for space in context.generate_design_space()[:number]:
        sch = Schedule(context.mod, seed=7)
        space.trace.apply_to_schedule(sch, remove_postproc=True)
        sch.enter_postproc()
        assert all(step.apply(sch) for step in context.space_generator.postprocs)
        result.append(sch)
    return result


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "name", ["seed", "in place, ragged", "in place, dilated", "copied, multiplied"]
)
def test_metaschedules_candidates_are_the_layer(
    name: str, data_format: str, tmp_path: Path
) -> None:
    case = Case.of(CASES[name], data_format)
    kernel = case.config.kernel_config(case.channels)
    for number, sch in enumerate(candidates(case, 2)):
        entry = tmp_path / str(number)
        entry.mkdir()
        default_library.write(entry, sch, TARGET, {})
        tuned = default_space.Tuned(entry, kernel, case.weights, 1)
        y = np.full(case.expected.shape, np.nan, np.float32)
        tuned(before_a_hole(case.x), y)
        check(name, y, case.expected, case.allowed)


def test_layouts_place_every_weight_once() -> None:
    case = Case.of(CASES["copied, multiplied"], "channels_last")
    for sch in candidates(case, 3):
        tables = {name: table for name, (_, table) in default_library.layouts(sch).items()}
        for table in tables.values():
            assert sorted(table.reshape(-1)) == list(range(table.size))
        pointwise = tables["pointwise"].reshape(-1)
        assert np.any(pointwise != np.arange(pointwise.size))  # tiles lie together


def test_plain_layer_has_no_other_activation() -> None:
    case = Case.of(layer(2, 2, 2, steps=9, activation="gelu"), "channels_last")
    with pytest.raises(ValueError, match=r"one of \['elu', .*Received: activation=gelu"):
        plain.workload(case.config.kernel_config(2), shape_of(case))


@pytest.mark.usefixtures("quick")
def test_not_tuned_names_the_command() -> None:
    with pytest.raises(ValueError, match="not tuned: run tvm-sepconv bench --metaschedule TRIALS"):
        metaschedule.prepare(Case.of(SEED, "channels_last"), 1)


@pytest.mark.usefixtures("quick")
def test_search_is_kept_and_used(builds_here: None, tmp_path: Path) -> None:
    case = Case.of(CASES["copied"], "channels_last")
    seen: list[int] = []
    kept = metaschedule.tune(case, 1, 3, tmp_path / "work", lambda now: seen.append(now.trials))
    assert seen[-1] == 3
    description = json.loads((kept / default_library.DESCRIPTION).read_text())
    assert description["trials"] == 3
    assert 0 < description["best_secs"] < 1
    (form,) = metaschedule.prepare(case, 1)
    assert form.form == "3 trials"
    check("kept", form.restore(form.call(form.x)), case.expected, case.allowed)
    with pytest.raises(ValueError, match="not tuned"):
        metaschedule.prepare(case, 2)
    with pytest.raises(ValueError, match="not tuned"):
        metaschedule.prepare(Case.of(CASES["copied"], "channels_first"), 1)


def entry(place: Path, trials: int, content: bytes) -> Path:
    """A result that looks whole, kept in `place`."""
    result = place.parent / "result"
    result.mkdir(exist_ok=True)
    hashes = {}
    for name in (default_library.LIBRARY, default_library.TABLES):
        (result / name).write_bytes(content)
        hashes[name] = default_library.bundle.sha256(result / name)
    (result / default_library.DESCRIPTION).write_text(json.dumps({"sha256": hashes}))
    return default_space.keep(result, place, trials)


def test_best_is_of_most_trials_and_whole(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert default_space.best(place) is None
    few, many = entry(place, 9, b"few"), entry(place, 32, b"many")
    assert default_space.best(place) == many
    assert entry(place, 32, b"again") == many
    assert (many / default_library.LIBRARY).read_bytes() == b"again"
    (many / default_library.LIBRARY).write_bytes(b"agai")
    assert default_space.best(place) == few
    (few / default_library.DESCRIPTION).write_text("[]")
    assert default_space.best(place) is None
    assert sorted(p.name for p in place.iterdir()) == ["32", "9"]


@pytest.mark.usefixtures("quick")
def test_wrong_result_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case.of(SEED, "channels_last")
    monkeypatch.setattr(default_space, "tune", lambda *args: (tmp_path, None))
    monkeypatch.setattr(default_space, "Tuned", lambda *args: lambda x, y: y.fill(0))
    with pytest.raises(AssertionError, match="MetaSchedule is not the layer"):
        metaschedule.tune(case, 1, 1, tmp_path, print)
    assert not (tmp_path / "cache").exists()


@derived_object
class Refusing(ms.builder.PyBuilder):  # type: ignore[misc]
    def build(self, inputs: list[Any]) -> list[Any]:
        return [ms.builder.BuilderResult(None, "no linker") for _ in inputs]


@pytest.mark.usefixtures("quick")
def test_search_without_a_result_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_space, "_builder", lambda *args: Refusing())
    case = Case.of(SEED, "channels_last")
    message = "None of MetaSchedule's 2 candidates ran: 2 builds and 0 runs failed.*no linker"
    with pytest.raises(RuntimeError, match=message):
        metaschedule.tune(case, 1, 2, tmp_path, lambda now: None)


def test_search_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metaschedule, "NEEDED", ("numpy", "no_such_module"))
    with pytest.raises(RuntimeError, match=r"needs no_such_module: pip install .*\[tune\]"):
        metaschedule.tune(Case.of(SEED, "channels_last"), 1, 1, tmp_path, print)


@pytest.mark.usefixtures("quick")
def test_no_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1\. Received: trials=0"):
        metaschedule.tune(Case.of(SEED, "channels_last"), 1, 0, tmp_path, print)
