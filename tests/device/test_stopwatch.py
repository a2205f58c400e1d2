"""The stopwatch on a fake machine whose speed, neighbours and caches are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.device.stopwatch import (
    MEASURE,
    PROFILE,
    Program,
    Stopwatch,
    StopwatchSettings,
    Timing,
    bootstrap_spread,
)
from hwsearch.errors import DeviceJobError, HwsearchError, InputError, NoisyDeviceError

CANARY_MS = 0.8


class Machine:
    """A clock that only the machine's own work moves; ``speed(seconds)`` is time per work."""

    def __init__(
        self, speed: Callable[[float], float] = lambda now: 1.0, noise: float = 0.0, cold_ms: float = 0.0
    ) -> None:
        self.now = 0
        self.speed, self.noise, self.cold_ms = speed, noise, cold_ms
        self.rng = np.random.default_rng(1)
        self.warm: Machine.Net | None = None
        self.log: list[str] = []
        self.canary = self.net("canary", CANARY_MS)

    class Net:
        def __init__(self, machine: Machine, name: str, work_ms: float) -> None:
            self.machine, self.name, self.work_ms = machine, name, work_ms

        def run(self) -> None:
            machine = self.machine
            work = self.work_ms + (machine.cold_ms if machine.warm is not self else 0.0)
            factor = machine.speed(machine.now / 1e9) * math.exp(machine.noise * machine.rng.standard_normal())
            machine.warm = self
            machine.now += int(work * factor * 1e6)
            if not machine.log or machine.log[-1] != self.name:
                machine.log.append(self.name)

    def net(self, name: str, work_ms: float) -> Net:
        return Machine.Net(self, name, work_ms)

    def clock(self) -> int:
        return self.now

    def times(
        self, works: dict[str, float], how: StopwatchSettings = PROFILE, reference_ms: float | None = CANARY_MS
    ) -> dict[str, Timing | HwsearchError]:
        items: list[tuple[str, Callable[[], Program]]] = [
            (name, lambda name=name, work=work: self.net(name, work)) for name, work in works.items()
        ]
        watch = Stopwatch(self.canary, self.clock, how, reference_ms)
        return {list(works)[index]: outcome for index, outcome in watch.time(items)}


def good(outcome: Timing | HwsearchError) -> Timing:
    assert isinstance(outcome, Timing)
    return outcome


def drifting(now: float) -> float:
    return 1.0 + 0.22 * math.sin(now * 9.0)


def test_a_steady_machine_gives_the_true_time() -> None:
    timing = good(Machine().times({"net": 3.0})["net"])
    assert timing.measured_ms == pytest.approx(3.0, rel=1e-5)
    assert timing.raw_p50_ms == pytest.approx(3.0, rel=1e-5)
    assert timing.raw_p90_ms == pytest.approx(3.0, rel=1e-5)
    assert timing.canary_ms == pytest.approx(CANARY_MS, rel=1e-5)
    assert (timing.rounds, timing.discarded) == (PROFILE.rounds_min, 0)
    assert timing.spread < 1e-6
    assert timing.node_shares == ()
    assert timing.kernels == ()


def test_drift_is_divided_out_by_the_canary() -> None:
    works = {f"net{number}": 0.3 + 0.7 * number for number in range(10)}
    timings = Machine(drifting, noise=0.003).times(works, reference_ms=0.8 * CANARY_MS)
    errors = [abs(good(timings[name]).measured_ms / work / 0.8 - 1) for name, work in works.items()]
    assert max(errors) < 0.03
    assert all(good(timing).near for timing in timings.values())


def test_disturbances_that_slow_networks_by_unlike_factors_are_waited_out() -> None:
    """A neighbour comes and goes every tenth of a second; the canary slows by a fifth, one network by much more."""

    class Touchy(Machine.Net):
        def run(self) -> None:
            disturbed = int(self.machine.now / 1e8) % 2
            own, self.work_ms = self.work_ms, self.work_ms * (1.5 if disturbed else 1.0)
            super().run()
            self.work_ms = own

    machine = Machine(lambda now: 1.2 if int(now * 10) % 2 else 1.0, noise=0.002)
    watch = Stopwatch(machine.canary, machine.clock, PROFILE, CANARY_MS)
    ((_, timing),) = watch.time([("touchy", lambda: Touchy(machine, "touchy", 2.0))])
    assert good(timing).near
    assert good(timing).measured_ms == pytest.approx(2.0, rel=0.01)
    assert good(timing).spread < 0.02


