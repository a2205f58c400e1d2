"""The predictor's error card as a section: how far its predictions of unseen networks were off on this device."""

from __future__ import annotations

from pathlib import Path

from hwsearch.report import figures
from hwsearch.report.page import Page, absent, panel, percent, plural, table, text
from hwsearch.report.values import items, mapping, number, positive, read_json, word


def card_section(page: Page, table_folder: Path | None) -> str:
    """Scatter of predicted against measured, error by family, and the summary numbers, where there is a card."""
    title = "How good the prediction is"
    problems: list[str] = []
    card = mapping(read_json(table_folder / "predictor" / "card.json", problems)) if table_folder else {}
    if not card:
        why = problems[0] if problems else "No predictor card is there: fit a predictor on this device's table first."
        return panel(title, "", absent(why))
    return panel(title, "", text(card))
