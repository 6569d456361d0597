"""The skeleton of our HTML reports: one file, no script, nothing loaded, legible on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from hstu_trt.bench.load.stats import BEHIND, ERRORS, SATURATED, SHED, SHORT, UNSTABLE

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1f2937; --soft: #4b5563;
  --rule: #e5e7eb; --good: #0f766e; --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ground: #05070a; --card: #0d1117; --ink: #e6edf3; --soft: #9da7b3;
  --rule: #21262d; --good: #3fc7b5; --bad: #fb9a5b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 ui-sans-serif, system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0.2rem 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 0.5rem; }
p { margin: 0.3rem 0; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.15rem; font-weight: 600; margin: 0.6rem 0; }
.pictures { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pictures svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; overflow-wrap: normal; background: var(--card); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.88rem; }
th, td { padding: 0.3rem 0.6rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td { vertical-align: top; }
td:first-child, td:last-child { white-space: normal; min-width: 9rem; }
details { margin: 0.4rem 0; } summary { cursor: pointer; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 0.9rem; margin: 0.6rem 0; } a { color: inherit; }
@media (max-width: 30rem) { table { font-size: 0.7rem; } th, td { padding: 0.25rem 0.2rem; }
  td:first-child, td:last-child { min-width: 6rem; } }
"""

_GOOD = ("ok", "valid", "same", "better")
_BAD = ("BEYOND", "WORSE", "MISSED", "UNCHECKED", UNSTABLE, SATURATED, SHORT, SHED, ERRORS, BEHIND)


def document(title: str, parts: Sequence[str]) -> str:
    """The page around its parts, which are HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>"


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """A heading, a remark if there is one, and a table."""
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{said}{table(header, rows)}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls sideways where it is too wide; verdicts are coloured."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    text = str(value)
    style = ' class="bad"' if any(word in text for word in _BAD) else ' class="good"' if text in _GOOD else ""
    return f"<td{style}>{escape(text)}</td>"
