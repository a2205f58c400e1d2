"""`device check`: is this machine quiet enough to be measured, and how fast is it?

It times the canary for some seconds (its undisturbed speed is the reference speed that every later number refers to),
and six unlike networks again and again, each time in a new process: what differs between the repeats is the *noise
floor*, and no claim about a latency on this device can be finer. The result is ``device.json`` in the device's table
folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.device.canary import CANARY, check_networks
from hwsearch.device.machine import Machine
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import PROFILE
from hwsearch.errors import HwsearchError, InputError, SchemaError

SCHEMA, VERSION = "hwsearch.device-check", 2
FILE = "device.json"

#: Fields that are numbers from 0 up, those of them that a system may not tell, and what no field can reach.
_NUMBERS = (
    "reference_ms", "typical_ms", "canary_spread", "noise_floor", "raw_noise_floor", "disturbed", "coarse", "busy",
    "stolen", "threads", "cores", "usable_cores", "contention",
)  # fmt: skip
_UNTOLD = ("busy", "stolen", "cores", "usable_cores", "contention")
_LARGEST = 1e9

#: Above these a device is noisy: test-retest error (p95), and share of timings that found no undisturbed moment.
NOISE_LIMIT = 0.10
COARSE_LIMIT = 0.30

#: Above these there is a remark: the canary's scatter, and cores that the hypervisor took.
STEADY_LIMIT = 0.25
STOLEN_LIMIT = 0.02

#: A change of the canary's undisturbed speed within a check that is worth a remark.
CHANGE_LIMIT = 0.10


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """What `device check` found.

    Attributes:
        device: its name.
        fingerprint: what it is.
        reference_ms: the canary undisturbed (5th percentile; the faster of before and after): the reference speed of
            the device's table.
        typical_ms, canary_spread: its median, and (p90 - p10) / median.
        noise_floor: 95th percentile of the relative test-retest difference of ``measured_ms``.
        raw_noise_floor: the same of the plain median, for comparison.
        disturbed: share of the canary's readings that were slower than the reference speed.
        coarse: share of the networks' timings that found no moment at reference speed.
        busy, stolen: cores that other processes, and the hypervisor, kept busy; None where the system does not tell.
        verdict: ``"ok"`` or ``"noisy"``.
        messages: what was noticed, a line each: first the reasons for "noisy", then remarks.
        canary: which canary network ``reference_ms`` belongs to.
        threads: that one inference may use.
        cores, usable_cores: of the machine, and those that the process may use (affinity, a container's quota).
        turbo: "on", "off" or "unknown".
        contention: share of a core's time that others and the hypervisor took from the timed threads; None where the
            system does not tell.
    """

    device: str
    fingerprint: Fingerprint
    reference_ms: float
    typical_ms: float
    canary_spread: float
    noise_floor: float
    raw_noise_floor: float
    disturbed: float
    coarse: float
    busy: float | None
    stolen: float | None
    verdict: str
    messages: tuple[str, ...]
    canary: str = CANARY
    threads: int = 1
    cores: int | None = None
    usable_cores: float | None = None
    turbo: str = "unknown"
    contention: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the device is quiet enough."""
        return self.verdict == "ok"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeviceCheck:
        """The inverse of :meth:`to_dict`.

        Raises:
            SchemaError: a field is missing, unknown or senseless; the message names it.
        """
        # A check of before lacks what was added with a default; that changes nothing of what it found.
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        wrong = sorted((needed - set(data)) | (set(data) - {f.name for f in fields(cls)}))
        if wrong:
            raise SchemaError(
                f"missing or unknown fields {', '.join(map(str, wrong))}; run `hwsearch device check` again"
            )
        for name in _NUMBERS:
            value = data.get(name, 0.0)
            if value is None and name in _UNTOLD:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LARGEST:
                raise SchemaError(f"{name} is {value!r:.40}; run `hwsearch device check` again")
        for name in ("device", "verdict", "turbo"):
            if not isinstance(data.get(name, ""), str):
                raise SchemaError(f"{name} is {data[name]!r:.40}; run `hwsearch device check` again")
        if not isinstance(data["messages"], (list, tuple)) or not all(isinstance(m, str) for m in data["messages"]):
            raise SchemaError("messages is no list of texts; run `hwsearch device check` again")
        if data["reference_ms"] == 0:
            raise SchemaError("reference_ms is 0; run `hwsearch device check` again")
        if data.get("canary") != CANARY:
            raise SchemaError(
                f"made with {data.get('canary')!r}, this version times {CANARY!r}; run `hwsearch device check` again"
            )
        values = dict(data) | {
            "fingerprint": Fingerprint.from_dict(data["fingerprint"]),
            "messages": tuple(data["messages"]),
        }
        return cls(**values)

    def save(self, folder: Path) -> Path:
        """Writes ``device.json`` into the folder, whole or not at all.

        Raises:
            InputError: the folder cannot be written.
        """
        path = folder / FILE
        text = json.dumps({"schema": SCHEMA, "version": VERSION, **self.to_dict()}, indent=2, sort_keys=True) + "\n"
        temporary = folder / f".{FILE}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None
        return path

    @classmethod
    def load(cls, folder: Path) -> DeviceCheck:
        """The check saved in a device's table folder.

        Raises:
            InputError: there is none.
            SchemaError: the file is damaged or of another version.
        """
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; run `hwsearch device check {folder.name}` first") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise SchemaError(
                f"{path}: is not JSON ({error}); run `hwsearch device check {folder.name}` again"
            ) from None
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise SchemaError(f"{path}: is no device check; run `hwsearch device check {folder.name}` again")
        version = data.pop("version", None)
        if version != VERSION:
            raise SchemaError(
                f"{path}: has version {version!r}, this hwsearch reads {VERSION}; run `hwsearch device check` again"
            )
        try:
            return cls.from_dict(data)
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from None


