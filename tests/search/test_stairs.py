"""Stair edges: what is dropped really is dominated, and the reach of the space stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthGroup, WidthSpace
from hwsearch.latency.stairs import kept_widths
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.stairs import stair_edges


def test_only_block_edges_stay(toy: Any) -> None:
    space = toy.space(groups=4)
    stairs = stair_edges(space, toy.budget(space, 0.5))
    assert stairs.edges == ((8, 16, 24, 32),) * 4
    assert tuple(group.widths for group in stairs.space.groups) == stairs.edges
    assert stairs.log10_before == pytest.approx(4 * np.log10(15))
    assert stairs.log10_after == pytest.approx(4 * np.log10(4))
    assert stairs.reach_before == stairs.reach_after
    assert stairs.rows()[0] == ("g0", 32, 15, (8, 16, 24, 32))
    assert "10^4.7 choices -> 10^2.4" in stairs.summary()


def test_a_width_that_is_slower_than_a_larger_one_goes(toy: Any) -> None:
    space = toy.space([[2, 8, 10, 16, 18, 24, 32]] * 3)
    stairs = stair_edges(space, toy.budget(space, 0.5, toy.Staircase(bump=2)))
    # 8 k + 2 is padded to 8 k + 8 and then costs two blocks more: 2, 10 and 18 cost as much as 24, 32 and 40.
    assert stairs.edges == ((8, 16, 24, 32),) * 3


def test_every_device_of_the_budget_must_agree(toy: Any) -> None:
    space = toy.space(groups=3, step=4)
    fine, coarse = toy.Staircase(block=4), toy.Staircase(block=16)
    both = Budget([Limit(fine, 1.0), Limit(coarse, 1.0)])
    assert stair_edges(space, Budget([Limit(coarse, 1.0)])).edges == ((16, 32),) * 3
    assert stair_edges(space, both).edges == (tuple(range(8, 33, 4)),) * 3


def test_a_group_that_costs_nothing_keeps_its_full_width(toy: Any) -> None:
    class FirstOnly:
        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return choices[:, 0] * 0.1

    space = toy.space(groups=2)
    assert stair_edges(space, Budget([Limit(FirstOnly(), 1.0)])).edges[1] == (32,)


def test_a_saving_that_only_shows_beside_narrower_groups_counts() -> None:
    class Hidden:
        """The second group costs time only where the first is narrow (the runtime picks kernels by shape)."""

        def evaluate(self, choices: np.ndarray) -> np.ndarray:
            return choices[:, 0] * 1.0 + np.where(choices[:, 0] < 32, choices[:, 1], 32)

    groups = [WidthGroup(name, 32, 8, 8, (), (), (8, 16, 24, 32)) for name in ("a", "b")]
    space = WidthSpace(tuple(groups), network=None)  # type: ignore[arg-type]
    assert stair_edges(space, Budget([Limit(Hidden(), 50.0)])).edges[1] == (8, 16, 24, 32)


def test_snapping_widens_and_never_slows(toy: Any) -> None:
    space = toy.space(groups=5)
    latency = toy.Staircase(bump=1)
    stairs = stair_edges(space, toy.budget(space, 0.5, latency))
    rows = np.random.default_rng(0).integers(4, 33, size=(50, 5))
    snapped = stairs.snap(rows)
    assert (snapped >= rows).all()
    assert (latency.evaluate(snapped) <= latency.evaluate(rows) + 1e-12).all()


@settings(max_examples=200, deadline=None)
@given(
    times=st.lists(st.lists(st.floats(0.1, 10), min_size=2, max_size=2), min_size=1, max_size=12),
    tolerance=st.sampled_from([0.0, 0.02, 0.2]),
)
def test_every_dropped_width_has_a_kept_larger_one_that_is_no_slower(times: list, tolerance: float) -> None:
    table = np.asarray(times)
    kept = kept_widths(table, tolerance)
    allowance = tolerance * (table.max(axis=0) - table.min(axis=0))
    assert kept == sorted(kept)
    assert kept[-1] == len(table) - 1
    for dropped in set(range(len(table))) - set(kept):
        assert any((table[k] <= table[dropped] + allowance).all() for k in kept if k > dropped)
    for k in kept:
        assert not any((table[j] <= table[k] + allowance).all() for j in kept if j > k)


def test_many_small_steps_are_not_dropped_one_by_one() -> None:
    # Each step saves less than the tolerance; together they save everything.
    kept = kept_widths(np.linspace(0, 1, 101)[:, None], 0.02)
    assert len(kept) > 30
    assert kept[0] <= 2


def test_a_wrong_tolerance_is_refused(toy: Any) -> None:
    space = toy.space()
    with pytest.raises(InputError, match="tolerance"):
        stair_edges(space, toy.budget(space, 0.5), tolerance=1.0)
