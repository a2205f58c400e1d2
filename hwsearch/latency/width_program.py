"""A ``LoweringTemplate`` compiled for look-ups: which small whole numbers index which slots' price tables.

A slot's price depends on the channel counts that its kernel computes on (*axes*), and on the classes of other counts
that decide its form. The latter may be many: a concatenation stays blocked only where every part is aligned. So they
are reduced to one small number, the *state*: going through those counts one after another, the slot's rule is
simplified by what is known so far, and equal remainders are one state. A conjunction over a dozen groups has two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from hwsearch.latency.lowering_template import Ints, LoweringTemplate, Quantity, Rule, Slot, Split, answer, walk

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

#: An axis: ("width", group) or ("sum", quantity).
Axis: TypeAlias = tuple[str, int]
_MOST_STATES = 4096
#: Counts that only decide a form are axes, too, while a slot's table has at most so many entries: that saves the state.
_DIRECT = 4096


@dataclass(frozen=True, eq=False)
class WidthIndex:
    """Position of a group's width among its allowed ones."""

    group: int
    size: int


@dataclass(frozen=True, eq=False)
class SumIndex:
    """Position of a sum of groups in ``range(size)``: ``steps[group][position of its width]``, summed over groups."""

    steps: Mapping[int, Ints]
    size: int


@dataclass(frozen=True, eq=False)
class StateIndex:
    """``table[before, on]``: a state from the state before and one more count; ``before`` None starts a chain."""

    before: int | None
    on: int
    table: Ints
    size: int


Index: TypeAlias = "WidthIndex | SumIndex | StateIndex"


@dataclass(frozen=True)
class Member:
    """One slot of the program.

    Attributes:
        slot: of the template.
        axes: what its kernel computes on.
        indices: positions in ``Program.indices`` that address its prices: the state, if there is one, then the axes.
        rules: the rest of its rule in each state.
    """

    slot: Slot
    axes: tuple[Axis, ...]
    indices: tuple[int, ...]
    rules: tuple[Rule, ...]


