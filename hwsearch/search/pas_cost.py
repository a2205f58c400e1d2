"""Milliseconds that gradient descent can follow: a lower bound of what widths cost, and the budget's term in a loss.

Predicted time is a staircase in width and not even monotone, so it has no useful gradient of its own. A ``Surrogate``
is its envelope min over c' >= c (a wider layer that is faster is what would be built), piecewise linear between the
stair edges. There are three:

* ``TableSurrogate``: from a ``WidthTable``, term by term, linear in every width of a kernel term, and summed.
* ``CurveSurrogate``: of any other latency (an upper quantile, a latency without a table), by curves over one group at a
  time around the widths that are asked about.
* ``PolynomialSurrogate``: multiply-accumulates and parameters, exactly.

``BudgetTerm`` adds up the limits: squared relative errors, each with a weight that follows how far its limit is missed.

Reference: PaS (IJCAI 2022) has alpha * (MACs - target)^2 with MACs as the product of neighbouring widths; milliseconds,
the relative error and the moving weight are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.stairs import TOLERANCE, kept_widths
from hwsearch.latency.width_program import SumIndex, WidthIndex
from hwsearch.search.budget import MegaMacs
from hwsearch.search.grid import WidthGrid, Widths

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.latency.width_table import Factor, WidthTable
    from hwsearch.search.budget import Budget, Limit

Floats = NDArray[np.float64]

_CONTEXTS = 256  # of a table's other axes, that edges are looked for in
_STEP = 1e-4  # relative step of the derivative of a network's own terms
#: A weight stays within this factor of where it began.
_MOST_PRESSURE = 1e6


class Surrogate(Protocol):
    """A differentiable cost of widths."""

    def __call__(self, widths: Floats, *, growing: bool = False) -> tuple[float, Floats]:
        """(cost, its derivative by each width (G,)) at real-valued widths (G,).

        At an edge the derivative is that of the narrower side; of the wider side where ``growing``.
        """


class TableSurrogate:
    """The lower envelope of a ``WidthTable``, linear between stair edges in every width of each of its terms.

    Args:
        table: its unknown entries are priced now, which takes seconds to a minute.
        factor: every cost is multiplied by it.
        tolerance: a step counts as an edge above this share of its term's range; with 0 the surrogate is nowhere above
            the envelope, otherwise by no more than that.
    """

    def __init__(self, table: WidthTable, factor: float = 1.0, *, tolerance: float = TOLERANCE) -> None:
        table.expand()
        self.factor, self._predictor, self._groups = factor, table.predictor, len(table.space.groups)
        self._terms = [_Term(table, part, tolerance) for part in table.factors]

    def __call__(self, widths: Floats, *, growing: bool = False) -> tuple[float, Floats]:
        """See ``Surrogate``."""
        ms, mb = 0.0, 0.0
        by_width = np.zeros((2, self._groups))
        for term in self._terms:
            value, slopes = term.at(widths, growing)
            ms, mb = ms + value.real, mb + value.imag
            by_width += np.stack([slopes.real, slopes.imag])
        near = [1 + _STEP, 1 - _STEP]
        times = self._whole(
            np.array([ms, *(ms * f for f in near), ms, ms]), np.array([mb, mb, mb, *(mb * f for f in near)])
        )
        by_ms = (times[1] - times[2]) / max(2 * _STEP * ms, 1e-300)
        by_mb = (times[3] - times[4]) / max(2 * _STEP * mb, 1e-300)
        return float(times[0]), np.asarray(by_ms * by_width[0] + by_mb * by_width[1])

    def _whole(self, ms: Floats, mb: Floats) -> Floats:
        """Milliseconds (N,) of networks whose kernels sum up to so many milliseconds and megabytes."""
        total = ms + self._predictor.context_ms(np.maximum(mb, 1e-12)) + self._predictor.overhead_ms
        return np.asarray(self.factor * self._predictor.stretched(total))


class _Term:
    """One table: its envelope at the edges of its axes, which are widths of groups or sums of some.

    What decides a kernel's form beyond its own widths (alignment of other groups) is taken at its best: edges are where
    the runtime takes the fast form.
    """

    def __init__(self, table: WidthTable, part: Factor, tolerance: float) -> None:
        values = part.table.reshape(part.sizes)
        self._maps: list[Floats] = []  # per axis: (G + 1,) weights of the widths and a constant
        self._ticks: list[Floats] = []
        groups = table.space.groups
        for axis in reversed(range(len(part.indices))):
            if not isinstance(table.program.indices[part.indices[axis]], WidthIndex | SumIndex):
                values = values.real.min(axis=axis) + 1j * values.imag.min(axis=axis)
        for number in part.indices:
            index = table.program.indices[number]
            row = np.zeros(len(groups) + 1)
            if isinstance(index, WidthIndex):
                row[index.group] = 1.0
                ticks = table.program.widths[index.group].astype(np.float64)
            elif isinstance(index, SumIndex):
                ticks = np.arange(index.size, dtype=np.float64)
                for group, steps in index.steps.items():
                    widths = table.program.widths[group]
                    if len(widths) > 1:
                        row[group] = (steps[-1] - steps[0]) / (widths[-1] - widths[0])
                        row[-1] -= row[group] * widths[0]
            else:
                continue
            self._maps.append(row)
            self._ticks.append(ticks)
        envelope = values.real.copy()
        for axis in range(envelope.ndim):
            envelope = np.flip(np.minimum.accumulate(np.flip(envelope, axis), axis=axis), axis)
        edges = [_edges(envelope, axis, tolerance) for axis in range(envelope.ndim)]
        self._ticks = [ticks[kept] for ticks, kept in zip(self._ticks, edges, strict=True)]
        at = np.ix_(*edges)
        self._values = envelope[at] + 1j * values.imag[at]

    def at(self, widths: Floats, growing: bool) -> tuple[complex, NDArray[np.complex128]]:
        """(milliseconds + i megabytes, derivative (G,)) by linear interpolation along every axis."""
        with_one = np.append(widths, 1.0)
        corners, shares, slopes = [], [], []
        for row, ticks in zip(self._maps, self._ticks, strict=True):
            low, share, slope = _cell(ticks, float(row @ with_one), growing)
            corners.append([low, min(low + 1, len(ticks) - 1)])
            shares.append(np.array([1 - share, share]))
            slopes.append(np.array([-slope, slope]))
        cube = self._values[np.ix_(*corners)]
        derivative = np.zeros(len(widths), dtype=np.complex128)
        for axis, row in enumerate(self._maps):
            along = [slopes[a] if a == axis else shares[a] for a in range(len(shares))]
            derivative += _contracted(cube, along) * row[:-1]
        return complex(_contracted(cube, shares)), derivative


class CurveSurrogate:
    """The lower envelope around given widths, of any function of allowed widths.

    At the allowed widths just above those asked about, each group's curve is followed with the others fixed: the value
    is what the curves say together, the derivative each curve's own.

    Args:
        space: the allowed widths.
        evaluate: milliseconds (N,) of widths (N, G).
        tolerance: see ``TableSurrogate``.
    """

    def __init__(
        self, space: WidthSpace, evaluate: Callable[[Widths], Floats], *, tolerance: float = TOLERANCE
    ) -> None:
        self._grid, self._evaluate, self._tolerance = WidthGrid.of(space), evaluate, tolerance
        self._known: dict[tuple[int, ...], tuple[list[Floats], list[Floats]]] = {}

    def __call__(self, widths: Floats, *, growing: bool = False) -> tuple[float, Floats]:
        """See ``Surrogate``."""
        base = self._grid.take(self._grid.at_least(np.asarray(widths)[None]))[0]
        ticks, curves = self._curves(tuple(base.tolist()))
        values, slopes, above = [], [], []
        for group, (own, curve) in enumerate(zip(ticks, curves, strict=True)):
            low, share, slope = _cell(own, float(widths[group]), growing)
            rise = float(curve[min(low + 1, len(own) - 1)] - curve[low])
            values.append(float(curve[low]) + share * rise)
            slopes.append(slope * rise)
            at, part, _ = _cell(own, float(base[group]), growing)
            above.append(float(curve[at]) + part * float(curve[min(at + 1, len(own) - 1)] - curve[at]))
        return max(min(above) + sum(values) - sum(above), 0.0), np.asarray(slopes)

    def _curves(self, base: tuple[int, ...]) -> tuple[list[Floats], list[Floats]]:
        """Edges and envelopes of every group's curve around a base; all asked for at once."""
        if base not in self._known:
            rows = []
            for group, allowed in enumerate(self._grid.allowed):
                part = np.repeat(np.asarray(base, dtype=np.int64)[None], len(allowed), axis=0)
                part[:, group] = allowed
                rows.append(part)
            times = np.asarray(self._evaluate(np.concatenate(rows)), dtype=np.float64)
            ticks, curves = [], []
            for allowed, own in zip(
                self._grid.allowed, np.split(times, np.cumsum([len(part) for part in rows])[:-1]), strict=True
            ):
                envelope = np.minimum.accumulate(own[::-1])[::-1]
                kept = _edges(envelope, 0, self._tolerance)
                ticks.append(allowed[kept].astype(np.float64))
                curves.append(envelope[kept])
            self._known[base] = (ticks, curves)
        return self._known[base]


