"""HTML in small pieces: everything that comes from a file passes through ``text`` or ``figures_json``, never raw."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwsearch.report.style import CSS, SCRIPT

#: The browser itself then refuses every request: the page is this file and nothing else.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass
class Page:
    """A page under construction: pieces of body and the figures they refer to."""

    title: str
    meta: Sequence[str] = ()
    pieces: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, piece: str) -> None:
        """Append HTML that is already escaped."""
        self.pieces.append(piece)

    def figure(self, figure: dict[str, Any] | None, label: str) -> str:
        """The place of a figure in the page ("" for None); ``label`` says in words what it shows."""
        if figure is None:
            return ""
        name = f"figure-{len(self.figures) + 1}"
        self.figures[name] = figure
        height = int(figure["height"])
        return f'<div class="figure" id="{name}" style="height:{height}px" role="img" aria-label="{text(label)}"></div>'

    def render(self, version: str) -> str:
        """The whole page as one self-contained HTML file. The plotting library is inside only if a figure is."""
        scripts = ""
        if self.figures:
            from plotly.offline import get_plotlyjs

            scripts = (
                f"<script>{get_plotlyjs()}</script>\n"
                f'<script type="application/json" id="figures">{figures_json(self.figures)}</script>\n'
                f"<script>{SCRIPT}</script>"
            )
        meta = "".join(f"<span>{text(part)}</span>" for part in self.meta if part)
        body = "\n".join(self.pieces)
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="hwsearch {text(version)}">
<link rel="icon" href="data:,">
<title>{text(self.title)}</title>
<style>{CSS}</style>
</head>
<body>
<header class="top"><div class="wrap"><p class="brand"><b>hw</b>search</p><p class="meta">{meta}</p></div></header>
<main class="wrap">
{body}
</main>
<footer><div class="wrap">Written by hwsearch {text(version)}. This file is complete and loads nothing.
Drag in a figure to zoom, double-click to go back.</div></footer>
<noscript><p class="wrap">The figures need JavaScript; all numbers in tables and cards do not.</p></noscript>
{scripts}
</body>
</html>
"""


def text(value: object) -> str:
    """Any value as HTML text, safe in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def figures_json(figures: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in; not-finite numbers become null."""
    plain = json.dumps(_finite(figures), allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, escape in escapes.items():
        plain = plain.replace(character, escape)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def panel(title: str, note: str, *content: str) -> str:
    """A titled section. ``note`` (plain text) says how to read it; content is HTML, empty pieces are skipped."""
    inner = "\n".join(piece for piece in content if piece)
    paragraph = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section class="panel"><h2>{text(title)}</h2>{paragraph}\n{inner}</section>'


def halves(*content: str) -> str:
    """Pieces side by side where there is room for two; empty ones are skipped."""
    pieces = [piece for piece in content if piece]
    return (
        f'<div class="halves">{"".join(f"<div>{p}</div>" for p in pieces)}</div>'
        if len(pieces) == 2
        else "".join(pieces)
    )


def absent(why: str) -> str:
    """The one line that stands where data is missing."""
    return f'<p class="absent">{text(why)}</p>'


def card(title: str, value: str, unit: str, sub: str, state: str = "") -> str:
    """A number with its name above and a line below."""
    small = f"<small>{text(unit)}</small>" if unit else ""
    return (
        f'<article class="card {text(state)}"><h2>{text(title)}</h2><p class="value">{text(value)}{small}</p>'
        f'<p class="sub">{text(sub)}</p></article>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, stack: bool = False, mark: str = "") -> str:
    """A table of cells that are already HTML. ``stack``: rows become blocks on a narrow screen. ``mark``: first cell of
    the row to stress."""
    header = "".join(f"<th>{text(name)}</th>" for name in head)
    body = []
    for row in rows:
        cells = [f"<td>{row[0]}</td>"]
        cells += [f'<td data-label="{text(name)}">{cell}</td>' for name, cell in zip(head[1:], row[1:], strict=True)]
        kind = ' class="found"' if mark and row[0] == text(mark) else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    kind = ' class="stack"' if stack else ""
    return f"<table{kind}><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f'<details><summary>{text(summary)}</summary><div class="scroll">{content}</div></details>'


def definitions(pairs: Iterable[tuple[str, object]]) -> str:
    """A list of names and values."""
    return f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in pairs)}</dl>"


# --- numbers as people read them ---


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits and no unit: 0.0123, 1.43, 12.3, 123."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:,.{min(digits, 6)}f}"


def count(value: float | None) -> str:
    """A count with a unit letter: 950, 105 k, 12.4 M, 1.82 G."""
    if value is None or not math.isfinite(value):
        return "–"
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return "–" if value is None or not math.isfinite(value) else f"{value * 100:.{digits}f} %"


def plural(number: int, noun: str) -> str:
    """``1 kernel``, ``1,204 kernels``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
