"""Patterns: base and free units around a width, checked against counts worked out by hand."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.patterns import bins_of, draw, draw_units, leftmost, zone


def all_patterns(units: int, width: int, offset: int) -> list[tuple[int, ...]]:
    """Every pattern of a width, by its definition."""
    place = zone(units, width, offset)
    free = combinations(range(place.base, place.end), place.free)
    return [(*range(place.base), *chosen) for chosen in free]


@pytest.mark.parametrize(
    ("units", "offset", "counts", "usage"),
    [
        (6, 1, [2, 2, 2, 2, 2, 1], [5.5, 5, 4, 3, 2, 1.5]),
        (8, 2, [3, 6, 6, 6, 6, 6, 3, 1], [6.83, 6.33, 5.83, 5, 4, 3.17, 2.67, 2.17]),
        (6, 0, [1] * 6, [6, 5, 4, 3, 2, 1]),
    ],
)
def test_counts_and_expected_usage_are_those_of_the_definition(
    units: int, offset: int, counts: list[int], usage: list[float]
) -> None:
    found = [all_patterns(units, width, offset) for width in range(1, units + 1)]
    assert [len(patterns) for patterns in found] == counts
    used = np.zeros(units)
    for patterns in found:
        for pattern in patterns:
            used[list(pattern)] += 1 / len(patterns)
    np.testing.assert_allclose(used, usage, atol=0.005)


def test_the_figure_of_the_paper() -> None:
    """Six channels, offset 1: width c is the first c - 1 channels and either the c-th or the one after it."""
    assert all_patterns(6, 3, 1) == [(0, 1, 2), (0, 1, 3)]
    assert all_patterns(6, 6, 1) == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_the_interior_has_2r_over_r_patterns(offset: int) -> None:
    assert len(all_patterns(20, 10, offset)) == comb(2 * offset, offset)


@pytest.mark.parametrize(("units", "width", "offset"), [(8, 4, 2), (8, 1, 2), (8, 7, 2), (6, 3, 1)])
def test_every_pattern_is_drawn_equally_often(units: int, width: int, offset: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [tuple(draw_units(units, width, offset, 1, rng).tolist()) for _ in range(3000)]
    patterns = all_patterns(units, width, offset)
    shares = np.array([drawn.count(pattern) for pattern in patterns]) / 3000
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, 1 / len(patterns), atol=0.05)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_width_gets_a_valid_pattern(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 40))
    width = data.draw(st.integers(1, units))
    offset, bin_units = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    kept = draw_units(units, width, offset, bin_units, np.random.default_rng(data.draw(st.integers(0, 9))))
    place = zone(units, width, offset * bin_units)
    assert len(kept) == width
    assert np.all(np.diff(kept) > 0)
    assert kept[: place.base].tolist() == list(range(place.base))
    assert kept[0] >= 0
    assert kept[-1] < place.end
    if offset == 0 or width == units:
        assert kept.tolist() == list(range(width))


def test_free_units_come_in_whole_bins_where_widths_are_multiples() -> None:
    rng = np.random.default_rng(0)
    seen = {tuple(draw_units(32, 16, 1, 4, rng).tolist()) for _ in range(50)}
    assert seen == {tuple(range(16)), (*range(12), 16, 17, 18, 19)}


def test_a_space_draws_by_group_with_its_own_bins(toy: Any) -> None:
    space = toy.space([range(4, 33, 4), range(1, 9)])
    choice = WidthChoice((16, 8))
    pattern = draw(space, choice, 1, (4, 1), np.random.default_rng(3))
    assert pattern.choice == choice
    assert pattern.by_group(space)["g1"].tolist() == list(range(8))
    assert leftmost(choice).choice == choice
    assert bins_of(space, None) == (4, 1)  # the distance between the allowed widths
    assert bins_of(space, 16) == (16, 8)
    with pytest.raises(InputError, match="bin_units is 0"):
        bins_of(space, 0)
