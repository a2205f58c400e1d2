"""The way that a search by gates took (PaS, MGAS): how its use of the budget fell, and which widths it gave up when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwsearch.report import figures
from hwsearch.report.page import Page, panel
from hwsearch.report.run_data import Curve
from hwsearch.report.values import items, mapping, number, word

_MOST_POINTS, _MOST_GROUPS = 400, 120
#: Name of a line, and what a point calls its value.
_USE = {"use": "use", "target": "target"}


def way_section(page: Page, result: dict[str, Any]) -> str:
    """The section; nothing where the result holds no way with uses of the budget."""
    points = items(mapping(result.get("extra")).get("trajectory"))
    lines = way(points, _USE, "use")
    if not lines:
        return ""
    content = [
        page.figure(
            figures.curves(lines, "use", "predicted ms, as a share of the budget"),
            "The share of the budget that the network uses over the steps of the search",
        )
    ]
    steps, rows = _widths(points)
    names = [word(name, "?") for name in items(result.get("groups"))][:_MOST_GROUPS]
    if steps and len(names) == len(rows):
        figure = figures.quality(names, steps, rows, "step; share of the widest so far seen that is switched on")
        content.append(page.figure(figure, "The width of each group over the steps of the search"))
    note = (
        "What the gradients and the price of a millisecond switched off, step by step. What was found is near the end"
    )
    note += " of it, moved onto the budget."
    return panel("The way of the search", note, *content)


def way(points: Sequence[Any], names: Mapping[str, str], quantity: str) -> list[Curve]:
    """Lines over the steps: ``names`` are those of the lines and of their values in a point."""
    found = []
    for name, key in names.items():
        pairs = [(number(mapping(p).get("step")), number(mapping(p).get(key))) for p in points[:_MOST_POINTS]]
        line = tuple((step, value) for step, value in pairs if step is not None and value is not None)
        if len(line) > 1:
            found.append(Curve(name, quantity, line))
    return found


def _widths(points: Sequence[Any]) -> tuple[list[str], list[list[float | None]]]:
    """Steps, and a row a group: its share of its widest. Empty where points do not have the same number of widths."""
    told = [(number(mapping(p).get("step")), items(mapping(p).get("widths"))) for p in points[:_MOST_POINTS]]
    kept = [(step, [number(width) for width in widths[:_MOST_GROUPS]]) for step, widths in told if step is not None]
    if not kept or len({len(widths) for _, widths in kept}) != 1:
        return [], []
    rows: list[list[float | None]] = []
    for row in zip(*(widths for _, widths in kept), strict=True):
        widest = max((width for width in row if width is not None), default=0.0)
        rows.append([width / widest if width is not None and widest > 0 else None for width in row])
    return [f"{step:g}" for step, _ in kept], rows
