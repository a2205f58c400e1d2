"""Novelty and conformal intervals, on errors whose law is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.interval import FARTHEST, Intervals, Profiled, conformal

CONV = Kernel(
    "conv", "Conv", layout_in="nchwc", layout_out="nchwc", in_channels=32, out_channels=64, in_height=14, in_width=14,
    out_height=14, out_width=14, kernel_height=3, kernel_width=3,
)  # fmt: skip


def test_novelty_counts_octaves_to_the_nearest_of_the_same_kind() -> None:
    known = Profiled.of([CONV, replace(CONV, out_channels=256)])
    asked = [
        CONV,
        replace(CONV, out_channels=128),
        replace(CONV, in_channels=64, out_channels=128),
        replace(CONV, in_channels=32 * 2**9),
        replace(CONV, kernel_height=5, kernel_width=5),
        replace(CONV, out_channels=66),
    ]
    assert known.novelty(asked).tolist() == [0.0, 1.0, 2.0, FARTHEST, FARTHEST, 0.0]
    assert Profiled.from_dict(known.to_dict()).novelty(asked).tolist() == known.novelty(asked).tolist()


def test_conformal_ranks() -> None:
    scores = np.sort(np.linspace(-0.10, 0.20, 199))
    assert conformal(scores, 0.9) == (scores[199 - 190], scores[189])
    assert conformal(scores[:5], 0.9) == (1.5 * scores[0], 1.5 * scores[4]), "too few: the extremes, stretched"
    wide, narrow = conformal(scores, 0.95), conformal(scores, 0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("seed", range(3))
def test_intervals_cover_at_every_novelty(seed: int) -> None:
    """Errors twice as large an octave away: the interval must be as wide there, and no wider than needed nearby."""
    rng = np.random.default_rng(seed)
    novelty = rng.uniform(0, 2, 4000)
    errors = rng.standard_normal(4000) * 0.02 * (1 + novelty)
    fitted = Intervals.fit(errors[:2000], novelty[:2000])
    low, high = fitted.log_bounds(novelty[2000:], 0.9)
    inside = (errors[2000:] >= low) & (errors[2000:] <= high)
    for part in (novelty[2000:] < 0.5, novelty[2000:] > 1.5):
        assert 0.86 < inside[part].mean() < 0.94
    near, far = fitted.log_bounds(np.array([0.0, 1.0]), 0.9)[1]
    assert far / near == pytest.approx(2, rel=0.2)
    assert near == pytest.approx(0.02 * 1.645, rel=0.15)


def test_equal_errors_still_leave_some_room() -> None:
    fitted = Intervals.fit(np.zeros(50), np.zeros(50))
    low, high = fitted.log_bounds(np.zeros(1), 0.9)
    assert low[0] <= 0 <= high[0]
    assert fitted.a > 0
