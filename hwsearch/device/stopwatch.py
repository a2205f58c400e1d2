"""The one stopwatch: profiling, measuring in a search and verifying all get their milliseconds here.

Shared machines change speed within milliseconds and for seconds at a time, so a plain median repeats only within 10 to
30 %. Disturbed, networks slow down by unlike factors (one by 1.2, the next by 1.6, at the same moment), so nothing can
be divided out then; *undisturbed*, they repeat to a per cent. Therefore every reading of a network stands between two
readings of a small fixed network, the *canary*; networks are interleaved in random order; the stopwatch waits for
moments in which the canary is as fast as it ever is (``reference_ms``, found when the device was checked), and the
estimate is::

    measured_ms = low quantile over rounds near the reference of (fastest run / mean canary before and after)
                  x reference_ms

A round is *near* when both of its canary readings are within ``near_limit`` times the reference. Even then a neighbour
that the canary does not feel can disturb a network, only ever to the slow side: hence fastest runs and a low quantile.
On a machine that is never at its reference speed there are no near rounds; after some patience the estimate falls back
to the median of the ratios of all rounds within ``canary_limit``, which is right to several per cent. A round slower
than that is discarded, and too few good rounds are a :class:`NoisyDeviceError`, never a number.

Raw percentiles, uncorrected and over every timed run, stand beside it.

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

#: What the estimate from disturbed rounds is uncertain by at least.
COARSE_SPREAD = 0.05
_LOW = 0.1  # quantile over near rounds: disturbances only ever add time
_NEAR_WAIT_NS = 1_500_000_000  # longest wait for the reference speed at a time ...
_NEAR_REST_NS = 10_000_000_000  # ... and for how long it is not waited for again after a wait in vain
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
        runs_per_reading: but at least so often; the reading is the fastest of its runs.
        canary_reading_ms: the same for the canary, after one untimed run.
        rounds_min, rounds_max: near rounds before the stop rule is asked, and rounds at most.
        target_spread: stop once the relative 95 % half-width is below this.
        seconds_min, seconds_max: device time on one network before the stop rule is asked (the state of a moment is not
            the average), and at most.
        near_limit: a round is at reference speed when neither canary reading exceeds this times the reference.
        canary_limit: a round whose canary exceeds this times the reference on the mean is discarded.
        good_min: fewer near rounds than this do not count as such; fewer kept rounds are no measurement.
        patience_seconds: how long to wait, at a time, for a slow machine to recover.
        profile_runs: runs under the runtime's profiler for the shares of the nodes.
        seed: of the order and of the bootstrap.
    """

    pool: int = 8
    warmup_seconds: float = 0.05
    reading_ms: float = 4.0
    runs_per_reading: int = 2
    canary_reading_ms: float = 1.0
    rounds_min: int = 8
    rounds_max: int = 60
    target_spread: float = 0.015
    seconds_min: float = 0.0
    seconds_max: float = 2.0
    near_limit: float = 1.02
    canary_limit: float = 1.25
    good_min: int = 4
    patience_seconds: float = 6.0
    profile_runs: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool", "runs_per_reading", "rounds_min", "rounds_max", "good_min", "profile_runs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"stopwatch setting {name} is {value!r}; use a whole number of at least 1")
        numbers = (
            "warmup_seconds", "reading_ms", "canary_reading_ms", "target_spread", "seconds_min", "seconds_max",
            "patience_seconds",
        )  # fmt: skip
        for name in numbers:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"stopwatch setting {name} is {value!r}; use a finite number of at least 0")
        for name in ("near_limit", "canary_limit"):
            if not getattr(self, name) > 1:
                raise InputError(f"stopwatch setting {name} is {getattr(self, name)!r}; use a number above 1")
        if not self.good_min <= self.rounds_min <= self.rounds_max:
            raise InputError(
                "stopwatch settings need good_min <= rounds_min <= rounds_max, not "
                f"{self.good_min}, {self.rounds_min}, {self.rounds_max}"
            )


