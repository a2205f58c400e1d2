"""``device revalidate``: does a predictor made earlier still hold on this device? Asked of the device, in a minute.

Some of the table's networks, of every family and size, are made again from the plan's seeds, timed again in two fresh
processes, and compared with the table. The canary divides the machine's mood out, so the ratios speak of the runtime
and the silicon. Three answers:

* **holds**: the median ratio and the scatter around it are what the noise floor allows;
* **shifted**: everything is slower or faster by one factor (the networks against the canary, or the canary itself);
* **broken**: networks differ from each other in how much they moved: profile and fit again.

``accept`` lets a predictor that holds be used with the runtime version that is installed now. It writes that one field
and nothing else, and only where nothing else differs and every network of the sample became the same kernels; the
former version stays in the manifest under ``revalidated``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.device.session import DeviceSession
from hwsearch.device.spec import Fingerprint
from hwsearch.device.stopwatch import PROFILE, Timing
from hwsearch.errors import AnswerIsNo, HwsearchError, InputError, NoisyDeviceError
from hwsearch.latency.predictor import BINDING, SCHEMA, VERSION, LatencyPredictor
from hwsearch.latency.sample import NetworkTemplate, PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable, NetworkSample, read_manifest, write_atomic

#: Networks timed again, by default.
NETWORKS = 24
#: Fresh processes in which each is timed: where a process finds its memory moves all its times.
PASSES = 2
CANARY_SECONDS = 3.0
#: The median may be off by so much, or by half the noise floor; single networks by so much, or by twice the floor.
SHIFT, SCATTER = 0.04, 0.10
#: A canary beyond this times its reference (or below its inverse) is another speed of the machine.
SPEED = 1.25
#: A family that moved by more than this against the rest (or by twice the noise floor) is named.
MOVED = 0.15
_FAMILY_SHARE, _FAMILY_NETWORKS = 0.02, 3
_VISIT = replace(PROFILE, rounds_min=5, rounds_max=9, good_min=3, reading_ms=3.0, profile_runs=12)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class FamilyRatio:
    """How a kernel family's milliseconds moved: median over networks of now / table, and how many networks tell."""

    family: str
    ratio: float
    networks: int


