"""Budgets: validation, use, reach and repair, on staircases that are not monotone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.search.budget import Budget, Limit, ScaledLatency
from hwsearch.search.grid import WidthGrid

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "3 ms", None, True])
def test_a_budget_that_is_no_number_of_milliseconds_is_refused(toy: Any, wrong: Any) -> None:
    with pytest.raises(InputError, match="max_ms") as caught:
        Limit(toy.Staircase(), wrong)
    assert "\n" not in str(caught.value)


def test_other_wrong_values_are_refused(toy: Any) -> None:
    with pytest.raises(InputError, match="evaluate"):
        Limit(object(), 1.0)
    with pytest.raises(InputError, match="quantile is 1"):
        Limit(toy.Staircase(), 1.0, quantile=1.0)
    with pytest.raises(InputError, match="interval"):
        Limit(type("OnlyTimes", (), {"evaluate": lambda self, c: c.sum(1)})(), 1.0, quantile=0.9)
    with pytest.raises(InputError, match="at least one Limit"):
        Budget([])
    with pytest.raises(InputError, match="floor"):
        Budget([Limit(toy.Staircase(), 1.0)], floor=1.0)


def test_use_and_violation_take_the_worst_limit(toy: Any) -> None:
    latency = toy.Staircase()
    rows = np.asarray([[8, 8], [32, 32]])
    times = latency.evaluate(rows)
    budget = Budget([Limit(latency, times[1], 0.5), Limit(latency, times[1] / 2, 0.5)])
    assert budget.evaluate(rows).shape == (2, 2)
    np.testing.assert_allclose(budget.use(rows), times / (times[1] / 2))
    assert budget.feasible(rows).tolist() == [True, False]
    np.testing.assert_allclose(budget.violation(rows), [0.0, 1.0])
    # A budget is kept up to exactly its limit, and not a little further.
    assert Budget([Limit(latency, times[0], 0.5)]).feasible(rows[:1]).tolist() == [True]
    assert Budget([Limit(latency, times[0] * (1 - 1e-9), 0.5)]).feasible(rows[:1]).tolist() == [False]
    assert budget.evaluate(np.zeros((0, 2), dtype=np.int64)).shape == (0, 2)


def test_a_prediction_that_is_no_number_never_fits(toy: Any) -> None:
    class Broken:
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return np.full(len(choices), np.nan)

    budget = Budget([Limit(Broken(), 1.0)])
    assert budget.feasible(np.asarray([[1]])).tolist() == [False]
    with pytest.raises(InfeasibleBudgetError, match="finite predicted time"):
        budget.check_reachable(toy.space())


def test_a_limit_is_kept_with_probability_0_95_unless_it_is_measured(toy: Any) -> None:
    latency = toy.Staircase()
    rows = np.asarray([[8, 16]])
    assert Limit(latency, 1.0).quantile == 0.95
    np.testing.assert_allclose(Limit(latency, 1.0).evaluate(rows), latency.interval(rows, 0.9)[1])
    assert Limit(latency, 1.0, measure=lambda choice: 1.0).quantile == 0.5
    assert Limit(type("OnlyTimes", (), {"evaluate": lambda self, c: c.sum(1)})(), 1.0).quantile == 0.5


def test_a_quantile_compares_the_upper_side_of_the_interval(toy: Any) -> None:
    latency = toy.Staircase()
    rows = np.asarray([[16, 16, 16]])
    # One-sided 0.95 is the upper end of a two-sided interval of level 0.9.
    expected = latency.interval(rows, 0.9)[1]
    np.testing.assert_allclose(Limit(latency, 1.0, quantile=0.95).evaluate(rows), expected)


def test_correction_scales_times_or_asks_the_latency(toy: Any) -> None:
    rows = np.asarray([[16, 8]])
    limit = Limit(toy.Staircase(), 1.0, quantile=0.9)
    np.testing.assert_allclose(limit.corrected(1.1).evaluate(rows), 1.1 * limit.evaluate(rows))
    assert isinstance(limit.corrected(1.1).latency, ScaledLatency)

    class Own(toy.Staircase):  # type: ignore[misc]
        def corrected(self, factor: float) -> Any:
            return toy.Staircase(fixed_ms=factor)

    assert Limit(Own(), 1.0).corrected(7.0).latency == toy.Staircase(fixed_ms=7.0)


def test_repeated_rows_are_predicted_once(toy: Any) -> None:
    latency = toy.Staircase()
    Budget([Limit(latency, 1.0)]).evaluate(np.asarray([[8, 8], [8, 8], [16, 8]]))
    assert latency.predictions == 2


def test_the_smallest_time_is_found_where_the_narrowest_is_not_the_fastest(toy: Any) -> None:
    space = toy.space([[10, 16, 24, 32]] * 4)
    latency = toy.Staircase(bump=4)  # 10 channels cost as much as 48
    budget = Budget([Limit(latency, 1.0, 0.5)])
    fastest = latency.evaluate(np.full((1, 4), 16))[0]
    assert budget.reachable(space).smallest_ms == pytest.approx(fastest)
    assert budget.reachable(space).largest_ms == pytest.approx(latency.evaluate(np.full((1, 4), 32))[0])
    # Just enough for 16 everywhere, by far too little for the all-minimum choice: still reachable.
    Budget([Limit(latency, fastest * 1.001, 0.5)]).check_reachable(space)
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable is") as caught:
        Budget([Limit(latency, fastest * 0.99, 0.5, name="box")]).check_reachable(space)
    assert caught.value.smallest_ms == pytest.approx(fastest)
    assert caught.value.exit_code == 1
    assert "on box" in str(caught.value)


def test_the_budget_that_the_refusal_names_is_enough(toy: Any) -> None:
    space, latency = toy.space(), toy.Staircase()
    with pytest.raises(InfeasibleBudgetError) as caught:
        Budget([Limit(latency, 1e-3)]).check_reachable(space)
    named = float(str(caught.value).split("at least ")[1].split(" ms")[0])
    Budget([Limit(latency, named)]).check_reachable(space)


def test_what_was_asked_before_changes_no_repair(toy: Any) -> None:
    """A resumed run may ask in another order than the unbroken one."""
    space = toy.space([[2, 10, 16, 24, 32]] * 5)
    rows = WidthGrid.of(space).sample(20, np.random.default_rng(0))
    repaired = []
    for asked_first in (False, True):
        budget = toy.budget(space, 0.2, toy.Staircase(bump=2))
        if asked_first:
            budget.reachable(space)
        repaired.append(budget.repair(space, rows, np.random.default_rng(1)))
    np.testing.assert_array_equal(*repaired)


def in_space(space: Any, rows: np.ndarray) -> bool:
    allowed = WidthGrid.of(space).allowed
    return all(np.isin(rows[:, g], widths).all() for g, widths in enumerate(allowed))


@PROPERTY
@given(data=st.data())
def test_repair_always_keeps_a_reachable_budget(toy: Any, data: st.DataObject) -> None:
    """Whatever the space, staircase and population: allowed widths, within the budget, the same for one seed."""
    groups = data.draw(st.integers(1, 6), label="groups")
    widths = st.lists(st.integers(1, 48), min_size=1, max_size=10, unique=True)
    space = toy.space([data.draw(widths) for _ in range(groups)])
    block, bump = data.draw(st.sampled_from([1, 8, 16])), data.draw(st.sampled_from([0, 1, 4]))
    latency = toy.Staircase(block=block, bump=bump)
    budget = toy.budget(space, data.draw(st.floats(0.05, 1.3), label="share"), latency)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = rng.integers(1, 60, size=(5, groups))
    try:
        budget.check_reachable(space)
    except InfeasibleBudgetError:
        repaired = budget.repair(space, rows, rng)
        assert in_space(space, repaired)
        return
    state = rng.bit_generator.state
    repaired = budget.repair(space, rows, rng)
    assert repaired.dtype == np.int64
    assert repaired.shape == rows.shape
    assert in_space(space, repaired)
    assert budget.feasible(repaired).all()
    rng.bit_generator.state = state
    np.testing.assert_array_equal(budget.repair(space, rows, rng), repaired)


@pytest.mark.parametrize("share", [0.15, 0.28, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("bump", [0, 2])
def test_repair_fills_the_budget_with_few_predictions(toy: Any, share: float, bump: int) -> None:
    space, latency = toy.space(groups=15, units=64), toy.Staircase(bump=bump)
    budget = toy.budget(space, share, latency)
    rng = np.random.default_rng(0)
    rows = WidthGrid.of(space).sample(100, rng)
    latency.predictions = 0
    repaired = budget.repair(space, rows, rng)
    assert latency.predictions < 16 * len(rows)
    use = budget.use(repaired)
    assert use.max() <= 1.0
    assert (use >= 0.95).mean() >= 0.95
    assert len(np.unique(repaired, axis=0)) == len(rows), "different choices must stay different"


def test_repair_leaves_alone_what_already_fits(toy: Any) -> None:
    space = toy.space(groups=8)
    budget = toy.budget(space, 0.5)
    rng = np.random.default_rng(1)
    once = budget.repair(space, WidthGrid.of(space).sample(30, rng), rng)
    good = once[budget.use(once) >= 0.95]
    assert len(good) > 20
    np.testing.assert_array_equal(budget.repair(space, good, rng), good)


def test_where_the_full_network_fits_the_floor_is_void(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 1.2)
    rows = WidthGrid.of(space).sample(20, np.random.default_rng(0))
    np.testing.assert_array_equal(budget.repair(space, rows, np.random.default_rng(0)), rows)


def test_without_a_floor_slow_choices_still_stay_different(toy: Any) -> None:
    space = toy.space(groups=8)
    latency = toy.Staircase()
    full = latency.evaluate(np.asarray([space.full().widths]))[0]
    budget = Budget([Limit(latency, full * 0.3)], floor=0.0)
    rng = np.random.default_rng(0)
    repaired = budget.repair(space, WidthGrid.of(space).sample(30, rng), rng)
    assert budget.feasible(repaired).all()
    assert len(np.unique(repaired, axis=0)) == 30


def test_repair_keeps_several_limits(toy: Any) -> None:
    space = toy.space(groups=8)
    one, two = toy.Staircase(block=8), toy.Staircase(block=16, bump=2, fixed_ms=0.5)
    full = [latency.evaluate(np.asarray([space.full().widths]))[0] for latency in (one, two)]
    budget = Budget([Limit(one, full[0] * 0.4, 0.5), Limit(two, full[1] * 0.5, 0.5)])
    rng = np.random.default_rng(0)
    repaired = budget.repair(space, WidthGrid.of(space).sample(40, rng), rng)
    assert (budget.evaluate(repaired) <= [full[0] * 0.4, full[1] * 0.5]).all()
    assert (budget.use(repaired) >= 0.95).mean() > 0.7


def test_a_population_of_another_size_is_refused(toy: Any) -> None:
    space = toy.space(groups=3)
    with pytest.raises(InputError, match="3 groups"):
        toy.budget(space, 0.5).repair(space, np.ones((2, 4), dtype=np.int64), np.random.default_rng(0))
    empty = toy.budget(space, 0.5).repair(space, np.zeros((0, 3), dtype=np.int64), np.random.default_rng(0))
    assert empty.shape == (0, 3)
