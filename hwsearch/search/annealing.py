"""Simulated annealing of widths under a budget: what quality asks for against what milliseconds cost.

The energy of a choice is what its layers are expected to be worth, negative, plus a penalty where its *predicted*
latency misses the budget. It needs predictions and no training, so thousands of choices are weighed between two
trainings. Every chain ends with a projection onto the budget: the least worth per millisecond saved goes first, and
what is left of the budget is filled by the most worth per millisecond spent.

Reference: Metropolis et al., J. Chem. Phys. 21 (1953), for the acceptance rule. The energy is hwsearch's own, see
``WidthWorth``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError
from hwsearch.search.grid import Indices, WidthGrid, Widths, row_keys

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget, Floats

_EASE = 1e-9  # a saving of less is none
_JUMPS = (1, 2, 4)  # steps of a projection: a stair can be several widths of the grid wide
_PROJECTIONS = 400  # changes a projection may make


@dataclass(frozen=True)
class AnnealSettings:
    """How long and how widely to look.

    Args:
        chains: run side by side, priced together.
        steps: proposals of each chain.
        groups: groups that one proposal changes at most.
        penalty: energy of missing the budget by all of it, where widening everything by one per cent is worth 0.01.
        cold: last temperature as a share of the first.
        reach: widths stay within this factor of those that quality was measured at.
    """

    chains: int = 12
    steps: int = 60
    groups: int = 3
    penalty: float = 8.0
    cold: float = 0.01
    reach: float = 2.0

    def __post_init__(self) -> None:
        for name in ("chains", "steps", "groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.penalty <= 0 or not 0 < self.cold <= 1 or self.reach <= 1:
            raise InputError(
                f"annealing cannot use penalty={self.penalty}, cold={self.cold}, reach={self.reach}: give a penalty "
                "above 0, cold above 0 and up to 1, and a reach above 1"
            )


@dataclass(frozen=True, eq=False)
class WidthWorth:
    """What widths are worth: the integral of each group's quality over the logarithm of its width.

    A group whose layers use what they have (a high QC) gains from more channels, one whose layers do not gains little:
    CONetV2 makes a group wider in proportion to its QC, which is to climb sum(QC * log width). QC itself falls as a
    group widens, about as ``width ** -elasticity``; so the worth of group g at width c, in units of its full width::

        worth_g(c) = weight_g * (1 - c ** -elasticity) / elasticity        (weight_g * log(c) at elasticity 0)

    Attributes:
        full: (G,) full widths.
        weights: (G,) quality at full width, summing to 1.
        elasticity: 0 or more.
    """

    full: NDArray[np.float64]
    weights: NDArray[np.float64]
    elasticity: float

    def __call__(self, choices: Widths) -> Floats:
        """Worth (N,) of choices (N, G), 0 at full width and below 0 elsewhere."""
        shares = np.asarray(choices, dtype=np.float64) / self.full
        if self.elasticity < 1e-6:
            terms = np.log(shares)
        else:
            terms = -np.expm1(-self.elasticity * np.log(shares)) / self.elasticity
        return np.asarray(terms @ self.weights, dtype=np.float64)


def anneal(
    space: WidthSpace,
    budget: Budget,
    worth: WidthWorth,
    starts: Widths,
    around: Widths,
    rng: np.random.Generator,
    settings: AnnealSettings | None = None,
) -> list[tuple[tuple[int, ...], float]]:
    """Choices inside the budget of high worth.

    Args:
        space: the allowed widths.
        budget: predicts the milliseconds.
        worth: see ``WidthWorth``.
        starts: (N, G) widths that the chains start from, in turn.
        around: (G,) widths that quality was measured at, see ``AnnealSettings.reach``.
        rng: decides everything random.

    Returns:
        (widths, energy), the best first, each inside the budget: the ends of the chains and the best met on the way,
        projected. At least one wherever the space keeps the budget.
    """
    settings = settings or AnnealSettings()
    grid = WidthGrid.of(space)
    low = grid.at_least((np.asarray(around) / settings.reach)[None])[0]
    high = np.maximum(grid.nearest((np.asarray(around) * settings.reach)[None])[0], low)
    state = np.clip(np.resize(grid.nearest(starts), (settings.chains, grid.groups)), low, high)
    energy, use = _energy(budget, grid, worth, state, settings)
    best, best_energy = state.copy(), np.where(use <= 1, energy, np.inf)
    first = None
    for step in range(settings.steps):
        tried = _proposals(state, low, high, settings.groups, rng)
        tried_energy, tried_use = _energy(budget, grid, worth, tried, settings)
        change = tried_energy - energy
        if first is None:
            finite = change[np.isfinite(change) & (change != 0)]
            first = float(np.std(finite)) if len(finite) > 1 else 0.01
            first = max(first, 1e-6)
        heat = first * settings.cold ** (step / max(settings.steps - 1, 1))
        with np.errstate(over="ignore", invalid="ignore"):
            taken = rng.random(len(state)) < np.exp(-np.maximum(change, 0.0) / heat)
        state[taken], energy[taken], use[taken] = tried[taken], tried_energy[taken], tried_use[taken]
        better = (use <= 1) & (energy < best_energy)
        best[better], best_energy[better] = state[better], energy[better]
    ends = np.concatenate([state, best])
    rows = project(space, budget, worth, grid.take(ends), rng)
    found = dict(zip(row_keys(rows), (-worth(rows)).tolist(), strict=True))
    kept = budget.feasible(rows)
    keys = {key for key, fits in zip(row_keys(rows), kept, strict=True) if fits}
    return sorted(((key, found[key]) for key in keys), key=lambda item: (item[1], item[0]))


def project(space: WidthSpace, budget: Budget, worth: WidthWorth, choices: Widths, rng: np.random.Generator) -> Widths:
    """Move choices (N, G) into the budget at the least loss of worth, then fill what is left of it.

    Where no single step saves time (time is a staircase), ``Budget.repair`` brings the choice inside.
    """
    grid = WidthGrid.of(space)
    rows = [
        _filled(budget, grid, worth, _inside(space, budget, grid, worth, row, rng)) for row in grid.nearest(choices)
    ]
    return grid.take(np.stack(rows))


def _energy(
    budget: Budget, grid: WidthGrid, worth: WidthWorth, state: Indices, settings: AnnealSettings
) -> tuple[Floats, Floats]:
    """Energies (N,) and uses of the budget (N,)."""
    rows = grid.take(state)
    use = budget.use(rows)
    return settings.penalty * np.maximum(use - 1, 0.0) - worth(rows), use


def _proposals(state: Indices, low: Indices, high: Indices, groups: int, rng: np.random.Generator) -> Indices:
    """Every chain moves one to ``groups`` of its groups by a few steps, up or down."""
    movable = np.flatnonzero(high > low)
    tried = state.copy()
    if len(movable) == 0:
        return tried
    for row in tried:
        for g in rng.choice(movable, size=min(1 + int(rng.integers(groups)), len(movable)), replace=False):
            far = 1 + int(rng.exponential(0.1 * (high[g] - low[g])))
            row[g] = np.clip(row[g] + (far if rng.random() < 0.5 else -far), low[g], high[g])
    return tried


def _steps_from(index: Indices, grid: WidthGrid, sign: int) -> Indices:
    """All choices (K, G) that differ from one in a single group, narrower or wider by one of ``_JUMPS``."""
    found = []
    for g in range(grid.groups):
        for jump in _JUMPS:
            to = index[g] + sign * jump
            if 0 <= to <= grid.top[g]:
                found.append((g, to))
    tried = np.repeat(index[None], len(found), axis=0)
    for row, (g, to) in enumerate(found):
        tried[row, g] = to
    return tried


def _inside(
    space: WidthSpace, budget: Budget, grid: WidthGrid, worth: WidthWorth, index: Indices, rng: np.random.Generator
) -> Indices:
    """One choice brought inside: again and again the step that loses the least worth per use saved."""
    use = float(budget.use(grid.take(index[None]))[0])
    for _ in range(_PROJECTIONS):
        if use <= 1:
            return index
        tried = _steps_from(index, grid, -1)
        if len(tried) == 0:
            break
        rows = grid.take(tried)
        uses = budget.use(rows)
        # Savings beyond what is needed are worth nothing.
        saved = np.minimum(use - uses, use - 1)
        lost = float(worth(grid.take(index[None]))[0]) - worth(rows)
        price = np.where(saved > _EASE, lost / np.maximum(saved, _EASE), np.inf)
        at = int(np.argmin(price))
        if not np.isfinite(price[at]):
            break
        index, use = tried[at], float(uses[at])
    if use <= 1:
        return index
    return np.asarray(grid.nearest(budget.repair(space, grid.take(index[None]), rng))[0], dtype=np.int64)


def _filled(budget: Budget, grid: WidthGrid, worth: WidthWorth, index: Indices) -> Indices:
    """One choice inside the budget widened while something fits: most worth per use first; what is free is taken."""
    use = float(budget.use(grid.take(index[None]))[0])
    for _ in range(_PROJECTIONS):
        tried = _steps_from(index, grid, 1)
        if len(tried) == 0 or use > 1:
            return index
        rows = grid.take(tried)
        uses = budget.use(rows)
        won = worth(rows) - float(worth(grid.take(index[None]))[0])
        gain = np.where((uses <= 1) & (won > 0), won / np.maximum(uses - use, _EASE), -np.inf)
        at = int(np.argmax(gain))
        if not np.isfinite(gain[at]):
            return index
        index, use = tried[at], float(uses[at])
    return index


def worth_of(
    full: Sequence[int],
    widths: Sequence[Sequence[int]],
    qualities: Sequence[Sequence[float]],
    shares: Sequence[float],
    momentum: float,
    prior: float = 0.5,
) -> WidthWorth:
    """Worth from what was measured so far.

    Args:
        full: (G,) full widths.
        widths: (T, G) of the trials, oldest first.
        qualities: (T, G) their quality by group, 0 or more.
        shares: (G,) how much each group counts: the share of the network's layer sides that it decides.
        momentum: weight of a trial against the next one, 0 to 1 (normalised: what is averaged keeps its size).
        prior: elasticity before there is anything to learn it from.

    A group that nothing was learnt in yet counts as the mean group, so that the first trials do not starve it.
    """
    c = np.asarray(widths, dtype=np.float64) / np.asarray(full, dtype=np.float64)
    q = np.asarray(qualities, dtype=np.float64)
    elasticity = _elasticity(c, q, prior)
    at_full = q * c**elasticity
    age = momentum ** np.arange(len(q))[::-1]
    mean = (age[:, None] * at_full).sum(axis=0) / age.sum()
    known = mean > 0
    mean = np.where(known, mean, mean[known].mean() if known.any() else 1.0)
    weights = mean * np.asarray(shares, dtype=np.float64)
    return WidthWorth(np.asarray(full, dtype=np.float64), weights / weights.sum(), elasticity)


def _elasticity(c: NDArray[np.float64], q: NDArray[np.float64], prior: float, strength: float = 0.5) -> float:
    """How fast quality falls with width: pooled over groups from the changes between successive trials.

    What all groups have in common is taken off first (training makes all of them better), and a prior stands in while
    little has changed. Never negative: then the widest groups would be worth more the wider they are.
    """
    both = (q[1:] > 0) & (q[:-1] > 0)
    dq = np.log(np.where(both, q[1:], 1.0)) - np.log(np.where(both, q[:-1], 1.0))
    dc = np.log(c[1:]) - np.log(c[:-1])
    top = bottom = 0.0
    for trial in range(len(dq)):
        rows = both[trial]
        if rows.sum() > 1:
            x, y = dc[trial][rows], dq[trial][rows]
            x, y = x - x.mean(), y - y.mean()
            top, bottom = top - float(x @ y), bottom + float(x @ x)
    return float(np.clip((prior * strength + top) / (strength + bottom), 0.0, 2.0))
