"""The predictor's error card as a section: how far its predictions of unseen networks were off on this device.

Read from ``predictor/`` of the device's table folder: ``card.json`` (an ``ErrorCard``; its ``points``, ``bounds`` and
``residuals`` are drawn where it has them) and the held-out ``log_errors`` of ``manifest.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwsearch.report import figures, figures_card
from hwsearch.report.page import Page, absent, halves, panel, percent, plural, table, text
from hwsearch.report.values import items, mapping, number, positive, read_json, word

_TITLE = "How good the prediction is"
_ROWS = (
    ("unseen", "networks not seen in the fit"),
    ("unseen_family", "whole families not seen in the fit"),
)


_RIVALS = {
    "macs_line": "for comparison: a line through the MACs",
    "nn_meter": "for comparison: nn-Meter's features and random forest",
    "raw_boosting": "for comparison: XGBoost on plain features",
}


def card_section(page: Page, table_folder: Path | None) -> str:
    """Error of held-out networks beside the noise floor and the simplest rival, and error by kernel family."""
    problems: list[str] = []
    folder = table_folder / "predictor" if table_folder else None
    card = mapping(read_json(folder / "card.json", problems)) if folder else {}
    manifest = mapping(read_json(folder / "manifest.json", problems)) if folder else {}
    unseen = mapping(card.get("unseen"))
    if not unseen:
        why = problems[0] if problems else "No predictor card (card.json) is beside the device's table."
        return panel(_TITLE, "", absent(why))
    floor = number(card.get("noise_floor"))
    return panel(_TITLE, _sentence(card, unseen, floor), _table(card), *_drawn(page, card, manifest, floor))


def _drawn(page: Page, card: Mapping[str, Any], manifest: Mapping[str, Any], floor: float | None) -> list[str]:
    """Predictions of networks left out of the fit, whether their intervals hold, and the kernels' errors by family."""
    unseen = page.figure(_unseen_figure(card, manifest), "Predictions of held-out networks against their measurements")
    held = page.figure(_interval_figure(card), "Measurements of held-out networks in their predicted intervals")
    errors = {str(f)[:60]: e for f, r in mapping(card.get("by_family")).items() if (e := _share(r, "mape")) is not None}
    mean = page.figure(figures.error_by_family(errors, floor), "Mean error by kernel family") if errors else ""
    spread = page.figure(_residual_figure(card), "Residuals by kernel family")
    note = (
        "Left: the mean error of single kernels of held-out networks, by family. Right: their residuals; the box "
        "holds half of a family's kernels, the whiskers nine in ten."
    )
    below = f'<p class="note">{text(note)}</p>' if mean and spread else ""
    drawn = [halves(unseen, held), below, halves(mean, spread)] if held else [halves(unseen, mean), spread]
    return [*drawn, _missing(card)]


def _missing(card: Mapping[str, Any]) -> str:
    """What an older card lacks, and the command that adds it."""
    parts = (("bounds", "the intervals of held-out networks"), ("residuals", "the residuals by kernel family"))
    lacks = " and ".join(name for key, name in parts if not card.get(key))
    if not lacks:
        return ""
    command = f"hwsearch fit --device {word(card.get('device'), 'NAME')}"
    said = text(f"This card is an older one, without {lacks}.")
    return f'<p class="note">{said} <code>{text(command)}</code> adds them, from the table alone.</p>'


def _interval_figure(card: Mapping[str, Any]) -> figures.Figure | None:
    """Where the card has the interval of every held-out network beside its point."""
    points = []
    for point, bounds in zip(items(card.get("points")), items(card.get("bounds")), strict=False):
        if isinstance(point, list) and isinstance(bounds, list) and len(point) >= 2 and len(bounds) == 2:
            numbers = [positive(value) for value in (*point[:2], *bounds)]
            if all(value is not None for value in numbers):
                points.append((numbers[0] or 0.0, numbers[1] or 0.0, numbers[2] or 0.0, numbers[3] or 0.0))
    return figures_card.intervals(points) if len(points) > 1 else None


def _residual_figure(card: Mapping[str, Any]) -> figures.Figure | None:
    found = {}
    for family, quantiles in mapping(card.get("residuals")).items():
        values = [number(value) for value in items(quantiles)]
        if len(values) == 5 and all(value is not None for value in values):
            found[str(family)[:60]] = sorted(value or 0.0 for value in values)
    return figures_card.residuals(found) if found else None


def _sentence(card: Mapping[str, Any], unseen: Mapping[str, Any], floor: float | None) -> str:
    words = [f"Mean error {percent(_share(unseen, 'mape'))} on networks that the predictor had not seen"]
    if (rival := _share(mapping(card.get("rivals")).get("macs_line"), "mape")) is not None:
        words.append(f"; counting MACs instead is off by {percent(rival)}")
    if floor is not None:
        words.append(f". The device itself repeats a measurement to {percent(floor)}")
    networks, kernels = positive(card.get("networks")), positive(card.get("kernels"))
    if networks and kernels:
        words.append(f". Fitted on {plural(int(networks), 'network')}, {plural(int(kernels), 'kernel')}")
    return "".join(words) + "."


def _table(card: Mapping[str, Any]) -> str:
    rows = []
    rivals = mapping(card.get("rivals"))
    named = [(name, card.get(key)) for key, name in _ROWS] + [(name, rivals.get(key)) for key, name in _RIVALS.items()]
    for name, entry in named:
        row = mapping(entry)
        if not row:
            continue
        rank, count = number(row.get("spearman")), positive(row.get("count"))
        rows.append(
            [
                text(name),
                f"{count:,.0f}" if count else "–",
                percent(_share(row, "mape")),
                percent(_share(row, "within_5"), 0),
                percent(_share(row, "within_10"), 0),
                "–" if rank is None else f"{rank:.3f}",
                percent(_share(row, "coverage"), 0),
            ]
        )
    head = ["", "networks", "mean error", "within 5 %", "within 10 %", "rank correlation", "in 90 % interval"]
    return table([name.replace(" %", "\u00a0%") for name in head], rows, stack=True)


def _share(row: object, key: str) -> float | None:
    value = number(mapping(row).get(key))
    return value if value is not None and value >= 0 else None


def _unseen_figure(card: Mapping[str, Any], manifest: Mapping[str, Any]) -> figures.Figure | None:
    """Predicted against measured where the card has the points, else how the errors are distributed."""
    points = []
    for entry in items(card.get("points")):
        if isinstance(entry, list) and len(entry) >= 2:
            measured, predicted = positive(entry[0]), positive(entry[1])
            if measured is not None and predicted is not None:
                points.append((measured, predicted, word(entry[2], "network") if len(entry) > 2 else "network"))
    if points:
        return figures.predicted_against_measured(points)
    logs = [value for e in items(manifest.get("log_errors")) if (value := number(e)) is not None and abs(value) < 10]
    return figures.error_distribution([math.exp(-value) - 1 for value in logs]) if len(logs) > 1 else None
