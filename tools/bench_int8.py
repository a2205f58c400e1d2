#!/usr/bin/env python
"""Measures what 8 bits cost: accuracy in float32 and in 8 bits, with and without the quantisation-friendly block.

    python tools/bench_int8.py train   --output build/int8.csv --seconds 600
    python tools/bench_int8.py report  --output build/int8.csv
    python tools/bench_int8.py measure --output build/int8.csv --device x86-ort-1t          on a quiet machine

A RepVGG-like host on Fashion-MNIST: ``repvgg`` and ``searched`` (RepNAS over the ODBB space, two branches a layer on
average), each with batch norms on every branch and with one behind the sum (``-friendly``: QARepVGG). Each is trained
for the same steps, folded, and quantised for this CPU as ``deploy`` does it: calibrations compared on held-out training
images. Columns: test accuracy in float32; in 8 bits with a scale a channel; with one scale for all weights of a layer;
and with as many of the worst layers in float32 as half a point of held-out accuracy takes. The test set is looked at
once, at the end. Every finished network is a line of the output file and its ONNX files lie beside it, so a run that
was stopped goes on. ``measure`` takes the timing lock.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ending import leave

from hwsearch.deploy.int8 import judge_of
from hwsearch.deploy.quantise import Int8Settings, Quantised, quantise, scheme_for
from hwsearch.device.check import DeviceCheck
from hwsearch.device.lock import background_lock
from hwsearch.device.runtime_onnxruntime import probe
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import CheckFailedError, InputError
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.latency.measure import measure_many
from hwsearch.models.repvgg import repvgg_small
from hwsearch.reparam.fold import fold
from hwsearch.search.repnas import BranchBudget, RepNAS, RepNASConfig
from hwsearch.train.data import Examples
from hwsearch.train.loop import TrainConfig, train
from hwsearch.train.task import Classification, load_task

NETWORKS = ("repvgg", "repvgg-friendly", "searched", "searched-friendly")
WIDTHS = (12, 16, 32, 64)
KEPT = 0.34
TOLERANCE = 0.005


@dataclass(frozen=True)
class Line:
    """One network: test accuracies, decibels of the output, calibration, layers that the tolerance keeps in float32."""

    network: str
    seed: int
    steps: int
    float32: float
    int8: float
    one_scale: float
    kept: float
    sqnr_db: float
    one_scale_db: float
    method: str
    layers_kept: str
    worst: str


def trained(network: str, seed: int, steps: int, task: Classification, folder: Path) -> torch.nn.Module:
    """Train one network, or go on with it."""
    torch.manual_seed(seed)
    searched, friendly = network.startswith("searched"), network.endswith("-friendly")
    model = repvgg_small(branches="odbb" if searched else "repvgg", widths=WIDTHS, post_norm=friendly)
    settings = TrainConfig(steps=steps, batch_size=64, learning_rate=0.1, seed=seed, threads=1, checkpoint_s=10)
    if searched:
        config = RepNASConfig(BranchBudget(limit=KEPT), training=settings)
        RepNAS(model, config).search(task, None, folder=folder)
    else:
        train(model, task, settings, folder=folder)
    return model.eval()


def one(network: str, seed: int, steps: int, task: Classification, test: Examples, folder: Path) -> Line:
    """Train, fold and quantise one network; its files lie in the folder."""
    model = trained(network, seed, steps, task, folder)
    with background_lock():
        example = task.valid.take(np.arange(1))[0]
        onnx = export_onnx(fold(model, example, minimal=False), example)
        valid = np.asarray(task.valid.take(np.arange(len(task.valid)))[0].float().numpy())
        settings, scheme = Int8Settings(tolerance=TOLERANCE), scheme_for(probe(Device("here", "onnxruntime")).isa)
        count = settings.images
        judge = judge_of(task, np.arange(count, len(valid)))

        def eight(**changes: object) -> Quantised:
            return quantise(
                onnx, valid[:count], valid[count : count + 64],
                settings=replace(settings, **{k: v for k, v in changes.items() if k == "keep_fp32"}),  # type: ignore[arg-type]
                scheme=replace(scheme, **{k: v for k, v in changes.items() if k == "per_channel"}),  # type: ignore[arg-type]
                judge=judge,
            )  # fmt: skip

        plain, single = eight(), eight(per_channel=False)
        try:
            held = eight(keep_fp32="auto")
            kept, names = held.onnx, held.kept
        except CheckFailedError:
            kept, names = onnx, tuple(layer.name for layer in plain.layers)
        on_test = judge_of(task, np.arange(len(test)), examples=test)
        for name, content in (("float32", onnx), ("int8", plain.onnx), ("kept", kept)):
            (folder / f"{name}.onnx").write_bytes(content)
        worst = min(plain.alone_db, key=lambda name: plain.alone_db[name])
        return Line(
            network, seed, steps, on_test(onnx), on_test(plain.onnx), on_test(single.onnx), on_test(kept),
            plain.sqnr_db, single.sqnr_db, plain.method, " ".join(names), worst,
        )  # fmt: skip


def read(path: Path) -> list[Line]:
    """The lines so far; a torn last one is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("worst") is not None]
    numbers = {name: float for name in ("float32", "int8", "one_scale", "kept", "sqnr_db", "one_scale_db")}
    kinds = {"seed": int, "steps": int, **numbers}
    return [Line(**{name: kinds.get(name, str)(value) for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]


def append(path: Path, line: Line) -> None:
    """Add one line, with a header where the file is new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(line)), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(asdict(line))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable path") from error


def folder_of(arguments: argparse.Namespace, network: str, seed: int, steps: int) -> Path:
    """Where a network's checkpoint and files lie."""
    folder = Path(arguments.output).with_suffix("") / f"{network}-{seed}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_train(arguments: argparse.Namespace) -> None:
    """Seed by seed, so that what is finished is always paired."""
    end = time.monotonic() + arguments.seconds
    with background_lock():
        task, test = load_task(arguments.data, valid=2000, limit_to=arguments.images + 2000, seed=0)
    done = {(line.network, line.seed, line.steps) for line in read(arguments.output)}
    for seed in range(arguments.seeds):
        for network in NETWORKS:
            if (network, seed, arguments.steps) in done:
                continue
            if time.monotonic() > end:
                return
            folder = folder_of(arguments, network, seed, arguments.steps)
            line = one(network, seed, arguments.steps, task, test, folder)
            append(arguments.output, line)
            print(
                f"{network} seed {seed}: {line.float32:.2%} float32, {line.int8:.2%} int8", file=sys.stderr, flush=True
            )


def report(lines: Sequence[Line]) -> str:
    """A table of means over the seeds, and of what 8 bits lose (paired)."""
    rows = [
        "| network | n | float32 | int8 loses, points | with one scale | worst in float32 | layers kept | dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        mine = [line for line in lines if line.network == network]
        if not mine:
            continue
        cells = [f"{100 * statistics.mean(line.float32 for line in mine):.2f} %"]
        for column in ("int8", "one_scale", "kept"):
            lost = [100 * (line.float32 - getattr(line, column)) for line in mine]
            error = statistics.stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else float("nan")
            cells.append(f"{statistics.mean(lost):+.2f} ± {error:.2f}")
        cells.append(f"{statistics.mean(len(line.layers_kept.split()) for line in mine):.1f}")
        cells.append(f"{statistics.mean(line.sqnr_db for line in mine):.1f}")
        rows.append(f"| {network} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def run_measure(arguments: argparse.Namespace, lines: Sequence[Line]) -> None:
    """Milliseconds of the first seed's networks, all in turn."""
    first = min((line.seed for line in lines), default=0)
    files = [
        (f"{line.network} {name}", folder_of(arguments, line.network, line.seed, line.steps) / f"{name}.onnx")
        for line in lines
        if line.seed == first
        for name in ("float32", "int8", "kept")
    ]
    if not files:
        raise InputError(f"{arguments.output} has no line: run the part train first")
    with open_session(Device.load(arguments.device)) as session:
        check = None if session.device.simulated else DeviceCheck.load(session.device.table_folder)
        found = measure_many(
            [(name, path.read_bytes()) for name, path in files], session,
            reference_ms=check.reference_ms if check else None,
        )  # fmt: skip
    base = {
        name.rpartition(" ")[0]: m.measured_ms for (name, _), m in zip(files, found, strict=True) if "float" in name
    }
    for (name, _), timing in zip(files, found, strict=True):
        ratio = timing.measured_ms / base[name.rpartition(" ")[0]]
        print(f"{name}: {timing.measured_ms:.4g} ms ±{timing.spread:.1%} ({timing.verdict}), {ratio:.2f} of float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "report", "measure"])
    parser.add_argument("--output", type=Path, default=Path("build/int8.csv"))
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--device", default="x86-ort-1t", help="measure: the device")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "train":
        run_train(arguments)
        return 0
    lines = read(arguments.output)
    if arguments.part == "report":
        print(report(lines))
    else:
        run_measure(arguments, lines)
    return 0


if __name__ == "__main__":
    leave(main)
