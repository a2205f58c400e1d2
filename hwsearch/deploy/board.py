"""Verify a bundle on a board: standard library, numpy and the runtime that it was made for are enough.

    python -m hwsearch.deploy.board BUNDLE                 outputs and milliseconds, one JSON object; exit 1 when broken
    python -m hwsearch.deploy.board BUNDLE --no-timing     outputs alone

On the machine that the bundle was made on milliseconds are at its reference speed, as ``hwsearch verify`` tells them.
On any other one there is none: they are those of the moment, and the verdict says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hwsearch.deploy.reader import Bundle, read_bundle
from hwsearch.deploy.verdict import Verdict, judge
from hwsearch.deploy.verify import run_cases
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import HwsearchError
from hwsearch.latency.measure import measure

_RAW = "this is not the machine that the bundle was made on: its milliseconds are those of the moment"


def verify_here(bundle: Bundle, *, threads: int | None = None, timing: bool = True) -> Verdict:
    """Judge a bundle on this machine by the runtime that it was made for, without a device's file.

    Args:
        threads: of one inference; those that the bundle was made for by default.
        timing: measure milliseconds too.
    Raises:
        DeviceJobError, NoisyDeviceError, SchemaError: as ``verify``.
    """
    made = None if bundle.fingerprint is None else Fingerprint.from_dict(bundle.fingerprint)
    device = Device(
        name=bundle.device,
        runtime="onnxruntime" if made is None or made.runtime == "simulated" else made.runtime,
        threads=threads or (1 if made is None else made.threads),
        precision=bundle.precision,
        home=Path.cwd(),
    )
    with open_session(device, canary=bundle.canary or b"") as session:
        numerics, left = run_cases(bundle, session)
        notes, found, floor = [], None, bundle.noise_floor or 0.0
        if timing:
            reference = bundle.reference_ms if made is not None and _same(made, session) else None
            if reference is None:
                notes.append(_RAW)
            found = measure(bundle.model, session, reference_ms=reference, name=bundle.name, allow_unfolded=True)
        else:
            notes.append("milliseconds were not measured")
    measured, raw = (None, None) if found is None else (found.measured_ms, found.raw_p50_ms)
    status, reasons = judge(
        numerics, bundle.budget_ms, measured, raw, floor, sqnr=left, promised_sqnr=bundle.promised_sqnr_db
    )
    return Verdict(
        status=status, reasons=reasons, notes=tuple(notes), name=bundle.name, device=bundle.device, numerics=numerics,
        budget_ms=bundle.budget_ms, predicted_ms=bundle.predicted_ms, measured_ms=measured, raw_p50_ms=raw,
        raw_p90_ms=None if found is None else found.raw_p90_ms, spread=None if found is None else found.spread,
        rounds=None if found is None else found.rounds, noise_floor=bundle.noise_floor, precision=bundle.precision,
        sqnr_db=left, promised_sqnr_db=bundle.promised_sqnr_db,
    )  # fmt: skip


def _same(made: Fingerprint, session: DeviceSession) -> bool:
    """Whether this is the machine, whatever precision its device had."""
    return all(text.startswith("precision:") for text in made.differences(session.fingerprint))


def main() -> int:
    """Entry point; the exit status is the verdict's."""
    parser = argparse.ArgumentParser(prog="hwsearch.deploy.board", description="Verify a bundle on this machine.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, help="threads of one inference; by default the bundle's")
    parser.add_argument("--no-timing", action="store_true", help="compare outputs only")
    arguments = parser.parse_args()
    try:
        verdict = verify_here(read_bundle(arguments.bundle), threads=arguments.threads, timing=not arguments.no_timing)
    except HwsearchError as error:
        sys.stderr.write(f"hwsearch: error: {' '.join(str(error).split())}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(verdict.to_dict(), sort_keys=True) + "\n")
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
