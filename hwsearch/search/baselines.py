"""What a search must beat: uniform scaling, random widths, pruning by magnitude and a knapsack of importance per ms.

All are held to the same budget and, where they settle, to the same measurements as a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import InputError
from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.grid import Indices, WidthGrid, Widths
from hwsearch.search.settle import Measure, Settled, settle

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget, Floats

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


def magnitude(space: WidthSpace, budget: Budget, model: nn.Module, *, by: str = "l1", measure: Measure | None = None,
              rounds: int = 6, journal: Path | None = None, progress: Progress | None = None) -> Settled:  # fmt: skip
    """Pruning by magnitude: one threshold for all groups on how large their units are, until the budget is kept.

    The importance of a unit is the mean size of the weights that produce it, relative to its group's mean, so that
    groups compare (Li et al., ICLR 2017); or of its batch-norm gammas (Liu et al., ICCV 2017). A group keeps as many
    units as lie above the threshold, moved to the nearest allowed width.

    Args:
        model: a *trained* full network; the magnitudes are its own.
        by: ``l1`` or ``gamma``.
        measure, rounds, journal, progress: as in ``uniform``.

    Raises:
        InputError: another ``by``, or ``gamma`` for a network without batch normalisation on its groups.
        InfeasibleBudgetError: not even the narrowest network of the space keeps the budget.
        AnswerIsNo: no threshold keeps it.
    """
    budget.check_reachable(space)
    rows = magnitude_choices(space, importances(space, model, by))

    def propose(corrected: Budget, _: Sequence[WidthChoice]) -> list[Candidate]:
        fits = np.flatnonzero(corrected.feasible(rows))
        return [] if len(fits) == 0 else [_candidate(corrected, rows[fits[-1]], -float(fits[-1]))]

    return settle(
        space, budget, propose, measure, rounds=rounds, per_round=1, margin=0.0, journal=journal, progress=progress
    )


def magnitude_choices(space: WidthSpace, sizes: Sequence[Floats]) -> Widths:
    """All different choices that one threshold on relative importances can give, narrowest first, int64 (N, G)."""
    grid = WidthGrid.of(space)
    relative = [size / max(float(size.mean()), 1e-30) for size in sizes]
    thresholds = np.unique(np.concatenate(relative))[::-1]
    counts = np.stack([(size[None] >= thresholds[:, None]).sum(axis=1) for size in relative], axis=1)
    rows = grid.take(grid.nearest(counts))
    different = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])
    return np.asarray(rows[different], dtype=np.int64)


def importances(space: WidthSpace, model: nn.Module, by: str = "l1") -> list[Floats]:
    """Per group the importance (units,) of its units, from the weights of ``model``.

    ``l1``: mean absolute weight of everything that produces the unit (weights of two and more dimensions); ``gamma``:
    mean absolute scale of its normalisation. A group that no weight produces has units of equal importance.

    Raises:
        InputError: see ``magnitude``.
    """
    if by not in ("l1", "gamma"):
        raise InputError(f"magnitude by {by!r}: give l1 or gamma")
    tensors = dict(model.named_parameters())
    # a transposed convolution has its outputs on the second axis
    transposed = {layer.weight for layer in space.network.layers if "transpose" in layer.op} if space.network else set()
    found = []
    for group in space.groups:
        sums, counts = np.zeros(group.units), 0
        for slot in group.slots:
            tensor = tensors.get(slot.parameter)
            wanted = slot.axis == (1 if slot.parameter in transposed else 0) and not slot.reads
            if tensor is None or not wanted or (tensor.dim() > 1) != (by == "l1"):
                continue
            if by == "gamma" and not slot.parameter.endswith("weight"):
                continue
            first = tensor.detach().abs().movedim(slot.axis, 0)
            size = first.double().flatten(1).mean(dim=1) if first.dim() > 1 else first
            sums += size.double().numpy()[slot.positions].mean(axis=1)
            counts += 1
        if not counts:
            raise InputError(
                f"group {group.name} has no {'weights' if by == 'l1' else 'normalisation'}: use another by"
            )
        found.append(sums / counts)
    return found


def knapsack(space: WidthSpace, budget: Budget, sizes: Sequence[Floats], *, tries: int = 24) -> Candidate:
    """The latency knapsack: take away, again and again, what loses least importance for the milliseconds it saves.

    From the full network on, every group is offered its next few narrower widths; the step of least importance lost per
    millisecond gained is taken, until the budget is kept; what is then left of the budget is filled with the step of
    most importance that still fits. Milliseconds are the predictor's, so a step that saves none is never taken alone.

    Args:
        sizes: importance of the units of every group, see ``importances``; a width keeps its most important ones.
        tries: narrower widths offered to a group at once, because a stair can be several widths long.

    Raises:
        InfeasibleBudgetError: no choice keeps the budget.

    Reference: after HALP (Shen et al., NeurIPS 2022), which solves the same knapsack by dynamic programming over
    tables of single layers; here the whole network's prediction is asked.
    """
    budget.check_reachable(space)
    grid = WidthGrid.of(space)
    worth = []
    for allowed, size in zip(grid.allowed, sizes, strict=True):
        best = np.concatenate([[0.0], np.cumsum(np.sort(size)[::-1])])
        worth.append(best[allowed] / max(float(best[-1]), 1e-30))
    at = grid.top.copy()
    use = float(budget.use(grid.take(at[None]))[0])
    while use > 1.0:
        moves = [(g, to) for g in range(grid.groups) for to in range(max(at[g] - tries, 0), at[g])]
        if not moves:
            break
        rows = np.repeat(at[None], len(moves), axis=0)
        rows[np.arange(len(moves)), [g for g, _ in moves]] = [to for _, to in moves]
        saved = use - budget.use(grid.take(rows))
        lost = np.asarray([worth[g][at[g]] - worth[g][to] for g, to in moves])
        rate = np.where(saved > 0, lost / np.maximum(saved, 1e-12), np.inf)
        if not np.isfinite(rate).any():
            break
        pick = int(np.argmin(rate))
        at, use = rows[pick], use - float(saved[pick])
    if use > 1.0:  # every single step is slower from here: what is smallest in time keeps the budget
        smallest, _ = budget.smallest_choice(space, enough=1.0)
        at = grid.nearest(smallest[None])[0]
    at = _filled(budget, grid, worth, at, tries)
    row = grid.take(at[None])[0]
    return _candidate(budget, row, 1.0 - sum(float(w[i]) for w, i in zip(worth, at, strict=True)) / grid.groups)


def _filled(budget: Budget, grid: WidthGrid, worth: Sequence[Floats], at: Indices, tries: int) -> Indices:
    """Widen single groups while that fits, the step of most importance first."""
    while True:
        moves = [
            (g, to) for g in range(grid.groups) for to in range(at[g] + 1, min(at[g] + tries, int(grid.top[g])) + 1)
        ]
        if not moves:
            return at
        rows = np.repeat(at[None], len(moves), axis=0)
        rows[np.arange(len(moves)), [g for g, _ in moves]] = [to for _, to in moves]
        fits = budget.feasible(grid.take(rows))
        gain = np.asarray([worth[g][to] - worth[g][at[g]] for g, to in moves])
        if not fits.any():
            return at
        at = rows[int(np.argmax(np.where(fits, gain, -np.inf)))]
