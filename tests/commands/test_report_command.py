"""`tvm-sepconv report`: numbers are the data's, what is missing is said, nothing from outside."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import pytest
from bench_reports import complete
from tuning_histories import MACHINE, TARGET, kernel, record, search, write, write_records

from tvm_sepconv import targets
from tvm_sepconv.bench import drawing
from tvm_sepconv.bench.report import OURS as OUR_CALLS
from tvm_sepconv.bench.table import us
from tvm_sepconv.cli import main
from tvm_sepconv.compiler.targets import cpu
from tvm_sepconv.compiler.tuning.records import Record
from tvm_sepconv.kernel_config import KernelConfig
from tvm_sepconv.report import curves, decisions, found, page, times

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)
LAYERS = ("QN-B1", "MB-1")
SPACES = ("tvm_sepconv", "metaschedule")


class Words(HTMLParser):
    """The texts of a page, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("href", "src", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's records and those of the package."""
    monkeypatch.setenv("TVM_SEPCONV_LOGS", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr("tvm_sepconv.compiler.tuning.logs.packaged", lambda: tmp_path / "none")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Searches of two layers in both spaces, and their records; no other records are in sight."""
    no_records(tmp_path, monkeypatch)
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "logs"))
    for layer in LAYERS:
        for space in SPACES:
            write(tmp_path / "work", search(layer, space))
        write_records(tmp_path / "logs", record(search(layer)))
    return tmp_path / "work"


def run(work: Path, *more: str) -> int:
    return main(["report", "--work-dir", str(work), "--output", str(work / "out"), *more])


def write_times(work: Path, layer: str, **changes: object) -> dict[str, list[float]]:
    """Times of the layer's three libraries; returns the samples."""
    one = record(search(layer))
    draw = np.random.default_rng(5)
    samples = {
        name: list(1e-4 * factor * draw.uniform(0.98, 1.02, 41))
        for name, factor in (("default", 1.0), ("transferred", 0.97), ("tuned", 0.9))
    }
    values = {
        "samples": samples, "source": "CN-21 (distance 0.5)", "batch": 1, "steps": 9,
        "machine": MACHINE, "date": "2026-01-03T00:00:00+00:00", "record_date": one.date, **changes,
    }  # fmt: skip
    path = found.times_path(work, one)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return samples


def test_page_and_pictures(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = work / "bench.json"
    one = complete()
    bench.write_text(json.dumps(one.to_dict()))
    assert run(work, "--bench", str(bench)) == 0
    out = capsys.readouterr().out
    names = [f"{part}-{TARGET}.png" for part in ("search", "times", "decisions")]
    assert all(str(work / "out" / name) in out for name in (*names, "index.html"))
    assert "Found 4 searches, 2 records, 1 bench report" in out
    assert "Transferred times: not measured for QN-B1 256→256 k33, MB-1 128→64 k13" in out
    for name in names:
        data = (work / "out" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == drawing.WIDTH_IN * drawing.DPI
        assert 400 < height < 4000
    text = (work / "out" / "index.html").read_text()
    parsed = Words(text)
    assert not {"script", "link", "img", "iframe", "image"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\([^#]|@import|https?:", text)
    assert parsed.tags.count("svg") == parsed.tags.count("table") == 3
    assert len(text) < 500_000
    for r in one.rows:  # the peers' times of every row are in the table, and the verdicts drawn
        assert r.best_peer is not None
        cells = [us(r.whole_call[OUR_CALLS].median_us), r.best_peer, f"{r.ratio:.2f}×"]
        assert set(cells) <= set(parsed.words)
        verdict = "won" if r.id not in one.losses else "LOST"
        assert f"{r.ratio:.2f}× {verdict} {r.best_peer}" in parsed.words
    for fact in (MACHINE, TARGET, "1 thread;", "2026-01-02", "TVM 0.27.0", one.where):
        assert any(fact in words for words in parsed.words)


def test_curves_are_the_running_minimum_of_the_medians(work: Path) -> None:
    searches = found.read(work, [], None).searches
    with drawing.style():
        areas = curves.figure(searches, "").axes
    assert [area.get_title("left") for area in areas] == [
        "QN-B1 256→256 k33, 1×500", "MB-1 128→64 k13, 1×128",
    ]  # fmt: skip
    for area, layer in zip(areas, LAYERS, strict=True):
        stairs = [line for line in area.lines if line.get_drawstyle() == "steps-post"]
        assert len(stairs) == 2
        words = [text.get_text() for text in area.texts]
        for line, space in zip(stairs, reversed(SPACES), strict=True):  # sorted by name
            lines = search(layer, space)
            medians = [median(t["secs"]) if t["secs"] else math.inf for t in lines[1:-1]]
            best = np.minimum.accumulate(medians)
            trials, drawn = (np.array(line.get_data()[axis]) for axis in (0, 1))
            at = np.searchsorted(trials, np.arange(1, len(medians) + 1), side="right") - 1
            assert 1e6 * best == pytest.approx(drawn[at])
            final = lines[-1]["final"]
            assert f"{curves.LINES[space][0]} {us(1e6 * final['best_secs'])}" in words
        default = search(layer)[-1]["final"]["default_secs"]
        assert f"default {us(1e6 * default)}" in words


def test_search_table(work: Path) -> None:
    rows = {(r[0].split()[0], r[2]): r for r in curves.table(found.read(work, [], None).searches)}
    assert set(rows) == {(layer, space) for layer in LAYERS for space in SPACES}
    for (layer, space), cells in rows.items():
        trials, final = search(layer, space)[1:-1], search(layer, space)[-1]["final"]
        medians = [median(t["secs"]) if t["secs"] else math.inf for t in trials]
        known = min(median(t["secs"]) for s in SPACES for t in search(layer, s)[1:-1] if t["secs"])
        default = search(layer)[-1]["final"]["default_secs"]
        near = next((n for n, m in enumerate(medians, 1) if m <= 1.03 * known), None)
        assert cells[3:] == [
            "48 of 48", str(sum(t["secs"] is None for t in trials)), us(1e6 * default),
            us(1e6 * min(medians)), us(1e6 * final["best_secs"]), "2.0 %",
            f"{default / final['best_secs']:.2f}×",
            "never" if near is None else f"{near}, {1.9 * near:.0f} s", "91 s",
        ]  # fmt: skip


def test_tuned_time_is_the_records_and_transferred_only_what_was_measured(work: Path) -> None:
    samples = write_times(work, "MB-1")
    rows = times.table(times.lines(found.read(work, [], None), TARGET, None))
    by_layer = {row[0].split()[0]: dict(zip(times.HEAD, row, strict=True)) for row in rows}
    one = record(search("QN-B1"))
    assert rows[0][2:5] == [
        us(1e6 * one.default_secs), us(1e6 * one.median_secs),
        f"{one.median_secs / one.default_secs:.3f} "
        f"({0.99 * one.median_secs / one.default_secs:.3f}–"
        f"{1.01 * one.median_secs / one.default_secs:.3f})",
    ]  # fmt: skip
    assert by_layer["QN-B1"]["transferred, µs"] == "—"
    assert by_layer["QN-B1"]["measured"] == "in its search, 2026-01-02"
    cells = by_layer["MB-1"]
    assert cells["transferred, µs"] == us(1e6 * median(samples["transferred"]))
    ratios = np.divide(samples["transferred"], samples["default"])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    assert cells["over default"] == f"{middle:.3f} ({low:.3f}–{high:.3f})"
    assert cells["from"] == "CN-21 (distance 0.5)"
    assert cells["measured"] == "by --measure, 2026-01-03"


def test_measuring_compares_default_transferred_and_tuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two small kernels near each other, and a record of another machine."""
    no_records(tmp_path, monkeypatch)
    monkeypatch.setattr(page, "write", lambda everything, output: [])
    target = targets.runnable()[0]
    records = [default_record(target, 32, filters) for filters in (64, 128)]
    foreign = replace(records[0], target="armv7-neon")
    write_records(tmp_path / "logs", *records, foreign)
    assert run(tmp_path, "--logs", str(tmp_path / "logs"), "--measure") == 0
    out = capsys.readouterr().out
    assert "for armv7-neon: not measured, this machine lacks the armv7 architecture" in out
    everything = found.read(tmp_path, [], target)
    assert set(everything.times) == {one.key for one in records}
    for one, other in (records, reversed(records)):
        measured = everything.times[one.key]
        assert set(measured.samples) == {"default", "transferred", "tuned"}
        assert {len(samples) for samples in measured.samples.values()} == {41}
        assert measured.source == f"{found.name(other.config)} (distance 1)"
        assert (measured.batch, measured.steps) == (1, 300)


def default_record(target: str, channels: int, filters: int, **changes: Any) -> Record:
    """A record of a layer's default decisions."""
    config, chosen = KernelConfig(channels, filters, 3), cpu(target)
    tiling = chosen.family.default_tilings(config, chosen.isa)[0]
    one = record(search("MB-1", trials=2, target=target))
    return replace(one, config=config, decisions=tiling.to_dict(), steps=300, **changes)


def test_what_cannot_be_measured_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made-up records' decisions are no tilings of these layers."""
    monkeypatch.setattr(page, "write", lambda everything, output: [])
    monkeypatch.setattr(targets, "missing_features", lambda isa: [])
    assert run(work, "--measure") == 0
    out = capsys.readouterr().out
    assert f"MB-1 128→64 k13 for {TARGET}: measuring, 2 of 2" in out
    assert f"MB-1 128→64 k13 for {TARGET}: not measured. " in out


def test_times_of_an_older_record_are_not_shown(work: Path) -> None:
    write_times(work, "MB-1", record_date="2025-01-01T00:00:00+00:00")
    everything = found.read(work, [], None)
    assert everything.times == {}
    assert any("Transferred times: not measured for QN-B1" in w for w in everything.missing)


def test_many_that_were_not_measured_are_counted(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "MOST_NAMES", 1)
    missing = found.read(work, [], None).missing
    assert any("Transferred times: not measured for 2 of 2 records (" in line for line in missing)


def test_figures_that_sum_it_up(work: Path) -> None:
    assert run(work) == 0
    words = Words((work / "out" / "index.html").read_text()).words
    records = [record(search(layer)) for layer in LAYERS]
    gains = [r.default_secs / r.median_secs for r in records]
    assert f"{geometric_mean(gains):.2f}×" in words
    bests = {
        (layer, space): min(median(t["secs"]) for t in search(layer, space)[1:-1] if t["secs"])
        for layer in LAYERS
        for space in SPACES
    }
    leads = [bests[layer, SPACES[1]] / bests[layer, SPACES[0]] for layer in LAYERS]
    assert f"{geometric_mean(leads):.2f}×" in words


def test_decisions_are_counted_by_kind(work: Path) -> None:
    everything = found.read(work, [], None)
    counted = decisions.counts(everything.searches, everything.records)
    assert list(counted) == list(search("MB-1")[1]["decisions"])
    tried = [t for n in LAYERS for t in search(n)[1:-1] if t["secs"]]
    for decision, kinds in counted.items():
        wanted = [decisions.words(t["decisions"][decision]) for t in tried]
        for value in decisions.values(kinds):
            assert kinds["tried"][value] == wanted.count(value)
        assert kinds["recorded"].total() == len(LAYERS)
        assert 0 < kinds["within 5 % of the best"].total() < len(tried)
    with drawing.style():
        area = decisions.figure(counted, "").axes[0]
    heights = [bar.get_height() for bars in area.containers for bar in bars]
    assert sum(heights) == pytest.approx(300)  # each kind's shares are 100 %


@pytest.mark.parametrize(
    ("value", "expected"),
    [([4, 2], "4×2"), (True, "yes"), (False, "no"), (64, "64"), ("outer", "outer")],
)
def test_decisions_in_words(value: object, expected: str) -> None:
    assert decisions.words(value) == expected


def test_values_are_sorted_by_size() -> None:
    assert decisions.counts([], []) == {}
    sizes = {"tried": decisions.Counter(["128", "16", "4×2", "yes", "8×1", "no"])}
    assert decisions.values(sizes) == ["no", "yes", "4×2", "8×1", "16", "128"]


def test_what_is_missing_is_said(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_SEPCONV_LOGS", str(tmp_path / "empty"))
    ours = tmp_path / "ours"
    write(ours, search("MB-1", trials=4)[:3])  # killed after two trials
    (ours / "broken").mkdir()
    (ours / "broken" / "history.jsonl").write_text('{"history": 1}\n')
    (ours / "damaged").mkdir()
    text = "\n".join(json.dumps(line) for line in search("CN-21", trials=2)[:-1])
    (ours / "damaged" / "history.jsonl").write_text(text + '\n{"tri')
    assert run(ours) == 0
    out = capsys.readouterr().out
    page_words = " ".join(Words((ours / "out" / "index.html").read_text()).words)
    for words in (
        "broken/history.jsonl cannot be shown: KeyError: ",
        "damaged/history.jsonl, line 4, is no trial",
        "Curves of the space metaschedule: none was searched (tvm-sepconv tune --space auto)",
        "Tuned times: there are no records (tvm-sepconv tune)",
        "Peers: no file of `tvm-sepconv bench --json FILE` was given",
    ):
        assert words in out
        assert words in page_words
    assert not (ours / "out" / f"times-{TARGET}.png").exists()


def test_nothing_at_all_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_records(tmp_path, monkeypatch)
    assert run(tmp_path) == 1
    assert f"no search left a history in {tmp_path}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_only_the_target_asked_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(work, search("CN-21", target="x86_64-avx2"))
    assert run(work, "--target", "x86_64-avx2") == 0
    out = capsys.readouterr().out
    assert "Found 1 searches, 0 records" in out
    assert (work / "out" / "search-x86_64-avx2.png").exists()
    assert not (work / "out" / f"search-{TARGET}.png").exists()


def test_file_that_is_no_bench_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "a.json").write_text("[1]")
    assert run(work, "--bench", str(work / "a.json")) == 2
    assert "a.json is no report of `tvm-sepconv bench --json`" in capsys.readouterr().err
    assert run(work, "--bench", str(work / "none.json")) == 2
    assert "none.json" in capsys.readouterr().err


def test_names_from_outside_are_escaped_and_stay_in_the_folder(work: Path) -> None:
    evil = "<script>alert('&')</script>$x^2$"
    for place in work.iterdir():
        shutil.rmtree(place)
    write(work, search("CN-21", evil.replace("/", ""), machine=evil, trials=6))
    path = write(work, search("CN-21", trials=6))
    lines = path.read_text().split("\n", 1)
    head = {**json.loads(lines[0]), "target": f"../{evil}"}
    path.write_text(json.dumps(head) + "\n" + lines[1])
    assert run(work) == 0
    text = (work / "out" / "index.html").read_text()
    assert "<script" not in text
    assert "script" not in Words(text).tags
    assert evil in "".join(Words(text).words)  # as it is, not as a formula
    outside = {p for p in work.rglob("*.png") if p.parent != work / "out"}
    assert outside == set()


def test_without_matplotlib_it_says_what_to_install(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert run(work) == 2
    assert "pip install 'tvm-sepconv[report]'" in capsys.readouterr().err
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("levels", "gap"),
    [([0.1, 0.5], 0.4), ([0.1, 0.11, 0.12], 0.085), ([0.5, 0.5], 0.085)],
    ids=["far", "crowd", "same"],
)
def test_labels_of_lines_are_apart(levels: list[float], gap: float) -> None:
    moved = curves._apart(levels)
    assert min(np.diff(moved)) == pytest.approx(gap)
    assert np.mean(moved) == pytest.approx(np.mean(levels))


def test_pictures_are_whole_on_their_own(work: Path) -> None:
    everything = found.read(work, [], None)
    with drawing.style():
        for part in page.parts(everything, TARGET):
            root = ElementTree.fromstring(drawing.svg(part.draw(), part.name, part.title))
            assert root[0].tag == "svg"
            assert len(list(root.iter("text"))) > 10
            assert re.search("#[0-9a-f]{6}", ElementTree.tostring(root, "unicode")) is None
    assert kernel("MB-1") in {one.config for one in everything.searches}
