"""The HTML document about a page's parts: its style, and nothing that is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# By name, in the light and in the dark. From --won on they are Okabe and Ito's, or near them, which
# people with any colour vision tell apart.
COLOURS = {
    "bg": ("#ffffff", "#14181d"), "ink": ("#1c2128", "#e6eaef"), "soft": ("#5d6673", "#9aa4b1"),
    "rule": ("#d9dee5", "#333b45"), "stripe": ("#f4f6f8", "#1b2027"),
    "won": ("#0072b2", "#56b4e9"), "lost": ("#d55e00", "#ff9150"),
    "won-bg": ("#d6e9f5", "#16384d"), "lost-bg": ("#fbe0cd", "#54290f"),
    "c0": ("#0072b2", "#56b4e9"), "c1": ("#d55e00", "#ff9150"), "c2": ("#009e73", "#2ec79b"),
    "c3": ("#b8860b", "#e6c229"), "c4": ("#aa4499", "#e08fd0"), "c5": ("#56b4e9", "#9ad7ff"),
    "c6": ("#6b4423", "#c8a27f"),
}  # fmt: skip


def _theme(number: int) -> str:
    return " ".join(f"--{name}: {shades[number]};" for name, shades in COLOURS.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_theme(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_theme(1)} }} }}"""
_STYLE += """
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--ink); margin: 2rem auto; max-width: 1280px;
  padding: 0 1.2rem; font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .3rem 0; max-width: 64rem; } .soft { color: var(--soft); }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.alarm { border-left: 5px solid var(--lost); background: var(--lost-bg); padding: .6rem .9rem;
  margin: .8rem 0; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.figures div { border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.25; } .figures .loss b { color:
  var(--lost); } .figures span { color: var(--soft); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  white-space: nowrap; margin: .6rem 0; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.left, td.left { text-align: left; } td.won { color: var(--won); font-weight: 600; }
td.lost { color: var(--lost); font-weight: 700; background: var(--lost-bg); }
td.best { font-weight: 700; text-decoration: underline; }
svg { width: 100%; min-width: 720px; height: auto; display: block; margin: .6rem 0; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A page with our style and nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{chr(10).join(parts)}\n</body>\n</html>\n"
    )


def cells_table(
    head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]], left: Sequence[int]
) -> str:
    """A table of cells with their classes; columns of words are aligned to the left."""

    def cells(tag: str, row: Sequence[tuple[str, str]]) -> str:
        return "".join(
            f'<{tag} class="{kind}{" left" * (number in left)}">{escape(words)}</{tag}>'
            for number, (kind, words) in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    heading = cells("th", [("", words) for words in head])
    return f'<div class="wide"><table>\n<tr>{heading}</tr>\n{body}\n</table></div>'
