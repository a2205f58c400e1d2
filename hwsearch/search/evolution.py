"""Constrained evolution over widths: NSGA-II from pymoo, driven by ask and tell under one seed.

The variables are indices into each group's allowed widths. Every child is repaired into the budget *before* it is
scored, so no training data is spent on a network that cannot be used, and no choice is scored twice. Losses go to a
journal as they come; a search that is started again asks for the same choices in the same order under its seed and
reads their losses there, so it ends exactly as the unbroken one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import AnswerIsNo, InputError
from hwsearch.search.genetic import nsga2, tell
from hwsearch.search.grid import Indices, WidthGrid, Widths, row_keys
from hwsearch.search.scores import Score, Scores

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget

Progress = Callable[[int, int, str], None]  #: done, total, text


_FILL_TRIES = 4  # draws of random choices before a generation stays small


@dataclass(frozen=True)
class EvolutionSettings:
    """How long and how widely to search.

    Args:
        population: choices kept from one generation to the next.
        generations: including the first; each asks for at most ``population`` new choices.
        evaluations: at most so many choices are scored in one search; None: population times generations.
        mutation: chance that a width changes; None: one group in each child on average.
        step: how far a changed width moves on average, as a share of the group's allowed widths.
        minimise_ms: also keep a front of loss against time, where the share of the budget is a second objective.
        score_batch: choices handed to ``score`` at once: what a kill can lose.
    """

    population: int = 12
    generations: int = 16
    evaluations: int | None = None
    mutation: float | None = None
    step: float = 0.1
    minimise_ms: bool = False
    score_batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("population", 2), ("generations", 1), ("score_batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: give a whole number of {least} or more")
        if self.evaluations is not None and (not isinstance(self.evaluations, int) or self.evaluations < 1):
            raise InputError(f"evaluations is {self.evaluations!r}: give a whole number of 1 or more, or leave it out")
        if self.mutation is not None and not 0 < self.mutation <= 1:
            raise InputError(f"mutation is {self.mutation!r}: give a chance above 0 and up to 1")
        if not 0 < self.step <= 1:
            raise InputError(f"step is {self.step!r}: give a share above 0 and up to 1")

    @property
    def most(self) -> int:
        """The largest number of choices that are scored."""
        return self.evaluations or self.population * self.generations


@dataclass(frozen=True)
class Candidate:
    """A choice that was scored: its loss, and predicted milliseconds on every limit of the budget, in its order."""

    choice: WidthChoice
    loss: float
    ms: tuple[float, ...]

    @property
    def predicted_ms(self) -> float:
        """Predicted milliseconds on the first limit."""
        return self.ms[0]


@dataclass(frozen=True)
class EvolutionResult:
    """All scored choices, best first (by loss, then by time), the best one, and how many generations ran."""

    candidates: tuple[Candidate, ...]
    best: Candidate
    generations: int


def evolve(
    space: WidthSpace,
    budget: Budget,
    score: Score,
    settings: EvolutionSettings | None = None,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    *,
    initial: Iterable[WidthChoice] = (),
    context: str = "",
) -> EvolutionResult:
    """Search the widths of least loss inside the budget.

    Args:
        space: the allowed widths.
        budget: predicts the milliseconds; every scored choice keeps all its limits.
        score: losses (N,) of int64 widths (N, G); must give the same loss for the same widths. A loss that is not
            finite counts as the worst.
        settings: see ``EvolutionSettings``.
        seed: fixes everything random.
        journal: file of finished losses; an existing one of the same search is continued. Searches that differ in the
            budget alone (same space, seed, settings and context) may share one: a loss does not depend on the budget.
        progress: called with (scored, at most, text) after every batch.
        initial: choices to start from (``population`` of them at most), repaired into the budget first.
        context: what else the losses depend on (a digest of the super-network's weights, say); part of the journal's
            header.

    Raises:
        InfeasibleBudgetError: no choice keeps the budget; nothing was scored.
        InputError: the journal belongs to another search.
        AnswerIsNo: every loss is infinite or not a number.
    """
    settings = settings or EvolutionSettings()
    budget.check_reachable(space)
    grid = WidthGrid.of(space)
    belongs = {"seed": seed, "space": grid.digest, "settings": asdict(settings), "context": context}
    scores = Scores(score, settings.score_batch, Path(journal) if journal else None, belongs)
    return Evolution(space, budget, grid, scores, settings, seed, progress).run(grid.population(list(initial)))


class Evolution:
    """One evolution: pymoo asks, the budget predicts, ``scores`` answers."""

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        grid: WidthGrid,
        scores: Scores,
        settings: EvolutionSettings,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.space, self.budget, self.grid, self.scores = space, budget, grid, scores
        self.settings, self.seed, self.progress = settings, seed, progress
        # Beside pymoo's own generator, which draws parents, crossovers and mutations from the same seed.
        self.rng = np.random.default_rng([seed, 1])
        self.found: dict[tuple[int, ...], Candidate] = {}

    def run(self, given: Widths) -> EvolutionResult:
        """Ask and tell until the settings are used up; ``given`` are the caller's choices (N, G) to start from."""
        algorithm = nsga2(self, self.first_choices(given))
        generation = 0
        while generation < self.settings.generations and len(self.found) < self.settings.most:
            asked = self.fill(algorithm.ask())
            if len(asked) == 0:
                break  # the budget's neighbourhood holds nothing that was not scored
            self.judge(algorithm, asked[: self.settings.most - len(self.found)])
            generation += 1
        ranked = tuple(sorted(self.found.values(), key=lambda c: (c.loss, c.ms, c.choice.widths)))
        if not ranked or not math.isfinite(ranked[0].loss):
            raise AnswerIsNo(
                f"none of the {len(ranked)} choices that were tried has a finite loss: the super-network diverged; "
                "train it with a lower learning rate"
            )
        return EvolutionResult(ranked, ranked[0], generation)

    def first_choices(self, given: Widths) -> Indices:
        """Where evolution starts, in the budget: the caller's, the full network scaled, ramps over depth, random."""
        grid, count = self.grid, self.settings.population
        depth = np.linspace(0, 1, grid.groups)
        ramps = [grid.full * (a + (b - a) * depth) for a, b in ((0.3, 1.0), (1.0, 0.3), (0.5, 0.9), (0.9, 0.5))]
        planned = np.concatenate([given, grid.full[None], grid.take(grid.nearest(np.stack(ramps)))])
        rows = np.concatenate([planned, grid.sample(2 * count, self.rng)])
        # Half as many again as wanted: some become equal once they are repaired.
        rows = rows[: max(count, len(given)) + count // 2]
        return self.different(self.budget.repair(self.space, rows, self.rng))[:count]

    def fill(self, asked: Any) -> Any:
        """A generation as pymoo asks for it, filled up with random choices where mating found too few new ones."""
        from pymoo.core.population import Population

        asked = Population.empty() if asked is None else asked
        known = {*self.found, *row_keys(self.grid.take(asked.get("X")))} if len(asked) else {*self.found}
        for _ in range(_FILL_TRIES):
            missing = self.settings.population - len(asked)
            if missing <= 0:
                break
            drawn = self.budget.repair(self.space, self.grid.sample(missing, self.rng), self.rng)
            fresh = [key for key in dict.fromkeys(row_keys(drawn)) if key not in known]
            known.update(fresh)
            if fresh:
                indices = self.grid.nearest(np.asarray(fresh, dtype=np.int64))
                asked = Population.merge(asked, Population.new(X=indices))
        return asked

    def different(self, choices: Widths) -> Indices:
        """Indices of the choices (N, G), each once, in their order."""
        once = list(dict.fromkeys(row_keys(choices)))
        return self.grid.nearest(np.asarray(once, dtype=np.int64).reshape(-1, self.grid.groups))

    def judge(self, algorithm: Any, asked: Any) -> None:
        """Score what pymoo asked for and tell it."""
        choices = self.grid.take(asked.get("X"))
        ms = self.budget.evaluate(choices)
        use = self.budget.use_of(ms)
        if not (keeps := use <= 1.0).all():  # repair promises it; still, never score what cannot be used
            asked, choices, ms, use = asked[keeps], choices[keeps], ms[keeps], use[keeps]
        done = len(self.found)
        losses = self.scores(choices, lambda more: self.report(done + more))
        self.found |= {
            key: Candidate(_choice(key), loss, tuple(times))
            for key, loss, times in zip(row_keys(choices), losses, ms.tolist(), strict=True)
        }
        self.report(len(self.found))
        if len(asked) == 0:
            return
        # pymoo's sorting is not made for infinity: one more than the worst finite loss stands for it.
        worst = max((c.loss for c in self.found.values() if math.isfinite(c.loss)), default=0.0) + 1.0
        objectives = [[loss if math.isfinite(loss) else worst for loss in losses]]
        if self.settings.minimise_ms:
            objectives.append(use.tolist())
        tell(algorithm, asked, np.asarray(objectives, dtype=np.float64).T)

    def report(self, done: int) -> None:
        """Tell the caller how far it is."""
        if self.progress:
            best = min((c.loss for c in self.found.values()), default=math.inf)
            self.progress(done, self.settings.most, f"best loss {best:.4f}" if math.isfinite(best) else "")


def _choice(key: tuple[int, ...]) -> WidthChoice:
    from hwsearch.graph.widths import WidthChoice

    return WidthChoice(key)