class PolynomialSurrogate:
    """Multiply-accumulates or parameters: products of at most two factors of a width each, so differences are exact.

    Args:
        evaluate: counts (N,) of any whole widths (N, G), allowed or not.
    """

    def __init__(self, evaluate: Callable[[Widths], NDArray[np.generic]]) -> None:
        self._evaluate = evaluate

    def __call__(self, widths: Floats, *, growing: bool = False) -> tuple[float, Floats]:
        """See ``Surrogate``; widths are whole."""
        row = np.rint(widths).astype(np.int64)
        ones = np.eye(len(row), dtype=np.int64)
        counts = np.asarray(self._evaluate(np.concatenate([row[None], row + ones, row - ones])), dtype=np.float64)
        return float(counts[0]), (counts[1 : len(row) + 1] - counts[len(row) + 1 :]) / 2


def surrogate_of(space: WidthSpace, limit: Limit, *, tolerance: float = TOLERANCE) -> Surrogate:
    """The surrogate of what a limit compares: from its table where it has one."""
    latency = limit.latency
    if isinstance(latency, MegaMacs):
        return PolynomialSurrogate(latency.evaluate)
    if isinstance(latency, NetworkLatency) and limit.quantile == 0.5 and latency.table is not None:
        return TableSurrogate(latency.table, latency.factor, tolerance=tolerance)
    return CurveSurrogate(space, limit.evaluate, tolerance=tolerance)


