"""The one stopwatch: profiling, measuring in a search and verifying all get their milliseconds here.

The whole machine changes speed for seconds at a time, so a plain median repeats only within 10 to 30 %. Therefore every
reading of a network stands between two readings of a small fixed network, the *canary*; networks are interleaved in
random order; and the estimate is::

    measured_ms = median over kept rounds of (time / mean canary before and after) x reference_ms

with ``reference_ms`` the canary's median when the device was checked. Raw percentiles, uncorrected and over every
timed run, stand beside it. While the canary is slower than ``canary_limit`` times the reference the stopwatch waits for
better times; a round that ran in such a time is discarded; too few good rounds are a :class:`NoisyDeviceError`, never a
number.

Pure: the clock and the programs come from outside, so a fake clock tests it and the simulated device uses it as it is.
Runs on the device: standard library and numpy only.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from hwsearch.errors import HwsearchError, InputError, NoisyDeviceError

if TYPE_CHECKING:
    from hwsearch.graph.kernel import Kernel

Clock: TypeAlias = Callable[[], int]  # nanoseconds since some fixed moment

_BOOTSTRAP = 300  # resamples of a confidence interval
_FRESH_NS = 3_000_000  # a canary reading older than this says nothing about now


class Program(Protocol):
    """A network that is loaded and can be run again and again on the same input."""

    def run(self) -> None:
        """One inference."""


@dataclass(frozen=True, slots=True)
class StopwatchSettings:
    """How carefully to time. ``PROFILE`` is for campaigns of many networks, ``MEASURE`` for one number that must hold.

    Attributes:
        pool: networks interleaved with each other (memory, against neighbours in time).
        warmup_seconds: longest warm-up of a network; it ends early once two successive runs agree.
        reading_ms: a reading repeats the network until it lasts about this long.
        runs_per_reading: but at least so often; the reading is the median of its runs.
        rounds_min, rounds_max: kept rounds before the stop rule is asked, and rounds at most.
        target_spread: stop once the relative 95 % half-width is below this.
        seconds_min, seconds_max: device time on one network before the stop rule is asked (the state of a moment is not
            the average), and at most.
        canary_limit: a round whose canary exceeds this times the reference is discarded.
        good_min: fewer kept rounds than this are no measurement.
        patience_seconds: how long to wait, at a time, for a slow machine to recover.
        profile_runs: runs under the runtime's profiler for the shares of the nodes.
        seed: of the order and of the bootstrap.
    """

    pool: int = 8
    warmup_seconds: float = 0.05
    reading_ms: float = 4.0
    runs_per_reading: int = 3
    rounds_min: int = 11
    rounds_max: int = 21
    target_spread: float = 0.015
    seconds_min: float = 0.0
    seconds_max: float = 2.0
    canary_limit: float = 1.25
    good_min: int = 5
    patience_seconds: float = 6.0
    profile_runs: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool", "runs_per_reading", "rounds_min", "rounds_max", "good_min", "profile_runs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"stopwatch setting {name} is {value!r}; use a whole number of at least 1")
        for name in ("warmup_seconds", "reading_ms", "target_spread", "seconds_min", "seconds_max", "patience_seconds"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"stopwatch setting {name} is {value!r}; use a finite number of at least 0")
        if not self.canary_limit > 1:
            raise InputError(f"stopwatch setting canary_limit is {self.canary_limit!r}; use a number above 1")
        if not self.good_min <= self.rounds_min <= self.rounds_max:
            raise InputError(
                "stopwatch settings need good_min <= rounds_min <= rounds_max, not "
                f"{self.good_min}, {self.rounds_min}, {self.rounds_max}"
            )


PROFILE = StopwatchSettings()
MEASURE = StopwatchSettings(
    warmup_seconds=0.2, reading_ms=5.0, runs_per_reading=5, rounds_min=25, rounds_max=500, target_spread=0.01,
    seconds_min=2.0, seconds_max=10.0, good_min=10, patience_seconds=20.0, profile_runs=50,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """One round of one network: its time, and the canary's mean time just before and just after."""

    time_ms: float
    canary_ms: float


@dataclass(frozen=True, slots=True)
class Timing:
    """What the stopwatch found about one network.

    Attributes:
        network: the name it was given under.
        measured_ms: time at the device's reference speed (see the module).
        raw_p50_ms, raw_p90_ms: percentiles of every timed run, uncorrected, discarded rounds included.
        spread: relative half-width of the 95 % bootstrap interval of ``measured_ms``.
        rounds, discarded: rounds kept, and rounds thrown away because the canary was slow.
        canary_ms: the canary's median in the kept rounds.
        node_shares: share of each node of the optimised graph, summing to 1; keyed by ``Kernel.node`` and in the order
            of ``kernels``. Empty unless asked for.
        seconds: device time that this network cost: loading, warm-up, its part of the canary, waiting for better times.
        kernels: the nodes themselves, from the very graph that was profiled. Empty unless ``node_shares`` is asked for.
    """

    network: str
    measured_ms: float
    raw_p50_ms: float
    raw_p90_ms: float
    spread: float
    rounds: int
    discarded: int
    canary_ms: float
    node_shares: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True)
