"""The campaign: times the networks of a plan on a device until the time is up, and writes the device's table.

Work goes in steps. Step s visits for the first time the s-th block of the plan's networks, and again every fourth
network of the block 4 steps back: those second visits, apart in time and in another place of the memory, say how well
one visit repeats. On a device that repeats badly every network can be visited up to four times (``visits.py`` says
what for). Every few steps a quick predictor looks at what was measured, and later blocks lean towards what it gets
wrong (``active.py``).

Every finished visit is committed to a journal at once, so a campaign killed at any moment goes on where it was with the
same call. What a step holds follows from the plan, and whether there is time for another step from the steps before it;
so on a device whose times do not depend on what ran before (the simulated one) the table of a campaign that was killed
is the same, byte for byte, as that of one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import PROFILE, StopwatchSettings, Timing
from hwsearch.errors import DeviceJobError, HwsearchError, InputError, NoisyDeviceError, SchemaError
from hwsearch.latency.active import CANDIDATES, FEWEST, Need, round_start
from hwsearch.latency.journal import Journal, Slot
from hwsearch.latency.sample import NetworkTemplate, PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable
from hwsearch.latency.visits import Network, Visit, combine

#: Told (networks done, device seconds spent, device seconds planned, message).
Progress = Callable[[int, float, float, str], None]

JOURNAL = "journal.sqlite"
#: Networks that a step visits for the first time; with the visits to earlier blocks it lasts some seconds.
BLOCK = 16
#: Steps from a network's first visit to each of its visits: a perfect ruler, its six distances are all different, so
#: that the steps of a campaign are tied to each other in as many ways as four visits allow.
LAGS = (0, 1, 4, 6)
#: Unless told otherwise networks are visited once, but every so-many-th of them twice, so many steps apart.
RETEST_EVERY, RETEST_LAG = 4, 4
#: A visit is short: what differs from one load of a network to the next is more than what rounds average out.
VISIT = replace(
    PROFILE, rounds_min=5, rounds_max=24, good_min=3, reading_ms=2.0, target_spread=0.02, seconds_max=0.6,
    warmup_seconds=0.02, profile_runs=12,
)  # fmt: skip
#: Fields of the fingerprint that may change within a campaign without its numbers losing their meaning.
_HARMLESS = ("system", "governor")


@dataclass(frozen=True)
class _Campaign:
    """What stays the same while a plan is worked off."""

    session: DeviceSession
    journal: Journal
    plan: SamplingPlan
    reference_ms: float
    settings: StopwatchSettings
    visits: int | None
    networks: int | None
    budget_s: float
    tell: Progress
    target: float | None

    def slots(self, step: int) -> list[Slot]:
        """The visits of a step, (place, visit); none when everything was visited."""
        lags = (0, RETEST_LAG) if self.visits is None else LAGS[: self.visits]
        return [
            (place, visit)
            for visit, lag in enumerate(lags)
            if step >= lag
            for place in range((step - lag) * BLOCK, (step - lag + 1) * BLOCK)
            if (self.networks is None or place < self.networks)
            and (visit == 0 or self.visits is not None or place % RETEST_EVERY == 0)
        ]

    def last_step(self) -> float:
        """Number of the last step that has a visit to make."""
        if self.networks is None:
            return math.inf
        return (self.networks - 1) // BLOCK + (RETEST_LAG if self.visits is None else LAGS[self.visits - 1])


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
    settings: StopwatchSettings = VISIT,
    visits: int | None = None,
    target: float | None = None,
) -> LatencyTable:
    """Time networks on a device and write its table, ``latency_tables/<name>/``.

    Called again with the same arguments it goes on, or returns at once when the time is spent. With more minutes it
    adds networks; with other templates or another seed it adds another campaign to the same table. A device without
    a ``device.json`` is checked first.

    Args:
        device: the device or its name.
        minutes: device time of this campaign, by the device's own clock (waiting for the machine does not count).
        templates: the user's models: half of the campaign draws its widths from their spaces.
        networks: stop after this many networks of the plan, even if there is time left.
        resume: False moves an earlier journal aside (``journal.sqlite.old``) and starts anew.
        seed: of the plan.
        progress: told (networks done, seconds spent, seconds planned, message).
        session: an open session to use.
        settings: how carefully to time at each visit.
        visits: to each network, 1 to 4; None is 1, and again to every fourth, to learn how well a visit repeats (on a
            simulated device every visit finds the same: 1).
        target: stop early once a quick predictor is off by no more than this on networks held out, on the mean; 0.04 is
            4 %. None: use all the time.

    Raises:
        InputError: values that make no sense, a folder that cannot be written, a journal of another runtime or CPU.
        NoisyDeviceError: the device's check says so, or most networks found no quiet moment.

    Example:
        >>> table = profile("simulated", minutes=0.5)         # doctest: +SKIP
        >>> len(table.networks)                               # doctest: +SKIP
        96
    """
    _check(minutes, networks, visits, target)
    device = Device.load(device) if isinstance(device, str) else device
    plan = SamplingPlan(seed=seed, templates=tuple(templates), precision=device.precision)
    tell: Progress = progress or (lambda done, spent, budget, message: None)
    if session is None:
        # Waiting for the machine is reported like everything else.
        with open_session(device, message=lambda text: tell(0, 0.0, 60 * minutes, text)) as opened:
            return profile(
                device, minutes=minutes, templates=templates, networks=networks, resume=resume, seed=seed,
                progress=progress, session=opened, settings=settings, visits=visits, target=target,
            )  # fmt: skip
    path = device.table_folder / JOURNAL
    if not resume:
        _move_aside(path)
    with Journal(path) as journal:
        _same_device(journal, session.fingerprint, path)
        journal.meta.setdefault(f"seed {seed}", str(seed))
        check = current_check(device, session, lambda text: tell(0, 0.0, 60 * minutes, text))
        if not check.ok:
            raise NoisyDeviceError(
                f"{device.name} is too noisy to be profiled ({'; '.join(check.messages)}): stop other work, then run"
                f" `hwsearch device check {device.name}`"
            )
        times = 1 if visits is None and device.simulated else visits
        campaign = _Campaign(
            session, journal, plan, check.reference_ms, settings, times, networks, 60 * minutes, tell,
            target,
        )  # fmt: skip
        _work(campaign)
        known, made = journal.measurements()
        seeds = tuple(sorted(_seed(text, path) for text in journal.meta.all("seed ")))
    # The reference speed may have been checked anew since: milliseconds are ratios to it, so they move exactly.
    moved = [
        visit
        if then == check.reference_ms
        else replace(visit, measured_ms=visit.measured_ms * check.reference_ms / then)
        for visit, then in made
    ]
    found = combine(known, moved)
    if not found.samples:
        raise InputError(f"no network was measured on {device.name!r}: give the campaign more than {minutes:g} minutes")
    floor = check.noise_floor if found.retest is None or device.simulated else float(f"{found.retest:.4g}")
    table = LatencyTable(device.name, session.fingerprint, check.reference_ms, floor, found.samples, seeds)
    table.save(device.table_folder)
    return table


def current_check(device: Device, session: DeviceSession, message: Callable[[str], None]) -> DeviceCheck:
    """The device's saved check when it still holds, else a new one, saved. A noisy one never holds."""
    if (device.table_folder / "device.json").exists():
        check = DeviceCheck.load(device.table_folder)
        if _differences(check.fingerprint, session.fingerprint):
            message(f"device {device.name} changed since it was checked: checking it again")
        elif check.ok:
            return check
        else:
            message(f"device {device.name} was noisy when it was checked: checking it again")
    return check_device(device, session=session, message=message)