class BudgetTerm(nn.Module):
    """The penalty: sum over limits of weight * (cost / target - 1)^2.

    A limit's weight is multiplied by exp(``rate`` * relative error) after every step: it grows while the limit is
    missed, which makes the search arrive whatever the size of the task's own gradients, and shrinks below it. Below
    all its limits the search is pulled back up to the one that binds; a limit that is kept never pulls against one that
    is missed. How far a limit is missed is the prediction at the next allowed widths above, which is what would be
    built; the surrogate, scaled alike, says which way is cheaper.

    All units of a group get the same push. A strong one would carry them over the threshold in one step, before the
    task's loss has told them apart; ``most`` holds the strongest push, at the first weights, down to a speed.

    Args:
        space: the allowed widths.
        surrogates: one per target.
        targets: costs to reach.
        predictions: per surrogate what it stands for: costs (N,) of allowed widths (N, G); None: it is exact.
        pressure: the first weight of every limit.
        rate: of the weights; 0 keeps them as they are (the paper).
        most: largest derivative by one width that the penalty has at the first weights; None: it is as it is.

    The buffer ``pressure`` (limits,) holds the weights: a checkpoint keeps them.
    """

    pressure: Tensor

    def __init__(
        self,
        space: WidthSpace,
        surrogates: Sequence[Surrogate],
        targets: Sequence[float],
        predictions: Sequence[Callable[[Widths], Floats] | None],
        *,
        pressure: float = 1.0,
        rate: float = 0.0,
        most: float | None = None,
    ) -> None:
        super().__init__()
        if not len(surrogates) == len(targets) == len(predictions) or not all(target > 0 for target in targets):
            raise InputError(f"a budget term needs a target above 0 for each of {len(surrogates)} costs, got {targets}")
        self._grid, self._surrogates, self._predictions = WidthGrid.of(space), list(surrogates), list(predictions)
        self._targets, self._first, self._rate = np.asarray(targets, dtype=np.float64), pressure, rate
        self._most = most
        self._told: dict[tuple[int, ...], list[tuple[float, float] | None]] = {}
        self.register_buffer("pressure", torch.full((len(targets),), pressure, dtype=torch.float64))

    @classmethod
    def of(
        cls,
        space: WidthSpace,
        budget: Budget,
        *,
        aim: float = 1.0,
        pressure: float = 1.0,
        rate: float = 0.0,
        most: float | None = None,
    ) -> BudgetTerm:
        """The term of a budget's own limits, each times ``aim``."""
        return cls(
            space,
            [surrogate_of(space, limit) for limit in budget.limits],
            [aim * limit.max_ms for limit in budget.limits],
            [None if isinstance(limit.latency, MegaMacs) else limit.evaluate for limit in budget.limits],
            pressure=pressure,
            rate=rate,
            most=most,
        )

    def errors(self, widths: Floats, *, growing: bool = False) -> tuple[Floats, Floats]:
        """(relative errors (L,), their derivatives (L, G)) of all limits at widths (G,)."""
        found = [surrogate(np.asarray(widths, dtype=np.float64), growing=growing) for surrogate in self._surrogates]
        told = self._at_edges(widths)
        costs = np.asarray([cost if edge is None else edge[0] for (cost, _), edge in zip(found, told, strict=True)])
        slopes = np.stack([
            slope if edge is None else slope * edge[1] for (_, slope), edge in zip(found, told, strict=True)
        ])  # fmt: skip
        return costs / self._targets - 1, slopes / self._targets[:, None]

    def forward(self, widths: Tensor) -> Tensor:
        """The penalty (scalar) of widths (G,) that carry a gradient; its derivative is that of the surrogates."""
        plain = widths.detach().cpu().double().numpy()
        errors, slopes = self.errors(plain)
        if errors.max() < 0:
            errors, slopes = self.errors(plain, growing=True)
        pulls = errors >= min(float(errors.max()), 0.0)
        slope = torch.as_tensor(slopes).to(widths)
        # The derivative is the surrogate's; widths are whole numbers here, so nothing beyond the first is ever asked.
        relative = torch.as_tensor(errors).to(widths) + slope @ (widths - widths.detach())
        strength = pulls.astype(np.float64)
        if self._most is not None:
            push = float(np.abs(2 * self._first * (pulls * errors) @ slopes).max())
            strength *= min(1.0, self._most / max(push, 1e-300))
        weights = self.pressure.to(widths) * torch.as_tensor(strength).to(widths)
        return (weights * relative.square()).sum()

    def update(self, widths: Floats) -> Floats:
        """Move the weights after a step; returns the relative errors (L,)."""
        errors, _ = self.errors(widths)
        moved = self.pressure * torch.exp(torch.as_tensor(self._rate * np.clip(errors, -1.0, 1.0)).to(self.pressure))
        self.pressure.copy_(moved.clamp(self._first / _MOST_PRESSURE, self._first * _MOST_PRESSURE))
        return errors

    def _at_edges(self, widths: Floats) -> list[tuple[float, float] | None]:
        """Per limit the prediction at the allowed widths just above, and that over the surrogate; None: exact."""
        above = self._grid.take(self._grid.at_least(np.asarray(widths)[None]))
        key = tuple(above[0].tolist())
        if key not in self._told:
            told: list[tuple[float, float] | None] = []
            for surrogate, predict in zip(self._surrogates, self._predictions, strict=True):
                if predict is None:
                    told.append(None)
                    continue
                cost, ms = surrogate(above[0].astype(np.float64))[0], float(predict(above)[0])
                told.append((ms, ms / cost if cost > 0 else 1.0))
            self._told[key] = told
        return self._told[key]


