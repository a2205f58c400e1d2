"""``GroupRule``: what a user decides about some groups: keep them as they are, bound them, or step them differently.

Rules go by name or glob pattern (``stages.1.*``). A pattern names the layers that *produce* a group: a group that
several layers produce together (a residual stage) is meant by any of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hwsearch.errors import InputError
from hwsearch.graph.groups import WidthGroup, check_settings

if TYPE_CHECKING:
    from torch import Tensor

    from hwsearch.graph.widths import WidthSpace


@dataclass(frozen=True)
class GroupRule:
    """One decision about the groups that ``pattern`` names.

    ``minimum`` and ``maximum`` are units when ints, shares of the full width when floats in (0, 1]; ``quantum`` is in
    channels. None leaves what the space has.
    """

    pattern: str
    freeze: bool = False
    quantum: int | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None


def apply_rules(space: WidthSpace, rules: Sequence[GroupRule]) -> WidthSpace:
    """The space after all rules, in their order: where several name a group, the last one that says something wins.

    A ``maximum`` starts the search from a narrower network: use ``bounded``, which makes that network.

    Raises:
        InputError: a pattern that names no group, a bad setting, bounds that leave no width, or no group left.

    Example:
        >>> apply_rules(space, [GroupRule("stem.*", freeze=True), GroupRule("stages.2.*", quantum=16, minimum=0.5)])
    """
    groups = {group.name: group for group in space.groups}
    reasons = dict(space.frozen_reasons)
    for rule in rules:
        if rule.maximum is not None:
            raise InputError(f"the maximum for {rule.pattern!r} needs a narrower network; use bounded to make it")
        for name in matching(space, rule.pattern):
            if name not in groups:
                continue
            if rule.freeze:
                reason = f"frozen by the user ({rule.pattern})"
                reasons.update({f"{slot.parameter} axis {slot.axis}": reason for slot in groups[name].slots})
                del groups[name]
            else:
                groups[name] = _bounded(groups[name], rule)
    if not groups:
        raise InputError("the rules freeze every group of the network; leave one to search")
    kept = tuple(groups[group.name] for group in space.groups if group.name in groups)
    return replace(space, groups=kept, frozen_reasons=reasons)


def bounded(space: WidthSpace, example_input: Tensor, rules: Sequence[GroupRule]) -> WidthSpace:
    """As ``apply_rules``, with each ``maximum`` made the new full width: the space's ``model`` is the narrower network.

    The first units of a bounded group are kept. Minimum and quantum then refer to the narrower network.

    Raises:
        InputError: as ``apply_rules``, or a space without its model.
    """
    from hwsearch.graph.surgery import shrink
    from hwsearch.graph.widths import WidthChoice, WidthSpace

    tops = {group.name: group.units for group in space.groups}
    for rule in rules:
        for name in matching(space, rule.pattern):
            if rule.maximum is not None and not rule.freeze:
                units = next(group.units for group in space.groups if group.name == name)
                tops[name] = _in_units(rule.maximum, units, rule.pattern)
    if all(tops[group.name] == group.units for group in space.groups):
        return apply_rules(space, [replace(rule, maximum=None) for rule in rules])
    if space.model is None:
        raise InputError("a maximum needs the space's model; make the space with WidthSpace.from_model")
    free = replace(
        space, groups=tuple(replace(group, widths=tuple(range(1, group.units + 1))) for group in space.groups)
    )
    model = shrink(space.model, free, WidthChoice(tuple(tops[group.name] for group in space.groups)))
    narrow = WidthSpace.from_model(model, example_input, verify=False)
    old = {group.name: group for group in space.groups}
    groups = tuple(
        group.with_widths(old[group.name].quantum * group.channels_per_unit, min(old[group.name].minimum, group.units))
        for group in narrow.groups
        if group.name in old
    )
    # What verification froze in the full network stays frozen in the narrow one.
    reasons = {**space.frozen_reasons, **narrow.frozen_reasons}
    narrow = replace(narrow, groups=groups, frozen_reasons=reasons)
    return apply_rules(narrow, [replace(rule, maximum=None) for rule in rules])


def matching(space: WidthSpace, pattern: str) -> list[str]:
    """Names of the groups that a name or glob pattern means.

    Raises:
        InputError: none, with the nearest names.
    """
    found = [group.name for group in space.groups if any(_means(pattern, name) for name in _names(group))]
    if not found:
        known = [name for group in space.groups for name in _names(group)]
        near = difflib.get_close_matches(pattern.rstrip("*."), known, 3, 0.4) or known[:3]
        raise InputError(f"no group matches {pattern!r}; the nearest layers that produce one are {', '.join(near)}")
    return found


def _means(pattern: str, name: str) -> bool:
    return pattern == name or fnmatchcase(name, pattern)


def _names(group: WidthGroup) -> list[str]:
    """A group's name, and the layers that produce it (not those that only read it)."""
    producers = [slot.parameter.rpartition(".")[0] or slot.parameter for slot in group.slots if not slot.reads]
    return list(dict.fromkeys([group.name, *producers]))


def _bounded(group: WidthGroup, rule: GroupRule) -> WidthGroup:
    if rule.quantum is not None or rule.minimum is not None:
        quantum = group.quantum * group.channels_per_unit if rule.quantum is None else rule.quantum
        minimum = group.minimum if rule.minimum is None and rule.quantum is None else rule.minimum
        check_settings(quantum, minimum)
        if isinstance(minimum, int) and minimum > group.units:
            raise InputError(f"group {group.name} has {group.units} units and cannot keep at least {minimum}")
        group = group.with_widths(quantum, minimum)
    return group


def _in_units(maximum: int | float, units: int, pattern: str) -> int:
    """A maximum as a number of units, from 1 to all of them."""
    check_settings(1, maximum)
    found = maximum if isinstance(maximum, int) else round(maximum * units)
    if found > units:
        raise InputError(f"the rule for {pattern!r} allows {found} units, but there are {units}; grow the model first")
    return max(1, found)
