"""Every contestant computes the layer, in every form it has, for every kind of layer.

A framework that is not installed is skipped. ``BENCH_PEERS=~/.cache/tvm_sepconv/peers pytest …``
takes those that ``tvm-sepconv bench --setup`` installed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_sepconv import targets
from tvm_sepconv.bench import environments, process
from tvm_sepconv.bench.case import Case, check
from tvm_sepconv.bench.contestants import CONTESTANTS, Contestant, dense, onnxruntime, ours, torch
from tvm_sepconv.bench.process import ContestantError, Worker
from tvm_sepconv.bench.worker import Session
from tvm_sepconv.config import SepConvConfig
from tvm_sepconv.subjects import Subject
from tvm_sepconv.workloads import workloads

SEED = workloads()["SEED"]
BY_THEMSELVES = ("ours", "two-kernels", "metaschedule")  # have tests of their own
LAYERS: dict[str, dict[str, Any]] = {
    "seed": {},
    "same, strided": {"padding": "same", "strides": 3},
    "causal silu": {"padding": (3, 0), "activation": "silu", "strides": 1},
    "dilated, multiplied, elu": {
        "strides": 1, "dilation_rate": 3, "depth_multiplier": 2, "activation": "elu",
    },
    "no bias": {"use_bias": False, "activation": "linear", "padding": "same"},
    "channels first": {"data_format": "channels_first", "kernel_size": 5, "padding": "same"},
}  # fmt: skip
# What is compiled is what PyTorch runs as it is, for every layer; each takes seconds.
COMPILED = ("seed", "causal silu", "channels first")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """A process for each contestant that can run here, started when it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        if "BENCH_PEERS" in os.environ:
            patch.setenv("TVM_SEPCONV_PEERS", os.environ["BENCH_PEERS"])
        pythons = {c.name: environments.python(c.environment, c.modules) for c in CONTESTANTS}
    with process.workers({k: v for k, v in pythons.items() if v is not None}, 1) as started:
        yield started


@pytest.mark.parametrize(
    ("contestant", "changes"),
    [
        pytest.param(contestant, changes, id=f"{contestant.key}-{name}")
        for contestant in CONTESTANTS
        if contestant.key not in BY_THEMSELVES
        for name, changes in LAYERS.items()
        if name in COMPILED or contestant.key != "torch-compile"
    ],
)
def test_contestant_is_the_layer(
    contestant: Contestant, changes: dict[str, Any], workers: dict[str, Worker]
) -> None:
    if contestant.name not in workers:
        pytest.skip(f"{contestant.modules}: tvm-sepconv bench --setup {contestant.environment}")
    config = SepConvConfig.parse(**{**SEED.layer, **changes})
    case = Case.of_subject(Subject("a", config, 12, 4, 10), targets.runnable()[0])
    worker = workers[contestant.name]
    case.save(worker.folder / "case.npz")
    reply = worker.ask(
        "prepare", case=str(worker.folder / "case.npz"), threads=1, copies=2,
        folder=str(worker.folder),
    )  # fmt: skip
    assert reply["forms"]
    expected, allowed = contestant.answer(case)
    assert expected.shape == case.expected.shape
    for form, path in reply["forms"]:
        check(form, np.load(path), expected, allowed)
    assert worker.ask("choose", secs=0.0)["form"] in dict(reply["forms"])
    turn = worker.ask("turn", repeats=2, samples=3, warm_secs=0.0)
    assert len(turn["times_us"]) == 3
    assert min(turn["times_us"]) > 0


@pytest.mark.parametrize(
    "contestant",
    [c for c in CONTESTANTS if c.key in ("onnxruntime", "openvino", "litert", "pytorch")],
    ids=lambda c: c.key,
)
def test_activation_without_a_form_is_refused(
    contestant: Contestant, workers: dict[str, Worker]
) -> None:
    if contestant.name not in workers:
        pytest.skip(f"{contestant.modules}: tvm-sepconv bench --setup {contestant.environment}")
    config = SepConvConfig.parse(3, 2, activation="gelu")
    worker = workers[contestant.name]
    Case.of_subject(Subject("a", config, 4, 1, 9)).save(worker.folder / "case.npz")
    with pytest.raises(ContestantError, match=r"one of .*linear.* Received: activation=gelu"):
        worker.ask(
            "prepare", case=str(worker.folder / "case.npz"), threads=1, copies=1,
            folder=str(worker.folder),
        )  # fmt: skip


