"""``space_table``: a width space in words, before any work: groups, widths, what they touch, costs, what is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from hwsearch.errors import InputError
from hwsearch.graph.groups import WidthGroup

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

#: Gives one number (milliseconds) for every choice.
Evaluate = Callable[[Sequence["WidthChoice"]], ArrayLike]


@dataclass(frozen=True)
class GroupCost:
    """What the whole network costs with one group at its smallest, middle and full width, all others full."""

    name: str
    smallest: float
    middle: float
    full: float


def group_costs(space: WidthSpace, evaluate: Evaluate) -> tuple[GroupCost, ...]:
    """Costs per group, by one call of ``evaluate`` with three choices a group.

    Raises:
        InputError: ``evaluate`` does not give one number per choice.

    Example:
        >>> group_costs(space, lambda choices: [space.macs(choice) for choice in choices])
    """
    from hwsearch.graph.widths import WidthChoice

    full = space.full().widths
    choices = [
        WidthChoice((*full[:index], width, *full[index + 1 :]))
        for index, group in enumerate(space.groups)
        for width in (group.widths[0], group.widths[len(group.widths) // 2], group.units)
    ]
    costs = np.asarray(evaluate(choices), dtype=float).ravel()
    if len(costs) != len(choices):
        raise InputError(f"evaluate must give one number per choice: {len(choices)} choices, {len(costs)} numbers")
    return tuple(
        GroupCost(group.name, *(float(cost) for cost in row))
        for group, row in zip(space.groups, costs.reshape(-1, 3), strict=True)
    )


def space_table(space: WidthSpace, evaluate: Evaluate | None = None, *, unit: str = "ms", slots: bool = True) -> str:
    """The space as text: one line per group, then what is frozen with its reason and source line.

    Args:
        space: any width space.
        evaluate: fills the columns smallest, middle and full (see ``group_costs``); without it they are left out.
        unit: unit of ``evaluate``'s numbers, for the heading.
        slots: list the parameter axes that each group touches under its line.

    Example:
        >>> print(space_table(space, lambda choices: [space.macs(c) / 1e6 for c in choices], unit="MMACs"))
    """
    costs = group_costs(space, evaluate) if evaluate is not None and space.groups else ()
    header = ["group", "units", "widths", "step"]
    header += [f"{name} {unit}" for name in ("min", "mid", "max")] if costs else []
    rows = [header]
    for index, group in enumerate(space.groups):
        row = [group.name + ("" if group.neutral else " *"), str(group.units), widths_text(group), str(group.quantum)]
        row += [f"{c:.4g}" for c in (costs[index].smallest, costs[index].middle, costs[index].full)] if costs else []
        rows.append(row)
    lines = _columns(rows)
    text = [lines[0], "-" * len(lines[0])]
    for line, group in zip(lines[1:], space.groups, strict=True):
        text.append(line)
        if slots:
            text += [f"    {line}" for line in slots_text(group)]
    text += ["", f"{len(space.groups)} groups, 10^{space.log10_size:.1f} choices"]
    if not all(group.neutral for group in space.groups):
        text.append("* an operation mixes over these channels: dropping a dead one still changes the function")
    return "\n".join([*text, *_frozen_text(space)])


def widths_text(group: WidthGroup) -> str:
    """The allowed widths: all of them when few, else the ends with their number."""
    if len(group.widths) <= 4:
        return " ".join(str(width) for width in group.widths)
    return f"{group.widths[0]} {group.widths[1]} .. {group.widths[-1]} ({len(group.widths)})"


def slots_text(group: WidthGroup) -> list[str]:
    """The parameter axes that a group touches: writers, then readers; ``x4`` where a unit takes four positions."""
    found = []
    for verb, reads in (("writes", False), ("reads", True)):
        names = [
            f"{slot.parameter}[{slot.axis}]" + (f" x{slot.elements_per_unit}" if slot.elements_per_unit > 1 else "")
            for slot in group.slots
            if slot.reads == reads
        ]
        if names:
            found.append(f"{verb} " + ", ".join(names))
    return found


def _frozen_text(space: WidthSpace) -> list[str]:
    """Frozen parameter axes by reason, and the operations without a rule."""
    by_reason: dict[str, list[str]] = {}
    for place, reason in space.frozen_reasons.items():
        by_reason.setdefault(reason, []).append(place)
    text = []
    if by_reason:
        text += ["", "keeps its size:"]
        for reason, places in by_reason.items():
            shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
            text += [f"  {reason}", f"    {shown}"]
    if space.unknown_operations:
        text += ["", "operations without a rule:", *(f"  {operation}" for operation in space.unknown_operations)]
    return text


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows as lines with aligned columns: the first one to the left, numbers to the right."""
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