@dataclass(frozen=True)
class Revalidation:
    """What the re-timing found.

    Attributes:
        device: its name.
        verdict: ``"holds"``, ``"shifted"`` or ``"broken"``.
        networks: how many were timed again.
        median_ratio: of now / table, both at the table's reference speed.
        factor: what every time is multiplied by now, the machine's own speed included where that changed.
        speed: the canary's undisturbed time now over the table's reference: above 1 is slower.
        p95: 95th percentile of how far a network's ratio is from the median, relative.
        noise_floor: the table's.
        families: every family with enough networks; ``moved`` names those that moved against the rest.
        other_kernels: networks that the runtime turns into other kernels than before.
        failed: networks that the runtime no longer runs, a line each.
        differences: fields of the fingerprint that differ, as "name: then against now".
        messages: the verdict in words, a line each.
    """

    device: str
    verdict: str
    networks: int
    median_ratio: float
    factor: float
    speed: float
    p95: float
    noise_floor: float
    families: tuple[FamilyRatio, ...]
    moved: tuple[str, ...]
    other_kernels: int
    failed: tuple[str, ...]
    differences: tuple[str, ...]
    messages: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the predictor may be trusted as before."""
        return self.verdict == "holds"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def revalidate(
    table: LatencyTable,
    session: DeviceSession,
    *,
    networks: int = NETWORKS,
    templates: Sequence[NetworkTemplate] = (),
    tell: Tell = lambda text: None,
) -> Revalidation:
    """Time a small sample of a table's networks again and compare.

    Args:
        table: the device's.
        session: an open session on the device as it is now.
        networks: how many; 8 or more.
        templates: the models that the campaign had: their networks take part too. Random ones always do.
        tell: progress, a line at a time.

    Raises:
        InputError: too few networks asked for, or the table's networks cannot be made again.
        NoisyDeviceError: half of the networks found no quiet moment.
    """
    if isinstance(networks, bool) or not isinstance(networks, int) or networks < 8:
        raise InputError(f"networks is {networks!r}; use a whole number from 8 up, or nothing can be said")
    chosen = _sample(table, tuple(templates), networks)
    known = {sample.id: sample for sample in table.networks}
    with session.alone(tell):
        tell(f"device {table.device}: timing the canary for {CANARY_SECONDS:g} s")
        now_ms = session.calibrate_canary(CANARY_SECONDS).fast_ms
        visits, failed = _time(chosen, session, now_ms, tell)
    if len(visits) < max(networks // 2, 1) and not failed:
        raise NoisyDeviceError(
            f"only {len(visits)} of {len(chosen)} networks found a quiet moment: stop other work, then try again"
        )
    # Times were taken relative to the canary as it is now; the table speaks of the canary as it was.
    pairs = [(known[name], visit, table.reference_ms / now_ms) for name, visit in sorted(visits.items())]
    return _judged(table, session.fingerprint, pairs, now_ms / table.reference_ms, failed)


def _sample(table: LatencyTable, templates: tuple[NetworkTemplate, ...], networks: int) -> list[PlannedNetwork]:
    """Networks of the table, made again: of each source in turn, spread over its milliseconds."""
    known = {sample.id: sample for sample in table.networks}
    places: dict[str, tuple[SamplingPlan, int]] = {}
    for seed in table.seeds or (0,):
        plan = SamplingPlan(seed=seed, templates=templates, precision=table.fingerprint.precision)
        # The plan's first places are the campaign's first networks; some hundred are enough to choose from.
        for index in range(min(2 * len(known) + 32, 16 * networks)):
            if len(places) >= min(4 * networks, len(known)):
                break
            made = plan.network(index).id
            if made in known:
                places.setdefault(made, (plan, index))
    if len(places) < min(8, networks):
        raise InputError(
            f"only {len(places)} of the {len(known)} networks in the table of {table.device!r} can be made again "
            "(another release's plan, or the widths of a model: give it with --model); profile the device again"
        )
    sources: dict[str, list[NetworkSample]] = {}
    for name in places:
        sources.setdefault(known[name].source, []).append(known[name])
    queues = [_spread(sorted(own, key=lambda s: (s.measured_ms, s.id))) for _, own in sorted(sources.items())]
    chosen: list[str] = []
    while len(chosen) < min(networks, len(places)):
        for queue in queues:
            if queue and len(chosen) < networks:
                chosen.append(queue.pop(0).id)
    return [places[name][0].network(places[name][1]) for name in chosen]


def _spread(ordered: list[NetworkSample]) -> list[NetworkSample]:
    """The middle first, then the middles of both halves and so on: any beginning of it is spread over the whole."""
    found, spans = [], [(0, len(ordered))]
    while spans:
        low, high = spans.pop(0)
        if low < high:
            middle = (low + high) // 2
            found.append(ordered[middle])
            spans += [(low, middle), (middle + 1, high)]
    return found


def _time(
    chosen: Sequence[PlannedNetwork], session: DeviceSession, now_ms: float, tell: Tell
) -> tuple[dict[str, list[Timing]], list[str]]:
    """Timings of each network by id, and why networks failed."""
    visits: dict[str, list[Timing]] = {}
    failed: dict[str, str] = {}

    def note(name: str, error: HwsearchError) -> None:
        if not isinstance(error, NoisyDeviceError):
            failed[name] = str(error)

    for number in range(PASSES):
        tell(f"device {session.device.name}: timing {len(chosen)} networks again, pass {number + 1} of {PASSES}")
        session.restart()
        jobs = [(network.id, network.onnx) for network in chosen if network.id not in failed]
        settings = replace(_VISIT, seed=number)
        for timing in session.time(jobs, reference_ms=now_ms, settings=settings, nodes=True, on_error=note):
            visits.setdefault(timing.network, []).append(timing)
    return visits, [failed[name] for name in sorted(failed)]


def _judged(
    table: LatencyTable,
    now: Fingerprint,
    pairs: Sequence[tuple[NetworkSample, list[Timing], float]],
    speed: float,
    failed: Sequence[str],
) -> Revalidation:
    logs = np.array(
        [math.log(scale * _median([t.measured_ms for t in own]) / then.measured_ms) for then, own, scale in pairs]
    )
    middle = float(np.median(logs)) if len(logs) else 0.0
    median_ratio = math.exp(middle)
    p95 = float(np.percentile(np.abs(np.expm1(logs - middle)), 95)) if len(logs) else 0.0
    families = _families(pairs)
    allowed = max(MOVED, 2 * table.noise_floor)
    moved = tuple(f.family for f in families if abs(f.ratio / median_ratio - 1) > allowed)
    other = sum(any(t.kernels != then.kernels for t in own) for then, own, _ in pairs)
    speed_changed = not 1 / SPEED <= speed <= SPEED
    scatter, shift = max(SCATTER, 2 * table.noise_floor), max(SHIFT, table.noise_floor / 2)
    factor = median_ratio * (speed if speed_changed else 1.0)
    messages = []
    if failed:
        messages.append(f"{len(failed)} networks no longer run: {failed[0]}")
    if p95 > scatter:
        messages.append(f"networks moved unlike each other: p95 {p95:.1%} around their median (limit {scatter:.0%})")
    verdict = "broken" if messages else "holds"
    if abs(median_ratio - 1) > shift:
        messages.append(f"networks take {median_ratio:.3f} times what they took (limit {shift:.1%} either way)")
        verdict = "broken" if verdict == "broken" else "shifted"
    if speed_changed:
        messages.append(
            f"the canary takes {speed:.2f} times its reference: the machine is busy or its clock changed; "
            "`hwsearch device check` finds the new reference speed"
        )
        verdict = "broken" if verdict == "broken" else "shifted"
    if moved:
        ratios = ", ".join(f"{f.family} {f.ratio:.2f}" for f in families if f.family in moved)
        messages.append(f"kernel families that moved against the rest: {ratios}")
    if other:
        messages.append(f"{other} of {len(pairs)} networks become other kernels than before")
    if verdict == "holds":
        words = f"{len(pairs)} networks take {median_ratio:.3f} times what they took, {p95:.1%} around it (p95)"
        messages.insert(0, words)
    elif verdict == "shifted":
        messages.append(f"every time is {factor:.3f} times the predicted one: profile again, or correct by that factor")
    else:
        messages.append(f"run `hwsearch profile --device {table.device} --no-resume` and `hwsearch fit`")
    return Revalidation(
        device=table.device,
        verdict=verdict,
        networks=len(pairs),
        median_ratio=median_ratio,
        factor=factor,
        speed=speed,
        p95=p95,
        noise_floor=table.noise_floor,
        families=families,
        moved=moved,
        other_kernels=other,
        failed=tuple(failed),
        differences=table.fingerprint.differences(now),
        messages=tuple(messages),
    )


def _families(pairs: Sequence[tuple[NetworkSample, list[Timing], float]]) -> tuple[FamilyRatio, ...]:
    """Ratios by kernel family, from networks that still become the same kernels."""
    ratios: dict[str, list[float]] = {}
    for then, own, scale in pairs:
        same = [timing for timing in own if timing.kernels == then.kernels]
        if not same:
            continue
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        for at, (kernel, ms) in enumerate(zip(then.kernels, then.node_ms, strict=True)):
            spent = _median([timing.node_shares[at][1] * timing.measured_ms for timing in same]) * scale
            before[kernel.family] = before.get(kernel.family, 0.0) + ms
            after[kernel.family] = after.get(kernel.family, 0.0) + spent
        for family, ms in before.items():
            if ms >= _FAMILY_SHARE * then.measured_ms:
                ratios.setdefault(family, []).append(after[family] / ms)
    found = [FamilyRatio(f, _median(v), len(v)) for f, v in sorted(ratios.items()) if len(v) >= _FAMILY_NETWORKS]
    return tuple(found)


def accept(folder: Path, outcome: Revalidation, now: Fingerprint) -> str:
    """Let the predictor of a folder be used with the runtime version that is installed now; says what was done.

    Raises:
        InputError: there is no predictor.
        AnswerIsNo: it does not hold, more than the runtime's version differs, or networks become other kernels.
    """
    made_for = LatencyPredictor.load(folder).fingerprint_
    different = [name for name in BINDING if getattr(made_for, name) != getattr(now, name)]
    if not outcome.holds:
        raise AnswerIsNo(f"not accepted: the predictor is {outcome.verdict} ({'; '.join(outcome.messages)})")
    if not different:
        return "the predictor was made for this very runtime: nothing to accept"
    if different != ["runtime_version"]:
        texts = [f"{name} {getattr(now, name)!r} instead of {getattr(made_for, name)!r}" for name in different]
        raise AnswerIsNo(f"not accepted: more than the runtime's version differs ({'; '.join(texts)}); profile again")
    if outcome.other_kernels:
        raise AnswerIsNo(
            f"not accepted: {outcome.other_kernels} of {outcome.networks} networks become other kernels under "
            f"{now.runtime} {now.runtime_version}; profile and fit again"
        )
    path = folder / "manifest.json"
    manifest = read_manifest(path, SCHEMA, VERSION, "predictor", "run `hwsearch fit` to make one")
    entry = {
        "from": made_for.runtime_version, "to": now.runtime_version, "networks": outcome.networks,
        "median_ratio": outcome.median_ratio, "p95": outcome.p95,
    }  # fmt: skip
    manifest["fingerprint"]["runtime_version"] = now.runtime_version
    manifest["revalidated"] = [*manifest.get("revalidated", ()), entry]
    try:
        write_atomic(path, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; make it writable") from None
    return f"accepted: made for {now.runtime} {made_for.runtime_version}, now also used with {now.runtime_version}"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
