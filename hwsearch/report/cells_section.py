"""The genotype that a search of cells found, drawn cell by cell, and the way that the search took."""

from __future__ import annotations

from typing import Any

from hwsearch.report import figures
from hwsearch.report.page import Page, details, panel, plural, table, text
from hwsearch.report.values import items, mapping, number, word
from hwsearch.report.way_section import way

_MOST_CELLS, _MOST_NODES = 40, 12
_MS = {"predicted": "ms", "target": "target_ms"}
_WIDE, _HIGH, _STEP = 92, 30, 190  # of a box, and from one node to the next


def cells_section(page: Page, result: dict[str, Any]) -> str:
    """The section; nothing where the result holds no genotype."""
    extra = mapping(result.get("extra"))
    genotype = mapping(extra.get("genotype"))
    cells = [_cell(cell) for cell in items(genotype.get("kept"))[:_MOST_CELLS]]
    nodes = number(genotype.get("nodes"))
    if not cells or nodes is None or not 1 <= nodes <= _MOST_NODES:
        return ""
    halving = {number(cell) for cell in items(genotype.get("reductions"))}
    kept = sum(len(names) for cell in cells for names in cell)
    offered = len(items(genotype.get("operations"))) * sum(len(cell) for cell in cells)
    note = f"{plural(len(cells), 'cell')}, {kept} of {offered} operations kept. Each node adds up what enters it"
    note += "; a cell puts its nodes side by side. The inputs are the outputs of the two cells before."
    drawn = []
    for at, cell in enumerate(cells):
        title = f"Cell {at}" + (" (halves the side)" if at in halving else "")
        drawn.append(f"<h3>{text(title)}</h3><div class='scroll'>{_drawing(cell, int(nodes))}</div>")
    rows = [
        [str(at), f"{_name(source)} → node {node}", text(", ".join(names)) or "–"]
        for at, cell in enumerate(cells)
        for (source, node), names in zip(_edges(int(nodes)), cell, strict=False)
    ]
    content = ["".join(drawn), details("As a table", table(["cell", "edge", "operations"], rows))]
    if lines := way(items(extra.get("trajectory")), _MS, "ms"):
        figure = figures.curves(lines, "ms", "predicted ms of the stage's cells")
        content.append(page.figure(figure, "Predicted milliseconds over the steps of the search, and the targets"))
    return panel("Cells", note, *content)


def _cell(value: object) -> list[list[str]]:
    return [[word(name, "?") for name in items(edge)] for edge in items(value)]


def _edges(nodes: int) -> list[tuple[int, int]]:
    return [(source, node) for node in range(nodes) for source in range(node + 2)]


def _name(source: int) -> str:
    return f"input {source}" if source < 2 else f"node {source - 2}"


def _drawing(cell: list[list[str]], nodes: int) -> str:
    """One cell as SVG: inputs on the left, nodes along a line, an arc with its operations for each edge."""
    rise = 26 + 22 * nodes
    places = {0: (0, rise - 40), 1: (0, rise + 40)} | {n + 2: (_STEP * (n + 1), rise) for n in range(nodes)}
    width, height = _STEP * (nodes + 1) + _WIDE + 8, 2 * rise + _HIGH
    parts = []
    for number_, ((source, node), names) in enumerate(zip(_edges(nodes), cell, strict=False)):
        if not names:
            continue
        (x0, y0), (x1, y1) = places[source], places[node + 2]
        x0, y0, y1 = x0 + _WIDE, y0 + _HIGH // 2, y1 + _HIGH // 2
        # Arcs of even edges pass above, of odd ones below, the further the longer they are.
        away = (-1 if number_ % 2 == 0 else 1) * (12 + 14 * (node + 2 - source - 1))
        bend = (y0 + y1) / 2 + 2 * away
        middle = (y0 + 2 * bend + y1) / 4
        parts.append(
            f'<path d="M{x0} {y0} Q{(x0 + x1) / 2} {bend} {x1} {y1}" fill="none" stroke="currentColor" opacity=".45"/>'
            f'<text x="{(x0 + x1) / 2}" y="{middle - 3:.0f}" text-anchor="middle" font-size="11" fill="currentColor">'
            f"{text(' + '.join(names))}</text>"
        )
    for place, (x, y) in places.items():
        parts.append(
            f'<rect x="{x + 1}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="6" fill="none" stroke="currentColor"/>'
            f'<text x="{x + 1 + _WIDE / 2}" y="{y + 20}" text-anchor="middle" font-size="13" fill="currentColor">'
            f"{_name(place)}</text>"
        )
    label = f"A cell of {nodes} nodes with its operations"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{''.join(parts)}</svg>"
    )
