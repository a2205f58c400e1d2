"""Several devices, one network: what it takes on each, as a section; nothing where the run has one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwsearch.report import figures
from hwsearch.report.page import Page, ms, panel, percent, table, text
from hwsearch.report.run_data import CandidatePoint, Row, RunData, candidates_at
from hwsearch.report.values import items, mapping, number, positive, word

_MOST = 12


def devices_section(page: Page, run: RunData) -> str:
    """A line for each network and device; below, the search's candidates at every further device's milliseconds."""
    limits = [mapping(limit) for limit in items(run.result.get("limits"))][:_MOST]
    if len(limits) < 2:
        return ""
    head = ["device", "network", "predicted ms", "measured ms", "budget ms", "of budget", "verdict"]
    drawn = []
    for at, limit in enumerate(limits[1:], start=1):
        name, budget = word(limit.get("name"), "?"), positive(limit.get("max_ms"))
        points = tuple(candidates_at(run.result.get("candidates"), at))
        if points:
            figure = _front(points, limit, budget, run.result)
            drawn.append(f"<h3>{text(name)}</h3>" + page.figure(figure, f"Score against predicted ms on {name}"))
    note = (
        "The one network keeps all budgets. The page's other sections are about the first device; below, the search's "
        "candidates stand at the predicted milliseconds of each further one."
    )
    stressed = run.answer.name if run.answer else "found"
    lines = _lines(limits, run.summary, stressed)
    return panel("Devices", note, table(head, lines, stack=True, mark=stressed) if lines else "", *drawn)


def _front(
    points: Sequence[CandidatePoint], limit: Mapping[str, Any], budget: float | None, result: Mapping[str, Any]
) -> figures.Figure:
    found = Row("found", predicted_ms=positive(limit.get("predicted_ms")))
    return figures.candidates(points, found, budget, number(result.get("loss")))


def _lines(limits: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], stressed: str) -> list[list[str]]:
    """Rows of the table, the delivered network first on every device; before the comparison what the search knows."""
    statuses = mapping(summary.get("statuses"))
    rows = [mapping(row) for row in items(summary.get("rows"))] or [{"name": "found", "devices": limits}]
    lines = []
    for at, limit in enumerate(limits):
        name = word(limit.get("name"), "?")
        for row in sorted(rows, key=lambda r: word(r.get("name")) != stressed):
            devices, network = items(row.get("devices")), word(row.get("name"), "?")
            time = mapping(devices[at]) if at < len(devices) else {}
            budget, measured = positive(limit.get("max_ms")), positive(time.get("measured_ms"))
            judged = network != "full"  # nobody asks the full network to keep the budget
            share = percent(measured / budget) if measured and budget and judged else "–"
            over = f'<span class="over">{share}</span>' if measured and budget and measured > budget else share
            lines.append(
                [
                    text(name),
                    text(network),
                    ms(positive(time.get("predicted_ms"))),
                    ms(measured),
                    ms(budget if judged else None),
                    over if judged else "–",
                    text(word(statuses.get(name), "–")) if network == stressed else "",
                ]
            )
    return lines
