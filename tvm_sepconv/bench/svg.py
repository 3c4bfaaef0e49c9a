"""Drawing as SVG text: axes, marks, and labels that do not lie on anything.

Colours are classes, which the page defines for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

CHARACTER = 7.1  # mean width of bold ones at LETTER pixels of height
LETTER = 11.5
_RADII = (12, 18, 26, 36, 48, 62, 80, 100, 125, 150, 180, 210, 250)
_ANGLES = 24
_GAP = 2.0  # between labels
_MARK = 5.0  # half a mark's size


class Point(NamedTuple):
    """A place in pixels; y points down."""

    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share an area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def contains(self, other: Box) -> bool:
        """Whether the other one lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )

    def crossed_by(self, a: Point, b: Point) -> bool:
        """Whether the line from `a` to `b` touches it (Liang and Barsky's clipping)."""
        first, last = 0.0, 1.0
        for start, delta, low, high in (
            (a.x, b.x - a.x, self.left, self.right),
            (a.y, b.y - a.y, self.top, self.bottom),
        ):
            if delta == 0:
                if not low <= start <= high:
                    return False
                continue
            near, far = sorted(((low - start) / delta, (high - start) / delta))
            first, last = max(first, near), min(last, far)
        return first <= last

    def nearest(self, point: Point) -> Point:
        """The place in it that is nearest to a point."""
        x = min(max(point.x, self.left), self.right)
        return Point(x, min(max(point.y, self.top), self.bottom))


Line = tuple[Point, Point]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` as pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def text_box(at: Point, words: str, anchor: str = "start") -> Box:
    """About where a text lies whose baseline starts, has its middle or ends at a point."""
    width = CHARACTER * len(words)
    left = at.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return Box(left, at.y - 0.8 * LETTER, left + width, at.y + 0.25 * LETTER)


def place(
    marks: Sequence[tuple[Point, str]],
    area: Box,
    boxes: Iterable[Box] = (),
    lines: Iterable[Line] = (),
) -> list[Box]:
    """Find a place for each mark's label: near it, and off all marks, boxes, lines and leaders.

    Where there is no such place, the one that touches the fewest of them.
    """
    taken = [*boxes, *(_around(point) for point, _ in marks)]
    leaders = list(lines)
    result: dict[int, Box] = {}
    # From the lower left on, so that neighbours' leaders fan out rather than cross.
    for number in sorted(range(len(marks)), key=lambda i: (marks[i][0].x, -marks[i][0].y)):
        point, words = marks[number]
        own = _around(point)
        others = [box for box in taken if box != own]
        best = min(
            _candidates(point, words, area),
            key=lambda box, p=point, o=others: _clashes(box, p, o, leaders),  # type: ignore[misc]
        )
        result[number] = best
        taken.append(best)
        leaders.append((point, best.nearest(point)))
    return [result[number] for number in range(len(marks))]


def _around(point: Point) -> Box:
    return Box(point.x - _MARK, point.y - _MARK, point.x + _MARK, point.y + _MARK)


def _candidates(point: Point, words: str, area: Box) -> list[Box]:
    """Boxes at growing distances in all directions, those inside the area; nearest first."""
    width, height = CHARACTER * len(words) + 2 * _GAP, LETTER + 2 * _GAP
    result = []
    for radius in _RADII:
        for turn in range(_ANGLES):
            angle = 2 * math.pi * turn / _ANGLES
            x = point.x + (radius + width / 2) * math.cos(angle)
            y = point.y + (radius + height / 2) * math.sin(angle)
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if area.contains(box):
                result.append(box)
    return result or [Box(point.x, point.y, point.x + width, point.y + height)]


def _clashes(box: Box, point: Point, boxes: Sequence[Box], lines: Sequence[Line]) -> int:
    end = box.nearest(point)
    own = (point, end)
    return sum(3 * box.overlaps(other) + 2 * other.crossed_by(*own) for other in boxes) + sum(
        2 * box.crossed_by(*other) + _cross(own, other) for other in lines
    )


def _cross(one: Line, other: Line) -> bool:
    """Whether two lines cross: each has the other's ends on its two sides."""

    def side(of: Line, point: Point) -> float:
        a, b = of
        return (b.x - a.x) * (point.y - a.y) - (b.y - a.y) * (point.x - a.x)

    return (
        side(one, other[0]) * side(one, other[1]) < 0
        and side(other, one[0]) * side(other, one[1]) < 0
    )


def text(at: Point, words: str, anchor: str = "start", kind: str = "") -> str:
    """A text; see `text_box`."""
    return (
        f'<text x="{at.x:.1f}" y="{at.y:.1f}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(words)}</text>"
    )


def line(a: Point, b: Point, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{a.x:.1f}" y1="{a.y:.1f}" x2="{b.x:.1f}" y2="{b.y:.1f}" class="{kind}"/>'


def polyline(points: Iterable[Point], kind: str) -> str:
    """Lines from point to point."""
    path = " ".join(f"{p.x:.1f},{p.y:.1f}" for p in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def rectangle(box: Box, kind: str, tip: str = "") -> str:
    """A filled rectangle with what is said of it when pointed at."""
    return (
        f'<rect x="{box.left:.1f}" y="{box.top:.1f}" width="{box.right - box.left:.1f}" '
        f'height="{box.bottom - box.top:.1f}" class="{kind}">{_title(tip)}</rect>'
    )


# Outlines about the origin, three to four pixels away from it.
_SHAPES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "square": "M-3.5,-3.5h7v7h-7z",
    "diamond": "M0,-4.8L4.8,0L0,4.8L-4.8,0z",
    "up": "M0,-4.6L4.4,3.4H-4.4z",
    "down": "M0,4.6L4.4,-3.4H-4.4z",
    "plus": "M-1.4,-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",
    "right": "M4.6,0L-3.4,4.4V-4.4z",
}
SHAPES = tuple(_SHAPES)


def mark(at: Point, shape: str, kind: str, tip: str = "") -> str:
    """One of `SHAPES` at a point, with what is said of it when pointed at."""
    return (
        f'<path d="{_SHAPES[shape]}" transform="translate({at.x:.1f},{at.y:.1f})" '
        f'class="{kind}">{_title(tip)}</path>'
    )


def dot(at: Point, kind: str, tip: str = "") -> str:
    """A small round mark, with what is said of it when pointed at."""
    return f'<circle cx="{at.x:.1f}" cy="{at.y:.1f}" r="2" class="{kind}">{_title(tip)}</circle>'


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def picture(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A drawing as wide as the page, up to `width`; `label` is what screen readers say."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{escape(label)}">\n{chr(10).join(parts)}\n</svg>'
    )