PROFILE = StopwatchSettings()
MEASURE = StopwatchSettings(
    warmup_seconds=0.2, reading_ms=3.0, rounds_min=15, rounds_max=500, target_spread=0.01, seconds_min=1.5,
    seconds_max=6.0, good_min=6, patience_seconds=20.0, profile_runs=50,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """One round of one network: its fastest run, and the canary's just before and just after."""

    time_ms: float
    before_ms: float
    after_ms: float

    @property
    def canary_ms(self) -> float:
        """The canary's mean."""
        return (self.before_ms + self.after_ms) / 2

    @property
    def ratio(self) -> float:
        """The network's time in canaries."""
        return self.time_ms / self.canary_ms


@dataclass(frozen=True, slots=True)
class Timing:
    """What the stopwatch found about one network.

    Attributes:
        network: the name it was given under.
        measured_ms: time at the device's reference speed (see the module).
        raw_p50_ms, raw_p90_ms: percentiles of every timed run, uncorrected, discarded rounds included.
        spread: relative half-width of the 95 % bootstrap interval of ``measured_ms``; 0.05 or more where it is coarse.
        rounds, discarded: rounds that the estimate is made of, and rounds in which the canary was too slow for that.
        canary_ms: the canary's median in the former.
        near: whether they were near the reference speed; if not, the estimate is the coarser one.
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
    near: bool = True
    node_shares: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True)
class CanaryReference:
    """The canary alone for some seconds: ``fast_ms`` (its 5th percentile) is the reference speed of a device.

    ``spread`` is (p90 - p10) / median; ``disturbed`` the share of readings above ``near_limit`` times ``fast_ms``.
    """

    fast_ms: float
    median_ms: float
    spread: float
    disturbed: float
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
        self._in_vain: int | None = None  # when the reference speed was last waited for in vain

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
        fast, p10, median, p90 = (float(p) for p in np.percentile(values, [5, 10, 50, 90]))
        disturbed = float(np.mean(values > self.settings.near_limit * fast))
        return CanaryReference(fast, median, (p90 - p10) / median, disturbed, len(readings))

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
        running.repeats = self._repeats(best, self.settings.reading_ms)
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
        running.readings.append(Reading(min(times), before, after))
        running.cost_ns += self.clock() - start

    def _wait(self) -> float:
        """The canary's reading once the machine is at its reference speed, or whatever it is when patience is over."""
        value = self._read_canary()
        if self.reference_ms is None:
            return value
        start = self.clock()
        near, slow = self.settings.near_limit * self.reference_ms, self.settings.canary_limit * self.reference_ms
        while value > near:
            now = self.clock()
            if value <= slow:
                self._slow_since = None
                resting = self._in_vain is not None and now - self._in_vain < _NEAR_REST_NS
                if resting or now - start > min(_NEAR_WAIT_NS, self.settings.patience_seconds * 1e9):
                    self._in_vain = self._in_vain if resting else now
                    return value
            else:
                self._slow_since = now if self._slow_since is None else self._slow_since
                if now - self._slow_since > self.settings.patience_seconds * 1e9:
                    return value  # a machine that stays slow is not waited for again and again
            value = self._read_canary(fresh=True)
        self._slow_since = self._in_vain = None
        return value

    def _finished(self, running: _Running) -> Timing | None:
        """The final timing, or None while more rounds are needed.

        Raises:
            NoisyDeviceError: the limits are reached and too few rounds were good.
        """
        settings, done = self.settings, len(running.readings)
        reference = self.reference_ms or min(reading.canary_ms for reading in running.readings)
        near = [r for r in running.readings if max(r.before_ms, r.after_ms) <= settings.near_limit * reference]
        kept, low = near, _LOW
        over = done >= settings.rounds_max or running.cost_ns > settings.seconds_max * 1e9
        if over and len(near) < settings.good_min:
            kept = [r for r in running.readings if r.canary_ms <= settings.canary_limit * reference]
            low = 0.5  # disturbed networks are right on the average only
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
        ratios = np.array([reading.ratio for reading in kept])
        spread = bootstrap_spread(ratios, settings.seed, low)
        if not over and spread > settings.target_spread:
            return None
        p50, p90 = np.percentile(running.runs_ms, [50, 90])
        return Timing(
            network=running.name,
            measured_ms=float(np.quantile(ratios, low)) * reference,
            raw_p50_ms=float(p50),
            raw_p90_ms=float(p90),
            spread=spread if kept is near else max(spread, COARSE_SPREAD),
            rounds=len(kept),
            discarded=done - len(kept),
            canary_ms=_middle([reading.canary_ms for reading in kept]),
            near=kept is near,
            seconds=(running.cost_ns + running.waited_ns) / 1e9,
        )

    def _read_canary(self, fresh: bool = False) -> float:
        """The canary's fastest run now, ms; a reading that ended a moment ago is still good unless ``fresh``."""
        if not self._canary_repeats:
            self.touch(-1)
            fastest = min(self._run(self.canary) for _ in range(20))
            self._canary_repeats = self._repeats(fastest, self.settings.canary_reading_ms)
        if not fresh and self._canary_last is not None and self.clock() - self._canary_last[0] <= _FRESH_NS:
            return self._canary_last[1]
        self.touch(-1)
        value = min(self._read(self.canary, self._canary_repeats))
        self._canary_last = self.clock(), value
        return value

    def _repeats(self, duration_ms: float, reading_ms: float) -> int:
        wanted = math.ceil(reading_ms / max(duration_ms, 1e-4))
        return min(max(wanted, self.settings.runs_per_reading), 1000)

    def _read(self, program: Program, repeats: int) -> list[float]:
        """Milliseconds of each run; one untimed run first, because the caches hold the neighbour's data."""
        program.run()
        return [self._run(program) for _ in range(repeats)]

    def _run(self, program: Program) -> float:
        start = self.clock()
        program.run()
        return (self.clock() - start) / 1e6


def bootstrap_spread(values: np.ndarray, seed: int, quantile: float = 0.5) -> float:
    """Relative half-width of the 95 % bootstrap interval of a quantile of ``values`` (n,); infinite for one value."""
    if len(values) < 2:
        return math.inf
    picks = np.random.default_rng(seed).integers(0, len(values), size=(_BOOTSTRAP, len(values)))
    low, high = np.percentile(np.quantile(values[picks], quantile, axis=1), [2.5, 97.5])
    return float((high - low) / 2 / np.quantile(values, quantile))


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
