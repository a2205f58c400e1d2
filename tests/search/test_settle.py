"""Settling by measurement: the *measured* time ends in the band, or the answer is a clear no."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.evolution import EvolutionSettings, evolve
from hwsearch.search.settle import settle

SETTINGS = EvolutionSettings(population=8, generations=4)


class Device:
    """The truth: the predictor's staircase times a bias, an error of each network, and noise of each reading."""

    def __init__(self, toy: Any, bias: float = 1.0, error: float = 0.0, noise: float = 0.0) -> None:
        self.latency, self.bias, self.error, self.noise = toy.Staircase(), bias, error, noise
        self.readings: list[tuple[int, ...]] = []
        self.rng = np.random.default_rng(0)

    def __call__(self, choice: WidthChoice) -> float:
        self.readings.append(choice.widths)
        own = np.random.default_rng(zlib.crc32(repr(choice.widths).encode())).normal()
        exact = self.latency.evaluate(np.asarray([choice.widths]))[0] * self.bias * (1 + self.error * own)
        return float(exact * (1 + self.noise * self.rng.normal()))


def proposer(toy: Any, space: Any, journal: Path | None = None) -> Any:
    def propose(budget: Budget, seeds: Sequence[WidthChoice]) -> Any:
        return evolve(space, budget, toy.score, SETTINGS, 0, journal, initial=seeds).candidates

    return propose


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize(("bias", "error"), [(1.0, 0.0), (1.15, 0.0), (0.85, 0.02), (1.3, 0.03), (0.7, 0.0)])
def test_the_measured_time_ends_in_the_band(toy: Any, share: float, bias: float, error: float) -> None:
    space = toy.space(groups=8)
    budget, device = toy.budget(space, share), Device(toy, bias, error, noise=0.005)
    settled = settle(space, budget, proposer(toy, space), device)
    assert settled.within
    assert settled.measured_ms is not None
    assert 0.95 <= settled.measured_ms[0] / budget.limits[0].max_ms <= 1.0
    assert settled.factors[0] == pytest.approx(bias, rel=0.1) or bias == 1.0
    # Two readings of what was accepted, and its prediction as the predictor gave it.
    assert device.readings.count(settled.candidate.choice.widths) == 2
    row = np.asarray([settled.candidate.choice.widths])
    assert settled.candidate.predicted_ms == pytest.approx(budget.evaluate(row)[0, 0])


def test_a_correction_never_asks_for_a_loss_twice(toy: Any, tmp_path: Path) -> None:
    space = toy.space(groups=8)
    budget, path = toy.budget(space, 0.4), tmp_path / "readings.jsonl"
    first = settle(space, budget, proposer(toy, space), device := Device(toy, 1.2, 0.02), journal=path)
    assert device.readings
    again = settle(space, budget, proposer(toy, space), other := Device(toy, 9.9), journal=path)
    assert other.readings == [], "a finished reading was taken again"
    assert again == first


def test_a_killed_settling_continues_to_the_same_end(toy: Any, tmp_path: Path) -> None:
    space = toy.space(groups=8)
    budget = toy.budget(space, 0.4)
    whole = settle(space, budget, proposer(toy, space), full := Device(toy, 1.25, 0.02))
    for stop in range(1, len(full.readings)):
        device = Device(toy, 1.25, 0.02)

        def killed(choice: WidthChoice, device: Device = device, stop: int = stop) -> float:
            if len(device.readings) == stop:
                raise KeyboardInterrupt
            return device(choice)

        path = tmp_path / f"{stop}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            settle(space, budget, proposer(toy, space), killed, journal=path)
        with path.open("ab") as file:
            file.write(b'{"ms": [0.')
        assert settle(space, budget, proposer(toy, space), device, journal=path) == whole
        assert len(device.readings) == len(full.readings)


def test_without_a_device_the_best_prediction_is_taken(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    settled = settle(space, budget, proposer(toy, space))
    assert settled.measured_ms is None
    assert not settled.within
    assert settled.trials == ()
    assert settled.candidate == evolve(space, budget, toy.score, SETTINGS, 0).best


def test_limits_bring_their_own_measurement(toy: Any) -> None:
    space = toy.space(groups=8)
    latency = toy.Staircase()
    full = latency.evaluate(np.asarray([space.full().widths]))[0]
    one, two = Device(toy, 1.1), Device(toy, 1.2)
    budget = Budget([Limit(latency, full * 0.4, measure=one), Limit(latency, full * 0.6, measure=two)])
    settled = settle(space, budget, proposer(toy, space))
    assert settled.measured_ms is not None
    assert len(settled.measured_ms) == 2
    assert settled.factors == pytest.approx((1.1, 1.2), rel=0.01)
    assert 0.95 <= max(settled.measured_ms[0] / (full * 0.4), settled.measured_ms[1] / (full * 0.6)) <= 1.0


def test_where_the_space_is_coarse_the_best_inside_is_taken(toy: Any) -> None:
    space = toy.space([[8, 32]] * 2)
    budget = toy.budget(space, 0.5)
    settled = settle(space, budget, proposer(toy, space), Device(toy))
    assert not settled.within
    assert settled.measured_ms is not None
    assert settled.measured_ms[0] <= budget.limits[0].max_ms


def test_a_device_far_slower_than_predicted_gets_a_clear_no(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5, name="box")
    match = r"measured networks keeps .* ms on box: the nearest was predicted at"
    with pytest.raises(AnswerIsNo, match=match) as caught:
        settle(space, budget, proposer(toy, space), Device(toy, bias=50.0))
    assert caught.value.exit_code == 1
    with pytest.raises(InfeasibleBudgetError):
        settle(space, toy.budget(space, 0.001), proposer(toy, space), Device(toy))


def test_nonsense_is_refused(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    with pytest.raises(InputError, match="rounds=0"):
        settle(space, budget, proposer(toy, space), Device(toy), rounds=0)
    with pytest.raises(InputError, match="a measured time"):
        settle(space, budget, proposer(toy, space), lambda choice: float("nan"))
    with pytest.raises(InputError, match="2 times for a budget of 1"):
        settle(space, budget, proposer(toy, space), lambda choice: [1.0, 1.0])
    path = tmp_path / "readings.jsonl"
    settle(space, budget, proposer(toy, space), Device(toy), journal=path)
    with pytest.raises(InputError, match="its limits is"):
        settle(space, toy.budget(space, 0.4), proposer(toy, space), Device(toy), journal=path)
