"""The report of a family: its front of quality and milliseconds, and where each network's own report is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hwsearch.deploy.verdict import STATUSES
from hwsearch.report import figures
from hwsearch.report.page import Page, absent, count, ms, panel, percent, plural, table, text
from hwsearch.report.values import items, mapping, number, positive, read_json, word

_NUMBERS = ("predicted_ms", "measured_ms", "budget_ms", "macs", "parameters")


@dataclass(frozen=True)
class FamilyRow:
    """One network of a family; ``name`` is full, uniform or found, ``member`` its run folder, "" for the full one."""

    name: str
    member: str
    status: str
    predicted_ms: float | None
    measured_ms: float | None
    budget_ms: float | None
    macs: float | None
    parameters: float | None
    metric: float | None


def family_page(folder: Path) -> Page:
    """The page of a family's run folder; what is missing in ``summary.json`` is said in its place."""
    problems: list[str] = []
    summary = mapping(read_json(folder / "summary.json", problems))
    metric, device = word(summary.get("metric_name"), "metric"), word(summary.get("device"))
    rows = _rows(summary)
    name = folder.resolve().name
    page = Page(f"{name} · hwsearch", [name, word(summary.get("model")), device, "a family"])
    found = [row for row in rows if row.name == "found"]
    kept = [row for row in rows if row.status == "pass"]
    state = "pass" if found and len(kept) == len(found) else "fail"
    title = (
        f"{plural(len(found), 'network')} of one parent, {len(kept)} inside their budgets" if found else "Nothing yet"
    )
    page.add(
        f'<section class="hero"><span class="pill {state}">{"Pass" if state == "pass" else "Fail"}</span>'
        f"<h1>{text(title)}</h1></section>"
    )
    points = [(row.name, row.measured_ms, row.metric, row.member) for row in rows
              if row.measured_ms is not None and row.metric is not None]  # fmt: skip
    better = "higher" if summary.get("higher_is_better", True) else "lower"
    front = page.figure(figures.family(points, metric), f"{metric} against measured ms of the family") if points else ""
    note = f"Measured milliseconds{f' on {device}' if device else ''} and {metric} on test data ({better} is better)."
    page.add(panel("The front", note, front or absent("summary.json lists no measured network.")))
    page.add(panel("Every network", "", _table(rows, metric)))
    for problem in problems:
        page.add(absent(f"Left out: {problem}"))
    return page


def _rows(summary: dict[str, object]) -> list[FamilyRow]:
    """The full network once, then uniform and found of every member."""
    found: list[FamilyRow] = []
    for entry in items(summary.get("members")):
        member = mapping(entry)
        folder, status = word(member.get("folder")), word(member.get("status"))
        delivered = word(member.get("delivered"), "found")
        for given in items(member.get("rows")):
            row = mapping(given)
            name = word(row.get("name"), "?")
            if name == "full" and any(known.name == "full" for known in found):
                continue
            numbers = {key: positive(row.get(key)) for key in _NUMBERS}
            judged = status if name == delivered and status in STATUSES else ""
            member_name = "" if name == "full" else folder
            found.append(FamilyRow(name, member_name, judged, **numbers, metric=number(row.get("metric"))))
    return found


def _table(rows: list[FamilyRow], metric: str) -> str:
    head = ["network", "predicted ms", "measured ms", "budget ms", "MACs", "parameters", metric, "verdict"]
    lines = []
    for row in rows:
        label = text(f"{row.name} {row.member}".strip())
        plain = all(part.isalnum() for part in row.member.replace("-", "").split("."))
        if row.name == "found" and plain:
            label = f'<a href="{text(row.member)}/report.html">{label}</a>'
        share = row.metric is not None and metric == "accuracy"
        value = percent(row.metric, 2) if share else "–" if row.metric is None else f"{row.metric:.4g}"
        budget = None if row.name == "full" else row.budget_ms
        lines.append([label, ms(row.predicted_ms), ms(row.measured_ms), ms(budget), count(row.macs),
                      count(row.parameters), value, text(row.status)])  # fmt: skip
    return table(head, lines, stack=True)
