"""Stair edges: the widths that are worth having, because no larger width is as fast.

A runtime pads channels to blocks and picks its kernels by shape, so time is a staircase in width and not even monotone.
Only the right-hand edges of the stairs matter: any other width can be made larger for nothing. Edges are found by
asking the predictor for every allowed width of one group at a time, the other groups at full and at middle width.

Reference: hwsearch's own, in the place of CafeNet's bins by MACs (ICLR 2021, FLOPs-sensitive bins).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import InputError
from hwsearch.latency.stairs import TOLERANCE, kept_widths
from hwsearch.search.budget import Reach
from hwsearch.search.grid import WidthGrid, Widths

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget, Floats


@dataclass(frozen=True)
class Stairs:
    """A space cut down to its stair edges.

    ``log10_before`` and ``log10_after`` count the choices (powers of ten); ``reach_before`` and ``reach_after`` are the
    smallest and the full network's milliseconds on the limit that binds.
    """

    space: WidthSpace
    edges: tuple[tuple[int, ...], ...]
    widths_before: tuple[int, ...]
    log10_before: float
    log10_after: float
    reach_before: Reach
    reach_after: Reach

    def snap(self, choices: Widths) -> Widths:
        """Each width moved to the smallest edge that is not narrower: more channels in no more time."""
        grid = WidthGrid.of(self.space)
        return grid.take(grid.at_least(grid.population(choices)))

    def rows(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """One row per group: (name, full width, number of allowed widths before, widths kept)."""
        groups = zip(self.space.groups, self.widths_before, self.edges, strict=True)
        return [(group.name, group.units, before, edges) for group, before, edges in groups]

    def summary(self) -> str:
        """One line for a log."""
        return (
            f"stair edges: 10^{self.log10_before:.1f} choices -> 10^{self.log10_after:.1f}; "
            f"reachable {self.reach_before.smallest_ms:.4g} .. {self.reach_before.largest_ms:.4g} ms -> "
            f"{self.reach_after.smallest_ms:.4g} .. {self.reach_after.largest_ms:.4g} ms"
        )


def stair_edges(space: WidthSpace, budget: Budget, *, tolerance: float = TOLERANCE) -> Stairs:
    """Keep the widths that no larger width matches in time, on any limit of the budget.

    Args:
        space: all allowed widths.
        budget: its latencies are asked; its milliseconds only choose which limit ``reach`` reports.
        tolerance: a saving counts only above this share of the group's own range of times. 0 keeps every width that
            saves anything.

    Returns:
        The restricted space and what the cut cost. A width is dropped only if one and the same larger, kept width is no
        slower on every limit, with the others at full width and at middle width.

    Raises:
        InputError: the tolerance is not in [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance is {tolerance!r}: give a share from 0 up to, not including, 1")
    grid = WidthGrid.of(space)
    edges = tuple(
        tuple(int(w) for w in allowed[kept_widths(_times(budget, grid, g), tolerance)])
        for g, allowed in enumerate(grid.allowed)
    )
    small = space.restrict({group.name: kept for group, kept in zip(space.groups, edges, strict=True)})
    return Stairs(
        small,
        edges,
        tuple(len(allowed) for allowed in grid.allowed),
        log10_before=log10_size(grid.key),
        log10_after=log10_size(edges),
        reach_before=budget.reachable(space),
        reach_after=budget.reachable(small),
    )


def log10_size(allowed: tuple[tuple[int, ...], ...]) -> float:
    """Powers of ten in the number of choices."""
    return float(np.sum(np.log10([len(widths) for widths in allowed])))


def _times(budget: Budget, grid: WidthGrid, group: int) -> Floats:
    """Milliseconds (W, C) of all widths of one group; C: every limit, with the other groups full and at the middle."""
    widths = grid.allowed[group]
    columns = []
    for others in (grid.full, grid.uniform([0.5])[0]):
        rows = np.repeat(others[None], len(widths), axis=0)
        rows[:, group] = widths
        columns.append(budget.evaluate(rows))
    return np.concatenate(columns, axis=1)
