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
_NEAR = (0.8, 1.25)  # uses that a walk alone mends: half the predictions, and a child keeps more of its parents
_INSIDE = 0.9  # the use down to which a choice that is too slow may fall
_POWER = 1.3  # time grows with about this power of a uniform scaling (between bandwidth's 1 and arithmetic's 2)


@dataclass
class _Bracket:
    """Per row: the best feasible choice known, and an infeasible one (``high_use`` is inf where none is known)."""

    low: Indices
    low_use: Floats  # (N,), -inf where no feasible choice is known
    high: Indices
    high_use: Floats
    aim: Floats  # (N,) the use from which a row is done

    @property
    def short(self) -> NDArray[np.int64]:
        """Rows whose best feasible choice is still below their aim, or that have none."""
        return np.flatnonzero(self.low_use < self.aim)

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
    first = budget.use(grid.take(start))
    # What is too slow comes down to just inside, however low the floor: a lower aim would change it more than it needs.
    aim = np.where(first > 1.0, max(floor, _INSIDE), floor)
    bracket = _Bracket(start.copy(), np.full(count, -np.inf), start.copy(), np.full(count, np.inf), aim)
    bracket.put(np.arange(count), start, first)
    _scale(budget, grid, start, first, bracket)

    lost = np.flatnonzero(np.isneginf(bracket.low_use))
    if len(lost):
        smallest, use = budget.smallest_choice(space, enough=1.0)
        bracket.low[lost], bracket.low_use[lost] = grid.nearest(smallest[None]), use
        if use > 1.0:
            # An unreachable budget: what misses it least is all there is, and check_reachable has said so before.
            return grid.take(bracket.low)
    unbounded = np.flatnonzero(np.isposinf(bracket.high_use))
    bracket.high[unbounded], bracket.high_use[unbounded] = grid.top, full_use
    _walk(budget, grid, bracket, rng)
    _polish(budget, grid, bracket, rng)
    return grid.take(bracket.low)


def _scale(budget: Budget, grid: WidthGrid, start: Indices, first: Floats, bracket: _Bracket) -> None:
    """Scale the widths of each row by one factor: keeps a choice's proportions, which are what evolution found."""
    widths = grid.take(start).astype(np.float64)
    middle = np.log((1.0 + bracket.aim) / 2)
    below = np.where(first <= 1.0, 0.0, -np.inf)  # log factor of the feasible end; -inf: none yet
    above = np.where(first > 1.0, 0.0, np.inf)
    below_use, above_use = first.copy(), first.copy()
    far = (first < _NEAR[0]) | (first > _NEAR[1])
    for _ in range(_SCALE_ROUNDS):
        rows = bracket.short
        rows = rows[far[rows]]
        if len(rows) == 0:
            return
        target = middle[rows]
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


def _walk(budget: Budget, grid: WidthGrid, bracket: _Bracket, rng: np.random.Generator) -> None:
    """Walk from the feasible to the infeasible end by single steps of single groups, to the last feasible point.

    The order of the steps is random, so that equal parents give different children. Somewhere on the way the budget is
    crossed; the crossing is found by interpolation, with a bisection every other round where time jumps.
    """
    rows = bracket.short
    rows = rows[bracket.high_use[rows] > 1.0]
    if len(rows) == 0:
        return
    low, change = bracket.low[rows].copy(), bracket.high[rows] - bracket.low[rows]
    when = _moments(change, rng)
    first, last = np.zeros(len(rows), dtype=np.int64), np.abs(change).sum(axis=1)
    first_use, last_use = bracket.low_use[rows].copy(), bracket.high_use[rows].copy()
    target = (1.0 + bracket.aim[rows]) / 2
    for turn in range(64):  # bisection alone needs log2(steps); 64 is never reached
        open_ = np.flatnonzero((last - first > 1) & (bracket.low_use[rows] < bracket.aim[rows]))
        if len(open_) == 0:
            return
        span = last[open_] - first[open_]
        slope = np.maximum(np.nan_to_num(last_use[open_] - first_use[open_], posinf=1e9), 1e-12)
        ahead = (target[open_] - first_use[open_]) / slope * span if turn % 2 == 0 else span / 2
        step = first[open_] + np.clip(np.round(ahead).astype(np.int64), 1, span - 1)
        taken = np.asarray([[_steps_before(times, s) for times in when[r]] for r, s in zip(open_, step, strict=True)])
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


def _steps_before(times: NDArray[np.int64], moment: int) -> int:
    """How many of the sorted ``times`` lie before ``moment``."""
    return int(np.searchsorted(times, moment, side="left"))


def _polish(budget: Budget, grid: WidthGrid, bracket: _Bracket, rng: np.random.Generator) -> None:
    """Rows just below their aim, where one step was too much: widen single groups, or trade one for another."""
    reach = np.maximum(grid.top // 3, 1)  # a stair can be several steps of the grid wide
    for _ in range(_POLISH_ROUNDS):
        rows = np.repeat(bracket.short, _POLISH_TRIES)
        if len(rows) == 0:
            return
        lane = np.arange(len(rows))
        wider, narrower = rng.integers(0, grid.groups, (2, len(rows)))
        steps = 1 + np.floor(rng.random((2, len(rows))) * reach[[wider, narrower]]).astype(np.int64)
        tried = bracket.low[rows].copy()
        tried[lane, wider] += steps[0]
        trade = lane % 2 == 1  # half of the tries also give something back elsewhere: finer than any single step
        tried[lane[trade], narrower[trade]] -= steps[1][trade]
        tried = np.clip(tried, 0, grid.top)
        uses = budget.use(grid.take(tried))
        for lane_of_row in range(_POLISH_TRIES):  # one at a time: rows repeat, and the best of each must win
            part = slice(lane_of_row, None, _POLISH_TRIES)
            bracket.put(rows[part], tried[part], uses[part])
