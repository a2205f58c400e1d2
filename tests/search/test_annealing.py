"""Annealing under a budget: worth, elasticity, projection, and that nothing outside the budget comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.errors import InputError
from hwsearch.search.annealing import AnnealSettings, WidthWorth, anneal, project, worth_of

FEW = AnnealSettings(chains=6, steps=25)


def even(space: Any, elasticity: float = 0.5) -> WidthWorth:
    full = np.array([group.units for group in space.groups], dtype=float)
    return WidthWorth(full, np.full(len(full), 1 / len(full)), elasticity)


@settings(max_examples=30, deadline=None)
@given(elasticity=st.floats(0, 2), seed=st.integers(0, 999))
def test_worth_rises_with_width_by_less_and_less(elasticity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random(4) + 0.1
    worth = WidthWorth(np.full(4, 64.0), weights / weights.sum(), elasticity)
    rows = np.sort(rng.integers(1, 65, (3, 4)), axis=0)
    values = worth(rows)
    assert (np.diff(values) >= -1e-12).all()
    assert worth(np.full((1, 4), 64))[0] == pytest.approx(0.0, abs=1e-12)
    one_more = worth(np.array([[16] * 4, [17] * 4, [18] * 4]))
    assert one_more[2] - one_more[1] < one_more[1] - one_more[0]


def test_the_slope_of_worth_is_the_quality_at_that_width() -> None:
    """What a group gains from a share more of its width is its quality there: full-width quality * c ** -e."""
    weights, e = np.array([0.7, 0.3]), 0.8
    worth = WidthWorth(np.array([100.0, 100.0]), weights, e)
    before = np.array([[40.0, 60.0]])
    for g in range(2):
        after = before.copy()
        after[0, g] *= 1.0001
        slope = (worth(after)[0] - worth(before)[0]) / np.log(1.0001)
        assert slope == pytest.approx(weights[g] * (before[0, g] / 100) ** -e, rel=1e-3)


def test_elasticity_and_weights_are_read_off_the_trials() -> None:
    """Quality that falls as width ** -0.9, under a rise that all groups share, gives back the 0.9."""
    rng = np.random.default_rng(0)
    full, at_full = [64] * 6, np.linspace(0.1, 0.6, 6)
    widths = rng.integers(8, 65, (12, 6))
    rise = np.linspace(1, 2, 12)[:, None]
    quality = at_full * (widths / 64) ** -0.9 * rise
    found = worth_of(full, widths.tolist(), quality.tolist(), [1] * 6, 0.5)
    assert found.elasticity == pytest.approx(0.9, abs=0.05)
    np.testing.assert_allclose(found.weights, at_full / at_full.sum(), rtol=0.05)
    first = worth_of(full, widths[:1].tolist(), quality[:1].tolist(), [1] * 6, 0.5)
    assert first.elasticity == 0.5


def test_a_network_that_learnt_nothing_yet_weighs_all_groups_alike() -> None:
    found = worth_of([8, 8, 8], [[4, 4, 4]], [[0.0, 0.0, 0.0]], [1, 1, 2], 0.5)
    np.testing.assert_allclose(found.weights, [0.25, 0.25, 0.5])
    part = worth_of([8, 8], [[8, 8]], [[0.4, 0.0]], [1, 1], 0.5)
    np.testing.assert_allclose(part.weights, [0.5, 0.5])


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.15, 1.1), bump=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_every_choice_keeps_the_budget(toy: Any, share: float, bump: float, seed: int) -> None:
    space = toy.space()
    budget = toy.budget(space, share, toy.Staircase(bump=bump))
    rng = np.random.default_rng(seed)
    around = space.sample(rng).widths
    found = anneal(space, budget, even(space), np.array([around]), np.array(around), rng, FEW)
    rows = np.array([key for key, _ in found])
    assert len(rows) >= 1
    assert budget.feasible(rows).all()
    space.choices(rows)
    energies = [energy for _, energy in found]
    assert energies == sorted(energies)
    np.testing.assert_allclose(energies, -even(space)(rows))


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.15, 0.9), seed=st.integers(0, 99))
def test_projection_fills_the_budget(toy: Any, share: float, seed: int) -> None:
    space = toy.space(step=1)
    budget = toy.budget(space, share, toy.Staircase(block=1))
    rng = np.random.default_rng(seed)
    rows = project(space, budget, even(space), space.choice_array([space.sample(rng) for _ in range(4)]), rng)
    use = budget.use(rows)
    assert (use <= 1).all()
    assert (use > 0.9).all()
    for row in rows:  # nothing more fits
        for g, group in enumerate(space.groups):
            if row[g] < group.units:
                wider = row.copy()
                wider[g] += 1
                assert not budget.feasible(wider[None])[0]


def test_projection_gives_up_least_worth() -> None:
    """Of two groups that cost alike the one of less quality shrinks."""
    from hwsearch.graph.widths import WidthGroup, WidthSpace
    from hwsearch.search.budget import Budget, Limit

    class Sum:
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return np.asarray(choices.sum(axis=1) * 0.01)

    groups = tuple(WidthGroup(n, 40, 1, 1, (), (), tuple(range(1, 41))) for n in "ab")
    space = WidthSpace(groups, network=None)  # type: ignore[arg-type]
    worth = WidthWorth(np.array([40.0, 40.0]), np.array([0.8, 0.2]), 0.5)
    row = project(space, Budget([Limit(Sum(), 0.4)]), worth, np.array([[40, 40]]), np.random.default_rng(0))[0]
    assert row.sum() == 40
    # At the optimum both slopes are equal: 0.8 a ** -1.5 = 0.2 b ** -1.5.
    assert row[0] / row[1] == pytest.approx(4 ** (1 / 1.5), rel=0.15)


def test_annealing_is_deterministic_and_better_than_its_start(toy: Any) -> None:
    space = toy.space(groups=8)
    budget = toy.budget(space, 0.4)
    weights = np.linspace(0.02, 0.25, 8)
    worth = WidthWorth(np.full(8, 32.0), weights / weights.sum(), 0.3)
    start = budget.repair(space, np.full((1, 8), 20), np.random.default_rng(0))
    results = [anneal(space, budget, worth, start, start[0], np.random.default_rng(3), FEW) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0][0][1] < -worth(start)[0]
    scaled = project(space, budget, worth, start, np.random.default_rng(0))
    assert results[0][0][1] <= -worth(scaled)[0] + 1e-12


@pytest.mark.parametrize("wrong", [{"chains": 0}, {"penalty": 0.0}, {"cold": 2.0}, {"reach": 1.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        AnnealSettings(**wrong)
