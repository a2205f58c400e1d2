"""The width space as a section: which layers each group writes and reads, its widths and costs, and what is frozen.

Read from a run folder's ``space.json`` (``hwsearch.graph.space_table``), defensively like everything in a report.
"""

from __future__ import annotations

from typing import Any

from hwsearch.graph.space_table import SCHEMA, VERSION
from hwsearch.report import figures
from hwsearch.report.page import Page, details, ms, panel, plural, table, text
from hwsearch.report.run_data import GroupRow
from hwsearch.report.values import items, mapping, number, positive, word

_MOST_GROUPS, _MOST_DRAWN = 400, 60


def space_section(page: Page, space: dict[str, Any]) -> str:
    """The section, or nothing where the run has no ``space.json`` that this release reads."""
    if space.get("schema") != SCHEMA or space.get("version") != VERSION:
        return ""
    groups = [row for entry in items(space.get("groups"))[:_MOST_GROUPS] if (row := _row(mapping(entry))) is not None]
    if not groups:
        return ""
    size = number(space.get("log10_size"))
    note = f"{plural(len(groups), 'width group')}" + ("" if size is None else f", 10^{size:.1f} networks") + ": layers "
    note += "in one column keep or drop the same channels. Filled: the layer writes them; hollow: it reads them."
    content = []
    if len(groups) <= _MOST_DRAWN:
        content.append(page.figure(figures.groups(groups), "Layers that write and read the channels of each group"))
    content.append(details("As a table", _table(groups, word(space.get("unit"), "ms"))))
    if frozen := _frozen(space):
        content.append(details("What keeps its size, and why", frozen))
    return panel("Width groups", note, *content)


def _row(entry: dict[str, Any]) -> GroupRow | None:
    name, units = word(entry.get("name")), positive(entry.get("units"))
    if not name or units is None:
        return None
    widths = [value for w in items(entry.get("widths")) if (value := positive(w)) is not None]
    costs = mapping(entry.get("cost"))
    return GroupRow(
        name,
        units,
        tuple(widths),
        tuple(word(slot, "?") for slot in items(entry.get("writes"))),
        tuple(word(slot, "?") for slot in items(entry.get("reads"))),
        tuple(positive(costs.get(key)) for key in ("smallest", "middle", "full")),
    )


def _table(groups: list[GroupRow], unit: str) -> str:
    head = ["group", "widths", f"min {unit}", f"mid {unit}", f"max {unit}", "writes", "reads"]
    rows = [
        [text(g.name), text(_widths(g)), *(ms(c) for c in g.costs), _listed(g.writes), _listed(g.reads)] for g in groups
    ]
    return table(head, rows, stack=True)


def _widths(group: GroupRow) -> str:
    if not group.widths:
        return f"{group.units:g}"
    low, high = min(group.widths), max(group.widths)
    return f"{low:g} to {high:g} ({len(group.widths)})" if low < high else f"{high:g}"


def _listed(slots: tuple[str, ...], most: int = 6) -> str:
    more = f" and {len(slots) - most} more" if len(slots) > most else ""
    return text(", ".join(slots[:most]) + more)


def _frozen(space: dict[str, Any]) -> str:
    rows = [
        [text(reason), _listed(tuple(word(place, "?") for place in items(places)))]
        for reason, places in mapping(space.get("frozen")).items()
    ]
    rows += [["no rule for this operation", text(word(name))] for name in items(space.get("unknown_operations"))]
    return table(["reason", "parameter axes"], rows[:_MOST_GROUPS], stack=True) if rows else ""
