"""Reports: ratios, bounds, losses as loud as wins, and no mean where a peer is missing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from bench_reports import LIMITS, PEERS, complete, report, row, samples

import tvm_sepconv
from tvm_sepconv import targets
from tvm_sepconv.bench import table
from tvm_sepconv.bench.machine import OthersWork, cpu_name, versions, where
from tvm_sepconv.bench.report import BESIDE, FORMAT, NOT_OF_THE_20, OURS, REQUIRED, Report, Row
from tvm_sepconv.bench.roofline import Traffic
from tvm_sepconv.workloads import workloads

ALL_REQUIRED = {"PyTorch": 30.0, "torch.compile": 40.0, "OpenVINO": 50.0, "LiteRT": 60.0}


def full_row(name: str, ours_us: float, onnxruntime_us: float) -> Row:
    """A row in which every required peer has a time; ONNX Runtime decides below 30 µs."""
    times = {**ALL_REQUIRED, "ONNX Runtime": onnxruntime_us}
    return dataclasses.replace(
        row(name, ours_us),
        whole_call={OURS: samples(ours_us), **{peer: samples(us) for peer, us in times.items()}},
    )


def test_ratio_is_to_the_best_peer_and_others_never_count() -> None:
    one = row("a", 10.0, PyTorch=40.0, LiteRT=20.0, two_kernels=5.0, MetaSchedule=4.0)
    assert (one.best_peer, one.ratio) == ("LiteRT", 2.0)
    assert one.ratio_to("two kernels") == 0.5
    assert set(one.whole_call) & set(BESIDE) == {"two kernels", "MetaSchedule"}


@pytest.mark.parametrize(
    ("ours_us", "others", "peer"),
    [(10.0, {}, None), (10.0, {"two_kernels": 5.0}, None), (None, {"LiteRT": 5.0}, "LiteRT")],
    ids=["alone", "beside non-peers", "ours failed"],
)
def test_without_both_there_is_no_ratio(
    ours_us: float | None, others: dict[str, float], peer: str | None
) -> None:
    one = row("a", ours_us, **others)
    assert (one.best_peer, one.ratio) == (peer, None)
    both = report(one)
    assert both.losses == []
    assert both.geometric_mean is None
    assert re.search(r"^a .* — .* 80\.0 +68%", table.text(both), re.MULTILINE)


def test_limit_that_explains_little_is_in_brackets() -> None:
    one = report(row("quick", 9.0, kernel_us=135.0), row("slow", 9.0, kernel_us=136.0))
    assert one.bound(one.rows[0]).time_us == pytest.approx(67.74, abs=0.01)
    assert [one.holds(r) for r in one.rows] == [True, False]
    text = table.text(one)
    assert re.search(r"^quick .*%  FMA ", text, re.MULTILINE)
    assert re.search(r"^slow .*%  \(FMA\) ", text, re.MULTILINE)
    assert "(bound): the nearest limit" in text
    assert "(bound)" not in table.text(report(one.rows[0]))


def test_losses_are_as_loud_as_wins() -> None:
    both = report(full_row("fast", 10.0, 20.0), full_row("slow", 10.0, 5.0))
    assert both.losses == ["slow"]
    assert both.geometric_mean == pytest.approx(1.0)
    text = table.text(both)
    assert re.search(r"^fast .* 20\.0 ONNX Runtime +2\.00× won ", text, re.MULTILINE)
    assert re.search(r"^slow .* 5\.00 ONNX Runtime +0\.50× LOST ", text, re.MULTILINE)
    assert "won 1, LOST 1: slow" in text
    assert "Geometric mean of the ratios: 1.00× over all 2 rows" in text
    assert "INCOMPLETE" not in text
    assert "DISTURBED" not in text


def test_everybodys_median_is_there_and_the_fastest_is_marked() -> None:
    text = table.text(complete())
    medians = text[text.index("Medians") :]
    for one in complete().rows:
        (line,) = re.findall(rf"^{re.escape(one.id)} .*{re.escape(one.shape)} .*$", medians, re.M)
        times = line[line.index(one.shape) + len(one.shape) :].split()
        assert len(times) == len(one.whole_call) == 11
        assert [float(t.rstrip("*")) for t in times] == [
            pytest.approx(s.median_us, rel=0.02) for s in one.whole_call.values()
        ]
        fastest = min((OURS, *PEERS), key=lambda name, one=one: one.whole_call[name].median_us)
        assert [t.endswith("*") for t in times] == [name == fastest for name in one.whole_call]


@pytest.mark.parametrize("peers", [PEERS, PEERS[:1], ()], ids=["all", "one", "none"])
def test_the_table_fits_the_terminal(peers: tuple[str, ...]) -> None:
    lines = table.text(complete(peers)).splitlines()
    assert max(map(len, lines)) <= table.COLUMNS == 120


def test_columns_that_do_not_fit_follow_below() -> None:
    shape = "a very long shape " * 4
    long = dataclasses.replace(complete().rows[0], shape=shape, id="an even longer name of a layer")
    text = table.text(report(long))
    assert max(map(len, text.splitlines())) <= table.COLUMNS
    assert len(re.findall(rf"^an eve…layer +{shape}", text, re.MULTILINE)) == 3
    assert "sched." in text


def test_kernel_speed_share_and_bound() -> None:
    moved = Traffic({"L2": 5_700_000, "L3": 0, "DRAM": 0}, 0, "L2")
    one = report(row("a", 110.0, PyTorch=120.0), row("b", 110.0, moved=moved, kernel_us=80.0))
    first, second = one.rows
    assert first.kernel_gflops == pytest.approx(80.0)  # 8 MFLOP in 100 µs
    assert one.share_of_peak(first) == pytest.approx(80.0 / 118.1)
    assert one.bound(first).level == "FMA"
    assert one.bound(first).time_us == pytest.approx(8e6 / 118.1e3)
    assert one.memory_bound(first).level == "L2"
    assert one.bound(second).level == "FMA"  # 67.7 µs, where the second cache takes 50
    text = table.text(one)
    assert re.search(r"^a .* 100\.0 +80\.0 +68%  FMA +L2 20/114 GB/s$", text, re.MULTILINE)
    assert re.search(r"^b .* 80\.0 +100\.0 +85%  FMA +L2 71/114 GB/s$", text, re.MULTILINE)
    held = dataclasses.replace(one, target="x86_64-sse42")
    assert held.share_of_peak(first) == pytest.approx(80.0 / 59.0)
    core = dataclasses.replace(one, target="x86_64-avx2@some-core")
    assert core.peak_gflops == 118.0


@pytest.mark.parametrize("absent", REQUIRED)
def test_incomplete_without_any_required_peer(absent: str) -> None:
    one = complete(tuple(name for name in PEERS if name != absent))
    text = table.text(one)
    assert text.startswith(f"INCOMPLETE: not measured: {absent}. No mean is quoted\n")
    assert f"  {absent}: pip install it" in text
    assert one.geometric_mean is None
    assert one.geometric_mean_of_the_20 is None
    assert "mean of the ratios" not in text
    assert "won 2" in text  # what there is, is shown


def test_other_peers_may_be_missing() -> None:
    one = complete(REQUIRED)
    assert one.incomplete == {}
    assert one.geometric_mean is not None
    text = table.text(one)
    assert "INCOMPLETE" not in text
    assert "Not measured: Keras on JAX: pip install it" in text


def test_peer_that_never_was_right_is_missing_too() -> None:
    failures = {"LiteRT": "it is not\nthe layer"}
    rows = [
        dataclasses.replace(
            one,
            whole_call={name: s for name, s in one.whole_call.items() if name != "LiteRT"},
            failures=failures,
        )
        for one in complete().rows
    ]
    text = table.text(report(*rows))
    assert text.startswith("INCOMPLETE: not measured: LiteRT.")
    assert "  LiteRT: no time in any row" in text
    assert re.search(r"^FAILED LiteRT, SEED, QN-C1, .* it is not the layer$", text, re.M | re.S)
    some = table.text(report(rows[0], *complete().rows[1:]))
    assert "INCOMPLETE" not in some
    assert "FAILED LiteRT, SEED: it is not the layer" in some
    assert "Without one of the required peers: SEED" in some


def test_a_space_that_nobody_tuned_is_no_failure() -> None:
    words = {"MetaSchedule": "not tuned: run it"}
    rows = [dataclasses.replace(one, failures=words) for one in complete().rows]
    text = table.text(report(*rows))
    assert "Not measured: MetaSchedule, SEED" in text
    assert "FAILED" not in text


def test_means_of_the_20_and_of_all() -> None:
    one = complete()
    ratios = {r.id: r.ratio or 0.0 for r in one.rows}
    assert one.geometric_mean == pytest.approx(np.exp(np.mean(np.log(list(ratios.values())))))
    twenty = [ratios[name] for name in workloads() if name not in ("SEED", "QN-B1-b16")]
    assert len(twenty) == 20
    assert one.geometric_mean_of_the_20 == pytest.approx(np.exp(np.mean(np.log(twenty))))
    without = report(*(r for r in one.rows if r.id not in NOT_OF_THE_20))
    assert without.geometric_mean_of_the_20 == pytest.approx(without.geometric_mean)
    fewer = report(*one.rows[:10])
    assert fewer.geometric_mean_of_the_20 is None
    assert "over the 20" not in table.text(fewer)
    assert "over all 10 rows" in table.text(fewer)


def test_forms_are_named_with_the_rows_that_differ() -> None:
    rows = [full_row(name, 10.0, 20.0) for name in "abc"]
    rows[1] = dataclasses.replace(rows[1], forms={"PyTorch": "eager, blocked"})
    rows = [
        dataclasses.replace(r, forms=r.forms if r.id == "b" else {"PyTorch": "eager"}) for r in rows
    ]
    assert "\nPyTorch, fastest as eager; eager, blocked: b\n" in table.text(report(*rows))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"others": 1.2}, "DISTURBED: other programs kept 1.2 processors busy"),
        ({"target": "x86_64-sse42"}, "Ours is held to x86_64-sse42"),
        ({"cold": True}, "float32 channels_last, cold inputs"),
        ({"limits": dataclasses.replace(LIMITS, steadiness=0.5)}, "UNSTEADY: .* 50 % of its best"),
    ],
    ids=["others", "held", "cold", "unsteady"],
)
def test_heading_says_what_is_not_usual(
    changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "runnable", lambda: ("x86_64-avx512",))
    assert not re.search(words, table.text(report(row("a", 1.0, LiteRT=2.0))))
    assert re.search(words, table.text(report(row("a", 1.0, LiteRT=2.0), **changes)))  # type: ignore[arg-type]


def test_heading_says_what_was_run_and_where() -> None:
    heading, *_ = table.text(complete()).split("\n\n")
    for words in ("$ tvm-sepconv bench", "Some CPU, 2 processors", "torch 2.13.0", "118 (x86_64-av",
                  "L2 114, L3 98, DRAM 31"):  # fmt: skip
        assert words in heading


def test_report_without_rows_is_its_heading() -> None:
    assert table.text(report()).startswith("INCOMPLETE: not measured: PyTorch, torch.compile, ")


def test_report_survives_json() -> None:
    one = complete()
    plain = json.loads(json.dumps(one.to_dict()))
    assert Report.from_dict(plain) == one
    assert plain["format"] == FORMAT
    assert plain["geometric_mean"] == pytest.approx(one.geometric_mean)
    assert plain["losses"] == one.losses
    first = plain["rows"][0]
    assert first["whole_call"][OURS]["median_us"] == one.rows[0].whole_call[OURS].median_us
    assert first["bound"]["level"] == one.bound(one.rows[0]).level
    assert first["share_of_peak"] == pytest.approx(one.share_of_peak(one.rows[0]))


@pytest.mark.parametrize(
    "spoil",
    [lambda d: d.pop("format"), lambda d: d.update(format=99), lambda d: d.pop("limits")],
    ids=["none", "newer", "part missing"],
)
def test_json_of_another_version_is_refused(spoil: object) -> None:
    plain = report(row("a", 1.0)).to_dict()
    spoil(plain)  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"must be what `tvm-sepconv bench --json` .* Measure again"
    ):
        Report.from_dict(plain)


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


SPIN = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
# A process of its own, which has no other descendants that might end meanwhile.
ALIVE_AND_ENDED = """
import subprocess, sys
from tvm_sepconv.bench.machine import own_secs
before = own_secs()
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
with subprocess.Popen([sys.executable, "-c", sys.argv[1]], **pipes) as child:
    child.stdout.readline()
    alive = own_secs() - before
    child.communicate(b"\\n")
print(alive, own_secs() - before)
"""


@pytest.mark.parametrize("nested", [False, True], ids=["child", "grandchild"])
def test_work_of_descendants_is_our_own(nested: bool) -> None:
    """Whether alive, dead or waited for; a ticking clock may be a few hundredths off."""
    code = f"{SPIN}print(flush=True)\ninput()\n"
    if nested:
        code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
    command = [sys.executable, "-c", ALIVE_AND_ENDED, code]
    done = subprocess.run(command, capture_output=True, text=True)
    alive, ended = map(float, done.stdout.split())
    assert alive > 0.17
    assert ended > alive - 0.03
