#!/usr/bin/env python
"""Measures what the latency predictor is worth on this device, on whole networks of families that were never profiled.

    python tools/bench_latency.py campaign --device NAME --minutes 6     # from nothing to fitted, and how long it took
    python tools/unseen_networks.py --output build/unseen                # the fixed list of unseen networks
    python tools/bench_latency.py measure  --device NAME --networks build/unseen --pass 1
    python tools/bench_latency.py measure  --device NAME --networks build/unseen --pass 2     # half an hour later
    python tools/bench_latency.py report   --device NAME --networks build/unseen [--json]

Every finished measurement is a line of a CSV file in the device's table folder, so a step that was killed goes on.
Nothing else may run on the machine meanwhile. ``report`` only reads: nothing is calibrated on the unseen networks.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ending import leave

from hwsearch.console import Console
from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import MEASURE
from hwsearch.errors import InputError, NoisyDeviceError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.card import RIVAL_NAMES, ErrorRow
from hwsearch.latency.measure import measure_many
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import profile
from hwsearch.latency.rivals import rival_predictions
from hwsearch.latency.table import LatencyTable, NetworkSample
from hwsearch.latency.training import Rows
from hwsearch.preparation import PREDICTOR, fit_table

MEASURED, CAMPAIGN = "bench_unseen.csv", "bench_campaign.json"
HEADER = ("pass", "family", "name", "measured_ms", "raw_p50_ms", "raw_p90_ms", "spread", "verdict", "unix_s")
#: Networks timed together, interleaved: unlike ones, since they are dealt out in turn.
GROUP = 6


@dataclass(frozen=True)
class Unseen:
    """One network of the list; ``beyond`` marks families outside of what the predictor is for."""

    family: str
    name: str
    path: Path
    beyond: bool


def unseen_networks(folder: Path) -> list[Unseen]:
    """The networks that ``tools/unseen_networks.py`` wrote."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no manifest.json; run tools/unseen_networks.py --output {folder}") from None
    return [
        Unseen(str(e["family"]), str(e["name"]), folder / str(e["file"]), bool(e["beyond_cnn_kernels"]))
        for e in manifest["networks"]
    ]


