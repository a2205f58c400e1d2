"""Visits made into numbers: common errors of a step go, outliers count little, the error bar is honest."""

from __future__ import annotations

import numpy as np
import pytest

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.profile import BLOCK, LAGS
from hwsearch.latency.visits import Combined, Network, Visit, combine, two_way

KERNELS = (Kernel("conv", "Conv"), Kernel("gemm", "Gemm"))


def visit(network: int, step: int, ms: float, shares: tuple[float, ...] = (0.75, 0.25)) -> Visit:
    return Visit(f"n{network:03d}", f"s{step:03d}", ms, 1.2 * ms, 1.5 * ms, 0.01, 4, 0.05, shares)


def campaign(rng: np.random.Generator, steps: int, *, drift: float, noise: float) -> tuple[np.ndarray, Combined]:
    """Four visits to each network, as a campaign makes them."""
    truth = np.exp(rng.normal(0, 1, BLOCK * (steps - LAGS[-1])))
    common = rng.normal(0, drift, steps)
    visits = []
    for number, ms in enumerate(truth):
        for lag in LAGS:
            step = number // BLOCK + lag
            visits.append(visit(number, step, float(ms * np.exp(common[step] + rng.normal(0, noise)))))
    rng.shuffle(visits)  # type: ignore[arg-type]
    names = {v.network for v in visits}
    return truth, combine({n: Network(n, "random:vgg", KERNELS) for n in names}, visits)


def test_common_errors_of_steps_are_taken_out() -> None:
    truth, found = campaign(np.random.default_rng(0), 30, drift=0.05, noise=1e-4)
    ratio = np.log([s.measured_ms for s in found.samples]) - np.log(truth)
    # What all steps share cannot be known; what differs from network to network can.
    assert np.std(ratio) < 0.012
    naive = 0.05 / 2
    assert np.std(ratio) < naive / 2


def test_the_error_bar_is_honest() -> None:
    truth, found = campaign(np.random.default_rng(1), 40, drift=0.03, noise=0.06)
    ratio = np.log([s.measured_ms for s in found.samples]) - np.log(truth)
    ratio -= np.median(ratio)
    bar = np.array([s.spread for s in found.samples])
    assert 0.88 < np.mean(np.abs(ratio) < bar) < 0.995
    # Two campaigns differ by sqrt(2) times 0.06 / sqrt(4) on one network: p95 is 1.96 times that.
    assert found.retest == pytest.approx(1.96 * 0.06 / np.sqrt(2), rel=0.25)


def test_one_wild_visit_does_not_move_a_network_far() -> None:
    rng = np.random.default_rng(2)
    log_ms, network, step = [], [], []
    for number in range(40):
        for turn in range(4):
            log_ms.append(rng.normal(0, 0.01))
            network.append(number)
            step.append((number + turn) % 40)
    log_ms[0] += 1.0
    level, left = two_way(np.array(log_ms), np.array(network), np.array(step))
    assert abs(level[0]) < 0.04, "the mean would be off by 0.25"
    assert left[0] > 0.9


def test_the_order_of_visits_does_not_matter() -> None:
    networks = {f"n{i:03d}": Network(f"n{i:03d}", "random:vgg", KERNELS) for i in range(3)}
    visits = [visit(i % 3, i // 3, 1.0 + 0.1 * i) for i in range(9)]
    assert combine(networks, visits) == combine(networks, visits[::-1])


def test_a_sample_sums_to_its_measurement_and_counts_what_it_cost() -> None:
    network = {"n000": Network("n000", "random:vgg", KERNELS)}
    found = combine(network, [visit(0, 0, 1.0, (0.8, 0.2)), visit(0, 1, 1.0, (0.6, 0.4))])
    (sample,) = found.samples
    assert sample.node_ms == (0.7, 0.3)
    assert sample.measured_ms == 1.0
    assert sample.rounds == 8
    assert sample.seconds == pytest.approx(0.1)
    assert found.retest is None, "one network tells nothing of the others"


def test_a_single_visit_is_itself() -> None:
    found = combine({"n000": Network("n000", "s", KERNELS)}, [visit(0, 0, 1.2345678)])
    assert found.samples[0].measured_ms == 1.23457
    assert found.samples[0].spread >= 0.05, "nobody knows how much it would scatter"
    assert combine({}, []).samples == ()