def _work(campaign: _Campaign) -> None:
    """Step after step until the time is spent, every network was visited, or the target is reached."""
    done = campaign.journal.done(campaign.plan.key)
    step, spent = 0, 0.0
    need: Need | None = None
    fitted_at = -1
    while step <= campaign.last_step() and spent < campaign.budget_s:
        slots = campaign.slots(step)
        missing = [slot for slot in slots if slot not in done]
        start = round_start(step)
        # Needed to choose this step's networks, and to know whether enough were timed.
        if fitted_at != start and (missing or campaign.target is not None):
            need, fitted_at = _need(campaign, start), start
            if need is not None and campaign.target is not None and need.mape <= campaign.target:
                break
        if missing:
            _tell(campaign, done, "timing networks", need)
            _choose(campaign, step, need)
            _step(campaign, step, missing, done, need)
        spent += math.fsum(done.get(slot, 0.0) for slot in slots)
        step += 1
    _tell(campaign, done, "done", need)


def _need(campaign: _Campaign, before: int) -> Need | None:
    """What the visits of the steps before ``before`` leave to be learnt; None while they are few."""
    networks, made = campaign.journal.measurements()
    key = campaign.plan.key
    visits = [visit for visit, _ in made if f"{key}/" < visit.step < f"{key}/{before:05d}"]
    samples = combine(networks, visits).samples
    return Need.of(samples, campaign.plan.seed) if len(samples) >= FEWEST else None


