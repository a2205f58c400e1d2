"""``measure``: one network's milliseconds on a device. `measure`, a search that measures and `verify` all come here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwsearch.device.session import DeviceSession
from hwsearch.device.stopwatch import MEASURE, StopwatchSettings, Timing
from hwsearch.errors import InputError

#: Agents in turn: where a process finds its memory moves its times, by a per cent or by ten where the weights are many,
#: for as long as it lives. So many at least, and at most where they disagree by more than ``AGREED`` (standard error).
AGENTS, MOST_AGENTS, AGREED = 3, 7, 0.008
#: Above this spread a measurement is called noisy where no noise floor is given.
SPREAD_LIMIT = 0.05


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        measured_ms: time at the device's reference speed (undisturbed: see ``device/stopwatch.py``).
        raw_p50_ms, raw_p90_ms: percentiles of the uncorrected runs, discarded rounds included.
        spread: relative half-width of ``measured_ms``: of its 95 % interval, or between the agents where that is more.
        rounds, discarded: rounds that count, and rounds in which the machine was disturbed.
        canary_ms: the canary's median in the kept rounds.
        verdict: ``"steady"``, or ``"noisy"`` when an agent found no moment at reference speed or the spread is above
            the noise floor.
    """

    measured_ms: float
    raw_p50_ms: float
    raw_p90_ms: float
    spread: float
    rounds: int
    discarded: int
    canary_ms: float
    verdict: str


def measure(
    onnx: bytes,
    session: DeviceSession,
    *,
    reference_ms: float | None,
    noise_floor: float | None = None,
    settings: StopwatchSettings = MEASURE,
    name: str = "the network",
    allow_unfolded: bool = False,
) -> Measurement:
    """Time one network carefully.

    Args:
        onnx: the network, static shapes.
        session: an open session on the device.
        reference_ms, noise_floor: the device's, from its ``DeviceCheck``.
        settings: see ``StopwatchSettings``; its time is divided among the agents.
        name: for messages.
        allow_unfolded: time it even if blocks of branches in it would fold into one convolution each.

    Raises:
        InputError: the network is unfolded, so that its milliseconds are not those of the deployed one.
        DeviceJobError: the runtime rejects or crashes on the network.
        NoisyDeviceError: the machine gave too few samples at its reference speed.

    Example:
        >>> measure(onnx, session, reference_ms=0.8).measured_ms                              # doctest: +SKIP
        1.37
    """
    (found,) = measure_many(
        [(name, onnx)], session, reference_ms=reference_ms, noise_floor=noise_floor, settings=settings,
        allow_unfolded=allow_unfolded,
    )  # fmt: skip
    return found


def measure_many(
    networks: Sequence[tuple[str, bytes]],
    session: DeviceSession,
    *,
    reference_ms: float | None,
    noise_floor: float | None = None,
    settings: StopwatchSettings = MEASURE,
    allow_unfolded: bool = False,
) -> list[Measurement]:
    """Time several networks, interleaved with each other; otherwise as ``measure``.

    Args:
        networks: (name, ONNX bytes); names must differ.

    Raises:
        InputError: two networks have one name, or one is unfolded.
    """
    found: dict[str, list[Timing]] = {name: [] for name, _ in networks}
    if len(found) < len(networks):
        raise InputError("two networks to measure have the same name; give each its own")
    if not allow_unfolded:
        from hwsearch.latency.unfolded import refuse_unfolded

        for name, onnx in networks:
            refuse_unfolded(onnx, name)
    # A simulated device has no memory to be lucky with: every agent would say the same.
    agents, most = (1, 1) if session.device.simulated else (AGENTS, MOST_AGENTS)
    unsettled = list(networks)
    for number in range(most):
        if number:
            session.restart()
        own = replace(
            settings,
            seed=settings.seed + number,
            seconds_min=settings.seconds_min / agents,
            seconds_max=settings.seconds_max / agents,
            rounds_min=max(settings.good_min, math.ceil(settings.rounds_min / agents)),
        )
        for timing in session.time(unsettled, reference_ms=reference_ms, settings=own):
            found[timing.network].append(timing)
        if number + 1 >= agents:
            unsettled = [item for item in unsettled if _disagree(found[item[0]]) > AGREED]
        if not unsettled:
            break
    return [_combined(timings, noise_floor) for timings in found.values()]


def _disagree(timings: list[Timing]) -> float:
    """Relative standard error of the agents' mean."""
    values = np.array([timing.measured_ms for timing in timings])
    return float(values.std(ddof=1) / values.mean() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _combined(timings: list[Timing], noise_floor: float | None) -> Measurement:
    """One number from the agents: their mean without the fastest and the slowest, which of three is the median."""
    values = np.sort([timing.measured_ms for timing in timings])
    measured_ms = float(values[1:-1].mean() if len(values) > 2 else values.mean())
    between = float(np.ptp(values)) / 2 / measured_ms / max(1.0, math.sqrt(len(values) / AGENTS))
    spread = max(between, float(np.median([timing.spread for timing in timings])))
    rounds, discarded = sum(t.rounds for t in timings), sum(t.discarded for t in timings)
    limit = SPREAD_LIMIT if noise_floor is None else max(noise_floor, 0.02)
    noisy = spread > limit or not all(timing.near for timing in timings)
    return Measurement(
        measured_ms=measured_ms,
        raw_p50_ms=float(np.median([timing.raw_p50_ms for timing in timings])),
        raw_p90_ms=float(np.median([timing.raw_p90_ms for timing in timings])),
        spread=spread,
        rounds=rounds,
        discarded=discarded,
        canary_ms=float(np.median([timing.canary_ms for timing in timings])),
        verdict="noisy" if noisy else "steady",
    )
