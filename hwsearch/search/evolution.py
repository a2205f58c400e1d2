"""Constrained evolution over widths: NSGA-II from pymoo, driven by ask and tell under one seed.

The variables are indices into each group's allowed widths. Every child is repaired into the budget *before* it is
scored, so no training data is spent on a network that cannot be used, and no choice is scored twice. Losses go to a
journal as they come; a search that is started again asks for the same choices in the same order under its seed and
reads their losses there, so it ends exactly as the unbroken one would.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import AnswerIsNo, InputError, InternalError
from hwsearch.search.grid import Indices, WidthGrid, Widths, row_keys
from hwsearch.search.journal import Journal

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget, Floats

Score = Callable[[Widths], "Floats"]  #: int64 (N, G) widths -> losses (N,), smaller is better
Progress = Callable[[int, int, str], None]  #: done, total, text

SCHEMA = "hwsearch.losses"
VERSION = 1


@dataclass(frozen=True)
class EvolutionSettings:
    """How long and how widely to search.

    Args:
        population: choices kept from one generation to the next.
        generations: including the first; each asks for at most ``population`` new choices.
        evaluations: at most so many choices are scored in one search; None: population times generations.
        mutation: chance that a width changes; None: one group in each child on average.
        spread: pymoo's eta of the mutation, 3 (far) to 30 (near).
        minimise_ms: also keep a front of loss against time, where the share of the budget is a second objective.
        score_batch: choices handed to ``score`` at once: what a kill can lose.
    """

    population: int = 24
    generations: int = 10
    evaluations: int | None = None
    mutation: float | None = None
    spread: float = 5.0
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
        if not 1 <= self.spread <= 100:
            raise InputError(f"spread is {self.spread!r}: give a number from 1 to 100")

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
        initial: choices to start from, repaired into the budget first.
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
    scores = Scores(score, settings.score_batch, _journal(journal, grid, settings, seed, context))
    found = _run(space, budget, grid, scores, settings, seed, progress, grid.population(list(initial)))
    if not any(math.isfinite(c.loss) for c in found[0]):
        raise AnswerIsNo(
            f"none of the {len(found[0])} choices that were tried has a finite loss: the super-network diverged; "
            "train it with a lower learning rate"
        )
    return EvolutionResult(found[0], found[0][0], found[1])


class Scores:
    """Losses by choice, cached and journalled: asks ``score`` only for what no earlier run has finished."""

    def __init__(self, score: Score, batch: int, journal: Journal | None = None) -> None:
        self._score, self._batch, self._journal = score, batch, journal
        self._known: dict[tuple[int, ...], float] = {}
        for record in journal.open() if journal else ():
            loss = record["loss"]
            self._known[tuple(record["widths"])] = math.inf if loss is None else float(loss)

    def __call__(self, choices: Widths, report: Callable[[int], None] = lambda done: None) -> list[float]:
        """Losses of choices (N, G), in their order; ``report`` hears how many are done."""
        keys = row_keys(choices)
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        for at in range(0, len(missing), self._batch):
            rows = missing[at : at + self._batch]
            losses = np.asarray(self._score(choices[rows]), dtype=np.float64).reshape(-1)
            if losses.shape != (len(rows),):
                raise InternalError(f"score gave {losses.shape[0]} losses for {len(rows)} choices")
            for row, loss in zip(rows, losses.tolist(), strict=True):
                self._known[keys[row]] = loss if math.isfinite(loss) else math.inf
                if self._journal:
                    finite = loss if math.isfinite(loss) else None
                    self._journal.append({"widths": list(keys[row]), "loss": finite})
            report(len(keys) - len(missing) + at + len(rows))
        return [self._known[key] for key in keys]


def _journal(
    path: Path | None, grid: WidthGrid, settings: EvolutionSettings, seed: int, context: str
) -> Journal | None:
    """The journal of this search, with a header that names everything its losses depend on."""
    if path is None:
        return None
    digest = hashlib.sha256(json.dumps([grid.names, grid.key]).encode()).hexdigest()
    return Journal(
        Path(path),
        {
            "schema": SCHEMA,
            "version": VERSION,
            "seed": seed,
            "space": digest[:16],
            "settings": asdict(settings),
            "context": context,
        },
    )


def _first_choices(
    space: WidthSpace, budget: Budget, grid: WidthGrid, count: int, given: Widths, rng: np.random.Generator
) -> Widths:
    """Where evolution starts, repaired: the caller's choices, a uniform scaling, ramps over depth, then random ones."""
    depth = np.linspace(0, 1, grid.groups)
    ramps = [grid.full * (a + (b - a) * depth) for a, b in ((0.3, 1.0), (1.0, 0.3), (0.5, 0.9), (0.9, 0.5))]
    planned = np.concatenate([given, grid.uniform([0.5]), grid.take(grid.nearest(np.stack(ramps)))])
    rows = np.concatenate([planned, grid.sample(2 * count, rng)])
    return budget.repair(space, rows[: max(count, len(given)) + count // 2], rng)


def _run(
    space: WidthSpace,
    budget: Budget,
    grid: WidthGrid,
    scores: Scores,
    settings: EvolutionSettings,
    seed: int,
    progress: Progress | None,
    given: Widths,
) -> tuple[tuple[Candidate, ...], int]:
    """The ask and tell loop; returns the candidates, best first, and the number of generations that ran."""
    from hwsearch.graph.widths import WidthChoice

    rng = np.random.default_rng([seed, 1])
    found: dict[tuple[int, ...], Candidate] = {}
    first = grid.nearest(_first_choices(space, budget, grid, settings.population, given, rng))
    algorithm = _algorithm(space, budget, grid, settings, seed, first, found, rng)
    generation = 0
    while generation < settings.generations and len(found) < settings.most:
        asked = algorithm.ask()
        if asked is None or len(asked) == 0:
            break  # the budget's neighbourhood holds no choice that was not scored
        asked = asked[: settings.most - len(found)]
        choices = grid.take(asked.get("X"))
        ms = budget.evaluate(choices)
        use = budget.use_of(ms)
        if (keep := use <= 1.0).sum() < len(keep):  # repair promises this; never score what cannot be used
            asked, choices, ms, use = asked[keep], choices[keep], ms[keep], use[keep]
        done = len(found)
        losses = scores(choices, lambda n, done=done: _report(progress, done + n, settings.most, found))  # type: ignore[misc]
        for key, loss, times in zip(row_keys(choices), losses, ms.tolist(), strict=True):
            found[key] = Candidate(WidthChoice(key), loss, tuple(times))
        # pymoo sorts with comparisons that infinity would upset: the worst finite loss plus one stands for it.
        finite = [c.loss for c in found.values() if math.isfinite(c.loss)]
        worst = max(finite, default=0.0) + 1.0
        objectives = [[loss if math.isfinite(loss) else worst for loss in losses]]
        if settings.minimise_ms:
            objectives.append(use.tolist())
        _tell(algorithm, asked, np.asarray(objectives, dtype=np.float64).T)
        generation += 1
        _report(progress, len(found), settings.most, found)
    return tuple(sorted(found.values(), key=lambda c: (c.loss, c.ms, c.choice.widths))), generation


def _report(progress: Progress | None, done: int, total: int, found: dict[tuple[int, ...], Candidate]) -> None:
    if progress:
        best = min((c.loss for c in found.values()), default=math.inf)
        progress(done, total, f"best loss {best:.4f}" if math.isfinite(best) else "")


def _algorithm(
    space: WidthSpace,
    budget: Budget,
    grid: WidthGrid,
    settings: EvolutionSettings,
    seed: int,
    first: Indices,
    found: dict[tuple[int, ...], Candidate],
    rng: np.random.Generator,
) -> Any:
    """pymoo's NSGA-II, set up with our repair, and with everything scored so far counted as a duplicate."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PolynomialMutation

    class IntoBudget(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, **kwargs: Any) -> Any:
            rounded = np.clip(np.rint(np.asarray(X, dtype=np.float64)).astype(np.int64), 0, grid.top)
            return grid.nearest(budget.repair(space, grid.take(rounded), rng))

    class Unseen(DuplicateElimination):  # type: ignore[misc]
        def do(self, pop: Any, *others: Any, return_indices: bool = False, to_itself: bool = True) -> Any:
            known = {key for other in others if len(other) for key in row_keys(grid.take(other.get("X")))}
            fresh = []
            for i, key in enumerate(row_keys(grid.take(pop.get("X"))) if len(pop) else ()):
                if key not in known and key not in found:
                    fresh.append(i)
                known.add(key)
            stale = sorted(set(range(len(pop))) - set(fresh))
            return (pop[fresh], fresh, stale) if return_indices else pop[fresh]

    problem = Problem(n_var=grid.groups, n_obj=2 if settings.minimise_ms else 1, xl=np.zeros(grid.groups), xu=grid.top)
    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=first,
        crossover=UniformCrossover(prob=0.9),
        mutation=PolynomialMutation(
            prob=1.0, prob_var=settings.mutation or 1 / grid.groups, eta=settings.spread, at_least_once=True
        ),
        repair=IntoBudget(),
        eliminate_duplicates=Unseen(),
    )
    # Each retry costs a round of repairs; where the space is nearly exhausted a small generation is the better answer.
    algorithm.mating.n_max_iterations = 6
    # pymoo draws from its own generator once it has a seed; with None it would ask the operating system.
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    return algorithm


def _tell(algorithm: Any, asked: Any, objectives: Floats) -> None:
    """Hand the objectives (N, M) back to pymoo."""
    from pymoo.core.evaluator import Evaluator
    from pymoo.problems.static import StaticProblem

    Evaluator().eval(StaticProblem(algorithm.problem, F=objectives), asked)
    algorithm.tell(infills=asked)


def choices_of(candidates: Sequence[Candidate]) -> list[WidthChoice]:
    """The choices of candidates, in their order."""
    return [candidate.choice for candidate in candidates]
