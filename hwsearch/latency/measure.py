"""``measure``: one network's milliseconds on a device. `measure`, a search that measures and `verify` all come here."""

from __future__ import annotations

from dataclasses import dataclass

from hwsearch.device.session import DeviceSession
from hwsearch.device.stopwatch import MEASURE, StopwatchSettings


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        measured_ms: time at the device's reference speed (the canary's median at ``device check``).
        raw_p50_ms, raw_p90_ms: percentiles of the uncorrected runs.
        spread: relative half-width of the 95 % interval of ``measured_ms``.
        rounds, discarded: rounds kept, and rounds in which the machine was too slow to count.
        canary_ms: the canary's median in the kept rounds.
    """

    measured_ms: float
    raw_p50_ms: float
    raw_p90_ms: float
    spread: float
    rounds: int
    discarded: int
    canary_ms: float


def measure(
    onnx: bytes,
    session: DeviceSession,
    *,
    reference_ms: float | None,
    settings: StopwatchSettings = MEASURE,
    name: str = "the network",
) -> Measurement:
    """Time one network carefully.

    Args:
        onnx: the network, static shapes.
        session: an open session on the device.
        reference_ms: the device's reference speed, from its ``DeviceCheck``.
        settings: see ``StopwatchSettings``.
        name: for messages.

    Raises:
        DeviceJobError: the runtime rejects or crashes on the network.
        NoisyDeviceError: the machine gave too few samples at its reference speed.

    Example:
        >>> measure(onnx, session, reference_ms=0.8).measured_ms                              # doctest: +SKIP
        1.37
    """
    (timing,) = session.time([(name, onnx)], reference_ms=reference_ms, settings=settings)
    return Measurement(
        timing.measured_ms,
        timing.raw_p50_ms,
        timing.raw_p90_ms,
        timing.spread,
        timing.rounds,
        timing.discarded,
        timing.canary_ms,
    )
