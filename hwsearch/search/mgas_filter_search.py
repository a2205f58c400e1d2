"""The search of filters itself: weights and gates learn together under a growing price of milliseconds.

Every step is a function of its number and of what stands in ``Filters``, so a search goes on from any step as if it had
never been stopped.

1. Weights learn alone for a while.
2. Weights, scores and thresholds learn under L = task + multiplier * sum over filters of price * mask. A filter's price
   is its share of the milliseconds that its group's next stair saves, as they were at the last commit; the multiplier
   follows how far a ramped target is missed.
3. Now and then masks are committed, from the gates' moving averages, and what is left is priced again.
4. At the end what is left is cut to the target, if it has not arrived.

Reference: MGAS (arXiv 2310.15074), whose filters cost nothing in its published code; price, controller and commits are
ours, as in ``mgas_stages``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwsearch.search.gates import DiscreteGate
from hwsearch.search.grid import WidthGrid, Widths
from hwsearch.search.mgas_config import Phase
from hwsearch.search.mgas_filters import FilterNet

if TYPE_CHECKING:
    from hwsearch.search.budget import Budget
    from hwsearch.search.mgas_widths_config import FilterConfig
    from hwsearch.train.data import Batch
    from hwsearch.train.task import Task

Floats = NDArray[np.float64]

#: The share of the searching steps after which the ramped target is the search's own.
_RAMP = 0.8
#: Stairs below a width that are looked at: the next one alone may save nothing.
_STAIRS = 2
#: Columns of the way that a search keeps, before the widths.
COLUMNS = ("step", "use", "target", "multiplier", "loss")


class Filters(nn.Module):
    """Everything that changes during a search, so that a checkpoint holds it.

    Buffers: ``control`` (multiplier, use of the budget at the beginning, units cut at the end), ``path`` (points,
    columns and widths) the way so far.
    """

    control: Tensor
    path: Tensor

    def __init__(self, net: FilterNet, points: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("control", torch.zeros(3, dtype=torch.float64))
        columns = len(COLUMNS) + len(net.space.groups)
        self.register_buffer("path", torch.zeros(points, columns, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The gated network's output."""
        return self.net(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FilterWorth:
    """What widths cost, in shares of the budget.

    Attributes:
        use: of the whole network: the envelope, for a wider layer that is faster is what would be built.
        prices: of one filter of every group (G,), 0 or more.
    """

    use: float
    prices: Floats


def filter_worth(budget: Budget, grid: WidthGrid, widths: Widths) -> FilterWorth:
    """Price the filters of every group at allowed widths (G,).

    A group's curve is its envelope, min over c' >= c, with the other groups fixed; a filter costs the steepest slope
    down to one of the next narrower allowed widths.
    """
    rows = [np.asarray(widths, dtype=np.int64)[None]]
    starts = []
    for g, allowed in enumerate(grid.allowed):
        at = int(np.searchsorted(allowed, widths[g]))
        starts.append(max(at - _STAIRS, 0))
        part = np.repeat(rows[0], len(allowed) - starts[-1], axis=0)
        part[:, g] = allowed[starts[-1] :]
        rows.append(part)
    uses = budget.use(np.concatenate(rows))
    curves = np.split(uses, np.cumsum([len(part) for part in rows])[:-1])[1:]
    use, prices = float(uses[0]), np.zeros(grid.groups)
    for g, (allowed, start, curve) in enumerate(zip(grid.allowed, starts, curves, strict=True)):
        envelope = np.minimum.accumulate(curve[::-1])[::-1]
        now = int(np.searchsorted(allowed, widths[g]))
        use = min(use, float(envelope[now - start]))
        for lower in range(start, now):
            saved = float(envelope[now - start] - envelope[lower - start])
            prices[g] = max(prices[g], saved / float(allowed[now] - allowed[lower]))
    return FilterWorth(use, prices)


class FilterSearch:
    """The search as a step of the training loop.

    Args:
        filters: what changes.
        budget: prices widths; its milliseconds are the target, times ``config.aim``.
        phase: when weights learn alone, and when masks are committed.
        tell: told of commits by name and values.
    """

    def __init__(
        self,
        filters: Filters,
        task: Task,
        budget: Budget,
        config: FilterConfig,
        phase: Phase,
        *,
        tell: Callable[..., None],
    ) -> None:
        self.filters, self.net, self.task, self.budget = filters, filters.net, task, budget
        self.config, self.phase, self.tell = config, phase, tell
        self.grid = WidthGrid.of(self.net.space)
        self._worth: tuple[tuple[int, ...], FilterWorth] | None = None
        gates = {id(p) for p in self.net.gates.parameters()}
        self._weights = [p for p in self.net.parameters() if id(p) not in gates]
        self._stride = max(-(-phase.steps // len(filters.path)), 1)

    # ---- the step ----

    def step(self, number: int, batch: Batch) -> Tensor:
        """Gradients of one batch; returns the task's loss."""
        phase, control = self.phase, self.filters.control
        if number == 0:
            control[1] = self.worth().use
        loss: Tensor = self.task.loss(self.filters(batch[0]), batch)
        if number < phase.warm:
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in self.net.gates.parameters():
                parameter.grad = None
        else:
            cost, use = self.penalty()
            (loss + float(control[0]) * cost).backward()  # type: ignore[no-untyped-call]
            self._even()
            self.net.observe()
            gain = self.config.rate / max(phase.steps - phase.warm, 1) * (use / self.target(number) - 1)
            control[0] = max(float(control[0]) + gain, 0.0)
        nn.utils.clip_grad_norm_(self._weights, self.config.clip)
        if number + 1 in phase.commits:
            self._commit(number)
        if number % self._stride == self._stride - 1 or number + 1 == phase.steps:
            place = min(number // self._stride, len(self.filters.path) - 1)
            row = [number + 1, self.worth().use, self.target(number), float(control[0]), float(loss.detach())]
            self.filters.path[place] = torch.tensor([*row, *self.net.alive()], dtype=torch.float64)
        return loss.detach()

    @torch.no_grad()
    def _even(self) -> None:
        """A threshold's gradient is the mean over its living units (times the mean size of all groups), not their sum:
        wide groups would fall first whatever a filter of theirs costs."""
        sizes = [len(gate) for _, gate in self.net.searched()]
        for _, gate in self.net.searched():
            if gate.threshold.grad is not None:
                gate.threshold.grad.mul_(float(np.mean(sizes)) / float(gate.alive.sum()))

    def penalty(self) -> tuple[Tensor, float]:
        """What the loss counts: shares of the network's milliseconds, about 1 while everything is on; and the use of
        the budget as the masks are at this moment, to first order."""
        known = self.worth()
        total, use = self.filters.control.new_zeros((), dtype=torch.float32), known.use
        for index, gate in self.net.searched():
            price, mask = float(known.prices[index]), gate.mask()
            total = total + price / known.use * mask.sum()
            use -= price * float(gate.alive.sum() - mask.detach().sum())
            if self.config.threshold_weight:
                total = total + self.config.threshold_weight * torch.exp(-gate.threshold).sum()
        return total, max(use, 0.05 * known.use)

    def target(self, number: int) -> float:
        """The use of the budget to be at by now: from that at the beginning down to ``aim``, geometrically."""
        start, own, phase = float(self.filters.control[1]), self.config.aim, self.phase
        done = (number - phase.warm + 1) / max(_RAMP * (phase.steps - phase.warm), 1.0)
        return start * (own / start) ** min(max(done, 0.0), 1.0) if own < start else own

    # ---- what is left, and what it costs ----

    def worth(self) -> FilterWorth:
        """What is alive costs, at the allowed widths just above it."""
        alive = self.net.alive()
        if self._worth is None or self._worth[0] != alive:
            self._worth = (alive, filter_worth(self.budget, self.grid, self.built(alive)))
        return self._worth[1]

    def built(self, alive: tuple[int, ...]) -> Widths:
        """The allowed widths (G,) that so many units would be built at."""
        return np.asarray(self.grid.take(self.grid.at_least(np.asarray([alive])))[0], dtype=np.int64)

    def commit_needed(self, target: float) -> int:
        """Commit what is off on average, what is furthest below its threshold first, until the target is reached to
        first order; how many units that were.

        Units of a group fall together, and all that fell between two commits would often be more than was asked for;
        what is left of them may come back.
        """
        known = self.worth()
        offers: list[tuple[float, int, int, DiscreteGate]] = []
        for index, gate in self.net.searched():
            below = torch.nonzero(gate.alive & (gate.average <= 0)).flatten().tolist()
            offers += [(float(gate.average[at]), index, at, gate) for at in below]
        use, fallen = known.use, 0
        for _, index, at, gate in sorted(offers, key=lambda offer: offer[:3]):
            if use <= target:
                break
            if int(gate.alive.sum()) > gate.least:
                gate.close([at])
                use -= float(known.prices[index])
                fallen += 1
        return fallen

    def project(self, target: float) -> int:
        """Cut, group after group, what has the least margin for the milliseconds it costs, down to the next narrower
        width each time, until the target is reached; how many units that were. Stops where nothing saves any more."""
        cut = 0
        while self.worth().use > target and (offer := self._cheapest()) is not None:
            index, units = offer
            self.net.gate(index).close(units)
            cut += len(units)
        return cut

    def _cheapest(self) -> tuple[int, list[int]] | None:
        """(group, its weakest units) of the narrower width that loses least margin for what it saves."""
        alive, prices = self.net.alive(), self.worth().prices
        offers: list[tuple[float, int, list[int]]] = []
        for index, gate in self.net.searched():
            allowed = self.grid.allowed[index]
            now = int(np.searchsorted(allowed, alive[index]))
            if now == 0 or prices[index] <= 0:
                continue
            left = int(allowed[now - 1])
            living = torch.nonzero(gate.alive).flatten()
            off = living[torch.sort(gate.average[living], stable=True).indices[: len(living) - left]]
            margin = float(gate.average[off].clamp_min(1e-3).sum())
            saves = float(prices[index]) * float(allowed[now] - left)
            offers.append((margin / saves, index, off.tolist()))
        return min(offers)[1:] if offers else None

    def _commit(self, number: int) -> None:
        fallen = self.commit_needed(self.target(number))
        last = number + 1 == self.phase.steps
        cut = self.project(self.config.aim) if last else 0
        self.filters.control[2] += cut
        ms = self.budget.evaluate(self.built(self.net.alive())[None])[0].tolist()
        self.tell(
            "committed", step=number + 1, filters=fallen, cut=cut, widths=list(self.net.alive()), predicted_ms=ms,
            multiplier=float(self.filters.control[0]),
        )  # fmt: skip


__all__ = ["COLUMNS", "FilterSearch", "FilterWorth", "Filters", "filter_worth"]
