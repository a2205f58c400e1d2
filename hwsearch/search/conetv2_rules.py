"""How widths follow quality: the published rule of CONetV2, and ours.

* ``Published``: a momentum sum M of quality grows by what the last trial added; a group's width is multiplied by 1 plus
  that growth (between half and double), with a random push upward that "cools" over the trials. Nothing is ever refused
  and no cost is looked at.
* ``Annealed``: quality says what width is worth (``WidthWorth``), the budget's prediction what it costs; widths are
  annealed under both and projected onto the budget.

Reference: CONetV2 (Hosseini et al., arXiv 2110.06830) and its published code, for ``Published``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.graph.widths import WidthChoice
from hwsearch.search.annealing import anneal, worth_of
from hwsearch.search.grid import WidthGrid, row_keys
from hwsearch.search.quality import Side, sides_of_groups
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.conetv2_config import ConetConfig
    from hwsearch.search.trials import Trial

_START_WIDTH, _FIRST_STEP, _WIDEST = 16, 16, 256  # units; of the published rule
_HEAT = 5.0  # ALPHA of the published code
_IGNORED = 5  # the published rule picks no trial up to this one


class Rule(ABC):
    """How widths follow quality.

    Args:
        space: the allowed widths.
        config: see ``ConetConfig``.
        seed: fixes everything random.
    """

    def __init__(self, space: WidthSpace, config: ConetConfig, seed: int = 0) -> None:
        self.space, self.config, self.seed = space, config, seed
        self.grid = WidthGrid.of(space)
        self.sides = sides_of_groups(space)

    @abstractmethod
    def following(self, trials: Sequence[Trial], budget: Budget) -> WidthChoice:
        """The widths of the trial after these."""

    @abstractmethod
    def propose(
        self, trials: Sequence[Trial], budget: Budget, seeds: Sequence[WidthChoice]
    ) -> list[tuple[tuple[int, ...], float]]:
        """(widths, loss) inside the budget, best first, after all trials."""

    def by_group(self, quality: Mapping[Side, float]) -> list[float]:
        """Mean over the sides of each group; 0 for a group without a measured one."""
        found = []
        for sides in self.sides:
            values = [quality[side] for side in sides if side in quality]
            found.append(float(np.mean(values)) if values else 0.0)
        return found


class Annealed(Rule):
    """Ours: what quality makes widths worth, against predicted milliseconds."""

    def following(self, trials: Sequence[Trial], budget: Budget) -> WidthChoice:
        """Half-way widths first; then the best of the annealed choices, inside the budget."""
        rng = generator(self.seed, "anneal", len(trials))
        if not trials:
            share = np.asarray([self.config.start_share * self.grid.full])
            start = budget.repair(self.space, self.grid.take(self.grid.nearest(share)), rng)
            return WidthChoice(row_keys(start)[0])
        return WidthChoice(self._annealed(trials, budget, (), rng)[0][0])

    def propose(
        self, trials: Sequence[Trial], budget: Budget, seeds: Sequence[WidthChoice]
    ) -> list[tuple[tuple[int, ...], float]]:
        """Annealed again from the last trials and from ``seeds``."""
        return self._annealed(trials, budget, seeds, generator(self.seed, "propose"))

    def _annealed(
        self, trials: Sequence[Trial], budget: Budget, seeds: Sequence[WidthChoice], rng: np.random.Generator
    ) -> list[tuple[tuple[int, ...], float]]:
        qualities = [self.by_group(trial.best(self.config.guard)) for trial in trials]
        widths = [trial.choice.widths for trial in trials]
        known = trials[-1].best(self.config.guard)
        shares = [max(sum(side in known for side in sides), 1) for sides in self.sides]
        full = [group.units for group in self.space.groups]
        worth = worth_of(full, widths, qualities, shares, self.config.momentum)
        starts = np.asarray([widths[-1], *(seed.widths for seed in seeds)], dtype=np.int64)
        return anneal(self.space, budget, worth, starts, np.asarray(widths[-1]), rng, self.config.annealing)


class Published(Rule):
    """The published rule, and its greedy form."""

    def following(self, trials: Sequence[Trial], budget: Budget) -> WidthChoice:
        """16 everywhere, then 16 more, then each group by the growth of its momentum sum."""
        if not trials:
            return self._nearest(np.full(self.grid.groups, float(_START_WIDTH)))
        widths = np.asarray(trials[-1].choice.widths, dtype=np.float64)
        if len(trials) == 1:
            return self._nearest(widths + _FIRST_STEP)
        sums = self._sums(trials)
        new, old = (np.asarray(self.by_group(total)) for total in (sums[-1], sums[-2]))
        delta = new - old
        if self.config.accept == "conetv2":
            heat = _HEAT * (self.config.trials - (len(trials) - 1)) / self.config.trials
            rng = generator(self.seed, "push", len(trials) - 1)
            with np.errstate(divide="ignore"):
                chance = np.exp(-1.0 / (np.abs(delta) * heat))
            delta = delta + np.where(rng.random(len(delta)) < chance, chance, 0.0)
        return self._nearest(2 * np.round(widths * np.clip(1 + delta, 0.5, 2.0) / 2))

    def propose(
        self, trials: Sequence[Trial], budget: Budget, seeds: Sequence[WidthChoice]
    ) -> list[tuple[tuple[int, ...], float]]:
        """Trials by their mean momentum sum, the largest first, moved into the budget; the paper looks at no cost."""
        ignored = min(_IGNORED + 1, len(trials) - 1)
        means = [float(np.mean(list(total.values()))) for total in self._sums(trials)][ignored:]
        order = sorted(range(len(means)), key=lambda at: (-means[at], at))
        rows = np.asarray([trials[ignored + at].choice.widths for at in order], dtype=np.int64)
        moved = budget.repair(self.space, rows, generator(self.seed, "propose"))
        found: dict[tuple[int, ...], float] = {}
        for key, fits, at in zip(row_keys(moved), budget.feasible(moved), order, strict=True):
            if fits:
                found.setdefault(key, -means[at])
        return list(found.items())

    def _sums(self, trials: Sequence[Trial]) -> list[dict[Side, float]]:
        """M after every trial: momentum times the last one plus the trial's own quality; not normalised."""
        sums: list[dict[Side, float]] = []
        for trial in trials:
            best, before = trial.best(self.config.guard), sums[-1] if sums else {}
            sums.append({side: self.config.momentum * before.get(side, 0.0) + value for side, value in best.items()})
        return sums

    def _nearest(self, widths: np.ndarray) -> WidthChoice:
        """The allowed widths nearest to wanted ones, within the published bounds."""
        bounded = np.clip(widths, _START_WIDTH, _WIDEST)
        return WidthChoice(row_keys(self.grid.take(self.grid.nearest(bounded[None])))[0])
