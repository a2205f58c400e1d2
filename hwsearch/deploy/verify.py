"""``verify``: run a bundle on a device. Does it still compute what it should, and inside its budget?

Milliseconds come from ``latency.measure``, the one code path of profiling, searching and verifying.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from hwsearch.deploy.reader import Bundle, read_bundle
from hwsearch.deploy.verdict import Numerics, Verdict, compare, judge, sqnr_db
from hwsearch.device.check import FILE, DeviceCheck
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import MEASURE, StopwatchSettings
from hwsearch.errors import InputError, SchemaError
from hwsearch.latency.measure import measure


def verify(
    bundle: Bundle | str | os.PathLike[str],
    device: Device | str,
    *,
    session: DeviceSession | None = None,
    settings: StopwatchSettings = MEASURE,
    message: Callable[[str], None] | None = None,
) -> Verdict:
    """Check a bundle's files, its outputs and its milliseconds on a device.

    The verdict is "pass" when outputs are within the bundle's tolerance of the golden ones, ``measured_ms`` is within
    the budget, and the raw median is within the budget times (1 + the device's noise floor). A bundle without a budget
    is judged by its outputs alone; its milliseconds are measured and reported all the same. An 8-bit network is held to
    two things: its own golden answers, by a tolerance that was measured when it was made, and the share of the float
    network's output that it promised to leave.

    Args:
        bundle: its folder (read anew and checked byte by byte, also when a ``Bundle`` is given).
        device: where to run it; normally the one that the bundle was made for.
        session: an open session on that device to use.
        settings: how carefully to time.
        message: told in one line when the machine is busy.
    Raises:
        InputError: no such bundle or device, or the device was never checked.
        SchemaError: a file of the bundle is not what the manifest says.
        DeviceJobError: the runtime rejects or crashes on the model.
        NoisyDeviceError: the machine is too busy to give a number.

    Example:
        >>> verify("bundle", "x86-ort-1t").status                                            # doctest: +SKIP
        'pass'
    """
    read = read_bundle(bundle.folder if isinstance(bundle, Bundle) else bundle)
    target = Device.load(device) if isinstance(device, str) else device
    if session is None:
        with open_session(target, message=message, canary=read.canary) as opened:
            return _verify(read, target, opened, settings)
    return _verify(read, target, session, settings)


def _verify(bundle: Bundle, device: Device, session: DeviceSession, settings: StopwatchSettings) -> Verdict:
    reference_ms, noise_floor, raw_floor, notes = _reference(bundle, device, session.fingerprint)
    if bundle.device != device.name:
        notes.insert(0, f"the bundle was made for {bundle.device}, it was verified on {device.name}")
    if bundle.budget_ms is None:
        notes.append("the bundle has no budget: its milliseconds are reported, not judged")
    numerics, left = run_cases(bundle, session)
    # what deploy wrote is folded, and the look into the graph needs more than a board has
    timed = measure(
        bundle.model, session, reference_ms=reference_ms, settings=settings, name=bundle.name, allow_unfolded=True
    )
    status, reasons = judge(
        numerics, bundle.budget_ms, timed.measured_ms, timed.raw_p50_ms, raw_floor,
        sqnr=left, promised_sqnr=bundle.promised_sqnr_db,
    )  # fmt: skip
    return Verdict(
        status=status,
        reasons=reasons,
        notes=tuple(notes),
        name=bundle.name,
        device=device.name,
        numerics=numerics,
        budget_ms=bundle.budget_ms,
        predicted_ms=bundle.predicted_ms,
        measured_ms=timed.measured_ms,
        raw_p50_ms=timed.raw_p50_ms,
        raw_p90_ms=timed.raw_p90_ms,
        spread=timed.spread,
        rounds=timed.rounds,
        noise_floor=noise_floor,
        precision=bundle.precision,
        sqnr_db=left,
        promised_sqnr_db=bundle.promised_sqnr_db,
    )


def run_cases(bundle: Bundle, session: DeviceSession) -> tuple[Numerics, float | None]:
    """How far the golden outputs are off on a device, and what 8 bits leave of the float network's (dB).

    Raises:
        SchemaError: the model has other outputs than the manifest says.
        DeviceJobError: the runtime rejects or crashes on the model.
    """
    answers = [session.run(bundle.model, {bundle.input_name: case.input}) for case in bundle.cases]
    for answer in answers:
        if bundle.output_name not in answer:
            raise SchemaError(
                f"the model of {bundle.folder} has outputs {', '.join(sorted(answer))}, the manifest says "
                f"{bundle.output_name!r}: deploy it again"
            )
    pairs = [(case.output, answer[bundle.output_name]) for case, answer in zip(bundle.cases, answers, strict=True)]
    numerics = compare(pairs, bundle.relative_tolerance, bundle.absolute_tolerance)
    return numerics, _left([case.reference for case in bundle.cases], [got for _, got in pairs])


def _left(references: list[np.ndarray | None], answers: list[np.ndarray]) -> float | None:
    """What 8 bits leave of the float network's outputs, in dB over all cases; None for a float network."""
    known = [reference for reference in references if reference is not None]
    if len(known) < len(answers) or any(a.shape != b.shape for a, b in zip(known, answers, strict=True)):
        return -200.0 if known else None
    return sqnr_db(np.stack(known), np.stack(answers))


def _reference(bundle: Bundle, device: Device, found: Fingerprint) -> tuple[float, float, float, list[str]]:
    """(reference_ms, noise floor, that of raw medians, notes): of the device's own check, else of the bundle
    where it is the same device."""
    remedy = f"run `hwsearch device check {device.name}` first"
    if (device.table_folder / FILE).exists():
        check = DeviceCheck.load(device.table_folder)
        changed = check.fingerprint.differences(found)
        notes = [f"the device has changed since its check ({'; '.join(changed)}): check it again"] if changed else []
        return check.reference_ms, check.noise_floor, max(check.noise_floor, check.raw_noise_floor), notes
    if bundle.reference_ms is None or bundle.noise_floor is None or bundle.fingerprint is None:
        raise InputError(f"device {device.name} has not been checked, so there is no reference speed: {remedy}")
    changed = Fingerprint.from_dict(bundle.fingerprint).differences(found)
    if changed:
        raise InputError(f"this is not the device that the bundle was made on ({'; '.join(changed)}): {remedy}")
    notes = ["reference speed and noise floor are the bundle's own"]
    return bundle.reference_ms, bundle.noise_floor, bundle.noise_floor, notes