def check_device(
    device: Device | str,
    *,
    seconds: float = 5.0,
    passes: int = 3,
    save: bool = True,
    session: DeviceSession | None = None,
    message: Callable[[str], None] | None = None,
) -> DeviceCheck:
    """Checks a device and, by default, saves the result in its table folder.

    Args:
        device: the device or its name.
        seconds: how long the canary is timed alone; the whole check takes some seconds more.
        passes: how often each network is timed, 2 or more.
        save: whether to write ``device.json``.
        session: an open session to use.
        message: told what is being done, in one line each.

    Raises:
        InputError: no such device, or its table folder cannot be written.
        DeviceJobError: the runtime does not work at all.

    Example:
        >>> check_device("simulated", save=False).verdict
        'ok'
    """
    if passes < 2:
        raise InputError(f"passes is {passes}; at least 2 are needed to compare")
    if not math.isfinite(seconds) or seconds < 0:
        raise InputError(f"seconds is {seconds}; use a number from 0")
    device = Device.load(device) if isinstance(device, str) else device
    tell = message or (lambda text: None)
    if session is None:
        with open_session(device, message=message) as opened:
            return check_device(device, seconds=seconds, passes=passes, save=save, session=opened, message=message)
    problems: list[str] = []
    with session.alone(tell):
        tell(f"device {device.name}: timing the canary for {seconds / 2:g} s")
        first, *load_before = session.calibrate(seconds / 2)
        measured, raw, coarse = _passes(session, first.fast_ms, passes, tell, problems)
        # once more at the end: the state of one moment must not become the speed that everything is corrected to
        tell(f"device {device.name}: timing the canary for {seconds / 2:g} s again")
        last, *load_after = session.calibrate(seconds / 2)
    noise, raw_noise = _retest(measured), _retest(raw)
    busy, stolen = (_larger(one, two) for one, two in zip(load_before, load_after, strict=True))
    change = abs(last.fast_ms / first.fast_ms - 1)
    load = _Load(busy, stolen, device.threads, session.machine)
    spread = max(first.spread, last.spread)
    noisy, messages = _verdict(noise, coarse, spread, load, session.fingerprint, problems)
    if change > CHANGE_LIMIT:
        messages.append(f"the machine's speed changed by {change:.0%} within the check")
    result = DeviceCheck(
        device=device.name,
        fingerprint=session.fingerprint,
        reference_ms=min(first.fast_ms, last.fast_ms),
        typical_ms=(first.median_ms + last.median_ms) / 2,
        canary_spread=spread,
        noise_floor=noise,
        raw_noise_floor=raw_noise,
        disturbed=max(first.disturbed, last.disturbed),
        coarse=coarse,
        busy=busy,
        stolen=stolen,
        verdict="noisy" if noisy else "ok",
        messages=tuple(messages),
        threads=device.threads,
        cores=load.machine.cores if load.machine else None,
        usable_cores=load.machine.usable if load.machine else None,
        turbo=load.machine.turbo if load.machine else "unknown",
        contention=load.contention,
    )
    if save:
        result.save(device.table_folder)
    return result


