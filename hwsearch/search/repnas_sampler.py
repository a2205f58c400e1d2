"""Which branches run: scores over the whole network, the best within a budget, and the gate that learns them.

A score is ``alpha`` plus logistic noise; the best K of the whole network run (not K per layer). The gate of a branch
that runs is 1 in the forward pass and passes the gradient of ``sigmoid(score)`` back to its alpha.

Reference: Zhang et al., RepNAS, 2021, and its published code. Differences, each a defect of that code: a layer is never
left without a branch (``floor``), the noise is a function of (seed, step), so that all processes draw alike, and the
mask is kept with the weights.

Ours, and no defect of that code: ``whole``. One sum of branches is as free as another only while one of them is as
free as the convolution that they stand for; a layer left with 1x1 alone computes less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError
from hwsearch.search.repnas_space import KINDS, BranchSpace, FoldedMs, Mask
from hwsearch.train.seeds import generator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BranchBudget:
    """How many branches the network may keep.

    Args:
        kind: what is counted: ``branches`` (the paper), ``macs`` or ``activation_bytes`` of a training step per
            example, or ``ms`` of the folded network (with minimal support).
        limit: at most so much; for all but ``ms`` a value up to 1 is a share of what all branches have together.
    """

    kind: str = "branches"
    limit: float = 0.34

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"a branch budget counts {self.kind!r}: give one of {', '.join(KINDS)}")
        if not 0 < self.limit < float("inf"):
            raise InputError(f"a branch budget is {self.limit}: give a number above 0")

    def amount(self, costs: Floats) -> float:
        """The limit in units of ``costs`` (L, N); a number of branches is whole."""
        whole = float(costs.sum())
        amount = self.limit * whole if self.limit <= 1 and self.kind != "ms" else self.limit
        return float(np.floor(amount + 1e-9)) if self.kind == "branches" else amount


def noise(seed: int, step: int, shape: tuple[int, ...]) -> Floats:
    """Logistic(0, 1) noise: the difference of two Gumbel variables; a function of (seed, step) alone."""
    return generator(seed, "branches", step).logistic(size=shape)


def choose(
    space: BranchSpace, scores: Floats, costs: Floats, amount: float, floor: int = 1, whole: bool = False
) -> Mask:
    """The branches of highest score whose costs together stay within ``amount``.

    First each layer gets its best branch (with ``floor`` 0: only layers without an identity, which would otherwise put
    out nothing), then the best of the whole network follow while they fit. With unit costs that is the top K, exactly.

    Args:
        scores, costs: (L, N).
        whole: a layer's first branch is its best of ``space.whole``.
    Raises:
        AnswerIsNo: not even one branch a layer fits.
    """
    ranked = np.where(space.legal, scores, -np.inf)
    needs = np.ones(len(space.layers), dtype=np.bool_) if floor else ~space.skips
    mask = np.zeros_like(space.legal)
    rows = np.flatnonzero(needs)
    first = np.where(space.whole, ranked, -np.inf) if whole else ranked
    mask[rows, first[rows].argmax(axis=1)] = True
    if costs[mask].sum() > amount:  # the best do not fit: the cheapest may
        cheap = np.where(space.whole if whole else space.legal, costs, np.inf)
        mask[:] = False
        mask[rows, cheap[rows].argmin(axis=1)] = True
        if costs[mask].sum() > amount:
            raise AnswerIsNo(
                f"the branch budget of {amount:g} is below the {costs[mask].sum():g} that one branch a layer needs: "
                "give a larger budget"
            )
        for row in rows:  # and of those layers where a better one fits, the better one
            for column in np.argsort(-first[row], kind="stable"):
                now = int(mask[row].argmax())
                if first[row, column] <= first[row, now]:
                    break
                if costs[mask].sum() - costs[row, now] + costs[row, column] <= amount:
                    mask[row, now], mask[row, column] = False, True
                    break
    used = float(costs[mask].sum())
    for place in np.argsort(-ranked, axis=None, kind="stable"):
        row, column = np.unravel_index(place, mask.shape)
        if space.legal[row, column] and not mask[row, column] and used + costs[row, column] <= amount * (1 + 1e-12):
            mask[row, column] = True
            used += float(costs[row, column])
    return mask


def choose_within_ms(
    space: BranchSpace, scores: Floats, folded: FoldedMs, max_ms: float, count: int | None = None, floor: int = 1
) -> Mask:
    """The branches of highest score whose folded network takes at most ``max_ms``.

    Starts from the best ``count`` (all, where None), and while the network is too slow takes the smaller kernel that
    loses least score for each millisecond it saves; what a layer may no longer have goes to others.

    Raises:
        InfeasibleBudgetError: with every kernel at its cheapest the network is still too slow.
    """
    allowed = space.legal.copy()
    units = space.legal.astype(np.float64)
    smallest = folded.whole_ms + sum(min(ms for _, ms in shapes) for shapes in folded.shapes)
    if smallest > max_ms:
        raise InfeasibleBudgetError(
            f"no choice of branches folds into {max_ms:g} ms: the smallest reachable is {smallest:.4g} ms",
            smallest_ms=smallest,
        )
    weight = 1 / (1 + np.exp(-scores))  # positive, so that losing a branch always costs something
    while True:
        now = replace(space, legal=allowed)
        mask = choose(now, scores, units, float(units.sum()) if count is None else float(count), floor)
        ms = folded.of_mask(mask)
        if ms <= max_ms:
            return mask
        steps = []
        for layer, shapes in enumerate(folded.shapes):
            for inside, added in shapes:
                row = allowed[layer] & np.array(inside)
                saved = folded.added_ms(layer, mask[layer]) - added
                if saved > 0 and row.any() and (row != allowed[layer]).any():
                    lost = float(weight[layer][mask[layer] & ~row].sum())
                    steps.append((lost / saved, layer, row))
        if not steps:
            allowed = np.stack([np.array(shapes[0][0]) & space.legal[i] for i, shapes in enumerate(folded.shapes)])
            continue
        _, layer, row = min(steps, key=lambda step: (step[0], step[1]))
        allowed[layer] = row


def gate_gradient(mask: Mask, scores: Floats, gradient: Floats) -> Floats:
    """dL/d alpha from dL/d gate: ``M * sigmoid(s) * (1 - sigmoid(s)) * dL/dz`` (straight through)."""
    sigmoid = 1 / (1 + np.exp(-scores))
    return np.asarray(mask * sigmoid * (1 - sigmoid) * gradient)
