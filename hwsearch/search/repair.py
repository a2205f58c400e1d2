"""Moving whole populations into a budget with few predictions: scale, then walk, then polish.

A prediction costs milliseconds (the runtime lowers the network), so rows are predicted in batches and the number of
rounds is small: interpolation finds a crossing in three or four, bisection guards it where time jumps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwsearch.search.grid import Indices, WidthGrid, Widths

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget, Floats

_SCALE_ROUNDS = 6
_POLISH_ROUNDS = 4
_POLISH_TRIES = 6
_POWER = 1.3  # time grows with about this power of a uniform scaling (between bandwidth's 1 and arithmetic's 2)


@dataclass
class _Bracket:
    """Per row: the best feasible choice known, and an infeasible one (``high_use`` is inf where none is known)."""

    low: Indices
    low_use: Floats  # (N,), -inf where no feasible choice is known
    high: Indices
    high_use: Floats

    def put(self, rows: NDArray[np.int64], tried: Indices, uses: Floats) -> None:
        """Sort new predictions of ``rows`` into the bracket."""
        better = (uses <= 1.0) & (uses > self.low_use[rows])
        self.low[rows[better]], self.low_use[rows[better]] = tried[better], uses[better]
        tighter = (uses > 1.0) & (uses < self.high_use[rows])
        self.high[rows[tighter]], self.high_use[rows[tighter]] = tried[tighter], uses[tighter]


def repair(budget: Budget, space: WidthSpace, choices: Widths, rng: np.random.Generator) -> Widths:
    """See ``Budget.repair``."""
    grid = WidthGrid.of(space)
    start = grid.nearest(grid.population(choices))
    if len(start) == 0 or grid.groups == 0:
        return grid.population(choices)
    full_use = float(budget.use(grid.full[None])[0])
    floor = budget.floor if full_use > 1.0 else 0.0
    count = len(start)
    bracket = _Bracket(start.copy(), np.full(count, -np.inf), start.copy(), np.full(count, np.inf))
    first = budget.use(grid.take(start))
    bracket.put(np.arange(count), start, first)
    _scale(budget, grid, start, first, bracket, floor)

    lost = np.flatnonzero(np.isneginf(bracket.low_use))
    if len(lost):
        smallest, use = budget.smallest_choice(space, enough=1.0)
        bracket.low[lost], bracket.low_use[lost] = grid.nearest(smallest[None]), use
        # An unreachable budget: the choice that misses it least is all there is. check_reachable has said so before.
        if use > 1.0:
            return grid.take(bracket.low)
    unbounded = np.flatnonzero(np.isposinf(bracket.high_use))
    bracket.high[unbounded], bracket.high_use[unbounded] = grid.top, full_use
    _walk(budget, grid, bracket, floor, rng)
    _polish(budget, grid, bracket, floor, rng)
    return grid.take(bracket.low)


def _short(bracket: _Bracket, floor: float) -> NDArray[np.int64]:
    """Rows whose best feasible choice is still below the floor (or missing)."""
    return np.flatnonzero(bracket.low_use < floor)


def _scale(budget: Budget, grid: WidthGrid, start: Indices, first: Floats, bracket: _Bracket, floor: float) -> None:
    """Scale the widths of each row by one factor: keeps a choice's proportions, which are what evolution found."""
    widths = grid.take(start).astype(np.float64)
    target = np.log((1.0 + floor) / 2)
    below = np.where(first <= 1.0, 0.0, -np.inf)  # log factor of the feasible end; -inf: none yet
    above = np.where(first > 1.0, 0.0, np.inf)
    below_use, above_use = first.copy(), first.copy()
    for _ in range(_SCALE_ROUNDS):
        rows = _short(bracket, floor)
        if len(rows) == 0:
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            log_below, log_above = np.log(below_use[rows]), np.log(above_use[rows])
            share = np.clip((target - log_below) / (log_above - log_below), 0.1, 0.9)
            inside = below[rows] + share * (above[rows] - below[rows])
            down = above[rows] + np.minimum((target - log_above) / _POWER, -0.1)
            up = below[rows] + np.maximum((target - log_below) / _POWER, 0.1)
        factor = np.where(np.isneginf(below[rows]), down, np.where(np.isposinf(above[rows]), up, inside))
        factor = np.nan_to_num(factor, nan=-0.7, posinf=1.0, neginf=-1.0)  # a prediction of 0 or inf has no slope
        tried = grid.nearest(widths[rows] * np.exp(factor)[:, None])
        uses = budget.use(grid.take(tried))
        bracket.put(rows, tried, uses)
        fits = uses <= 1.0
        below[rows[fits]], below_use[rows[fits]] = factor[fits], uses[fits]
        above[rows[~fits]], above_use[rows[~fits]] = factor[~fits], uses[~fits]