def test_a_machine_that_is_never_at_its_reference_speed_gives_the_coarser_estimate() -> None:
    machine = Machine(lambda now: 1.1 + 0.03 * math.sin(now * 9.0))
    timings = machine.times({"a": 2.0, "b": 3.0})
    for name, work in (("a", 2.0), ("b", 3.0)):
        timing = good(timings[name])
        assert not timing.near
        assert timing.discarded == 0
        assert timing.measured_ms == pytest.approx(work, rel=0.01)
    assert machine.now / 1e9 < 8.0  # the reference speed is not waited for again and again


@settings(max_examples=25, deadline=None)
@given(slowness=st.floats(0.8, 1.2), work=st.floats(0.05, 20))
def test_a_machine_of_another_speed_gives_the_same_answer(slowness: float, work: float) -> None:
    timing = good(Machine(lambda now: slowness).times({"net": work})["net"])
    assert timing.measured_ms == pytest.approx(work, rel=1e-3)
    assert timing.near == (slowness <= PROFILE.near_limit)
    assert timing.raw_p50_ms == pytest.approx(work * slowness, rel=1e-3)


def test_each_reading_stands_between_two_of_the_canary_in_random_order() -> None:
    machine = Machine()
    machine.times({name: 1.0 for name in "abcd"})
    rounds = [name for name in machine.log[machine.log.index("canary") :] if name != "canary"]
    assert all(one == "canary" or two == "canary" for one, two in zip(machine.log[5:], machine.log[6:], strict=False))
    orders = {tuple(rounds[start : start + 4]) for start in range(0, 4 * PROFILE.rounds_min, 4)}
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(orders) > 3
    again = Machine()
    again.times({name: 1.0 for name in "abcd"})
    assert again.log == machine.log  # the order follows from the seed
    other = Machine()
    other.times({name: 1.0 for name in "abcd"}, replace(PROFILE, seed=1))
    assert other.log != machine.log


def test_a_reading_starts_warm_whatever_ran_before() -> None:
    timings = Machine(cold_ms=0.5).times({"a": 1.0, "b": 2.0})
    assert good(timings["a"]).measured_ms == pytest.approx(1.0, rel=1e-4)
    assert good(timings["b"]).raw_p90_ms == pytest.approx(2.0, rel=1e-4)


def test_rounds_in_a_slow_moment_are_discarded() -> None:
    machine = Machine(lambda now: 1.6 if 0.1 < now < 0.16 else 1.0)
    timing = good(machine.times({"net": 3.0}, replace(PROFILE, patience_seconds=0))["net"])
    assert timing.discarded >= 1
    assert timing.measured_ms == pytest.approx(3.0, rel=1e-3)
    assert timing.raw_p90_ms > 3.1  # raw numbers hide nothing


def test_a_slow_spell_is_waited_for() -> None:
    machine = Machine(lambda now: 1.6 if 0.02 < now < 4.0 else 1.0)
    timing = good(machine.times({"net": 3.0})["net"])
    assert timing.measured_ms == pytest.approx(3.0, rel=1e-3)
    assert timing.discarded <= 2
    assert timing.seconds > 3.0  # waiting is part of the cost


def test_a_machine_that_stays_slow_is_no_measurement() -> None:
    machine = Machine(lambda now: 1.5)
    timings = machine.times({name: 1.0 for name in "abc"})
    for name, error in timings.items():
        assert isinstance(error, NoisyDeviceError)
        assert repr(name) in str(error)
        assert "only 0 of" in str(error)
        assert "reference 0.8 ms" in str(error)
        assert "\n" not in str(error)
    assert machine.now / 1e9 < 2 * PROFILE.patience_seconds  # patience is spent once, not for each network


def test_without_a_reference_a_network_is_its_own() -> None:
    timing = good(Machine(lambda now: 1.5).times({"net": 2.0}, reference_ms=None)["net"])
    assert timing.measured_ms == pytest.approx(3.0, rel=1e-3)
    assert timing.discarded == 0
    assert timing.near


def test_noise_asks_for_more_rounds_up_to_the_limits() -> None:
    quiet = good(Machine(noise=0.002).times({"net": 3.0})["net"])
    noisy = good(Machine(noise=0.2).times({"net": 3.0})["net"])
    assert quiet.rounds < noisy.rounds <= noisy.rounds + noisy.discarded == PROFILE.rounds_max
    assert quiet.spread < PROFILE.target_spread < noisy.spread
    careful = good(Machine(noise=0.2).times({"net": 3.0}, MEASURE)["net"])
    assert careful.spread < noisy.spread
    assert careful.seconds >= MEASURE.seconds_min


def test_a_slow_network_is_cut_off_by_time() -> None:
    timing = good(Machine(noise=0.3).times({"net": 100.0})["net"])
    assert PROFILE.good_min <= timing.rounds < PROFILE.rounds_min
    very = good(Machine().times({"net": 5000.0})["net"])
    assert very.rounds == PROFILE.good_min


