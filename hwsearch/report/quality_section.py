"""What CONetV2 saw in the layers' weights after every epoch of its trials, as a section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwsearch.report import figures
from hwsearch.report.page import Page, panel
from hwsearch.report.values import items, mapping, number, word

_MOST_LAYERS, _MOST_EPOCHS = 120, 200


def quality_section(page: Page, records: Sequence[dict[str, Any]]) -> str:
    """Quality and rank of both sides of every layer; nothing where the run has no trials."""
    columns: list[str] = []
    found: list[dict[tuple[str, str], float | None]] = []
    for record in records[-_MOST_EPOCHS:]:
        trial, epoch = number(record.get("trial")), number(record.get("epoch"))
        sides = [mapping(entry) for entry in items(record.get("layers"))]
        if trial is not None and epoch is not None and sides:
            columns.append(f"{trial + 1:g}.{epoch + 1:g}")
            found.append({(word(s.get("side")), word(s.get("parameter"))): number(s.get("quality")) for s in sides})
    drawn = []
    for side in ("outputs", "inputs"):
        names = list(dict.fromkeys(name for at in found for kind, name in at if kind == side and name))[:_MOST_LAYERS]
        values = [[at.get((side, name)) for at in found] for name in names]
        if any(value is not None for row in values for value in row):
            layers = [name.removesuffix(".weight") for name in names]
            figure = figures.quality(layers, columns, values, f"trial and epoch; quality along the {side}")
            drawn.append(page.figure(figure, f"Quality along the {side} of each layer after each epoch"))
    note = "What the widths follow: quality of the layers' weights (rank and condition after EVBMF), epoch by epoch."
    return panel("Quality of the layers", note, *drawn) if drawn else ""
