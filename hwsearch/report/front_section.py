"""The front of accuracy and milliseconds: the networks that were trained, and the candidates that the search scored."""

from __future__ import annotations

from hwsearch.report import figures, figures_run
from hwsearch.report.page import Page, absent, halves, panel, plural
from hwsearch.report.run_data import RunData
from hwsearch.report.values import number

_TITLE = "Accuracy against milliseconds"


def front_section(page: Page, run: RunData) -> str:
    """Both, side by side: the trained networks with their metric, all scored choices with the search's own score."""
    metric = run.metric_name
    title = _TITLE if metric == "accuracy" else f"{metric[:1].upper()}{metric[1:]} against milliseconds"
    drawn = page.figure(
        figures_run.trained(run.rows, run.budget_ms, metric), f"{metric} of the trained networks against their ms"
    )
    scored = ""
    if run.candidates:
        found = figures.candidates(run.candidates, run.found, run.budget_ms, number(run.result.get("loss")))
        scored = page.figure(found, f"Search score against predicted ms of {len(run.candidates)} candidates")
    notes = []
    if drawn:
        notes.append("The networks of the comparison, trained alike and tested on images that no search saw.")
    if scored:
        notes.append(
            f"The search's {plural(len(run.candidates), 'candidate')}, each scored with shared weights before any "
            "training of its own (lower is better); the line is the best score that each number of milliseconds buys."
        )
    missing = "" if scored else absent("result.json lists no candidates.")
    return panel(title, " ".join(notes), halves(drawn, scored), missing)
