"""Architectures on a new device: laws that are known, and HELP's data where it is at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from hwsearch.errors import InputError
from hwsearch.latency.transfer_architectures import ArchitectureTransfer

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HWSEARCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
COSTS = ([3.0, 1.0, 0.2, 0.5], [2.0, 2.0, 0.1, 0.1], [1.0, 0.5, 0.4, 0.4], [4.0, 1.0, 0.0, 1.0])


def space(noise: float = 0.02, rows: int = 300) -> tuple[ArchitectureTransfer, np.ndarray, np.random.Generator]:
    """Cells of six operations, four sources whose latencies are sums with noise, half of them measured."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 4, (rows, 6))
    counts = np.stack([(kinds == kind).sum(axis=1) for kind in range(4)], axis=1).astype(float)
    places = np.stack([kinds == kind for kind in range(4)], axis=2).reshape(rows, -1).astype(float)
    sources = np.stack([5 + counts @ cost for cost in COSTS]) * np.exp(noise * rng.standard_normal((4, rows)))
    sources[:, rows // 2 :] = np.nan
    return ArchitectureTransfer.learn([counts, places], sources), counts, rng


def test_a_new_device_is_known_from_six_samples() -> None:
    learnt, counts, rng = space()
    truth = 2 + counts @ np.array([0.5, 3.0, 1.0, 0.2])
    picked = learnt.choose(6)
    assert len(set(picked.tolist())) == 6
    found = learnt.fit(picked, truth[picked] * np.exp(0.02 * rng.standard_normal(6))).predict()
    assert spearmanr(found.ms, truth)[0] > 0.95
    assert np.median(np.abs(found.ms / truth - 1)) < 0.05
    assert (found.low_ms <= found.ms).all()
    assert (found.ms <= found.high_ms).all()
    assert np.mean((found.low_ms <= truth) & (truth <= found.high_ms)) > 0.8


def test_sources_help() -> None:
    """A device like the sources, three samples: far better than three numbers alone could do."""
    learnt, counts, _ = space()
    truth = 3 * (5 + counts @ np.array(COSTS[0]))
    picked = learnt.choose(3)
    found = learnt.fit(picked, truth[picked]).predict()
    assert spearmanr(found.ms, truth)[0] > 0.9


def test_a_choice_tells_more_than_chance() -> None:
    learnt, counts, _ = space()
    truth = 2 + counts @ np.array([0.5, 3.0, 1.0, 0.2])

    def score(picked: np.ndarray) -> float:
        return float(spearmanr(learnt.fit(picked, truth[picked]).predict().ms, truth)[0])

    chance = [score(np.random.default_rng(seed).permutation(300)[:5]) for seed in range(12)]
    assert np.mean([score(learnt.choose(5, seed=seed)) for seed in range(4)]) > np.mean(chance)


def test_the_interval_widens_with_its_level() -> None:
    learnt, counts, _ = space()
    truth = 5 + counts.sum(axis=1)
    fitted = learnt.fit(np.arange(5), truth[:5] * np.array([1.1, 0.9, 1.05, 1.0, 0.95]))
    narrow, wide = fitted.predict(level=0.5), fitted.predict(level=0.95)
    assert (wide.low_ms <= narrow.low_ms).all()
    assert (wide.high_ms > narrow.high_ms).all()
    with pytest.raises(InputError, match="level is 1"):
        fitted.predict(level=1)


def test_equal_input_gives_equal_answers() -> None:
    first, second = space()[0], space()[0]
    assert first.choose(4, seed=1).tolist() == second.choose(4, seed=1).tolist()
    ms = np.array([5.0, 6.0, 9.0])
    assert np.array_equal(first.fit(np.arange(3), ms).predict().ms, second.fit(np.arange(3), ms).predict().ms)


@pytest.mark.parametrize(
    ("index", "ms", "message"),
    [([0, 1], [1.0, 2.0], "3 or more"), ([0, 1, 1], [1.0, 2.0, 2.0], "3 or more"),
     ([0, 1, 2], [1.0, float("nan"), 2.0], "nan is no positive"), ([0, 1, 2], [1.0, 0.0, 2.0], "0.0 is no positive")],
)  # fmt: skip
def test_samples_that_are_none_are_refused(index: list[int], ms: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        space()[0].fit(np.array(index), np.array(ms))


def test_sources_that_are_none_are_refused() -> None:
    counts = np.ones((30, 2))
    with pytest.raises(InputError, match="of one N"):
        ArchitectureTransfer.learn([counts], np.ones((2, 29)))
    with pytest.raises(InputError, match="source 1 has 30 latencies, the smallest -1"):
        ArchitectureTransfer.learn([counts], np.stack([np.ones(30), np.append(np.ones(29), -1.0)]))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "help").is_dir(), reason="HELP's latencies are not at hand (HWSEARCH_SHARED_DATA)")
def test_help_devices_from_ten_chosen_samples() -> None:
    """Three repeats of the benchmark: above what HELP reports, 0.932."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import bench_transfer
    finally:
        sys.path.pop(0)
    found: dict[str, list[float]] = {}
    for case, _, job in bench_transfer.bench_help(DATA, 3):
        if case.startswith("chosen/"):
            found.setdefault(case, []).append(job()["spearman"])
    assert len(found) == 6
    assert np.mean([np.mean(values) for values in found.values()]) > 0.935
