"""Modelled cycles of ARM code: what is counted, what the model makes of it, and tuning by it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from command_line import refused

pytest.importorskip("tvm")

from tvm_sepconv import cli, targets
from tvm_sepconv.compiler import build
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning import history, logs, measure
from tvm_sepconv.compiler.tuning.modelled import cycles, figures, score, tools
from tvm_sepconv.compiler.tuning.modelled.cycles import Block, Model
from tvm_sepconv.compiler.tuning.modelled.emulation import Emulator
from tvm_sepconv.compiler.tuning.modelled.runner import Modelled
from tvm_sepconv.compiler.tuning.modelled.tools import Tools
from tvm_sepconv.compiler.tuning.records import MODEL_HZ, read
from tvm_sepconv.config import KernelConfig

TARGET = "aarch64-neon@cortex-a55"
CONFIG = KernelConfig(channels=16, filters=32, kernel_size=5)
LAYER = ["--channels", "16", "--filters", "32", "--kernel-size", "5", "--padding", "same"]
SCHEMA = Path(__file__).parents[2] / "tuning_logs" / "record.schema.json"
# Two sections, a loop of seven turns in the first, nothing but the marks' code in the second.
PROGRAM = """
#include "marks.h"
#if defined(__aarch64__)
#define LOOP "mov x9, #7\\n1: nop\\nnop\\nsubs x9, x9, #1\\nb.ne 1b"
#define CLOBBER "x9"
#else
#define LOOP "mov r4, #7\\n1: nop\\nnop\\nsubs r4, r4, #1\\nbne 1b"
#define CLOBBER "r4"
#endif
int main(void) {
  __asm__ volatile(LOOP ::: CLOBBER, "cc");
  MARK_BEGIN();
  __asm__ volatile(LOOP ::: CLOBBER, "cc");
  MARK_END();
  __asm__ volatile(LOOP ::: CLOBBER, "cc");
  MARK_BEGIN();
  MARK_END();
  return 0;
}
"""


def found(arch: str) -> Tools:
    try:
        return tools.tools(arch)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "counter.so"
    try:
        tools.build_plugin(found("aarch64"), path)
    except RuntimeError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture(scope="module")
def runner(plugin: Path) -> Iterator[Modelled]:
    made = Modelled(cpu(TARGET))
    yield made
    made.close()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.npz"
    measure.write_task(path, CONFIG, 1, 130)
    return path


def library(config: KernelConfig, path: Path, target: str = TARGET) -> Path:
    chosen = cpu(target)
    tilings = chosen.family.default_tilings(config, chosen.isa)
    build.build_library(config, chosen, path, tuple(map(build.Variant, tilings)))
    return path


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(CONFIG, tmp_path_factory.mktemp("right") / "layer.so")


@pytest.mark.parametrize("arch", ["aarch64", "armv7"])
def test_what_runs_between_the_marks_is_counted_exactly(
    arch: str, plugin: Path, tmp_path: Path
) -> None:
    here, source = found(arch), tmp_path / "program.c"
    source.write_text(PROGRAM)
    include = f"-I{Path(tools.__file__).parent}"
    mode = ["-marm"] if arch == "armv7" else []
    command = [here.compiler, "-O1", *mode, include, str(source), "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True)
    counts = tmp_path / "counts"
    emulator = [here.emulator, "-L", here.sysroot, "-plugin", f"{plugin},out={counts}"]
    subprocess.run([*emulator, str(tmp_path / "program")], check=True)
    first, second = cycles.read_counts(counts)
    # The first turn is a block with the instruction before it, the mark no part of any.
    assert sorted((b.instructions, count) for b, count in first.items()) == [(4, 6), (5, 1)]
    (turn,) = (block for block in first if first[block] == 6)
    names = [line.split()[0] for line in cycles.disassembled(here, [turn.code])[0]]
    assert names[:3] == ["nop", "nop", "subs"] and names[3] in ("b.ne", "bne")
    assert (cycles.executed(first), cycles.executed(second)) == (1 + 7 * 4, 0)


CODE = {
    "eight multiply-adds, none waiting": ([f"fmla v{n}.4s, v16.4s, v17.4s" for n in range(8)], 4),
    "eight multiply-adds, each waiting": (["fmla v0.4s, v16.4s, v17.4s"] * 8, None),
    "nothing that a model knows": (["svc #0"], None),
}


def assembled(here: Tools, text: list[str], folder: Path) -> Block:
    (folder / "code.s").write_text("\n".join(text) + "\n")
    subprocess.run(
        [here.compiler, "-march=armv8.2-a", "-c", "code.s", "-o", "code.o"], cwd=folder, check=True
    )
    copy = [f"{here.compiler.removesuffix('gcc')}objcopy", "-O", "binary", "-j", ".text"]
    subprocess.run([*copy, "code.o", "code.bin"], cwd=folder, check=True)
    return Block(0, len(text), (folder / "code.bin").read_bytes())


@pytest.mark.parametrize("core", ["neoverse-n1", "cortex-a55"])
def test_the_model_is_llvm_mcas_and_its_floor_two_multiply_adds_a_cycle(
    core: str, tmp_path: Path
) -> None:
    here = found("aarch64")
    model = Model(here, core)
    took = {
        what: model.of_block(assembled(here, text, tmp_path)) for what, (text, _) in CODE.items()
    }
    free, waiting, unknown = took.values()
    assert 8 / cycles.FMA_PIPES <= free < 1.02 * 8 / cycles.FMA_PIPES
    assert waiting > 3 * free
    assert 0 <= unknown < 10
    block = assembled(here, CODE["eight multiply-adds, none waiting"][0], tmp_path)
    assert model.cycles(Counter({block: 1000})) == pytest.approx(1000 * free)
    (text,) = cycles.disassembled(here, [block.code])
    assert [line.split()[0] for line in text] == ["fmla"] * 8


def test_llvm_mcas_complaints_are_passed_on() -> None:
    here = found("aarch64")
    with pytest.raises(RuntimeError, match=r"This command failed[\s\S]*no-such-core"):
        Model(here, "no-such-core").of_block(Block(0, 1, bytes.fromhex("1f2003d5")))


@pytest.mark.parametrize(
    ("target", "core"),
    [("aarch64-neon", "neoverse-n1"), ("aarch64-neon@cortex-a76", "neoverse-n1"),
     ("aarch64-neon@cortex-a72", "neoverse-n1"), ("aarch64-fp16@cortex-a55", "cortex-a55"),
     ("aarch64-neon@cortex-a53", "cortex-a55")],
)  # fmt: skip
def test_each_64_bit_target_has_a_model(target: str, core: str) -> None:
    assert cycles.model_of(cpu(target)) == core


def test_every_core_that_targets_name_has_a_model() -> None:
    assert set(cycles.MODELS) == {"", *targets.CORES}


@pytest.mark.parametrize("target", ["armv7-neon", "x86_64-avx2"])
def test_other_targets_have_none(target: str) -> None:
    with pytest.raises(ValueError, match=f"64-bit ARM.*Received: target={target}"):
        cycles.model_of(cpu(target))


def test_other_architectures_are_not_emulated() -> None:
    with pytest.raises(ValueError, match=r"Emulated are aarch64 and armv7\. Received: x86_64"):
        tools.tools("x86_64")


def test_missing_programs_are_all_named_with_the_way_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tools.tools.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError) as caught:
        tools.tools("aarch64")
    said = str(caught.value)
    for name in ("qemu-aarch64", "llvm-mca-19", "llvm-mc-19", "aarch64-linux-gnu-gcc", "--rpc"):
        assert name in said
    assert "apt install qemu-user llvm-19 gcc-aarch64-linux-gnu" in said


@pytest.mark.skipif(not shutil.which("qemu-aarch64-static"), reason="needs qemu-aarch64-static")
def test_an_emulator_without_plugins_is_named(tmp_path: Path) -> None:
    static = replace(found("aarch64"), emulator="qemu-aarch64-static")
    with pytest.raises(
        RuntimeError, match=r"qemu-aarch64-static \S+ does not load plugins: .*--rpc"
    ):
        tools.build_plugin(static, tmp_path / "counter.so")


def test_samples_are_whole_cycles_the_same_each_time(
    runner: Modelled, task: Path, right: Path
) -> None:
    ((first, *others),) = runner.measure(task, [str(right)], 3)
    assert others == [first, first]
    assert (first * MODEL_HZ).is_integer() or abs(first * MODEL_HZ % 1 - 1) < 1e-6
    both = runner.measure(task, [str(right), str(right)], 1)  # which verifies more inputs before
    assert both == [[first], [first]]
    least = CONFIG.flops(1, 130) / 2 / 4 / cycles.FMA_PIPES
    assert least < first * MODEL_HZ < 10 * least
    assert "cortex-a55" in runner.machine and "LLVM 19" in runner.machine


def test_a_wrong_candidate_is_an_error_of_its_own(
    runner: Modelled, task: Path, tmp_path: Path
) -> None:
    wrong = library(replace(CONFIG, activation="relu"), tmp_path / "wrong.so")
    with pytest.raises(RuntimeError, match="outputs are wrong"):
        runner.measure(task, [str(wrong)], 1)


def test_a_candidate_with_an_instruction_that_the_core_lacks_is_an_error(
    plugin: Path, task: Path, tmp_path: Path
) -> None:
    # Armv8.1's atomic add in the place of a kernel; the emulated core is the family's least.
    emulator = Emulator(cpu(TARGET), tmp_path / "emulator")
    newer = tmp_path / "newer.c"
    newer.write_text(
        "__attribute__((constructor)) static void f(void) { long x = 0;"
        '__asm__ volatile("ldadd %0, %0, [%1]" : : "r"(x), "r"(&x) : "memory"); }'
    )
    command = [found("aarch64").compiler, "-march=armv8.1-a", "-shared", "-fPIC", str(newer)]
    subprocess.run([*command, "-o", str(tmp_path / "newer.so")], check=True)
    with pytest.raises(RuntimeError, match="signal 4"):
        emulator.count(measure.Task(task), tmp_path / "newer.so")


def test_what_is_no_library_is_an_error(runner: Modelled, task: Path, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(RuntimeError, match=r"The emulated program ended: .*text\.so"):
        runner.measure(task, [str(tmp_path / "text.so")], 1)


def test_a_candidate_that_does_not_end_is_an_error(
    runner: Modelled, task: Path, right: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_sepconv.compiler.tuning.modelled.emulation.LIMIT_SECS", 1e-3)
    with pytest.raises(RuntimeError, match="No result after"):
        runner.measure(task, [str(right)], 1)


@pytest.mark.parametrize(
    ("config", "steps", "short"),
    [(CONFIG, 10_000, 10_000), (KernelConfig(256, 256, 33), 500, 500),
     (KernelConfig(512, 512, 75), 500, 125), (KernelConfig(1024, 1024, 15), 300, 128),
     (KernelConfig(1024, 1024, 15, strides=2), 900, 256), (KernelConfig(1024, 1024, 15), 40, 40)],
)  # fmt: skip
def test_long_inputs_are_shortened_but_keep_the_longest_tiles(
    config: KernelConfig, steps: int, short: int
) -> None:
    found = score.shortened(config, 1, steps)
    assert found == pytest.approx(short, abs=3)
    assert found == steps or config.flops(1, found // config.strides) // 2 <= 2 * 10**8


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, for a small layer and nobody else's records."""
    monkeypatch.setattr(logs, "packaged", lambda: tmp_path / "packaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    command = ["tune", "--target", TARGET, *LAYER, "--steps", "130", "--trials", "4"]
    return [*command, "--work-dir", str(tmp_path / "work"), "--logs", str(tmp_path / "logs")]


def test_tuning_without_a_board_records_cycles_and_says_so(
    tune: list[str], builds_here: None, plugin: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main([*tune, "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "scored by modelled cycles, which are no time" in said
    assert "best" in said and "cycles" in said and "µs" not in said
    path = tmp_path / "logs" / f"{TARGET}.jsonl"
    (line,) = path.read_text().splitlines()
    values = json.loads(line)
    jsonschema.validate(values, json.loads(SCHEMA.read_text()))
    assert values["modelled"] == "cortex-a55"
    assert values["median_cycles"] <= values["default_cycles"]
    assert values["noise"] == 0
    shown = json.loads((tmp_path / "found.json").read_text())
    assert shown["best_cycles"] == values["median_cycles"]
    assert shown["default_cycles"] == values["default_cycles"]
    assert "best_secs" not in shown
    floor = CONFIG.flops(1, 130) / 2 / 4 / cycles.FMA_PIPES
    assert shown["share_of_peak"] == pytest.approx(floor / values["median_cycles"])
    (kept,) = (tmp_path / "work").rglob(history.NAME)
    header, *trials, final = map(json.loads, kept.read_text().splitlines())
    assert header["modelled"] == "cortex-a55"
    assert all(type(n) is int for trial in trials for n in trial["cycles"] or [])
    assert final["final"]["best_cycles"] == values["median_cycles"]
    (record,) = read(path)
    match = logs.lookup(record.config, TARGET)
    assert match is not None and match.origin == "tuned, modelled" and match.secs is None
    # Its history repeats the search on any machine, still modelled.
    assert cli.main([*tune, "--replay", str(tmp_path / "work")]) == 0
    (again,) = (tmp_path / "work").rglob("replay.jsonl")
    assert json.loads(again.read_text().splitlines()[0])["modelled"] == "cortex-a55"
    assert "cycles" in again.read_text().splitlines()[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--num-threads", "2"], "modelled for one thread"), (["--space", "auto"], "is measured")],
    ids=["threads", "space"],
)
@pytest.mark.skipif("aarch64-neon" in targets.runnable(), reason="this machine needs no model")
def test_what_cannot_be_modelled_is_refused(
    more: list[str], said: str, tune: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert said in refused(capsys, *tune, *more)


def test_cycles_shows_layers_and_their_hottest_blocks(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cycles", *LAYER, "--steps", "130", "--target", TARGET, "--blocks", "1"]
    assert cli.main([*command, "--decisions", '{"register_tile": [4, 4]}']) == 0
    head, row, _, hot, *code, mean = capsys.readouterr().out.splitlines()
    assert head == f"{TARGET}, modelled as cortex-a55; cycles are no time"
    assert row.startswith("layer") and row.endswith("of the floor")
    assert "of the cycles:" in hot and any("fmla" in line for line in code)
    assert mean.endswith("in the geometric mean of 1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--decisions", "[1]"], "must be a JSON object"), (["--decisions", "{"], "Received: {"),
     (["--figures", "--blocks", "1"], "--blocks"), (["--figures", "MB-1"], "IDS"),
     (["MB-1", "--target", "x86_64-avx2"], "64-bit ARM")],
    ids=["no object", "no JSON", "figures of blocks", "figures of a layer", "x86"],
)  # fmt: skip
def test_cycles_refuses_what_it_cannot_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "cycles", *arguments)


def test_multiply_adds_are_counted_in_the_hot_blocks_only(tmp_path: Path) -> None:
    here = found("aarch64")
    hot = assembled(here, ["fmla v0.4s, v1.4s, v2.4s", "add x0, x0, #1"], tmp_path)
    cold = assembled(here, ["add x0, x0, #1"] * 3, tmp_path)
    counts = Counter({hot: 1000, cold: 10})
    assert figures.hot_blocks(counts) == [hot]
    assert figures.multiply_add_share(here, counts) == pytest.approx(0.5)


def test_a_caller_that_does_not_link_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"This command failed[\s\S]*absent\.so"):
        tools.build_caller(found("aarch64"), tmp_path / "absent.so", tmp_path / "caller")