class CanaryReference:
    """The canary alone for some seconds: ``median_ms`` is the reference speed of a device.

    ``spread`` is (p90 - p10) / median; ``slow`` the share of readings above 1.25 times the median.
    """

    median_ms: float
    best_ms: float
    spread: float
    slow: float
    readings: int


@dataclass
class _Running:
    """A network in the pool."""

    index: int
    name: str
    program: Program
    repeats: int = 1
    cost_ns: int = 0
    waited_ns: int = 0
    next_check: int = 0
    runs_ms: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


class Stopwatch:
    """Times programs against a canary.

    Args:
        canary: the program that tells the machine's speed.
        clock: nanoseconds; ``time.perf_counter_ns`` on a device.
        settings: how carefully.
        reference_ms: the canary's time at reference speed; None takes each network's own rounds as the reference, which
            makes numbers of different moments incomparable.
        touch: told the index of a network before anything is done with it, -1 for the canary (crash forensics).
    """

    def __init__(
        self,
        canary: Program,
        clock: Clock,
        settings: StopwatchSettings,
        reference_ms: float | None = None,
        touch: Callable[[int], None] = lambda index: None,
    ) -> None:
        if reference_ms is not None and not (math.isfinite(reference_ms) and reference_ms > 0):
            raise InputError(f"reference_ms is {reference_ms!r}; use the positive number that `device check` found")
        self.canary = canary
        self.clock = clock
        self.settings = settings
        self.reference_ms = reference_ms
        self.touch = touch
        self._canary_repeats = 0
        self._canary_last: tuple[int, float] | None = None  # when it ended, what it read
        self._slow_since: int | None = None  # since when the canary has been too slow without a break

    def time(
        self, networks: Iterable[tuple[str, Callable[[], Program]]], release: Callable[[int], None] = lambda index: None
    ) -> Iterator[tuple[int, Timing | HwsearchError]]:
        """Times networks, at most ``settings.pool`` of them loaded at once, and yields each as soon as it is final.

        Args:
            networks: (name, function that loads it); loaded lazily, in order.
            release: told the index of a network that will not be run again.

        Yields:
            (position in ``networks``, its timing or why there is none); ``release`` follows when the caller comes back.
        """
        rng = random.Random(self.settings.seed)
        waiting = enumerate(networks)
        pool: list[_Running] = []
        exhausted = False
        with _quiet_collector():
            while True:
                while not exhausted and len(pool) < self.settings.pool:
                    item = next(waiting, None)
                    if item is None:
                        exhausted = True
                        break
                    index, (name, load) = item
                    try:
                        pool.append(self._enter(index, name, load))
                    except HwsearchError as error:
                        yield index, error
                        release(index)
                if not pool:
                    return
                rng.shuffle(pool)
                for running in list(pool):
                    try:
                        self._round(running)
                        outcome: Timing | HwsearchError | None = self._finished(running)
                    except HwsearchError as error:
                        outcome = error
                    if outcome is not None:
                        pool.remove(running)
                        yield running.index, outcome
                        release(running.index)

    def calibrate(self, seconds: float) -> CanaryReference:
        """The canary alone for about ``seconds`` (and at least 20 readings)."""
        self.touch(-1)
        readings: list[float] = []
        start = self.clock()
        with _quiet_collector():
            while len(readings) < 20 or self.clock() - start < seconds * 1e9:
                readings.append(self._read_canary(fresh=True))
        values = np.array(readings)
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        slow = float(np.mean(values > self.settings.canary_limit * median))
        return CanaryReference(float(median), float(values.min()), float((p90 - p10) / median), slow, len(readings))

    def _enter(self, index: int, name: str, load: Callable[[], Program]) -> _Running:
        """Loads and warms a network up: until two successive runs agree within 2 % or the time is over."""
        self.touch(index)
        start = self.clock()
        running = _Running(index, name, load())
        previous, best, begun = math.inf, math.inf, self.clock()
        while True:
            duration = self._run(running.program)
            best = min(best, duration)
            if abs(duration - previous) <= 0.02 * duration or self.clock() - begun > self.settings.warmup_seconds * 1e9:
                break
            previous = duration
        running.repeats = self._repeats(best)
        running.cost_ns = self.clock() - start
        return running

    def _round(self, running: _Running) -> None:
        start = self.clock()
        before = self._wait()
        running.waited_ns += self.clock() - start
        start = self.clock()
        self.touch(running.index)
        times = self._read(running.program, running.repeats)
        after = self._read_canary(fresh=True)
        running.runs_ms.extend(times)
        running.readings.append(Reading(_middle(times), (before + after) / 2))
        running.cost_ns += self.clock() - start

    def _wait(self) -> float:
        """The canary's reading once the machine is at speed, or whatever it is when patience is over."""
        value = self._read_canary()
        if self.reference_ms is None:
            return value
        while value > self.settings.canary_limit * self.reference_ms:
            now = self.clock()
            self._slow_since = now if self._slow_since is None else self._slow_since
            if now - self._slow_since > self.settings.patience_seconds * 1e9:
                return value  # a machine that stays slow is not waited for again and again
            value = self._read_canary(fresh=True)
        self._slow_since = None
        return value

    def _finished(self, running: _Running) -> Timing | None:
        """The final timing, or None while more rounds are needed.

        Raises:
            NoisyDeviceError: the limits are reached and too few rounds were good.
        """
        settings, done = self.settings, len(running.readings)
        kept, reference = self._kept(running)
        over = done >= settings.rounds_max or running.cost_ns > settings.seconds_max * 1e9
        if over and len(kept) < settings.good_min:
            # slow rounds are no reason to give up at once; a slow network still gets its few rounds
            if done < 2 * settings.rounds_max and (
                running.cost_ns < 2e9 * settings.seconds_max or done < settings.good_min
            ):
                return None
            slowest = _middle([reading.canary_ms for reading in running.readings])
            raise NoisyDeviceError(
                f"network {running.name!r}: only {len(kept)} of {done} rounds ran at reference speed (the canary took "
                f"{slowest:.3g} ms, reference {reference:.3g} ms): the device is busy, throttled or another one; "
                "let it rest, or run `hwsearch device check` again"
            )
        early = len(kept) < settings.rounds_min or running.cost_ns < settings.seconds_min * 1e9
        if not over and (early or done < running.next_check):
            return None
        running.next_check = done + max(2, done // 8)  # bootstrapping is dear: ask ever more seldom
        ratios = np.array([reading.time_ms / reading.canary_ms for reading in kept])
        spread = bootstrap_spread(ratios, settings.seed)
        if not over and spread > settings.target_spread:
            return None
        p50, p90 = np.percentile(running.runs_ms, [50, 90])
        return Timing(
            network=running.name,
            measured_ms=float(np.median(ratios)) * reference,
            raw_p50_ms=float(p50),
            raw_p90_ms=float(p90),
            spread=spread,
            rounds=len(kept),
            discarded=done - len(kept),
            canary_ms=_middle([reading.canary_ms for reading in kept]),
            seconds=(running.cost_ns + running.waited_ns) / 1e9,
        )

    def _kept(self, running: _Running) -> tuple[list[Reading], float]:
        reference = self.reference_ms or _middle([reading.canary_ms for reading in running.readings])
        limit = self.settings.canary_limit * reference
        return [reading for reading in running.readings if reading.canary_ms <= limit], reference

    def _read_canary(self, fresh: bool = False) -> float:
        """The canary's milliseconds now; a reading that ended a moment ago is still good unless ``fresh``."""
        if not self._canary_repeats:
            self.touch(-1)
            self._canary_repeats = self._repeats(min(self._run(self.canary) for _ in range(20)))
        if not fresh and self._canary_last is not None and self.clock() - self._canary_last[0] <= _FRESH_NS:
            return self._canary_last[1]
        self.touch(-1)
        value = _middle(self._read(self.canary, self._canary_repeats))
        self._canary_last = self.clock(), value
        return value

    def _repeats(self, duration_ms: float) -> int:
        wanted = math.ceil(self.settings.reading_ms / max(duration_ms, 1e-4))
        return min(max(wanted, self.settings.runs_per_reading), 1000)

    def _read(self, program: Program, repeats: int) -> list[float]:
        """Milliseconds of each run; one untimed run first, because the caches hold the neighbour's data."""
        program.run()
        return [self._run(program) for _ in range(repeats)]

    def _run(self, program: Program) -> float:
        start = self.clock()
        program.run()
        return (self.clock() - start) / 1e6


def bootstrap_spread(values: np.ndarray, seed: int) -> float:
    """Relative half-width of the 95 % bootstrap interval of the median of ``values`` (n,); infinite for one value."""
    if len(values) < 2:
        return math.inf
    picks = np.random.default_rng(seed).integers(0, len(values), size=(_BOOTSTRAP, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float((high - low) / 2 / np.median(values))


def _middle(values: list[float]) -> float:
    return float(np.median(values))


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection inside a timed run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
