"""Bins: groups of channels that are kept or dropped together, larger where a channel costs less.

Two rules make a width space smaller before anything is trained. **By MACs** is CafeNet's: every bin carries about the
same MACs, so that thin, costly layers keep fine widths and cheap ones get coarse. **By milliseconds** is ours: only the
right-hand edges of the predicted stairs stay (``stair_edges``). ``levels`` orders a space from coarse to fine, so that
evolution can begin on few widths and refine around its winners.

Reference: Su et al., "Locally Free Weight Sharing for Network Width Search", ICLR 2021 (FLOPs-sensitive bins).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import InputError
from hwsearch.search.grid import WidthGrid
from hwsearch.search.stairs import log10_size, stair_edges

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget, Floats, Reach

#: How a space is cut before the super-network is trained.
RULES = ("ms", "macs", "none")
#: A bin is at most this share of its group: thin layers must keep some choice.
_LARGEST_SHARE = 8


@dataclass(frozen=True)
class Reduction:
    """A space before and after a rule cut it.

    ``log10_before`` and ``log10_after`` count the choices (powers of ten); the reaches are milliseconds of the smallest
    and of the full network on the limit that binds. ``bins`` are units a bin (by MACs), else None.
    """

    space: WidthSpace
    rule: str
    log10_before: float
    log10_after: float
    reach_before: Reach
    reach_after: Reach
    bins: tuple[int, ...] | None = None

    def summary(self) -> str:
        """One line for a log.

        Example: ``widths by ms: 10^8.8 choices -> 10^5.1; reachable 0.0314 .. 0.1063 ms -> 0.0314 .. 0.1063 ms``.
        """
        return (
            f"widths by {self.rule}: 10^{self.log10_before:.1f} choices -> 10^{self.log10_after:.1f}; "
            f"reachable {self.reach_before.smallest_ms:.4g} .. {self.reach_before.largest_ms:.4g} ms -> "
            f"{self.reach_after.smallest_ms:.4g} .. {self.reach_after.largest_ms:.4g} ms"
        )


def reduce_space(space: WidthSpace, budget: Budget, rule: str, *, smallest: int = 1, largest: int = 64) -> Reduction:
    """Cut a space by one of ``RULES``.

    Args:
        smallest, largest: units a bin may have, by MACs only.

    Raises:
        InputError: an unknown rule, or bins out of range.
    """
    if rule not in RULES:
        raise InputError(f"bins is {rule!r}; give one of {', '.join(RULES)}")
    bins = None
    if rule == "ms":
        small = stair_edges(space, budget).space
    elif rule == "macs":
        bins = bins_by_macs(space, smallest=smallest, largest=largest)
        small = binned(space, bins)
    else:
        small = space
    return Reduction(
        small,
        rule,
        log10_before=space.log10_size,
        log10_after=log10_size(WidthGrid.of(small).key),
        reach_before=budget.reachable(space),
        reach_after=budget.reachable(small),
        bins=bins,
    )


def macs_per_unit(space: WidthSpace) -> Floats:
    """MACs (G,) that the full network loses with one unit of each group, on both sides of the group; exact."""
    full = WidthGrid.of(space).full
    rows = np.repeat(full[None], len(full) + 1, axis=0)
    rows[np.arange(len(full)), np.arange(len(full))] -= 1
    macs = space.macs_array(rows)
    return np.asarray(macs[-1] - macs[:-1], dtype=np.float64)


def bins_by_macs(space: WidthSpace, *, smallest: int = 1, largest: int = 64) -> tuple[int, ...]:
    """Units a bin (G,), so that a bin of any group carries about the same MACs.

    b = 2^ceil(log2(largest sensitivity / own)), held between ``smallest`` and ``largest``, at most an eighth of the
    group, and then moved to the next size down that divides the group's units.

    Raises:
        InputError: the two bounds are not 1 <= smallest <= largest.

    Example:
        >>> bins_by_macs(space, smallest=2)                                           # doctest: +SKIP
        (4, 2, 8, 2)
    """
    if not 1 <= smallest <= largest:
        raise InputError(f"bins of {smallest} to {largest} units: give 1 <= smallest <= largest")
    cost = macs_per_unit(space)
    most = float(cost.max())
    bins = []
    for group, own in zip(space.groups, cost.tolist(), strict=True):
        size = 2 ** math.ceil(math.log2(most / own)) if own > 0 else largest
        size = min(max(size, smallest), largest, max(group.units // _LARGEST_SHARE, 1))
        bins.append(next(b for b in range(size, 0, -1) if group.units % b == 0))
    return tuple(bins)


def binned(space: WidthSpace, bins: Sequence[int]) -> WidthSpace:
    """The widths of a space that are whole bins, and the full width."""
    kept = {
        group.name: [width for width in group.widths if width % size == 0] or [group.units]
        for group, size in zip(space.groups, bins, strict=True)
    }
    return space.restrict(kept)


def levels(space: WidthSpace, refinements: int) -> list[WidthSpace]:
    """The space from coarse to fine: each level keeps every second width of the next, full widths always.

    Args:
        refinements: how often the widths are halved at most; 0 gives the space itself alone. Levels that would not be
            coarser are left out.
    """
    found = [space]
    for _ in range(refinements):
        coarser = found[0].restrict(
            {
                group.name: group.widths[::-1][::2] if len(group.widths) > 3 else group.widths
                for group in found[0].groups
            }
        )
        if WidthGrid.of(coarser).key == WidthGrid.of(found[0]).key:
            break
        found.insert(0, coarser)
    return found
