"""Where labels go: near their marks, and not on anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RADII = (12, 18, 26, 36, 48, 62, 80, 100, 125, 150, 180, 210, 250)
_ANGLES = 24
_GAP = 2.0  # between labels
_MARK = 5.0  # half a mark's size


class Point(NamedTuple):
    """A place in pixels; y points up."""

    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share an area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def contains(self, other: Box) -> bool:
        """Whether the other one lies inside."""
        return (
            self.left <= other.left
            and self.bottom <= other.bottom
            and self.right >= other.right
            and self.top >= other.top
        )

    def crossed_by(self, a: Point, b: Point) -> bool:
        """Whether the line from `a` to `b` touches it (Liang and Barsky's clipping)."""
        first, last = 0.0, 1.0
        for start, delta, low, high in (
            (a.x, b.x - a.x, self.left, self.right),
            (a.y, b.y - a.y, self.bottom, self.top),
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
        return Point(x, min(max(point.y, self.bottom), self.top))


Line = tuple[Point, Point]
Size = tuple[float, float]  # width and height


def place(
    marks: Sequence[tuple[Point, Size]],
    area: Box,
    boxes: Iterable[Box] = (),
    lines: Iterable[Line] = (),
) -> list[Box]:
    """Find a place for each mark's label of that size: near it, and off everything else.

    Everything is all marks, boxes, lines, and the lines from other marks to their labels. Where
    there is no such place, it is the one that touches the fewest of them.
    """
    taken = [*boxes, *(_around(point) for point, _ in marks)]
    leaders = list(lines)
    result: dict[int, Box] = {}
    # From the lower left on, so that neighbours' leaders fan out rather than cross.
    for number in sorted(range(len(marks)), key=lambda i: marks[i][0]):
        point, size = marks[number]
        own = _around(point)
        others = [box for box in taken if box != own]
        best = min(
            _candidates(point, size, area),
            key=lambda box, p=point, o=others: _clashes(box, p, o, leaders),  # type: ignore[misc]
        )
        result[number] = best
        taken.append(best)
        leaders.append((point, best.nearest(point)))
    return [result[number] for number in range(len(marks))]


def _around(point: Point) -> Box:
    return Box(point.x - _MARK, point.y - _MARK, point.x + _MARK, point.y + _MARK)


def _candidates(point: Point, size: Size, area: Box) -> list[Box]:
    """Boxes at growing distances in all directions, those inside the area; nearest first."""
    width, height = size[0] + 2 * _GAP, size[1] + 2 * _GAP
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
