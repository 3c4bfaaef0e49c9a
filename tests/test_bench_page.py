"""Pages: whole, self-contained, losses as visible as wins, and no label on another."""

from __future__ import annotations

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_reports import PEERS, complete, report, row, samples

from tvm_sepconv.bench import page, plots, svg
from tvm_sepconv.bench.report import OURS, REQUIRED, Report
from tvm_sepconv.bench.svg import Axis, Box, Point, place

VOID = {"meta", "rect", "line", "path", "circle", "br", "polyline"}


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
        if tag not in VOID or tag in ("rect", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("peers", [PEERS, REQUIRED[:1], ()], ids=["all", "one", "none"])
def test_page_is_whole_and_loads_nothing(peers: tuple[str, ...]) -> None:
    text = page.html(complete(peers, ()))
    parsed = Page(text)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    attributes = {name for _, attributes in parsed.seen for name in attributes}
    assert not attributes & {"src", "href", "xlink:href", "srcset", "data"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text


def test_every_colour_is_there_in_light_and_dark() -> None:
    text = page.html(complete())
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    for theme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", theme))


def test_pictures_are_well_formed() -> None:
    drawn = plots.roofline(complete()) + plots.bars(complete())
    root = ElementTree.fromstring(f"<both>{drawn}</both>")
    assert len(root) == 3  # the roofline, the rows near its roof, and the bars
    titles = [title.text or "" for title in root.iter("title")]
    for one in complete().rows:
        assert sum(title.startswith(f"{one.id}, ") for title in titles) >= 1 + len(PEERS)


def test_every_figure_is_on_the_page() -> None:
    one = complete()
    words = "\n".join(Page(page.html(one)).words)
    facts = [one.where, one.command, "torch 2.13.0", "L2 114", "x86_64-avx512 118.1", "L1 32 KiB"]
    facts += [f"{mean:.2f}×" for mean in (one.geometric_mean_of_the_20, one.geometric_mean)]
    assert [fact for fact in facts if fact not in words] == []
    for r in one.rows:
        assert (
            f"{r.ratio:.2f}× {'won' if r.id not in one.losses else 'LOST'} {r.best_peer}" in words
        )
        assert f"{r.kernel_gflops:.1f}" in words


def test_losses_are_coloured_and_named() -> None:
    one = report(row("fast", 10.0, LiteRT=20.0), row("slow", 10.0, LiteRT=5.0))
    text = page.html(one)
    assert re.search(r'<rect [^>]*class="won"', text)
    assert re.search(r'<rect [^>]*class="lost"', text)
    assert '<td class="lost">0.50×</td><td class="lost left">LOST</td>' in text
    assert "rows LOST: slow" in text
    boxes = {
        kind: re.search(rf'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"[^>]*class="{kind}"', text)
        for kind in ("won", "lost")
    }
    assert boxes["won"] is not None and boxes["lost"] is not None
    (won, won_width), (lost, lost_width) = (map(float, m.groups()) for m in boxes.values() if m)
    assert lost + lost_width == pytest.approx(won, abs=0.2)  # both begin at 1, to either side
    assert won_width == pytest.approx(lost_width, abs=0.2)  # twice and half are equally far


def test_incomplete_page_says_so_first_and_quotes_no_mean() -> None:
    words = " ".join(Page(page.html(complete(REQUIRED[1:]))).words)
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


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_the_roofline_do_not_overlap(seed: int) -> None:
    """Twenty layers near the peak, as they are when all goes well, and a few elsewhere."""
    draw = np.random.default_rng(seed)
    rows = []
    for one in complete().rows:
        slow = draw.uniform(0.85, 0.96) if one.flops > 1e6 else draw.uniform(0.05, 0.5)
        rows.append(dataclasses.replace(one, kernel=samples(one.flops / 118.1e3 / slow)))
    root = ElementTree.fromstring(f"<all>{plots.roofline(report(*rows))}</all>")
    labelled = []
    for picture in root:
        boxes = [
            svg.text_box(Point(float(t.attrib["x"]), float(t.attrib["y"])), t.text or "")
            for t in picture.iter("text")
            if t.attrib["class"] == "name"
        ]
        labelled += [t.text for t in picture.iter("text") if t.attrib["class"] == "name"]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert set(labelled) >= {r.id for r in rows}


def test_labels_keep_clear_of_marks_boxes_and_lines() -> None:
    area, box = Box(0, 0, 300, 200), Box(100, 60, 300, 90)
    line = (Point(0, 150), Point(300, 150))
    marks = [(Point(100 + 4 * i, 110 + i), f"mark {i}") for i in range(6)]
    labels = place(marks, area, [box], [line])
    for label in labels:
        assert area.contains(label)
        assert not label.overlaps(box)
        assert not label.crossed_by(*line)
        assert not any(label.contains(Box(p.x, p.y, p.x, p.y)) for p, _ in marks)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))


def test_label_without_room_is_put_somewhere() -> None:
    (label,) = place([(Point(5, 5), "much too long for it")], Box(0, 0, 10, 10))
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
    ("axis", "expected"),
    [
        (Axis(0.3, 40, 0, 1, log=True), [0.5, 1, 2, 5, 10, 20]),
        (Axis(2, 20, 0, 1, log=True), [2, 3, 4, 5, 7, 10, 15, 20]),
        (Axis(88, 121, 0, 1, log=True), [90, 100, 110, 120]),
        (Axis(0, 1.2, 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        (Axis(0, 83, 0, 1), [0, 20, 40, 60, 80]),
    ],
    ids=["decades", "one decade", "narrow", "shares", "rates"],
)
def test_ticks_are_round_and_in_range(axis: Axis, expected: list[float]) -> None:
    assert plots.ticks(axis) == pytest.approx(expected)


def test_axes_map_ends_to_ends() -> None:
    down = Axis(1, 100, 200, 0, log=True)
    assert [down.at(v) for v in (1, 10, 100)] == pytest.approx([200, 100, 0])
    assert Axis(0, 10, 50, 150).at(5) == pytest.approx(100)