def _walk(budget: Budget, grid: WidthGrid, bracket: _Bracket, floor: float, rng: np.random.Generator) -> None:
    """Walk from the feasible to the infeasible end by single steps of single groups, to the last feasible point.

    The order of the steps is random, so that equal parents give different children. Somewhere on the way the budget is
    crossed; the crossing is found by interpolation, with a bisection every other round where time jumps.
    """
    rows = _short(bracket, floor)
    rows = rows[bracket.high_use[rows] > 1.0]
    if len(rows) == 0:
        return
    low, change = bracket.low[rows].copy(), bracket.high[rows] - bracket.low[rows]
    when = _moments(change, rng)
    first, last = np.zeros(len(rows), dtype=np.int64), np.abs(change).sum(axis=1)
    first_use, last_use = bracket.low_use[rows].copy(), bracket.high_use[rows].copy()
    target = (1.0 + floor) / 2
    for turn in range(64):  # bisection alone needs log2(steps); 64 is never reached
        open_ = np.flatnonzero((last - first > 1) & (bracket.low_use[rows] < floor))
        if len(open_) == 0:
            return
        span = last[open_] - first[open_]
        slope = np.maximum(np.nan_to_num(last_use[open_] - first_use[open_], posinf=1e9), 1e-12)
        ahead = (target - first_use[open_]) / slope * span if turn % 2 == 0 else span / 2
        step = first[open_] + np.clip(np.round(ahead).astype(np.int64), 1, span - 1)
        taken = np.asarray([[len_before(times, s) for times in when[r]] for r, s in zip(open_, step, strict=True)])
        tried = low[open_] + np.sign(change[open_]) * taken
        uses = budget.use(grid.take(tried))
        bracket.put(rows[open_], tried, uses)
        fits = uses <= 1.0
        first[open_[fits]], first_use[open_[fits]] = step[fits], uses[fits]
        last[open_[~fits]], last_use[open_[~fits]] = step[~fits], uses[~fits]


def _moments(change: Indices, rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
    """For every row and group, the sorted moments (0 ..) at which that group makes its steps; moments are shuffled."""
    moments = []
    for row in np.abs(change):
        order = rng.permutation(int(row.sum()))
        moments.append([np.sort(part) for part in np.split(order, np.cumsum(row)[:-1])])
    return moments


def len_before(times: NDArray[np.int64], moment: int) -> int:
    """How many of the sorted ``times`` lie before ``moment``."""
    return int(np.searchsorted(times, moment, side="left"))


def _polish(budget: Budget, grid: WidthGrid, bracket: _Bracket, floor: float, rng: np.random.Generator) -> None:
    """Rows just below the floor, where one step was too much: try single steps of other groups, keep the fullest."""
    for _ in range(_POLISH_ROUNDS):
        rows = np.repeat(_short(bracket, floor), _POLISH_TRIES)
        if len(rows) == 0:
            return
        tried = bracket.low[rows].copy()
        lane = np.arange(len(rows))
        tried[lane, rng.integers(0, grid.groups, len(rows))] += 1
        # Half of the tries also take a step back somewhere else: finer changes than any single step.
        back = lane[lane % 2 == 1]
        tried[back, rng.integers(0, grid.groups, len(back))] -= 1
        tried = np.clip(tried, 0, grid.top)
        uses = budget.use(grid.take(tried))
        for lane_of_row in range(_POLISH_TRIES):  # one at a time: rows repeat, and the best of each must win
            bracket.put(
                rows[lane_of_row::_POLISH_TRIES], tried[lane_of_row::_POLISH_TRIES], uses[lane_of_row::_POLISH_TRIES]
            )
