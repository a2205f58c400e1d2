"""The choice of what to time: the telling ones first, none twice, the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.latency.transfer_sampler import choose_rows


def left_variance(factors: np.ndarray, picked: np.ndarray, noise: float) -> float:
    """Summed posterior variance of everything, from the definition."""
    own = factors[picked]
    gain = np.linalg.solve(own @ own.T + noise * np.eye(len(picked)), own @ factors.T)
    return float((factors**2).sum() - np.einsum("kn,kn->", own @ factors.T, gain))


def test_each_step_is_the_best_one() -> None:
    factors = np.random.default_rng(0).standard_normal((30, 4)) * [3.0, 1.0, 0.5, 0.1]
    picked = choose_rows(factors, 5, noise=0.1)
    for step in range(5):
        others = [n for n in range(30) if n not in picked[:step]]
        tried = [left_variance(factors, np.append(picked[:step], n), 0.1) for n in others]
        assert others[int(np.argmin(tried))] == picked[step]


def test_only_candidates_are_chosen_and_only_the_population_counts() -> None:
    factors = np.array([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    assert choose_rows(factors, 1).tolist() == [0]
    assert choose_rows(factors, 1, candidates=np.array([1, 2, 3]), population=np.array([1, 2, 3])).tolist() == [3]
    assert choose_rows(factors, 1, candidates=np.array([1, 2, 3]), population=np.array([0])).tolist() == [1]


def test_a_seed_varies_the_choice_and_repeats_it() -> None:
    factors = np.random.default_rng(1).standard_normal((50, 5))
    choices = [tuple(choose_rows(factors, 6, seed=seed)) for seed in range(5)]
    assert len(set(choices)) > 1
    assert choices[2] == tuple(choose_rows(factors, 6, seed=2))
    assert all(len(set(choice)) == 6 for choice in choices)


@pytest.mark.parametrize("count", [0, 4])
def test_more_than_there_are_cannot_be_chosen(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} of 3 candidates"):
        choose_rows(np.eye(3), count)
