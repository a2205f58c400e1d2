"""The campaign: times the networks of a plan on a device until the time is up, and writes the device's table.

Every finished measurement is committed to a journal at once, so a campaign killed at any moment goes on where it was
with the same call. On a device whose times do not depend on what ran before (the simulated one) the table of a campaign
that was killed is the same, byte for byte, as that of one that was not: places of the plan are timed in batches of
fixed members, and whether there is time for another batch is decided by the batches before it alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import PROFILE, StopwatchSettings, Timing
from hwsearch.errors import HwsearchError, InputError, NoisyDeviceError
from hwsearch.latency.journal import Journal
from hwsearch.latency.sample import NetworkTemplate, PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable, NetworkSample

#: Told (networks done, device seconds spent, device seconds planned, message).
Progress = Callable[[int, float, float, str], None]

JOURNAL = "journal.sqlite"
#: Networks a batch: enough to interleave, few enough that the time limit is kept to within seconds.
BATCH = 16
#: Fields of the fingerprint that a campaign may see change without its numbers losing their meaning.
_HARMLESS = ("system", "governor")
_SMALLEST_MS = 1e-5


@dataclass(frozen=True)
class _Campaign:
    """What stays the same while a plan is worked off."""

    session: DeviceSession
    journal: Journal
    plan: SamplingPlan
    reference_ms: float
    settings: StopwatchSettings
    budget_s: float
    tell: Progress


def profile(
    device: Device | str,
    *,
    minutes: float = 5.0,
    templates: Sequence[NetworkTemplate] = (),
    networks: int | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    session: DeviceSession | None = None,
    settings: StopwatchSettings = PROFILE,
) -> LatencyTable:
    """Time networks on a device and write its table, ``latency_tables/<name>/``.

    Called again with the same arguments it goes on, or returns at once when the time is spent. With more minutes it
    adds networks; with other templates or another seed it adds another campaign to the same table. A device without a
    ``device.json`` is checked first.

    Args:
        device: the device or its name.
        minutes: device time of this campaign, by the device's own clock (waiting for the machine does not count).
        templates: the user's models: half of the campaign draws its widths from their spaces.
        networks: stop after this many networks of the plan, even if there is time left.
        resume: False moves an earlier journal aside (``journal.sqlite.old``) and starts anew.
        seed: of the plan.
        progress: told (done, seconds spent, seconds planned, message).
        session: an open session to use.
        settings: how carefully to time.

    Raises:
        InputError: values that make no sense, a folder that cannot be written, a journal of another runtime version,
            CPU ...
        NoisyDeviceError: the device's check says so, or most networks found no quiet moment.

    Example:
        >>> table = profile("simulated", minutes=0.5)         # doctest: +SKIP
        >>> len(table.networks)                               # doctest: +SKIP
        96
    """
    _check(minutes, networks)
    device = Device.load(device) if isinstance(device, str) else device
    plan = SamplingPlan(seed=seed, templates=tuple(templates))
    tell: Progress = progress or (lambda done, spent, budget, message: None)
    if session is None:
        # Waiting for the machine is reported like everything else.
        with open_session(device, message=lambda text: tell(0, 0.0, 60 * minutes, text)) as opened:
            return profile(
                device, minutes=minutes, templates=templates, networks=networks, resume=resume, seed=seed,
                progress=progress, session=opened, settings=settings,
            )  # fmt: skip
    path = device.table_folder / JOURNAL
    if not resume:
        _move_aside(path)
    with Journal(path) as journal:
        _same_device(journal, session.fingerprint, path)
        check = current_check(device, session, lambda text: tell(0, 0.0, 60 * minutes, text))
        if not check.ok:
            raise NoisyDeviceError(
                f"{device.name} is too noisy to be profiled ({'; '.join(check.messages)}): stop other work, then run"
                f" `hwsearch device check {device.name}`"
            )
        campaign = _Campaign(session, journal, plan, check.reference_ms, settings, 60 * minutes, tell)
        _work(campaign, networks)
        # The reference speed may have been checked anew since: milliseconds are ratios to it, so they move exactly.
        samples = [sample.scaled(check.reference_ms / made) if made != check.reference_ms else sample
                   for sample, made in journal.samples()]  # fmt: skip
    if not samples:
        raise InputError(f"no network was measured on {device.name!r}: give the campaign more than {minutes:g} minutes")
    table = LatencyTable(device.name, session.fingerprint, check.reference_ms, check.noise_floor, ())
    table = table.with_networks(samples)
    table.save(device.table_folder)
    return table


def current_check(device: Device, session: DeviceSession, message: Callable[[str], None]) -> DeviceCheck:
    """The device's saved check when it still holds, else a new one, saved."""
    if (device.table_folder / "device.json").exists():
        check = DeviceCheck.load(device.table_folder)
        changed = _differences(check.fingerprint, session.fingerprint)
        if check.ok and not changed:
            return check
        why = "changed since" if changed else "was too noisy when"
        message(f"device {device.name} {why} it was checked: checking it again")
    return check_device(device, session=session, message=message)