def run_campaign(device: Device, minutes: float, console: Console) -> None:
    """Device check, campaign and fit, each from nothing; the minutes they took go to a file."""
    start = time.monotonic()
    with open_session(device, message=console.say) as session:
        check = check_device(device, session=session, message=console.say)
        checked = time.monotonic()
        if not check.ok:
            raise NoisyDeviceError(f"{device.name} is too noisy now ({'; '.join(check.messages)}); try again later")
        with console.bar("profile") as bar:
            table = profile(
                device, minutes=minutes, session=session, progress=lambda n, spent, all_s, text: bar(spent, all_s, text)
            )
        profiled = time.monotonic()
    _, card = fit_table(device, table, console)
    fitted = time.monotonic()
    facts = {
        "check_minutes": (checked - start) / 60,
        "profile_minutes": (profiled - checked) / 60,
        "fit_minutes": (fitted - profiled) / 60,
        "minutes": (fitted - start) / 60,
        "networks": len(table.networks),
        "kernel_instances": table.kernel_count,
        "device_check_noise_floor": check.noise_floor,
        "noise_floor": table.noise_floor,
    }
    (device.table_folder / CAMPAIGN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.show(card.to_markdown())
    console.show(json.dumps(facts))


def run_measure(device: Device, networks: Sequence[Unseen], number: int, console: Console) -> None:
    """One reading of each network, appended as it is finished."""
    path = device.table_folder / MEASURED
    check = DeviceCheck.load(device.table_folder)
    done = {(row["pass"], row["name"]) for row in _measured(path)}
    left = [n for n in networks if (str(number), n.name) not in done]
    groups = [left[at :: -(-len(left) // GROUP)] for at in range(-(-len(left) // GROUP))] if left else []
    with open_session(device, message=console.say) as session, console.bar(f"pass {number}") as bar:
        for at, group in enumerate(groups):
            session.restart()
            found = measure_many(
                [(n.name, n.path.read_bytes()) for n in group],
                session,
                reference_ms=check.reference_ms,
                noise_floor=check.noise_floor,
                settings=replace(MEASURE, seed=1000 * number + at),
                allow_unfolded=True,
            )
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(HEADER)
                for n, m in zip(group, found, strict=True):
                    values = (m.measured_ms, m.raw_p50_ms, m.raw_p90_ms, m.spread)
                    writer.writerow(
                        [number, n.family, n.name, *(f"{v:.6g}" for v in values), m.verdict, int(time.time())]
                    )
            bar(at + 1, len(groups), f"{group[-1].name} {found[-1].measured_ms:.3g} ms")


def run_report(device: Device, networks: Sequence[Unseen], console: Console, as_json: bool) -> None:
    """Errors by family, rivals, intervals and test-retest, from what is on the disk."""
    table = LatencyTable.load(device.table_folder)
    predictor = LatencyPredictor.load(device.table_folder / PREDICTOR)
    rows = _measured(device.table_folder / MEASURED)
    readings: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda r: int(r["pass"])):
        readings.setdefault(row["name"], []).append(float(row["measured_ms"]))
    known = [n for n in networks if n.name in readings]
    if not known:
        raise InputError("nothing was measured yet; run `tools/bench_latency.py measure` first")
    measured = np.array([float(np.mean(readings[n.name])) for n in known])
    with open_session(device, message=console.say) as session:
        kernels = _lowered(session, known)
    estimates = [predictor.network(k) for k in kernels]
    predicted = np.array([e.ms for e in estimates])
    inside = np.array([e.low_ms <= m <= e.high_ms for e, m in zip(estimates, measured, strict=True)])
    width = float(np.median([(e.high_ms - e.low_ms) / 2 / e.ms for e in estimates]))
    core = np.array([not n.beyond for n in known])
    rivals = _rivals(table, known, kernels, measured)
    families = sorted({n.family for n in known if not n.beyond})
    by_family = {f: _errors(predicted, measured, inside, [n.family == f for n in known]) for f in families}
    facts = {
        "device": device.name,
        "fingerprint": table.fingerprint.to_dict(),
        "python": platform.python_version(),
        "campaign": _campaign(device),
        "networks": int(core.sum()),
        "families": len(families),
        "all": vars_of(_errors(predicted, measured, inside, core)),
        "macro_within_10": float(np.mean([r.within_10 for r in by_family.values()])),
        "macro_within_5": float(np.mean([r.within_5 for r in by_family.values()])),
        "macro_mape": float(np.mean([r.mape for r in by_family.values()])),
        "worst_family_within_10": min((r.within_10, f) for f, r in by_family.items()),
        "interval_covers": float(inside[core].mean()),
        "interval_half_width": width,
        "bias": float(np.median(np.log(predicted / measured)[core])),
        "coverage": float(np.mean([e.coverage for e in estimates])),
        "by_family": {f: vars_of(r) for f, r in by_family.items()},
        "beyond": vars_of(_errors(predicted, measured, inside, ~core)) if (~core).any() else None,
        "rivals": {name: vars_of(_errors(ms, measured, None, core)) for name, ms in rivals.items()},
        "retest": _retest(rows),
        "networks_in_full": [
            {"family": n.family, "name": n.name, "predicted_ms": p, "measured_ms": m, "error": p / m - 1}
            for n, p, m in zip(known, predicted.tolist(), measured.tolist(), strict=True)
        ],
    }
    if as_json:
        print(json.dumps(facts))
        return
    head = ["", "n", "MAPE", "within 5 %", "within 10 %", "Spearman", "in interval"]
    body = [_cells("all", _errors(predicted, measured, inside, core))]
    body += [_cells(f"rival: {RIVAL_NAMES[name]}", _errors(ms, measured, None, core)) for name, ms in rivals.items()]
    body += [_cells(f, r) for f, r in by_family.items()]
    if facts["beyond"]:
        body.append(_cells("beyond the scope (not counted)", _errors(predicted, measured, inside, ~core)))
    for line in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(line) + " |")
    for name in ("macro_within_10", "macro_within_5", "macro_mape", "worst_family_within_10", "interval_covers",
                 "interval_half_width", "bias", "coverage", "retest", "campaign"):  # fmt: skip
        print(f"{name}: {facts[name]}")


def _measured(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("unix_s")]


def _lowered(session: DeviceSession, networks: Sequence[Unseen]) -> list[tuple[Kernel, ...]]:
    return [session.lower([n.path.read_bytes()], [n.name])[0] for n in networks]


def _rivals(
    table: LatencyTable, networks: Sequence[Unseen], kernels: Sequence[tuple[Kernel, ...]], measured: np.ndarray
) -> dict[str, np.ndarray]:
    """The rivals fitted on the whole table, predicting the unseen networks, (N,) each."""
    asked = [
        # Their own times take no part: only networks of fold 0 are fitted on.
        NetworkSample(n.name, n.family, k, (ms / len(k),) * len(k), ms, ms, ms, 0.0, 1)
        for n, k, ms in zip(networks, kernels, measured.tolist(), strict=True)
    ]
    rows = Rows.of([*table.networks, *asked])
    fold = np.array([0] * len(table.networks) + [1] * len(asked))
    return {name: ms[fold == 1] for name, ms in rival_predictions(rows, fold, judged=(1,)).items()}


def _retest(rows: Sequence[Mapping[str, str]]) -> dict[str, float] | None:
    """Relative differences of the first two passes."""
    by_pass = {p: {r["name"]: r for r in rows if r["pass"] == p} for p in ("1", "2")}
    both = sorted(by_pass["1"].keys() & by_pass["2"].keys())
    if len(both) < 2:
        return None
    one, two = (np.array([float(by_pass[p][n]["measured_ms"]) for n in both]) for p in "12")
    raw = [np.array([float(by_pass[p][n]["raw_p50_ms"]) for n in both]) for p in "12"]
    apart = np.array([int(by_pass["2"][n]["unix_s"]) - int(by_pass["1"][n]["unix_s"]) for n in both])
    difference = np.abs(one - two) / ((one + two) / 2)
    raw_difference = np.abs(raw[0] - raw[1]) / ((raw[0] + raw[1]) / 2)
    return {
        "networks": len(both),
        "p95": float(np.percentile(difference, 95)),
        "median": float(np.median(difference)),
        "raw_p95": float(np.percentile(raw_difference, 95)),
        "minutes_apart": float(np.median(apart)) / 60,
    }


def _campaign(device: Device) -> object:
    path = device.table_folder / CAMPAIGN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _errors(
    predicted: np.ndarray, measured: np.ndarray, inside: np.ndarray | None, own: Sequence[bool] | np.ndarray
) -> ErrorRow:
    mask = np.asarray(own, dtype=bool)
    return ErrorRow.of(predicted[mask], measured[mask], None if inside is None else inside[mask])


def vars_of(row: ErrorRow) -> dict[str, object]:
    """A row as plain values."""
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _cells(name: str, row: ErrorRow) -> list[str]:
    inside = "" if row.coverage is None else f"{row.coverage:.0%}"
    shares = [f"{row.mape:.1%}", f"{row.within_5:.0%}", f"{row.within_10:.0%}"]
    return [name, str(row.count), *shares, f"{row.spearman:.4f}", inside]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("campaign", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t")
    parser.add_argument("--minutes", type=float, default=6.0, help="device time of the campaign")
    parser.add_argument("--networks", type=Path, default=Path("build/unseen"))
    parser.add_argument("--pass", dest="number", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    console = Console(json=asked.json)
    device = Device.load(asked.device)
    if asked.step == "campaign":
        run_campaign(device, asked.minutes, console)
    elif asked.step == "measure":
        run_measure(device, unseen_networks(asked.networks), asked.number, console)
    else:
        run_report(device, unseen_networks(asked.networks), console, asked.json)
    return 0


if __name__ == "__main__":
    leave(main)
