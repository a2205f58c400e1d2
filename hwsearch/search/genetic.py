"""pymoo's NSGA-II, set up for widths: what is ours (repair, duplicates, mutation) and what is its own (the rest).

pymoo is loaded when a search starts, and never before. It draws from a generator of its own under our seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.search.grid import Indices, row_keys

if TYPE_CHECKING:
    from hwsearch.search.budget import Floats
    from hwsearch.search.evolution import Evolution


def nsga2(evolution: Evolution, first: Indices) -> Any:
    """pymoo's NSGA-II with our repair, for which everything scored so far is a duplicate."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.config import Config
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.ux import UniformCrossover

    # pymoo would print a hint to standard output, which belongs to results.
    Config.warnings["not_compiled"] = False
    grid, settings = evolution.grid, evolution.settings

    class Steps(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
            return mutate(np.asarray(X, dtype=np.int64), grid.top, settings.mutation, settings.step, random_state)

    class IntoBudget(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, **kwargs: Any) -> Any:
            rounded = np.clip(np.rint(np.asarray(X, dtype=np.float64)).astype(np.int64), 0, grid.top)
            return grid.nearest(evolution.budget.repair(evolution.space, grid.take(rounded), evolution.rng))

    class Unseen(DuplicateElimination):  # type: ignore[misc]
        def do(self, pop: Any, *others: Any, return_indices: bool = False, to_itself: bool = True) -> Any:
            known = {key for other in others if len(other) for key in row_keys(grid.take(other.get("X")))}
            fresh = []
            for at, key in enumerate(row_keys(grid.take(pop.get("X"))) if len(pop) else ()):
                if key not in known and key not in evolution.found:
                    fresh.append(at)
                known.add(key)
            stale = sorted(set(range(len(pop))) - set(fresh))
            return (pop[fresh], fresh, stale) if return_indices else pop[fresh]

    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=first,
        crossover=UniformCrossover(prob=0.9),
        mutation=Steps(prob=1.0),
        repair=IntoBudget(),
        eliminate_duplicates=Unseen(),
    )
    # Each retry costs a round of repairs; where the space is nearly used up, a small generation is the better answer.
    algorithm.mating.n_max_iterations = 6
    problem = Problem(n_var=grid.groups, n_obj=2 if settings.minimise_ms else 1, xl=np.zeros(grid.groups), xu=grid.top)
    # With a seed pymoo draws from a generator of its own; without one it would ask the operating system.
    algorithm.setup(problem, termination=NoTermination(), seed=evolution.seed, verbose=False)
    return algorithm


def mutate(indices: Indices, top: Indices, chance: float | None, step: float, rng: np.random.Generator) -> Indices:
    """Move some widths of every row (N, G) up or down; at least one moves wherever one can.

    A polynomial mutation that is rounded to integers mostly gives the parent back where a group has few widths.
    """
    movable = np.flatnonzero(top > 0)
    if len(movable) == 0:
        return indices
    count, groups = indices.shape
    change = rng.random((count, groups)) < (1 / len(movable) if chance is None else chance)
    change[np.arange(count), rng.choice(movable, count)] |= ~change[:, movable].any(axis=1)
    far = 1 + np.floor(rng.exponential(step * top, (count, groups))).astype(np.int64)
    move = np.where(rng.random((count, groups)) < 0.5, -1, 1) * np.minimum(far, np.maximum(top, 1))
    moved = indices + move
    # A step over the edge turns round, else the edges would hold what runs into them.
    moved = np.where((moved < 0) | (moved > top), indices - move, moved)
    return np.where(change, np.clip(moved, 0, top), indices)


def tell(algorithm: Any, asked: Any, objectives: Floats) -> None:
    """Hand the objectives (N, M) back to pymoo."""
    from pymoo.core.evaluator import Evaluator
    from pymoo.problems.static import StaticProblem

    Evaluator().eval(StaticProblem(algorithm.problem, F=objectives), asked)
    algorithm.tell(infills=asked)