def _work(campaign: _Campaign, networks: int | None) -> None:
    """Batch after batch until the time or the number of networks is reached."""
    plan, journal = campaign.plan, campaign.journal
    done = journal.places(plan.key)
    start = 0
    while networks is None or start < networks:
        spent = sum(seconds for place, seconds in done.items() if place < start)
        campaign.tell(len(done), sum(done.values()), campaign.budget_s, "timing networks")
        if spent >= campaign.budget_s:
            break
        end = start + BATCH if networks is None else min(start + BATCH, networks)
        missing = [place for place in range(start, end) if place not in done]
        if missing:
            _batch(campaign, missing, done)
        start = end
    campaign.tell(len(done), sum(done.values()), campaign.budget_s, "done")


def _batch(campaign: _Campaign, places: list[int], done: dict[int, float]) -> None:
    """Time the networks at some places; ``done`` is kept up to date."""
    journal, key = campaign.journal, campaign.plan.key
    waiting: dict[str, PlannedNetwork] = {}
    for place in places:
        planned = campaign.plan.network(place)
        if journal.has(planned.id) or planned.id in waiting:
            journal.skip(key, place, planned.id)
            done[place] = 0.0
        else:
            waiting[planned.id] = planned
    noisy: list[HwsearchError] = []

    def failed(name: str, error: HwsearchError) -> None:
        noisy.extend([error] if isinstance(error, NoisyDeviceError) else [])
        journal.skip(key, waiting[name].index, name, str(error))
        done[waiting[name].index] = 0.0
        campaign.tell(len(done), sum(done.values()), campaign.budget_s, f"skipped: {error}")

    jobs = [(planned.id, planned.onnx) for planned in waiting.values()]
    timings = campaign.session.time(
        jobs, reference_ms=campaign.reference_ms, settings=campaign.settings, nodes=True, on_error=failed
    )
    for timing in timings:
        planned = waiting[timing.network]
        journal.record(key, planned.index, sample_of(timing, planned.source), campaign.reference_ms)
        done[planned.index] = timing.seconds
        campaign.tell(len(done), sum(done.values()), campaign.budget_s, f"{planned.source} {timing.measured_ms:.3g} ms")
    if len(noisy) > len(jobs) / 2:
        # They may go better another time; a table of a busy machine is worse than none.
        journal.forget(key, [waiting[planned.id].index for planned in waiting.values()])
        raise NoisyDeviceError(f"{len(noisy)} of {len(jobs)} networks found no quiet moment: {noisy[0]}")


def sample_of(timing: Timing, source: str) -> NetworkSample:
    """A timing as a line of the table: node times are shares of the un-profiled total."""
    return NetworkSample(
        id=timing.network,
        source=source,
        kernels=tuple(replace(kernel, source=()) for kernel in timing.kernels),
        node_ms=tuple(_rounded(max(share * timing.measured_ms, _SMALLEST_MS)) for _, share in timing.node_shares),
        measured_ms=_rounded(timing.measured_ms),
        raw_p50_ms=_rounded(timing.raw_p50_ms),
        raw_p90_ms=_rounded(timing.raw_p90_ms),
        spread=_rounded(min(timing.spread, 1.0)),
        rounds=timing.rounds,
        seconds=_rounded(timing.seconds),
    )


def _rounded(value: float) -> float:
    """Six significant digits: far finer than any measurement, and short in a CSV file."""
    return float(f"{value:.6g}")


def _check(minutes: float, networks: int | None) -> None:
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"minutes is {minutes!r}; use a number above 0")
    if networks is not None and (isinstance(networks, bool) or not isinstance(networks, int) or networks < 1):
        raise InputError(f"networks is {networks!r}; use a whole number from 1 up, or None for no limit")


def _differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    return [text for text in old.differences(new) if text.split(":", 1)[0] not in _HARMLESS]


def _same_device(journal: Journal, fingerprint: Fingerprint, path: Path) -> None:
    """Refuse to mix measurements of different runtimes or machines.

    Raises:
        InputError: the journal was made under another fingerprint.
    """
    import json

    stored = journal.meta.setdefault("fingerprint", json.dumps(fingerprint.to_dict(), sort_keys=True))
    different = _differences(Fingerprint.from_dict(json.loads(stored)), fingerprint)
    if different:
        raise InputError(
            f"{path} was made on another device ({'; '.join(different)}): start anew (resume=False, --fresh)"
        )


def _move_aside(path: Path) -> None:
    """Keep an earlier journal as ``.old``: measurements are dear."""
    try:
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                os.replace(file, path.with_name(f"{path.name}.old{suffix}"))
    except OSError as error:
        raise InputError(f"cannot move {path} aside: {error}; choose a folder you may write to") from None
