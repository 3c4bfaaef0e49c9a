"""Pages: whole, self-contained, losses as visible as wins, and no label on another."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from bench_reports import PEERS, complete, report, row, samples

from tvm_sepconv.bench import drawing, page, plots
from tvm_sepconv.bench.labels import Box, Point, place
from tvm_sepconv.bench.report import BESIDE, OURS, REQUIRED, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@functools.cache
def html_of(peers: tuple[str, ...] = PEERS) -> str:
    """The page of a run with these peers; its pictures take a second."""
    return page.html(complete(peers))


@pytest.mark.parametrize("peers", [PEERS, REQUIRED[1:], ()], ids=["all", "some", "none"])
def test_page_is_whole_and_loads_nothing(peers: tuple[str, ...]) -> None:
    text = html_of(peers)
    parsed = Page(text)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "image"}
    attributes = {name for _, attributes in parsed.seen for name in attributes}
    assert not attributes & {"src", "xlink:href", "srcset", "data"}
    assert all((a.get("href") or "#").startswith("#") for _, a in parsed.seen)
    assert not re.search(r"url\([^#]|@import|https?:", text)
    names = [a["id"] for _, a in parsed.seen if "id" in a]
    assert len(names) == len(set(names))  # what a picture defines is its own
    assert len(text) < 500_000
    assert "prefers-color-scheme: dark" in text


def test_every_colour_is_there_in_light_and_dark() -> None:
    text = html_of()
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    for theme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", theme))


@needs_matplotlib
def test_marks_are_where_the_ratios_are() -> None:
    one = complete()
    with drawing.style():
        (area,) = plots.bars(one).axes
        drawn = {str(line.get_label()): line.get_xydata() for line in area.lines}
        for name in (*PEERS, *BESIDE):
            at = drawn[f"{name} (no peer)" if name in BESIDE else name]
            expected = [(r.ratio_to(name), y) for y, r in enumerate(one.rows)]
            assert np.asarray(at) == pytest.approx(
                np.array([place for place in expected if place[0] <= plots.MOST])
            )
        beyond = [line for line in area.lines if set(line.get_xdata()) == {plots.MOST}]
        late = [n for n in PEERS for r in one.rows if r.ratio_to(n) > plots.MOST]
        assert sum(len(line.get_xdata()) for line in beyond) == len(late)


@needs_matplotlib
def test_roofline_has_a_mark_for_each_row_and_the_roofs() -> None:
    one = complete()
    with drawing.style():
        made = plots.roofline(one)
    assert len(made.axes) == 2  # one with all rows, one with those near the roof
    marks = [line.get_xydata()[0] for line in made.axes[0].lines if line.get_marker() in "oD"]
    rates = sorted(float(rate) for _, rate in marks)
    assert rates == pytest.approx(sorted(row.kernel_gflops for row in one.rows))
    words = [text.get_text() for text in made.axes[0].texts]
    assert {"x86_64-avx512, x86_64-avx2: 118 GFLOP/s", "L2 114 GB/s"} <= set(words)


def test_page_without_matplotlib_has_the_tables_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = page.html(complete())
    assert text.count("Pictures need matplotlib: pip install") == 2
    assert "<svg" not in text
    assert text.count("<table>") == 2
    with pytest.raises(RuntimeError, match="Pictures need matplotlib"), drawing.style():
        pass


@needs_matplotlib
def test_every_figure_is_on_the_page() -> None:
    one = complete()
    words = "\n".join(Page(html_of()).words)
    facts = [one.where, one.command, "torch 2.13.0", "L2 114", "x86_64-avx512 118.1", "L1 32 KiB"]
    facts += [f"{mean:.2f}×" for mean in (one.geometric_mean_of_the_20, one.geometric_mean)]
    assert [fact for fact in facts if fact not in words] == []
    for r in one.rows:
        assert (
            f"{r.ratio:.2f}× {'won' if r.id not in one.losses else 'LOST'} {r.best_peer}" in words
        )
        assert f"{r.kernel_gflops:.1f}" in words


@needs_matplotlib
def test_losses_are_coloured_and_named() -> None:
    one = report(row("fast", 10.0, LiteRT=20.0), row("slow", 10.0, LiteRT=5.0))
    text = page.html(one)
    assert '<td class="lost">0.50×</td><td class="lost left">LOST</td>' in text
    assert "rows LOST: slow" in text
    with drawing.style():
        (area,) = plots.bars(one).axes
        bars = [bar for bar in area.patches if bar.get_alpha() is not None]
        won, lost = ((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert won == pytest.approx((1, 2))  # both begin at 1, to either side
    assert sorted(lost) == pytest.approx([0.5, 1])
    assert re.search(r"fill: var\(--lost\)[^>]*>0\.50× LOST LiteRT<", text)


def test_incomplete_page_says_so_first_and_quotes_no_mean() -> None:
    words = " ".join(Page(html_of(REQUIRED[1:])).words)
    assert "INCOMPLETE." in words
    assert "PyTorch: pip install it" in words
    assert "geometric mean" not in words
    assert words.index("INCOMPLETE") < words.index("rows won")


@pytest.mark.parametrize(
    "made",
    [
        report(),
        report(row("a", None, failures={OURS: "it broke"})),
        report(row("a", 3.0), row("b", 2.0, two_kernels=1.0)),
        report(row("a", 1.0, LiteRT=1000.0)),
    ],
    ids=["no rows", "ours failed", "no peers", "beyond the edge"],
)
def test_unusual_reports_make_pages(made: Report) -> None:
    assert Page(page.html(made)).open == []


def test_names_from_outside_are_escaped() -> None:
    evil = "<script>alert('&')</script>"
    one = dataclasses.replace(
        row(evil, 1.0, LiteRT=2.0), shape=evil, failures={"PyTorch": evil}, forms={"LiteRT": evil}
    )
    text = page.html(dataclasses.replace(report(one), command=evil, where=evil))
    assert "<script" not in text
    assert Page(text).open == []


@needs_matplotlib
@pytest.mark.parametrize("seed", range(2))
def test_labels_of_the_roofline_do_not_overlap(seed: int) -> None:
    """Twenty layers near the peak, as they are when all goes well, and a few elsewhere."""
    draw = np.random.default_rng(seed)
    rows = []
    for one in complete().rows:
        slow = draw.uniform(0.85, 0.96) if one.flops > 1e6 else draw.uniform(0.05, 0.5)
        rows.append(dataclasses.replace(one, kernel=samples(one.flops / 118.1e3 / slow)))
    with drawing.style():
        made = plots.roofline(report(*rows))
        labelled = [words for area in made.axes for words in _named(made, area, rows)]
    assert sorted(labelled) == sorted(r.id for r in rows)


def _named(made: Figure, area: Axes, rows: list[Row]) -> list[str]:
    """The rows' names in a panel, none on another and all inside."""
    made.draw_without_rendering()
    texts = [text for text in area.texts if text.get_text() in {r.id for r in rows}]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = area.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 + 3 for box in boxes)
    return [text.get_text() for text in texts]


