"""Figures drawn by matplotlib: as SVG in a page, which gives them its colours, and as PNG."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_sepconv.bench.document import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 10.0
DPI = 160  # of PNG
COLOUR = {name: light for name, (light, _) in COLOURS.items()}
NEEDED = "Pictures need matplotlib: pip install 'tvm-sepconv[report]'"
# What matplotlib writes into SVG that is of no use within a page.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@contextmanager
def style() -> Iterator[None]:
    """Our lines, letters and colours for all that is drawn and saved meanwhile.

    Raises
    ------
    RuntimeError
        If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(NEEDED)
    import matplotlib

    ink, soft, rule = COLOUR["ink"], COLOUR["soft"], COLOUR["rule"]
    settings: dict[str, Any] = {
        "figure.constrained_layout.use": True, "figure.facecolor": COLOUR["bg"],
        "axes.facecolor": "none", "axes.edgecolor": rule, "axes.labelcolor": soft,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": rule, "grid.linewidth": 0.7, "text.color": ink,
        "axes.titlelocation": "left", "axes.titlesize": 9, "axes.titleweight": "bold",
        "axes.labelsize": 8.5, "font.size": 8.5, "font.sans-serif": ["DejaVu Sans"],
        "xtick.color": rule, "ytick.color": rule, "xtick.labelcolor": soft,
        "ytick.labelcolor": soft, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "lines.linewidth": 1.7, "svg.fonttype": "none", "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def figure(height_in: float, title: str, facts: str) -> Figure:
    """Return an empty figure with a title, and below it, smaller, where its data is from."""
    from matplotlib.figure import Figure

    made = Figure((WIDTH_IN, height_in))
    made.text(0.006, 1 - 0.06 / height_in, title, va="top", weight="bold", size=11)
    made.text(0.006, 1 - 0.27 / height_in, facts, color=COLOUR["soft"], size=8.5, va="top")
    return made


def axes(made: Figure, rows: int, columns: int, **arguments: Any) -> list[Axes]:
    """Return panels, row by row, below the two lines of the title."""
    height_in = made.get_size_inches()[1]
    engine: Any = made.get_layout_engine()  # the constrained one, of `style`
    engine.set(rect=(0, 0, 1, 1 - 0.46 / height_in))
    return list(made.subplots(rows, columns, squeeze=False, **arguments).flat)


def log_axes(area: Axes) -> None:
    """Make both axes logarithmic within their limits, with round values."""
    limits = {"x": area.get_xlim(), "y": area.get_ylim()}
    area.set(xscale="log", yscale="log")
    for axis, (low, high) in limits.items():
        marks = ticks(low, high, log=True)
        words = [f"{value:g}" for value in marks]
        area.set(**{f"{axis}lim": (low, high), f"{axis}ticks": marks, f"{axis}ticklabels": words})
    area.minorticks_off()


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values in a range: some of each decade, or evenly spaced ones within one."""
    if log and high > 8 * low:
        # More of a decade where there are few decades.
        digits: Sequence[float] = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = (digit * 10.0**power for power in powers for digit in digits)
        return [value for value in values if low <= value <= high]
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first, last = math.ceil(low / step), math.floor(high / step * (1 + 1e-9))
    return [step * number for number in range(first, last + 1)]


def svg(made: Figure, name: str, label: str) -> str:
    """Return a figure as the SVG of a page.

    Parameters
    ----------
    name
        Another one for each figure of a page: what is defined in it is known by it.
    label
        What screen readers say.
    """
    import matplotlib

    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        made.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would be the whole page's
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names such as axes_1, the same in each figure
    body = re.sub(r"\s*\n\s*", " ", body).replace("xlink:href", "href")
    for known, shade in COLOUR.items():
        body = body.replace(shade, f"var(--{known})")
    width, height = (72 * inches for inches in made.get_size_inches())
    return (
        f'<div class="wide"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{body.strip()}</svg></div>'
    )


def picture(draw: Callable[[], Figure], name: str, label: str) -> str:
    """Draw a figure for a page, see `svg`; without matplotlib a line that says so."""
    if importlib.util.find_spec("matplotlib") is None:
        return f'<p class="alarm">{escape(NEEDED)}</p>'
    with style():
        return svg(draw(), name, label)


def png(made: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    made.savefig(path, format="png", dpi=DPI)