def _passes(
    session: DeviceSession, reference_ms: float, passes: int, tell: Callable[[str], None], problems: list[str]
) -> tuple[list[dict[str, float]], list[dict[str, float]], float]:
    """measured_ms and raw_p50_ms by network in each pass, and the share of timings not at reference speed."""
    measured: list[dict[str, float]] = []
    raw: list[dict[str, float]] = []
    near: list[bool] = []

    def note(name: str, error: HwsearchError) -> None:
        problems.append(str(error))

    for number in range(passes):
        tell(f"device {session.device.name}: timing {len(check_networks())} networks, pass {number + 1} of {passes}")
        session.restart()
        settings = replace(PROFILE, seed=number)
        timings = list(session.time(check_networks(), reference_ms=reference_ms, settings=settings, on_error=note))
        measured.append({timing.network: timing.measured_ms for timing in timings})
        raw.append({timing.network: timing.raw_p50_ms for timing in timings})
        near += [timing.near for timing in timings]
    return measured, raw, 1 - sum(near) / max(1, len(near))


def _larger(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else max(one, two)


def _retest(passes: list[dict[str, float]]) -> float:
    """95th percentile of the relative difference of a network's times in any two passes; 1 without any pair."""
    differences = [
        abs(one[name] - two[name]) / ((one[name] + two[name]) / 2)
        for one, two in itertools.combinations(passes, 2)
        for name in one.keys() & two.keys()
    ]
    return float(np.percentile(sorted(differences), 95)) if differences else 1.0


@dataclass(frozen=True)
class _Load:
    """Who else wants the cores that are timed."""

    busy: float | None
    stolen: float | None
    threads: int
    machine: Machine | None

    @property
    def contention(self) -> float | None:
        """Cores that the timed threads lack because of others, as a share of the threads: 0 is alone."""
        if self.busy is None or self.machine is None:
            return None
        lacking = self.busy + self.threads - self.machine.cores
        taken = max(0.0, min(lacking, float(self.threads))) + (self.stolen or 0.0)
        return min(1.0, taken / self.threads)


def _verdict(
    noise: float, coarse: float, spread: float, load: _Load, fingerprint: Fingerprint, problems: list[str]
) -> tuple[bool, list[str]]:
    """(whether the device is too noisy, what to tell the user)."""
    reasons: list[str] = []
    if noise > NOISE_LIMIT:
        reasons.append(
            f"the same network's time differs by {noise:.1%} from one try to the next (limit {NOISE_LIMIT:.0%})"
        )
    if coarse > COARSE_LIMIT:
        reasons.append(f"{coarse:.0%} of the networks found no moment at reference speed (limit {COARSE_LIMIT:.0%})")
    reasons += problems
    notes: list[str] = []
    _contention(load, reasons, notes)
    if spread > STEADY_LIMIT:
        notes.append(f"the canary scatters by {spread:.0%} (p90 - p10 over its median): timings wait for quiet moments")
    if fingerprint.governor not in ("performance", "unknown"):
        notes.append(f"the frequency governor is {fingerprint.governor!r}; 'performance' is steadier")
    if load.machine is not None and load.machine.turbo == "on":
        notes.append("turbo is on: the clock depends on heat and on the other cores; without it times are steadier")
    return bool(reasons), [*reasons, *notes]


def _contention(load: _Load, reasons: list[str], notes: list[str]) -> None:
    """What others take of the cores, and whether there are enough for the threads asked for."""
    machine = load.machine
    if machine is None:
        return
    if load.busy is not None and load.busy > 0.2:
        # merely busy elsewhere is what the canary is for; taking the very core that is timed is too much
        place = reasons if load.busy + load.threads > machine.cores + 0.2 else notes
        place.append(f"other processes keep {load.busy:.1f} of {machine.cores} cores busy; stop them")
    if load.stolen is not None and load.stolen > STOLEN_LIMIT:
        notes.append(f"the hypervisor takes {load.stolen:.2f} cores away; a machine of one's own is steadier")
    if load.threads > machine.usable:
        quota = "a quota of " if machine.quota == machine.usable else ""
        cores = f"{quota}{machine.usable:g} cores"
        reasons.append(f"{load.threads} threads on {cores}: they wait for each other; ask for fewer threads")
    elif machine.quota is not None and load.threads > 0.8 * machine.quota:
        notes.append(f"a quota of {machine.quota:g} cores for {load.threads} threads: the system may pause them")
