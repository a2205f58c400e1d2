"""Convolutions on GPUs: blocks and waves, a campaign's drift, other devices' times."""

from __future__ import annotations

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.latency.gpu_convolutions import Drift, GpuConvolutions, GpuSpec, describe, fit_drift, other_devices

T4 = GpuSpec(8.141e12, 320e9, 40, 4 * 2**20)
V100 = GpuSpec(14.03e12, 900e9, 80, 6 * 2**20)


def shapes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(low, high, count) for low, high in ((1, 33), (8, 512), (8, 512), (5, 40))], axis=1)


def test_the_ideal_rises_in_waves() -> None:
    """Two blocks of 8 x 16 outputs an image: up to 20 images are one wave on 40 processors, and cost what two do."""
    rows = np.array([[batch, 512, 32, 16] for batch in (2, 20, 21, 40, 41)])
    ideal = describe(rows, T4)[1]
    assert ideal[0] == pytest.approx(ideal[1])
    assert ideal[2] > 1.2 * ideal[1]
    assert ideal[2] == pytest.approx(ideal[3], rel=0.2)


def test_the_ideal_is_no_less_than_arithmetic_needs() -> None:
    rows = shapes(200)
    ideal = describe(rows, T4)[1]
    batch, ins, outs, side = rows.T.astype(float)
    # The fastest algorithm, Winograd F(4x4), multiplies a quarter as often.
    assert (ideal >= 2 * batch * side**2 * ins * outs * 9 / 4 / T4.flops * 1e3 * 0.99).all()
    assert np.isfinite(describe(rows, T4)[0]).all()


def test_a_drift_is_found_and_taken_out() -> None:
    rows = shapes(400)
    features, ideal = describe(rows, T4)
    truth = 0.02 + 1.3 * ideal
    position = np.linspace(0, 1, 400)
    readings = truth + 0.4 * position
    drift = fit_drift(features, ideal, readings, position)
    assert drift.slope_ms == pytest.approx(0.4, rel=0.1)
    rest, held = np.arange(400) % 4 > 0, np.arange(400) % 4 == 0
    knows = GpuConvolutions.fit(rows[rest], readings[rest], T4, position=position[rest], rounds=100)
    blind = GpuConvolutions.fit(rows[rest], readings[rest], T4, rounds=100)
    error = np.abs(knows.predict(rows[held], position=position[held]) / readings[held] - 1)
    assert error.mean() < 0.6 * np.abs(blind.predict(rows[held]) / readings[held] - 1).mean()
    assert np.median(np.abs(knows.predict(rows[held]) / truth[held] - 1)) < 0.15


def test_no_drift_is_found_where_there_is_none() -> None:
    rows = shapes(400)
    features, ideal = describe(rows, T4)
    position = np.random.default_rng(1).permutation(400) / 400
    drift = fit_drift(features, ideal, 1.5 * ideal, position)
    assert drift.slope_ms < 0.05 * float(np.median(ideal))


def test_other_devices_tell_what_shapes_do_not() -> None:
    """Both devices' times hold a temper of each convolution that no feature shows."""
    rows = shapes(300)
    temper = np.exp(0.3 * np.random.default_rng(2).standard_normal(300))
    here, there = describe(rows, T4)[1] * temper, describe(rows, V100)[1] * temper
    said = other_devices(rows, {"v100": (rows[:250], there[:250], V100)}, drift=False)
    assert said.shape == (300, 1)
    assert np.isnan(said[250:]).all()
    rest, held = np.arange(0, 200), np.arange(200, 250)
    alone = GpuConvolutions.fit(rows[rest], here[rest], T4, rounds=60).predict(rows[held])
    helped = GpuConvolutions.fit(rows[rest], here[rest], T4, others=said[rest], rounds=60).predict(
        rows[held], others=said[held]
    )
    assert np.abs(helped / here[held] - 1).mean() < 0.5 * np.abs(alone / here[held] - 1).mean()


def test_what_is_no_convolution_is_refused() -> None:
    with pytest.raises(InputError, match="rows of batch"):
        describe(np.array([[1, 0, 4, 4]]), T4)
    with pytest.raises(InputError, match="one positive number each"):
        GpuConvolutions.fit(shapes(3), np.array([1.0, 2.0, -1.0]), T4)
    assert Drift(0.1, 0.4).ms(np.array([0.0, 0.5])).tolist() == [0.1, pytest.approx(0.3)]
