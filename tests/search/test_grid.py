"""Widths as arrays: the same rounding as the space's own, and clear messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.grid import WidthGrid, row_keys


def test_uniform_scaling_rounds_as_the_space_does(toy: Any) -> None:
    """One rounding rule everywhere: a tie goes to the wider width."""
    space = toy.space([[4, 8, 16, 32], [3, 5, 10], [7]])
    ratios = np.arange(1, 129) / 128
    rows = WidthGrid.of(space).uniform(ratios)
    assert row_keys(rows) == [space.uniform(float(ratio)).widths for ratio in ratios]
    assert WidthGrid.of(space).nearest(np.asarray([[6.0, 4.0, 0.0]])).tolist() == [[1, 1, 0]]


def test_at_least_never_narrows(toy: Any) -> None:
    grid = WidthGrid.of(toy.space([[4, 8, 16], [5, 10, 20]]))
    assert grid.take(grid.at_least(np.asarray([[4, 6], [9, 21], [1, 20]]))).tolist() == [[4, 10], [16, 20], [4, 20]]


def test_indices_and_widths_go_back_and_forth(toy: Any) -> None:
    grid = WidthGrid.of(toy.space([[4, 8, 16], [5, 10, 20], [1]]))
    rows = grid.sample(50, np.random.default_rng(0))
    np.testing.assert_array_equal(grid.take(grid.nearest(rows)), rows)
    assert grid.take(grid.top[None])[0].tolist() == grid.full.tolist() == [16, 20, 1]
    assert grid.smallest.tolist() == [4, 5, 1]


def test_any_kind_of_choices_becomes_a_population(toy: Any) -> None:
    grid = WidthGrid.of(toy.space([[4, 8], [5, 10]]))
    assert grid.population([WidthChoice((4, 5)), WidthChoice((8, 10))]).tolist() == [[4, 5], [8, 10]]
    assert grid.population([(4, 5)]).tolist() == [[4, 5]]
    assert grid.population(np.asarray([4, 5])).tolist() == [[4, 5]]
    assert grid.population([]).shape == (0, 2)
    with pytest.raises(InputError, match="one width per group"):
        grid.population([(4, 5, 6)])


def test_the_digest_tells_spaces_apart(toy: Any) -> None:
    one, two = toy.space([[4, 8], [5, 10]]), toy.space([[4, 8], [6, 10]])
    assert WidthGrid.of(one).digest == WidthGrid.of(toy.space([[4, 8], [5, 10]])).digest
    assert WidthGrid.of(one).digest != WidthGrid.of(two).digest
