"""Patterns: which units of every group a sub-network uses, locally free around its width.

A width of c units is represented by *base* units (always kept) and *free* units that lie anywhere in a local zone
around c. A pattern belongs to a group, so layers that the graph ties together share it by themselves.

Reference: CafeNet, "Locally Free Weight Sharing for Network Width Search" (ICLR 2021): base and free channels with
offset r. With r = 0 only the leftmost pattern is left, which is slimmable training (Yu et al., ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthGroup, WidthSpace

IntArray = NDArray[np.int64]


class Zone(NamedTuple):
    """Units ``0 .. base - 1`` are always kept; of the units ``base .. end - 1`` as many as ``free`` are."""

    base: int
    end: int
    free: int


@dataclass(frozen=True, eq=False)
class Pattern:
    """Kept unit indices of every group, each ascending, in the order of ``WidthSpace.groups``."""

    kept: tuple[IntArray, ...]

    @property
    def choice(self) -> WidthChoice:
        """The widths of this pattern."""
        return WidthChoice(tuple(len(units) for units in self.kept))

    def by_group(self, space: WidthSpace) -> dict[str, IntArray]:
        """Kept units by group name, as ``shrink(keep=...)`` takes them."""
        return {group.name: units for group, units in zip(space.groups, self.kept, strict=True)}


def zone(units: int, width: int, reach: int) -> Zone:
    """Base and free zone of a width: the zone goes ``reach`` units to either side, as far as there are units.

    Example:
        >>> zone(6, 3, 1)
        Zone(base=2, end=4, free=1)
    """
    base = max(0, width - reach)
    return Zone(base, min(units, width + reach), width - base)


def leftmost(choice: WidthChoice) -> Pattern:
    """The first units of every group."""
    return Pattern(tuple(np.arange(width, dtype=np.int64) for width in choice.widths))


def draw(space: WidthSpace, choice: WidthChoice, offset: int, bins: Sequence[int], rng: np.random.Generator) -> Pattern:
    """One pattern of a choice, every group's free bins drawn uniformly from its zone.

    Args:
        offset: r, how many bins the zone goes to either side of the width; 0 is the leftmost pattern.
        bins: units a bin, one number a group.
    """
    pairs = zip(space.groups, choice.widths, bins, strict=True)
    return Pattern(tuple(draw_units(group.units, width, offset, bin_units, rng) for group, width, bin_units in pairs))


def draw_units(units: int, width: int, offset: int, bin_units: int, rng: np.random.Generator) -> IntArray:
    """Kept units (width,) of one group, ascending.

    The zone is cut into bins from its base on and whole bins are taken; where widths are no multiples of the bin, the
    last one taken gives only as many units as are still needed.
    """
    place = zone(units, width, offset * bin_units)
    if place.end - place.base == place.free:
        return np.arange(width, dtype=np.int64)
    starts = np.arange(place.base, place.end, bin_units)
    taken: list[IntArray] = [np.arange(place.base)]
    missing = place.free
    for start in rng.permutation(starts).tolist():
        stop = min(start + bin_units, place.end, start + missing)
        taken.append(np.arange(start, stop))
        missing -= stop - start
        if missing == 0:
            break
    return np.sort(np.concatenate(taken))


def bins_of(space: WidthSpace, bin_units: int | None) -> tuple[int, ...]:
    """Units a bin for every group: the same number everywhere (at most the group's units), or each group's own step.

    A group's own step is the median distance between its allowed widths: its quantum in a space as it was extracted,
    the length of a stair or of a bin by MACs in one that was cut down.

    Raises:
        InputError: the number is below 1.
    """
    if bin_units is not None and bin_units < 1:
        raise InputError(f"bin_units is {bin_units}; give 1 or more, or leave it out for each group's own step")
    return tuple(min(bin_units or _step(group), group.units) for group in space.groups)


def _step(group: WidthGroup) -> int:
    distances = np.diff(np.asarray(group.widths, dtype=np.int64))
    return int(np.sort(distances)[len(distances) // 2]) if len(distances) else group.quantum


def rightmost(space: WidthSpace, choice: WidthChoice) -> Pattern:
    """The last units of every group: BCNet's second path through a width (Su et al., CVPR 2021)."""
    pairs = zip(space.groups, choice.widths, strict=True)
    return Pattern(tuple(np.arange(group.units - width, group.units, dtype=np.int64) for group, width in pairs))


def complement(space: WidthSpace, choice: WidthChoice) -> WidthChoice:
    """The widths that a choice leaves over, at the nearest allowed ones (the wider of two equally near).

    Trained from both sides after ``choice`` itself, every unit has been used equally often (BCNet).
    """
    pairs = zip(space.groups, choice.widths, strict=True)
    return WidthChoice(
        tuple(
            min(group.widths, key=lambda allowed: (abs(allowed - (group.units - width)), -allowed))
            for group, width in pairs
        )
    )