def _edges(envelope: Floats, axis: int, tolerance: float) -> NDArray[np.int64]:
    """Positions of the right-hand edges along an axis of an envelope, and the first: megabytes fall below any edge."""
    rows = np.moveaxis(envelope, axis, 0).reshape(envelope.shape[axis], -1)
    if rows.shape[1] > _CONTEXTS:
        rows = rows[:, np.linspace(0, rows.shape[1] - 1, _CONTEXTS).round().astype(np.int64)]
    return np.unique(np.asarray([0, *kept_widths(rows, tolerance)], dtype=np.int64))


def _cell(ticks: Floats, x: float, growing: bool) -> tuple[int, float, float]:
    """(lower tick, share of the way to the next one, d share / d x); beyond the ends the end's value without slope."""
    if len(ticks) == 1 or x < ticks[0] or x > ticks[-1] or x == (ticks[-1] if growing else ticks[0]):
        return (len(ticks) - 1 if x > ticks[0] else 0), 0.0, 0.0
    low = int(np.searchsorted(ticks, x, side="right" if growing else "left")) - 1
    width = float(ticks[low + 1] - ticks[low])
    return low, (x - float(ticks[low])) / width, 1 / width


def _contracted(cube: NDArray[np.complex128], along: Sequence[Floats]) -> complex:
    """A cube (2, ..., 2) times one vector (2,) per axis."""
    for vector in along:
        cube = np.tensordot(vector, cube, axes=(0, 0))
    return complex(cube)