def test_a_short_reading_is_repeated_and_the_canary_too() -> None:
    machine = Machine()
    seen: dict[str, int] = {}
    run = Machine.Net.run

    class Counting(Machine.Net):
        def run(self) -> None:
            seen[self.name] = seen.get(self.name, 0) + 1
            run(self)

    machine.canary = Counting(machine, "canary", CANARY_MS)
    watch = Stopwatch(machine.canary, machine.clock, PROFILE, CANARY_MS)
    ((_, timing),) = watch.time([("tiny", lambda: Counting(machine, "tiny", 0.04))])
    assert seen["tiny"] >= 100 * good(timing).rounds
    assert seen["canary"] >= 5 * good(timing).rounds


def test_a_network_that_does_not_load_is_told_and_the_others_go_on() -> None:
    machine = Machine()

    def fail() -> Program:
        raise DeviceJobError("no such operator")

    released: list[int] = []
    watch = Stopwatch(machine.canary, machine.clock, PROFILE, CANARY_MS)
    outcomes = dict(watch.time([("good", lambda: machine.net("good", 1.0)), ("bad", fail)], released.append))
    assert good(outcomes[0]).measured_ms == pytest.approx(1.0, rel=1e-4)
    assert str(outcomes[1]) == "no such operator"
    assert sorted(released) == [0, 1]


def test_only_a_pool_is_loaded_at_a_time_and_results_come_early() -> None:
    machine = Machine()
    loaded: set[int] = set()
    peak: list[int] = []

    def load(index: int) -> Program:
        loaded.add(index)
        peak.append(len(loaded))
        return machine.net(str(index), 1.0)

    watch = Stopwatch(machine.canary, machine.clock, replace(PROFILE, pool=3), CANARY_MS)
    items = [(str(index), lambda index=index: load(index)) for index in range(10)]
    started_when_first_came = 0
    for index, outcome in watch.time(items, loaded.discard):
        good(outcome)
        assert index in loaded  # still loaded: it may be profiled now
        started_when_first_came = started_when_first_came or len(peak)
    assert max(peak) == 3
    assert started_when_first_came == 3
    assert not loaded


def test_costs_add_up_to_the_time_on_the_device() -> None:
    machine = Machine(drifting, noise=0.02)
    timings = machine.times({str(number): 1.0 + number for number in range(5)})
    total = sum(good(timing).seconds for timing in timings.values())
    assert total == pytest.approx(machine.now / 1e9, rel=0.05)


def test_the_same_seed_gives_the_same_timing() -> None:
    first, second = (Machine(drifting, noise=0.05).times({"a": 1.0, "b": 2.0}) for _ in range(2))
    assert first == second


def test_calibration_finds_the_undisturbed_canary() -> None:
    machine = Machine(lambda now: 1.5 if int(now * 10) % 10 > 2 else 1.0, noise=0.002)
    reference = Stopwatch(machine.canary, machine.clock, PROFILE).calibrate(3.0)
    assert reference.fast_ms == pytest.approx(CANARY_MS, rel=0.01)
    assert reference.median_ms == pytest.approx(1.5 * CANARY_MS, rel=0.01)
    assert 0.6 < reference.disturbed < 0.8
    assert reference.spread == pytest.approx(1 / 3, abs=0.02)
    assert reference.readings > 100
    assert machine.now / 1e9 == pytest.approx(3.0, rel=0.1)
    assert Stopwatch(machine.canary, machine.clock, PROFILE).calibrate(0.0).readings == 20


@pytest.mark.parametrize("reference", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_reference_is_refused(reference: float) -> None:
    with pytest.raises(InputError, match="reference_ms"):
        Stopwatch(Machine().canary, lambda: 0, PROFILE, reference)


@pytest.mark.parametrize(
    "change",
    [
        {"pool": 0},
        {"runs_per_reading": 1.5},
        {"rounds_max": 3},
        {"good_min": 50},
        {"reading_ms": -1.0},
        {"seconds_max": math.nan},
        {"canary_limit": 1.0},
        {"near_limit": 1.0},
    ],
)
def test_senseless_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match="stopwatch setting"):
        replace(PROFILE, **change)


def test_the_bootstrap_interval_shrinks_with_the_sample() -> None:
    rng = np.random.default_rng(0)
    few, many = (bootstrap_spread(rng.normal(1.0, 0.1, size), 0) for size in (10, 1000))
    assert 0 < many < few
    assert bootstrap_spread(rng.normal(1.0, 0.1, 1000), 0, 0.1) > many  # a low quantile is less certain
    assert bootstrap_spread(np.ones(5), 0) == 0
    assert bootstrap_spread(np.ones(1), 0) == math.inf