def _choose(campaign: _Campaign, step: int, need: Need | None) -> None:
    """Commit which candidate is timed at each place of the step's new block, half of which keep the plan's own."""
    block = [place for place, visit in campaign.slots(step) if visit == 0]
    known = campaign.journal.chosen(campaign.plan.key)
    if need is None or any(place in known for place in block):
        return
    chosen = dict.fromkeys(block, 0)
    open_places = [place for place in block if place // 2 % 2]
    tries = [(place, number) for place in open_places for number in range(CANDIDATES)]
    networks = [campaign.plan.network(place, number) for place, number in tries]
    best: dict[int, float] = {}
    try:
        lowered = campaign.session.lower([n.onnx for n in networks], [n.id for n in networks])
    except DeviceJobError:
        lowered = []  # one that the runtime rejects spoils the batch; timing it will say which
    for (place, number), score in zip(tries, need.scores(lowered), strict=False):
        if score > best.get(place, -math.inf):
            best[place], chosen[place] = score, number
    campaign.journal.choose(campaign.plan.key, chosen)


def _step(campaign: _Campaign, step: int, slots: list[Slot], done: dict[Slot, float], need: Need | None) -> None:
    """Make some visits of a step, interleaved in random order; ``done`` is kept up to date."""
    journal, key = campaign.journal, campaign.plan.key
    broken, chosen = journal.failed(key), journal.chosen(key)
    order = np.random.default_rng([campaign.plan.seed, step]).permutation(len(slots))
    waiting: dict[str, tuple[Slot, PlannedNetwork]] = {}
    for slot in (slots[index] for index in order):
        planned = campaign.plan.network(slot[0], chosen.get(slot[0], 0))
        if slot[0] in broken:
            journal.skip(key, slot, planned.id, "an earlier visit failed")
            done[slot] = 0.0
        else:
            waiting[f"{planned.id}, visit {slot[1] + 1} (place {slot[0]})"] = slot, planned
    noisy: list[Slot] = []
    reasons: list[HwsearchError] = []

    def failed(name: str, error: HwsearchError) -> None:
        slot, planned = waiting[name]
        if isinstance(error, NoisyDeviceError):
            noisy.append(slot)
            reasons.append(error)
            # Not the network's fault: other visits to it may do better.
            journal.skip(key, slot, planned.id, "")
        else:
            journal.skip(key, slot, planned.id, str(error))
        done[slot] = 0.0
        _tell(campaign, done, f"skipped: {error}", need)

    jobs = [(name, planned.onnx) for name, (_, planned) in waiting.items()]
    # Another order of rounds each time, should a step be worked off in two parts.
    settings = replace(campaign.settings, seed=campaign.settings.seed + step)
    for timing in campaign.session.time(
        jobs, reference_ms=campaign.reference_ms, settings=settings, nodes=True, on_error=failed
    ):
        slot, planned = waiting[timing.network]
        network, visit = _visit(timing, planned, f"{key}/{step:05d}")
        journal.record(key, slot, network, visit, campaign.reference_ms)
        done[slot] = timing.seconds
        _tell(campaign, done, f"{planned.source} {timing.measured_ms:.3g} ms", need)
    if len(noisy) > len(jobs) / 2:
        # They may go better another time; a table of a busy machine is worse than none.
        journal.forget(key, noisy)
        raise NoisyDeviceError(f"{len(noisy)} of {len(jobs)} networks found no quiet moment: {reasons[0]}")


def _visit(timing: Timing, planned: PlannedNetwork, step: str) -> tuple[Network, Visit]:
    kernels = tuple(replace(kernel, source=()) for kernel in timing.kernels)
    visit = Visit(
        network=planned.id,
        step=step,
        measured_ms=timing.measured_ms,
        raw_p50_ms=timing.raw_p50_ms,
        raw_p90_ms=timing.raw_p90_ms,
        spread=timing.spread,
        rounds=timing.rounds,
        seconds=timing.seconds,
        shares=tuple(share for _, share in timing.node_shares),
    )
    return Network(planned.id, planned.source, kernels), visit


def _tell(campaign: _Campaign, done: dict[Slot, float], message: str, need: Need | None) -> None:
    networks = len({place for place, _ in done})
    if need is not None:
        aim = "" if campaign.target is None else f", target {campaign.target:.1%}"
        message = f"error {need.mape:.1%}{aim}, {message}"
    campaign.tell(networks, math.fsum(done.values()), campaign.budget_s, message)


def _check(minutes: float, networks: int | None, visits: int | None, target: float | None) -> None:
    if target is not None and (isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1):
        raise InputError(f"target is {target!r}; use a share between 0 and 1, such as 0.04 for 4 %")
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"minutes is {minutes!r}; use a number above 0")
    for name, value, most in (("networks", networks, math.inf), ("visits", visits, len(LAGS))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise InputError(f"{name} is {value!r}; use a whole number from 1 to {most}, or None")


def _differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    return [text for text in old.differences(new) if text.split(":", 1)[0] not in _HARMLESS]


def _same_device(journal: Journal, fingerprint: Fingerprint, path: Path) -> None:
    """Refuse to mix measurements of different runtimes or machines.

    Raises:
        InputError: the journal was made under another fingerprint.
    """
    stored = journal.meta.setdefault("fingerprint", json.dumps(fingerprint.to_dict(), sort_keys=True))
    try:
        different = _differences(Fingerprint.from_dict(json.loads(stored)), fingerprint)
    except (ValueError, RecursionError, SchemaError) as error:
        raise SchemaError(f"{path}: its fingerprint cannot be read ({error}); move it away and profile again") from None
    if different:
        raise InputError(
            f"{path} was made on another device ({'; '.join(different)}): start anew with resume=False (--no-resume)"
        )


def _seed(text: str, path: Path) -> int:
    if not text.isdecimal() or len(text) > 100:
        raise SchemaError(f"{path}: its seed {text[:40]!r} is no whole number; move it away and profile again")
    return int(text)


def _move_aside(path: Path) -> None:
    """Keep an earlier journal as ``.old``: measurements are dear."""
    try:
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                os.replace(file, path.with_name(f"{path.name}.old{suffix}"))
    except OSError as error:
        raise InputError(f"cannot move {path} aside: {error}; choose a folder you may write to") from None
