"""The HTML document about a page's parts: its style, and nothing that is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Okabe and Ito's colours, which people with any colour vision tell apart; lighter ones in the dark.
_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c2128; --soft: #5d6673; --rule: #d9dee5;
  --stripe: #f4f6f8; --won: #0072b2; --lost: #d55e00; --won-bg: #d6e9f5; --lost-bg: #fbe0cd;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8860b; --c4: #aa4499; --c5: #56b4e9;
  --c6: #6b4423; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --ink: #e6eaef; --soft: #9aa4b1;
  --rule: #333b45; --stripe: #1b2027; --won: #56b4e9; --lost: #ff9150; --won-bg: #16384d;
  --lost-bg: #54290f; --c0: #56b4e9; --c1: #ff9150; --c2: #2ec79b; --c3: #e6c229; --c4: #e08fd0;
  --c5: #9ad7ff; --c6: #c8a27f; } }
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
svg { width: 100%; height: auto; display: block; margin: .6rem 0; font: 11.5px system-ui,
  "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { fill: var(--soft); }
.axis { fill: var(--soft); font-size: 12.5px; } .name { font-weight: 600; }
.leader { stroke: var(--soft); stroke-width: .7; } .one { stroke: var(--ink); stroke-width: 1.6; }
.frame { fill: none; stroke: var(--soft); stroke-dasharray: 4 3; }
.stripe { fill: var(--stripe); } .roof { stroke-width: 2; fill: none; }
.label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px; }
.mark { stroke: var(--bg); stroke-width: 1; }
.roof.FMA { stroke: var(--ink); } .label.FMA { fill: var(--ink); }
.roof.L1 { stroke: var(--soft); } .label.L1 { fill: var(--soft); }
.roof.L2 { stroke: var(--c0); } .mark.L2, .label.L2 { fill: var(--c0); }
.roof.L3 { stroke: var(--c1); } .mark.L3, .label.L3 { fill: var(--c1); }
.roof.DRAM { stroke: var(--c2); } .mark.DRAM, .label.DRAM { fill: var(--c2); }
rect.won { fill: var(--won); opacity: .3; } rect.lost { fill: var(--lost); opacity: .75; }
.verdict { font-weight: 600; } text.won { fill: var(--won); } text.lost { fill: var(--lost); }
.peer { stroke: var(--bg); stroke-width: .8; }
.p0 { fill: var(--c0); } .p1 { fill: var(--c1); } .p2 { fill: var(--c2); } .p3 { fill: var(--c3); }
.p4 { fill: var(--c4); } .p5 { fill: var(--c5); } .p6 { fill: var(--c6); }
.beside { fill: var(--bg); stroke: var(--soft); stroke-width: 1.4; }
.limit { stroke: var(--lost); stroke-width: 1.4; stroke-dasharray: 6 4; }
.regular { stroke: var(--soft); stroke-width: 1; }
.series { fill: none; stroke-width: 1.8; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); }
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
