"""Measuring: the number, what stands beside it, several agents in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwsearch.device.stopwatch import MEASURE, StopwatchSettings, Timing
from hwsearch.errors import DeviceJobError, InputError
from hwsearch.latency.measure import AGENTS, MOST_AGENTS, measure, measure_many
from hwsearch.latency.random_networks import random_network


class FakeSession:
    """Agents whose answers are known, one after another."""

    def __init__(self, answers: Sequence[float], *, near: bool = True, simulated: bool = False) -> None:
        self.device = SimpleNamespace(simulated=simulated)
        self.answers, self.near, self.restarts = list(answers), near, 0
        self.settings: list[StopwatchSettings] = []

    def restart(self) -> None:
        self.restarts += 1

    def time(self, networks: Any, *, reference_ms: Any, settings: StopwatchSettings) -> Iterator[Timing]:
        self.settings.append(settings)
        ms = self.answers[len(self.settings) - 1]
        for name, _ in reversed(networks):
            yield Timing(name, ms, 1.1 * ms, 1.5 * ms, 0.01, 10, 2, 0.5, self.near)


def test_the_simulated_device_repeats_itself(campaign: Any) -> None:
    onnx = random_network("resnet", np.random.default_rng(3))
    check = {"reference_ms": campaign.table.reference_ms, "noise_floor": campaign.table.noise_floor}
    one = measure(onnx, campaign.session, **check)
    two = measure(onnx, campaign.session, **check)
    assert one == two
    assert one.verdict == "steady"
    assert 0 < one.measured_ms < 100
    assert one.raw_p50_ms <= one.raw_p90_ms
    assert one.rounds >= MEASURE.rounds_min


def test_the_median_of_three_agents_that_agree() -> None:
    session = FakeSession([1.0, 1.02, 1.01])
    (found,) = measure_many([("a", b"")], session, reference_ms=0.5, noise_floor=0.05)  # type: ignore[arg-type]
    assert found.measured_ms == 1.01
    assert found.spread == pytest.approx(0.01)  # of the single readings
    assert found.verdict == "steady"
    assert session.restarts == AGENTS - 1
    assert found.rounds == 30
    assert len({settings.seed for settings in session.settings}) == AGENTS
    total = sum(settings.seconds_max for settings in session.settings)
    assert total == pytest.approx(MEASURE.seconds_max), "the time is divided, not multiplied"


def test_more_agents_where_three_disagree() -> None:
    session = FakeSession([1.0, 1.3, 1.02, 1.01, 1.03, 1.02, 1.0])
    (found,) = measure_many([("a", b"")], session, reference_ms=0.5, noise_floor=0.05)  # type: ignore[arg-type]
    assert session.restarts == MOST_AGENTS - 1
    assert found.measured_ms == pytest.approx(np.mean([1.0, 1.01, 1.02, 1.02, 1.03])), "without both extremes"
    assert found.verdict == "noisy"
    settled = FakeSession([1.0, 1.05, 1.02, 1.02, 1.02, 9.0, 9.0])
    measure_many([("a", b"")], settled, reference_ms=0.5)  # type: ignore[arg-type]
    assert AGENTS - 1 < settled.restarts < MOST_AGENTS - 1, "no more than it takes"


def test_steady_and_never_at_reference_speed() -> None:
    (steady,) = measure_many([("a", b"")], FakeSession([1.0, 1.01, 1.02]), reference_ms=0.5)  # type: ignore[arg-type]
    assert steady.verdict == "steady"
    busy = FakeSession([1.0, 1.01, 1.02], near=False)
    assert measure_many([("a", b"")], busy, reference_ms=0.5)[0].verdict == "noisy"  # type: ignore[arg-type]


def test_several_networks_come_back_in_order_with_their_own_names() -> None:
    networks = [("a", b""), ("b", b"")]
    assert len(measure_many(networks, FakeSession([1.0, 1.0, 1.0]), reference_ms=None)) == 2  # type: ignore[arg-type]
    with pytest.raises(InputError, match="same name"):
        measure_many([("a", b""), ("a", b"")], FakeSession([1.0]), reference_ms=None)  # type: ignore[arg-type]


def test_a_broken_network_is_named(campaign: Any) -> None:
    with pytest.raises(DeviceJobError, match="mine"):
        measure(b"no onnx", campaign.session, reference_ms=campaign.table.reference_ms, name="mine")


@pytest.mark.real
@pytest.mark.serial
def test_on_this_machine() -> None:
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device

    device = Device(name="here", runtime="onnxruntime")
    quick = replace(MEASURE, seconds_min=0.0, seconds_max=0.3, rounds_min=3, good_min=2, rounds_max=9)
    with open_session(device) as session:
        found = measure(random_network("vgg", np.random.default_rng(0)), session, reference_ms=None, settings=quick)
    assert found.measured_ms > 0
    assert found.raw_p50_ms <= found.raw_p90_ms
