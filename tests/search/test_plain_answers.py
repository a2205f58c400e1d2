"""Magnitude and the latency knapsack: what is taken away first, and that the budget is kept and used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.search.baselines import importances, knapsack, magnitude, magnitude_choices


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 1, 3, 3))
        net[1].weight.copy_(torch.arange(8.0, 0.0, -1.0))
    return net


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    return WidthSpace.from_model(model(), torch.zeros(1, 1, 8, 8))


def test_importance_is_the_size_of_what_makes_a_unit(space: WidthSpace) -> None:
    net = model()
    by_weight, by_gamma = importances(space, net), importances(space, net, "gamma")
    assert by_weight[0].tolist() == pytest.approx(list(range(1, 9)))
    assert by_gamma[0].tolist() == pytest.approx(list(range(8, 0, -1)))
    assert [len(sizes) for sizes in by_weight] == [8, 12]
    with pytest.raises(InputError, match="magnitude by 'l7'"):
        importances(space, net, "l7")
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(InputError, match="no normalisation"):
        importances(WidthSpace.from_model(plain, torch.zeros(1, 4)), plain, "gamma")


def test_one_threshold_cuts_all_groups_by_relative_size(toy: Any) -> None:
    space = toy.space([range(1, 5), range(1, 5)])
    rows = magnitude_choices(space, [np.array([1.0, 1.0, 1.0, 1.0]), np.array([4.0, 0.1, 0.1, 0.1])])
    # The second group has one large unit: it is the first to stand, and its small ones are the first to go.
    assert rows.tolist() == [[1, 1], [4, 1], [4, 4]]


def test_magnitude_keeps_the_budget_with_the_widest_cut_that_fits(toy: Any, space: WidthSpace) -> None:
    budget = toy.budget(space, 0.7, toy.Staircase(block=1))
    settled = magnitude(space, budget, model())
    rows = magnitude_choices(space, importances(space, model()))
    fits = rows[budget.feasible(rows)]
    assert settled.candidate.choice.widths == tuple(fits[-1])
    with pytest.raises(InfeasibleBudgetError):
        magnitude(space, toy.budget(space, 0.01), model())


def test_the_knapsack_takes_what_is_worth_least_per_millisecond(toy: Any) -> None:
    """Two groups of equal cost: the one whose units are worth nothing shrinks."""
    space = toy.space([range(1, 9), range(1, 9)])

    class Sum:
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return np.asarray(choices, dtype=float).sum(axis=1)

    sizes = [np.ones(8), np.array([1.0, *[1e-6] * 7])]
    found = knapsack(space, toy.budget(space, 0.6, Sum()), sizes)
    assert found.choice.widths == (8, 1)
    # Equal worth, but one group costs four times as much: it is the one that shrinks.

    class Costly(Sum):
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return np.asarray(choices, dtype=float) @ np.array([4.0, 1.0])

    assert knapsack(space, toy.budget(space, 0.8, Costly()), [np.ones(8)] * 2).choice.widths == (6, 8)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_knapsack_keeps_the_budget_on_stairs_that_are_not_monotone(toy: Any, share: float) -> None:
    space = toy.space(groups=6)
    budget = toy.budget(space, share, toy.Staircase(bump=2))
    rng = np.random.default_rng(0)
    found = knapsack(space, budget, [rng.random(32) for _ in range(6)])
    use = budget.use(np.array([found.choice.widths]))[0]
    assert 0.8 < use <= 1.0
    with pytest.raises(InfeasibleBudgetError):
        knapsack(space, toy.budget(space, 0.001), [np.ones(32)] * 6)
