"""``SpaceTable``: a width space before any work: groups, widths, what they touch, what they cost, what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hwsearch.errors import InputError
from hwsearch.graph.groups import IntArray, WidthGroup

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

SCHEMA, VERSION = "hwsearch.space", 1

#: One number (milliseconds) for every choice of an int array (N, groups).
Evaluate = Callable[[IntArray], ArrayLike]


@dataclass(frozen=True)
class GroupCost:
    """What the whole network costs with one group at its smallest, middle and full width, all others full."""

    smallest: float
    middle: float
    full: float


@dataclass(frozen=True)
class GroupLine:
    """One group: its units and allowed widths, the parameter axes that write and read it, and its costs.

    ``step`` is in units. ``mixed`` says that an operation mixes over its channels (layer normalisation): dropping a
    dead one still changes the function.
    """

    name: str
    units: int
    widths: tuple[int, ...]
    step: int
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    mixed: bool
    cost: GroupCost | None = None

    @property
    def widths_text(self) -> str:
        """The allowed widths: all of them when few, else the ends with their number."""
        if len(self.widths) <= 4:
            return " ".join(str(width) for width in self.widths)
        return f"{self.widths[0]} {self.widths[1]} .. {self.widths[-1]} ({len(self.widths)})"


@dataclass(frozen=True)
class SpaceTable:
    """A width space as a table.

    Attributes:
        groups: the width variables, in execution order.
        frozen: reason to the parameter axes that keep their size for it.
        unknown_operations: operations without a rule, with their source line.
        log10_size: number of choices, as a power of ten.
        unit: of the costs.
    """

    groups: tuple[GroupLine, ...]
    frozen: dict[str, tuple[str, ...]]
    unknown_operations: tuple[str, ...]
    log10_size: float
    unit: str = "ms"

    @classmethod
    def of(cls, space: WidthSpace, evaluate: Evaluate | None = None, *, unit: str = "ms") -> SpaceTable:
        """The table of a space; ``evaluate`` fills in what each group costs, by one call with three choices a group.

        Raises:
            InputError: ``evaluate`` does not give one number per choice.

        Example:
            >>> print(SpaceTable.of(space, space.macs_array, unit="MACs").text())
        """
        costs = _costs(space, evaluate) if evaluate is not None and space.groups else [None] * len(space.groups)
        frozen: dict[str, list[str]] = {}
        for place, reason in space.frozen_reasons.items():
            frozen.setdefault(reason, []).append(place)
        return cls(
            tuple(_line(group, cost) for group, cost in zip(space.groups, costs, strict=True)),
            {reason: tuple(places) for reason, places in frozen.items()},
            space.unknown_operations,
            space.log10_size,
            unit,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with schema and version."""
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}

    def text(self, *, slots: bool = True) -> str:
        """One line per group, then what is frozen with its reason and source line.

        ``slots`` lists the parameter axes that each group touches under its line.
        """
        costed = any(group.cost is not None for group in self.groups)
        rows = [["group", "units", "widths", "step"]]
        rows[0] += [f"{name} {self.unit}" for name in ("min", "mid", "max")] if costed else []
        for group in self.groups:
            row = [group.name + (" *" if group.mixed else ""), str(group.units), group.widths_text, str(group.step)]
            if group.cost is not None:
                row += [f"{cost:.4g}" for cost in (group.cost.smallest, group.cost.middle, group.cost.full)]
            rows.append(row)
        lines = _columns(rows)
        text = [lines[0], "-" * len(lines[0])]
        for line, group in zip(lines[1:], self.groups, strict=True):
            text.append(line)
            if slots:
                text += [
                    f"    {verb} {', '.join(n)}" for verb, n in (("writes", group.writes), ("reads", group.reads)) if n
                ]
        text += ["", f"{len(self.groups)} groups, 10^{self.log10_size:.1f} choices"]
        if any(group.mixed for group in self.groups):
            text.append("* an operation mixes over these channels: dropping a dead one still changes the function")
        if self.frozen:
            text += ["", "keeps its size:"]
            for reason, places in self.frozen.items():
                shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
                text += [f"  {reason}", f"    {shown}"]
        if self.unknown_operations:
            text += ["", "operations without a rule:", *(f"  {operation}" for operation in self.unknown_operations)]
        return "\n".join(text)


def _costs(space: WidthSpace, evaluate: Evaluate) -> list[GroupCost]:
    full = space.full().widths
    choices = [
        (*full[:index], width, *full[index + 1 :])
        for index, group in enumerate(space.groups)
        for width in (group.widths[0], group.widths[len(group.widths) // 2], group.units)
    ]
    costs = np.asarray(evaluate(np.asarray(choices, dtype=np.int64)), dtype=float).ravel()
    if len(costs) != len(choices):
        raise InputError(f"evaluate must give one number per choice: {len(choices)} choices, {len(costs)} numbers")
    return [GroupCost(*(float(cost) for cost in row)) for row in costs.reshape(-1, 3)]


def _line(group: WidthGroup, cost: GroupCost | None) -> GroupLine:
    """A group's line; ``x4`` behind an axis where a unit takes four of its positions."""

    def named(reads: bool) -> tuple[str, ...]:
        return tuple(
            f"{slot.parameter}[{slot.axis}]" + (f" x{slot.elements_per_unit}" if slot.elements_per_unit > 1 else "")
            for slot in group.slots
            if slot.reads == reads
        )

    return GroupLine(
        group.name, group.units, group.widths, group.quantum, named(False), named(True), not group.neutral, cost
    )


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows as lines with aligned columns: the first one to the left, numbers to the right."""
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
