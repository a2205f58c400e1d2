"""What a search must beat: uniform scaling and random widths, held to the same budget and the same measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.grid import WidthGrid, Widths
from hwsearch.search.settle import Measure, Settled, settle

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget

_RATIOS = 256  # steps of the ratio that are looked at; more than any group has useful widths


def uniform(
    space: WidthSpace,
    budget: Budget,
    measure: Measure | None = None,
    *,
    rounds: int = 6,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Settled:
    """The widest uniform scaling of the network whose measured time keeps the budget.

    All different scalings are predicted, because time is not monotone in the ratio; the widest that fits is measured,
    and measured over predicted corrects the next pick, as in a search.

    Args:
        measure: times a choice on the device; None: the limits' own, or none (the prediction then decides).

    Raises:
        InfeasibleBudgetError: not even the narrowest network of the space keeps the budget.
        AnswerIsNo: no uniform scaling keeps it.
    """
    budget.check_reachable(space)
    scalings = uniform_choices(space)

    def propose(corrected: Budget, _: Sequence[WidthChoice]) -> list[Candidate]:
        # One proposal only: a narrower scaling is never better than one that is known to fit.
        fits = np.flatnonzero(corrected.feasible(scalings))
        return [] if len(fits) == 0 else [_candidate(corrected, scalings[fits[-1]], -float(fits[-1]))]

    return settle(
        space, budget, propose, measure, rounds=rounds, per_round=1, margin=0.0, journal=journal, progress=progress
    )


def uniform_choices(space: WidthSpace) -> Widths:
    """All different uniform scalings of a space, narrowest first, int64 (N, G)."""
    grid = WidthGrid.of(space)
    rows = grid.uniform(np.arange(1, _RATIOS + 1) / _RATIOS)
    different = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])
    return np.asarray(rows[different], dtype=np.int64)


def random(space: WidthSpace, budget: Budget, rng: np.random.Generator, count: int = 1) -> list[Candidate]:
    """``count`` random choices inside the budget: widths drawn uniformly from the space, then repaired. Their loss is
    NaN: nothing was scored.

    Raises:
        InfeasibleBudgetError: no choice keeps the budget.
    """
    budget.check_reachable(space)
    rows = budget.repair(space, WidthGrid.of(space).sample(count, rng), rng)
    return [_candidate(budget, row, float("nan")) for row in rows]


def _candidate(budget: Budget, row: Widths, loss: float) -> Candidate:
    from hwsearch.graph.widths import WidthChoice

    return Candidate(WidthChoice(tuple(row.tolist())), loss, tuple(budget.evaluate(row[None])[0].tolist()))