def test_labels_keep_clear_of_marks_boxes_and_lines() -> None:
    area, box = Box(0, 0, 300, 200), Box(100, 110, 300, 140)
    line = (Point(0, 50), Point(300, 50))
    marks = [(Point(100 + 4 * i, 90 - i), (45.0, 11.0)) for i in range(6)]
    labels = place(marks, area, [box], [line])
    for label in labels:
        assert area.contains(label)
        assert not label.overlaps(box)
        assert not label.crossed_by(*line)
        assert not any(label.contains(Box(p.x, p.y, p.x, p.y)) for p, _ in marks)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))


def test_label_without_room_is_put_somewhere() -> None:
    (label,) = place([(Point(5, 5), (140.0, 11.0))], Box(0, 0, 10, 10))
    assert label.right - label.left > 100


@pytest.mark.parametrize(
    ("a", "b", "crosses"),
    [
        ((0, 5), (20, 5), True),
        ((0, 0), (20, 20), True),
        ((0, 0), (3, 3), False),
        ((0, 11), (20, 11), False),
        ((7, 0), (7, 20), True),
        ((11, 0), (11, 20), False),
        ((4, 4), (6, 6), True),
        ((0, 12), (12, 0), True),
        ((0, 22), (22, 0), False),
    ],
)
def test_lines_cross_boxes(a: tuple[int, int], b: tuple[int, int], crosses: bool) -> None:
    assert Box(4, 4, 10, 10).crossed_by(Point(*a), Point(*b)) is crosses


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.3, 40, True, [0.5, 1, 2, 5, 10, 20]),
        (2, 20, True, [2, 3, 4, 5, 7, 10, 15, 20]),
        (88, 121, True, [90, 100, 110, 120]),
        (0, 1.2, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        (0, 83, False, [0, 20, 40, 60, 80]),
    ],
    ids=["decades", "one decade", "narrow", "shares", "rates"],
)
def test_ticks_are_round_and_in_range(
    low: float, high: float, log: bool, expected: list[float]
) -> None:
    assert drawing.ticks(low, high, log) == pytest.approx(expected)