def test_torch_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        torch.compiled(Case.of(SEED, "channels_last"), 1)


def test_our_kernel_that_fails_is_an_error() -> None:
    pytest.importorskip("tvm")
    (form,) = ours.prepare(Case.of(SEED, "channels_last"), 1)
    assert form.kernel is not None
    with pytest.raises(RuntimeError, match=r"the kernel of SEED returned status \d"):
        form.kernel(form.x, np.empty((4, 6, 3), np.float32))


@pytest.mark.parametrize("copies", [1, 3])
def test_our_kernel_is_checked_and_timed_beside_the_peak(copies: int, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    isa = targets.runnable()[0]
    session = Session(CONTESTANTS[0])
    case = dataclasses.replace(Case.of(SEED, "channels_last"), target=isa)
    case.save(tmp_path / "case.npz")
    session.prepare(str(tmp_path / "case.npz"), 1, copies, str(tmp_path))
    times = session.kernel(isa, 0.0)
    assert set(times) == {"kernel", "peak"}
    assert times["kernel"]["best_us"] > 0
    wrong = dataclasses.replace(case, expected=case.expected + 1)
    session._case = wrong
    with pytest.raises(AssertionError, match="tvm_sepconv's kernel is not the layer"):
        session.kernel(isa, 0.0)


def test_dense_convolution_is_keras_conv1d() -> None:
    keras = pytest.importorskip("keras")
    case = Case.of(SEED, "channels_last")
    config = case.config
    layer = keras.layers.Conv1D(
        config.filters, config.kernel_size, strides=config.strides, use_bias=False
    )
    layer.build(case.x.shape)
    layer.set_weights([dense.weights(case)])
    expected, allowed = dense.answer(case)
    check("Keras", np.asarray(layer(case.x)), expected, allowed)
    assert allowed.max() < 1e-4 * expected.std()


def test_dense_convolution_that_takes_too_long_is_left_out() -> None:
    config = SepConvConfig.parse(4096, 99)
    x = np.broadcast_to(np.float32(0), (1, 2000, 4096))
    weights = (np.broadcast_to(np.float32(0), (99, 4096, 1)), np.zeros((1, 1, 1), np.float32))
    case = Case(config, weights, x, x, x)
    for function in (lambda: dense.answer(case), lambda: dense.prepare(case, 1)):
        with pytest.raises(ValueError, match="left out: a call takes 6318 GFLOP"):
            function()


# ---- ONNX, which the demo uses as well -----------------------------------------------------------


@pytest.mark.parametrize("height", [False, True], ids=["1-D", "2-D"])
def test_onnx_model_takes_any_length_where_padding_allows(height: bool) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    case = Case.of(SEED, "channels_last")
    x = case.channels_first(case.x)
    layer = onnxruntime.layer(case.config, case.weights, 1, height=height)
    y = layer(x[:, :, None])[:, :, 0] if height else layer(x)
    check("ONNX", y.swapaxes(1, 2), case.expected, case.allowed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": "same"}, "Received: steps=None, strides=2"),
        ({"activation": "gelu"}, r"one of \['linear', 'relu', .*Received: activation=gelu"),
        ({"activation": lambda y: y}, "Received: activation=None"),
    ],
    ids=["unknown steps", "activation", "custom activation"],
)
def test_what_the_onnx_model_cannot_be(changes: dict[str, object], message: str) -> None:
    pytest.importorskip("onnx")
    case = Case.of(SEED, "channels_last")
    config = SepConvConfig.parse(**{**SEED.layer, **changes})
    with pytest.raises(ValueError, match=message):
        onnxruntime.onnx_model(config, case.weights, (None, None), True)