@dataclass
class Program:
    """The compiled template.

    Attributes:
        template: what was compiled.
        widths: allowed widths of each group.
        indices: in an order in which each is computed from earlier ones.
        members: one a slot.
    """

    template: LoweringTemplate
    widths: tuple[Ints, ...]
    indices: list[Index] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)

    @classmethod
    def of(cls, template: LoweringTemplate, space: WidthSpace) -> Program | None:
        """The program for a space that the template covers, or None where the states are too many."""
        program = cls(template, tuple(np.asarray(group.widths, dtype=np.int64) for group in space.groups))
        for slot in template.slots:
            member = program._compile(slot)
            if member is None:
                return None
            program.members.append(member)
        return program

    def sizes(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Number of values of each of some indices."""
        return tuple(self.indices[i].size for i in indices)

    def counts(self, member: Member, positions: Mapping[Axis, Ints]) -> dict[int, Ints]:
        """Values of a slot's quantities, by number, for positions (K,) on its axes."""
        used = {e.quantity for v in member.slot.variants for e in v.extents}
        used |= {r.quantity for rule in member.rules for r in walk(rule) if isinstance(r, Split)}
        return {q: self._value(q, positions) for q in used}

    def _value(self, index: int, positions: Mapping[Axis, Ints]) -> Ints:
        if ("sum", index) in positions:
            return self._sum_values(index)[positions["sum", index]]
        quantity = self.template.quantities[index]
        parts = [factor * self.widths[group][positions["width", group]] for group, factor in quantity.terms]
        return np.asarray(sum(parts, start=np.int64(quantity.constant)))

    # ------------------------------------------------------------------ compiling

    def _compile(self, slot: Slot) -> Member | None:
        reached = {r for r in walk(slot.rule) if not isinstance(r, Split) and r >= 0}
        computed = {e.quantity for r in reached for e in slot.variants[r].extents}
        axes = self._axes(computed)
        asked = [r.quantity for r in walk(slot.rule) if isinstance(r, Split)]
        others = self._axes(q for q in asked if not self._resolved(q, axes))
        if math.prod(self.sizes(self._index(axis) for axis in (*axes, *others))) <= _DIRECT:
            axes, others = sorted((*axes, *others)), []
        states: list[Rule] = [slot.rule]
        before: int | None = None
        for axis in others:
            states, table = self._refine(states, axis)
            if len(states) > _MOST_STATES:
                return None
            if len(states) > 1 or before is not None:
                before = self._add(StateIndex(before, self._index(axis), table, len(states)))
        if len(states) == 1:
            before = None
        indices = [*([] if before is None else [before]), *(self._index(axis) for axis in axes)]
        return Member(slot, tuple(axes), tuple(indices), tuple(states))

    def _axes(self, quantities: Iterable[int]) -> list[Axis]:
        """The distinct axes of some quantities; a constant has none."""
        return sorted({axis for q in quantities if (axis := self._axis(q)) is not None})

    def _axis(self, quantity: int) -> Axis | None:
        terms = self.template.quantities[quantity].terms
        return None if not terms else ("width", terms[0][0]) if len(terms) == 1 else ("sum", quantity)

    def _resolved(self, quantity: int, axes: list[Axis]) -> bool:
        """Whether the positions on some axes say what a quantity is."""
        terms = self.template.quantities[quantity].terms
        return ("sum", quantity) in axes or all(("width", group) in axes for group, _ in terms)

    def _refine(self, states: list[Rule], axis: Axis) -> tuple[list[Rule], Ints]:
        """Every state's rule with one axis known: the new states, and the table (old states, positions) of them."""
        quantities = [i for i in range(len(self.template.quantities)) if self._axis(i) == axis]
        size = self.indices[self._index(axis)].size
        values = {q: self._value(q, {axis: np.arange(size)}) for q in quantities}
        tests = sorted({(r.quantity, r.block, r.small) for s in states for r in walk(s)
                        if isinstance(r, Split) and r.quantity in values})  # fmt: skip
        answers = np.stack([answer(block, small, values[q]) for q, block, small in tests], axis=1)
        cells, cell = np.unique(answers, axis=0, return_inverse=True)
        found: dict[Rule, int] = {}
        table = np.empty((len(states), size), dtype=np.int64)
        for number, state in enumerate(states):
            rest = [_known(state, dict(zip(tests, row, strict=True))) for row in cells.tolist()]
            table[number] = np.array([found.setdefault(rule, len(found)) for rule in rest])[cell.reshape(-1)]
        return list(found), table

    def _index(self, axis: Axis) -> int:
        """The position of an axis among the indices."""
        if axis in self._known:
            return self._known[axis]
        kind, number = axis
        made: Index
        if kind == "width":
            made = WidthIndex(number, len(self.widths[number]))
        else:
            quantity = self.template.quantities[number]
            step = self._step(quantity)
            steps = {g: f * (self.widths[g] - self.widths[g][0]) // step for g, f in quantity.terms}
            made = SumIndex(steps, 1 + int(sum(part.max() for part in steps.values())))
        self._known[axis] = len(self.indices)
        self.indices.append(made)
        return self._known[axis]

    def _step(self, quantity: Quantity) -> int:
        """The greatest common divisor of a sum's possible changes."""
        moves = [int(f * w) for g, f in quantity.terms for w in self.widths[g] - self.widths[g][0]]
        return max(math.gcd(*moves), 1)

    def _sum_values(self, index: int) -> Ints:
        quantity = self.template.quantities[index]
        least = quantity.constant + sum(f * int(self.widths[g][0]) for g, f in quantity.terms)
        size = self.indices[self._index(("sum", index))].size
        return least + self._step(quantity) * np.arange(size)

    def _add(self, state: StateIndex) -> int:
        """The position of a state; equal ones are one."""
        key = (state.before, state.on, state.table.tobytes())
        if key not in self._known:
            self._known[key] = len(self.indices)
            self.indices.append(state)
        return self._known[key]


def _known(rule: Rule, answers: Mapping[tuple[int, int, int], bool]) -> Rule:
    """A rule with some questions answered."""
    if not isinstance(rule, Split):
        return rule
    found = answers.get((rule.quantity, rule.block, rule.small))
    if found is not None:
        return _known(rule.yes if found else rule.no, answers)
    yes, no = _known(rule.yes, answers), _known(rule.no, answers)
    return yes if yes == no else Split(rule.quantity, rule.block, rule.small, yes, no)
