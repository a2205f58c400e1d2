"""Baselines keep the same budget, by the same measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.search import baselines
from hwsearch.search.budget import Budget, Limit


def test_uniform_is_the_widest_scaling_that_fits(toy: Any) -> None:
    space = toy.space(groups=4, units=64, step=1)
    for bump in (0, 3):
        latency = toy.Staircase(bump=bump)
        budget = toy.budget(space, 0.5, latency)
        found = np.asarray([baselines.uniform(space, budget).candidate.choice.widths])
        assert budget.feasible(found).all()
        wider = [row for row in baselines.uniform_choices(space) if row[0] > found[0, 0]]
        assert not budget.feasible(np.asarray(wider)).any()


def test_uniform_choices_are_different_and_go_from_narrow_to_full(toy: Any) -> None:
    space = toy.space([range(4, 33, 4), range(8, 65, 8)])
    rows = baselines.uniform_choices(space)
    assert rows[0].tolist() == [4, 8]
    assert rows[-1].tolist() == [32, 64]
    assert (np.diff(rows, axis=0) >= 0).all()
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("bias", [0.6, 0.9, 1.0, 1.1, 1.6])
def test_measurements_correct_the_uniform_pick(toy: Any, bias: float) -> None:
    space = toy.space(groups=6, units=64, step=1)
    truth = toy.Staircase(block=1)
    budget = toy.budget(space, 0.5, truth)

    def measure(choice: WidthChoice) -> float:
        return float(truth.evaluate(np.asarray([choice.widths]))[0] * bias)

    settled = baselines.uniform(space, budget, measure)
    rows = baselines.uniform_choices(space)
    best = rows[(truth.evaluate(rows) * bias <= budget.limits[0].max_ms)][-1]
    # Steps of this grid are 3 % of the budget: the pick is in the band, or the widest that fits.
    assert settled.within or settled.candidate.choice.widths == tuple(best)
    assert settled.measured_ms is not None
    assert settled.measured_ms[0] <= budget.limits[0].max_ms
    assert len(settled.trials) <= 4


def test_a_coarse_uniform_grid_ends_with_the_widest_that_was_measured_inside(toy: Any) -> None:
    space = toy.space([[8, 16, 24, 32]] * 4)
    truth = toy.Staircase()
    budget = toy.budget(space, 0.5, truth)
    settled = baselines.uniform(space, budget, lambda c: float(truth.evaluate(np.asarray([c.widths]))[0] * 1.05))
    assert settled.candidate.choice.widths == (16, 16, 16, 16)
    assert not settled.within


def test_random_choices_fill_the_budget(toy: Any) -> None:
    space = toy.space(groups=8)
    budget = toy.budget(space, 0.4)
    drawn = baselines.random(space, budget, np.random.default_rng(0), count=20)
    rows = np.asarray([c.choice.widths for c in drawn])
    assert budget.feasible(rows).all()
    assert (budget.use(rows) >= 0.95).mean() > 0.8
    assert len({c.choice for c in drawn}) == 20
    again = baselines.random(space, budget, np.random.default_rng(0), 20)
    assert [c.choice for c in again] == [c.choice for c in drawn]


def test_out_of_reach(toy: Any) -> None:
    space = toy.space()
    with pytest.raises(InfeasibleBudgetError):
        baselines.uniform(space, toy.budget(space, 0.001))
    with pytest.raises(InfeasibleBudgetError):
        baselines.random(space, toy.budget(space, 0.001), np.random.default_rng(0))


def test_a_budget_that_only_unequal_widths_keep(toy: Any) -> None:
    class Odd:
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return 1.0 + np.abs(choices - [8, 2]).sum(axis=1)

    space = toy.space([[2, 8], [2, 32]])
    budget = Budget([Limit(Odd(), 1.5)])
    assert budget.reachable(space).smallest_ms == 1.0
    with pytest.raises(AnswerIsNo, match="no candidate keeps"):
        baselines.uniform(space, budget)


def test_a_transposed_convolution_says_how_large_its_outputs_are() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 5, 4, stride=2), nn.InstanceNorm2d(5, affine=True), nn.Conv2d(5, 2, 1))
    space = WidthSpace.from_model(model.eval(), torch.zeros(1, 2, 4, 4))
    (sizes,) = baselines.importances(space, model)
    weight = model[0].weight.detach().abs().double()
    assert sizes == pytest.approx(weight.mean(dim=(0, 2, 3)).numpy())
