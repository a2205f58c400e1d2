"""EVBMF: known ranks are found, and what must not matter does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.errors import InputError
from hwsearch.search.lowrank import low_rank

SEEDS = st.integers(0, 2**20)


def matrix(rows: int, columns: int, rank: int, strength: float, seed: int) -> np.ndarray:
    """Noise of unit variance and ``rank`` directions, each ``strength`` times the largest singular value of noise."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, max(rank, 1))))[0][:, :rank]
    right = np.linalg.qr(rng.normal(size=(columns, max(rank, 1))))[0][:, :rank]
    scale = strength * (np.sqrt(rows) + np.sqrt(columns)) * np.linspace(1.0, 1.5, max(rank, 1))[:rank]
    return (left * scale) @ right.T + rng.normal(size=(rows, columns))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(16, 40), columns=st.integers(96, 200), share=st.floats(0, 0.25), seed=SEEDS)
def test_the_rank_under_noise_is_found(rows: int, columns: int, share: float, seed: int) -> None:
    rank = round(share * rows)
    found = low_rank(matrix(rows, columns, rank, 2.5, seed))
    assert found.rank == rank
    # A quarter of the directions may be signal: the rest still tells the noise's variance (1).
    assert 0.6 < found.noise_variance < 1.4


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rank=st.integers(0, 6), scale=st.floats(1e-6, 1e6))
def test_turning_scaling_and_reordering_change_nothing_else(seed: int, rank: int, scale: float) -> None:
    array = matrix(12, 40, rank, 2.0, seed)
    rng = np.random.default_rng(seed)
    plain = low_rank(array)
    turned = low_rank(array.T)
    mixed = low_rank(array[rng.permutation(12)][:, rng.permutation(40)] * rng.choice([-1, 1], 40))
    scaled = low_rank(array * scale)
    np.testing.assert_allclose(turned.values, plain.values, rtol=1e-6)
    np.testing.assert_allclose(mixed.values, plain.values, rtol=1e-6)
    np.testing.assert_allclose(scaled.values, plain.values * scale, rtol=1e-6)
    assert scaled.noise_variance == pytest.approx(plain.noise_variance * scale**2, rel=1e-5)
    assert (turned.rows, turned.columns) == (40, 12)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 6))
def test_values_are_shrunk_and_figures_stay_in_their_ranges(seed: int, rank: int) -> None:
    array = matrix(16, 48, rank, 1.6, seed)
    found, raw = low_rank(array), np.linalg.svd(array, compute_uv=False)
    assert found.rank >= 1
    assert (found.values > 0).all()
    assert (found.values < raw[: found.rank]).all()
    assert (np.diff(found.values) <= 0).all()
    assert 1 <= found.stable_rank <= found.gain + 1e-9
    assert found.gain <= found.rank + 1e-9
    assert found.condition >= 1


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 5))
def test_a_matrix_without_noise_keeps_its_rank_and_values(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    array = (np.linalg.qr(rng.normal(size=(10, rank)))[0] * np.linspace(1, 2, rank)) @ rng.normal(size=(rank, 30))
    found = low_rank(array)
    assert found.rank == rank
    np.testing.assert_allclose(found.values, np.linalg.svd(array, compute_uv=False)[:rank], rtol=1e-4)


def test_the_free_energy_is_least_where_the_variance_is_estimated() -> None:
    from hwsearch.search.lowrank import _free_energy

    array = matrix(20, 70, 5, 2.0, 3)
    spectrum = np.linalg.svd(array, compute_uv=False)
    found = low_rank(array).noise_variance
    tried = np.geomspace(found / 3, found * 3, 2000)
    assert _free_energy(np.array([found]), spectrum, 20, 70)[0] <= _free_energy(tried, spectrum, 20, 70).min() + 1e-7


def test_ordinary_and_odd_matrices() -> None:
    rng = np.random.default_rng(0)
    noise = low_rank(rng.normal(size=(64, 576)))
    assert (noise.rank, noise.condition, noise.stable_rank, noise.gain) == (0, 0.0, 0.0, 0.0)
    assert low_rank(np.zeros((4, 9))).rank == 0
    assert low_rank(np.ones((1, 1))).rank in (0, 1)
    for shape in ((1, 9), (9, 1), (2, 2), (3, 3)):
        assert low_rank(rng.normal(size=shape)).rank <= min(shape)
    with pytest.raises(InputError, match="not finite"):
        low_rank([[1.0, np.nan]])
    with pytest.raises(InputError, match="no singular values"):
        low_rank(np.zeros((0, 3)))
    with pytest.raises(InputError, match="no singular values"):
        low_rank([1.0, 2.0])
