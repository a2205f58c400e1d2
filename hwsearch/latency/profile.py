"""``profile``: the campaign. A plan's networks are timed on the device and committed to a journal one by one.

The plan is worked off in batches of fixed places, and the time limit is asked between batches against the *device
seconds in the journal*. So a campaign that was killed and started again measures the same networks as an unbroken
one; on the simulated device its table is the same byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE, StopwatchSettings, Timing
from hwsearch.errors import HwsearchError, InputError
from hwsearch.latency.journal import Journal
from hwsearch.latency.sample import NetworkTemplate, PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable, NetworkSample

#: Called with (device seconds spent, device seconds allowed, a few words).
Progress = Callable[[float, float, str], None]

JOURNAL = "journal.sqlite"
_BATCH = 32


def profile(
    device: Device | str,
    *,
    minutes: float = 5.0,
    templates: Sequence[NetworkTemplate] = (),
    networks: int | None = None,
    resume: bool = True,
    seed: int = 0,
    settings: StopwatchSettings = PROFILE,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure networks on a device until the time is used up, and publish the table.

    Args:
        device: the device or its name; checked first where it has not been.
        minutes: device time for this plan in all, earlier runs counted in.
        templates: models whose widths matter; every other network is one of theirs.
        networks: stop after so many networks of the plan, whatever the time.
        resume: go on with an earlier campaign; False throws its journal away.
        seed: of the plan.
        settings: how carefully each network is timed.
        progress: told after every network.

    Returns:
        The table of everything in the device's journal, also written to ``device.table_folder``.

    Raises:
        InputError: a value or folder cannot be used, or the journal belongs to another machine or reference speed.
        NoisyDeviceError: the machine is too busy.

    Example:
        >>> table = profile("simulated", minutes=0.1)                                          # doctest: +SKIP
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"minutes is {minutes!r}: give a number above 0")
    if networks is not None and networks < 1:
        raise InputError(f"networks is {networks}: give 1 or more, or leave it out")
    device = Device.load(device) if isinstance(device, str) else device
    plan = SamplingPlan(seed, tuple(templates))
    path = device.table_folder / JOURNAL
    if not resume:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    with Journal(path) as journal, open_session(device) as session:
        check = _checked(device, session)
        _bind(journal, device, check)
        _work(plan, journal, session, check, minutes * 60, networks, settings, progress)
        table = LatencyTable(device.name, check.fingerprint, check.reference_ms, check.noise_floor, journal.samples())
    if not table.networks:
        raise InputError(f"no network could be timed on {device.name} in {minutes:g} minutes: give it more")
    table.save(device.table_folder)
    return table


def _checked(device: Device, session: DeviceSession) -> DeviceCheck:
    from hwsearch.device.check import FILE

    if (device.table_folder / FILE).exists():
        return DeviceCheck.load(device.table_folder)
    return check_device(device, session=session)


def _bind(journal: Journal, device: Device, check: DeviceCheck) -> None:
    """A journal's times are comparable only under one fingerprint and one reference speed."""
    for name, value in (
        ("fingerprint", json.dumps(check.fingerprint.to_dict(), sort_keys=True)),
        ("reference_ms", repr(check.reference_ms)),
    ):
        stored = journal.meta.setdefault(name, value)
        if stored != value:
            raise InputError(
                f"{journal.path} was made with {name} {stored}, the device now has {value}: "
                f"profile with --no-resume to start again, or delete {device.table_folder}"
            )


def _work(
    plan: SamplingPlan,
    journal: Journal,
    session: DeviceSession,
    check: DeviceCheck,
    seconds: float,
    networks: int | None,
    settings: StopwatchSettings,
    progress: Progress | None,
) -> None:
    done = journal.places(plan.key)
    start = 0
    while (networks is None or start < networks) and _spent(done, start) < seconds:
        places = range(start, min(start + _BATCH, networks or start + _BATCH))
        missing = [plan.network(place) for place in places if place not in done]
        for network in missing:
            if journal.has(network.id):
                journal.skip(plan.key, network.index, network.id)
                done[network.index] = 0.0
        fresh = {network.id: network for network in missing if network.index not in done}

        def failed(name: str, error: HwsearchError, fresh: dict[str, PlannedNetwork] = fresh) -> None:
            # One network that a runtime rejects must not end a campaign; why is in the journal.
            journal.skip(plan.key, fresh[name].index, name, " ".join(str(error).split()))
            done[fresh[name].index] = 0.0

        jobs = [(network.id, network.onnx) for network in fresh.values()]
        for timing in session.time(
            jobs, reference_ms=check.reference_ms, settings=settings, nodes=True, on_error=failed
        ):
            network = fresh[timing.network]
            journal.record(plan.key, network.index, _sample(network, timing))
            done[network.index] = timing.seconds
            if progress:
                progress(sum(done.values()), seconds, f"{len(done)} networks")
        start = places.stop
    if progress:
        progress(seconds, seconds, f"{len(done)} networks")


def _spent(done: dict[int, float], places: int) -> float:
    """Device seconds of the first ``places`` places, in their order: the same sum however often it was interrupted."""
    return math.fsum(done.get(place, 0.0) for place in range(places))


def _sample(network: PlannedNetwork, timing: Timing) -> NetworkSample:
    return NetworkSample(
        id=network.id,
        source=network.source,
        kernels=timing.kernels,
        node_ms=tuple(max(share, 1e-7) * timing.measured_ms for _, share in timing.node_shares),
        measured_ms=timing.measured_ms,
        raw_p50_ms=timing.raw_p50_ms,
        raw_p90_ms=timing.raw_p90_ms,
        spread=timing.spread,
        rounds=timing.rounds,
        seconds=timing.seconds,
    )
