#!/usr/bin/env python
"""How well a new device is predicted from few samples and other devices' tables, on public latency data.

    python tools/bench_transfer.py help     --data FOLDER --output build/help.csv       # NAS-Bench-201, six devices
    python tools/bench_transfer.py neusight --data FOLDER --output build/neusight.csv   # 3x3 convolutions on a T4
    python tools/bench_transfer.py networks --output build/networks.csv                 # simulated devices
    python tools/bench_transfer.py report   --output build/help.csv [--json]

FOLDER (or $HWSEARCH_DATA) holds ``help/nasbench201_latency_ms.csv`` and ``neusight/conv_*.csv``. Every finished repeat
is a line of the output file, so a run that was stopped goes on; ``--seconds`` stops it in time.

``help`` follows HELP (Lee et al., NeurIPS 2021): nine source devices, of which the first 900 architectures are known;
six new ones, evaluated on architectures 900 to 1899 without the slowest and the fastest tenth. k = 10 samples come from
the first 900: at random without the new device's slowest and fastest tenth, as there (``random``), or chosen from what
the sources know, without a look at the new device (``chosen``).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ending import leave

from hwsearch.errors import InputError
from hwsearch.latency.gpu_convolutions import GpuConvolutions, GpuSpec, other_devices
from hwsearch.latency.transfer_architectures import ArchitectureTransfer

SOURCES = (
    "1080ti_1", "1080ti_32", "1080ti_256", "silver_4114", "silver_4210r", "samsung_a50", "pixel3", "essential_ph_1",
    "samsung_s7",
)  # fmt: skip
TARGETS = ("titan_rtx_256", "gold_6226", "fpga", "pixel2", "raspi4", "eyeriss")
KNOWN, QUERIES, SAMPLES = 900, 1000, 10
HELD_OUT = 1000
GPUS = {
    "T4": ("conv_Tesla_T4.csv", "Tesla_T4.json"),
    "V100": ("conv_Tesla_V100-PCIE-32GB.csv", "Tesla_V100-PCIE-32GB.json"),
    "P4": ("conv_Tesla_P4.csv", "Tesla_P4.json"),
    "P100": ("conv_Tesla_P100-PCIE-16GB.csv", "Tesla_P100-PCIE-16GB.json"),
    "A100": ("conv_NVIDIA_A100_80GB_PCIe.csv", "NVIDIA_A100-PCIE-40GB.json"),
}
HEADER = ("bench", "case", "repeat", "metric", "value")
_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")

Metrics = dict[str, float]


# ---------------------------------------------------------------- NAS-Bench-201 as numbers


def cell_features(architectures: Sequence[str]) -> list[np.ndarray]:
    """Features of NAS-Bench-201 cells, by group: counts, counts of what is reached, kinds by place, the same reached.

    An edge is reached when it lies on a path from the cell's input to its output; some runtimes drop the others.
    """
    rows = [_cell(text) for text in architectures]
    return [np.array([row[group] for row in rows], dtype=np.float64) for group in range(4)]


def _cell(text: str) -> tuple[list[float], list[float], list[float], list[float]]:
    names = re.findall(r"([a-z0-9_]+)~\d", text)
    if len(names) != len(_EDGES) or not set(names) <= set(_OPERATIONS):
        raise InputError(f"{text!r} is no cell of NAS-Bench-201; restore the file")
    kinds = [_OPERATIONS.index(name) for name in names]
    forth, back = {0}, {3}
    for (start, end), kind in zip(_EDGES, kinds, strict=True):
        if kind and start in forth:
            forth.add(end)
    for (start, end), kind in reversed(list(zip(_EDGES, kinds, strict=True))):
        if kind and end in back:
            back.add(start)
    live = [k if k and s in forth and e in back else 0 for (s, e), k in zip(_EDGES, kinds, strict=True)]
    ends = [end for (_, end), kind in zip(_EDGES, live, strict=True) if kind]
    additions = sum(max(ends.count(node) - 1, 0) for node in (1, 2, 3))
    reached = [float(live.count(kind)) for kind in (1, 2, 3, 4)]
    deep = [_depth(live, weight) for weight in ((0, 0, 1, 1, 1), (0, 0, 1, 1, 0), (0, 0, 1, 9, 0))]
    places = [float(k == kind) for k in kinds for kind in (1, 2, 3, 4)]
    live_places = [float(k == kind) for k in live for kind in (1, 2, 3, 4)]
    return (
        [float(kinds.count(kind)) for kind in (1, 2, 3, 4)],
        [*reached, float(additions), *deep, float(any(live))],
        places,
        live_places,
    )


def _depth(live: Sequence[int], weight: Sequence[int]) -> float:
    """The longest path through the cell when each operation counts ``weight``."""
    far = [0.0, -np.inf, -np.inf, -np.inf]
    for (start, end), kind in zip(_EDGES, live, strict=True):
        if kind:
            far[end] = max(far[end], far[start] + weight[kind])
    return max(far[3], 0.0)


def read_help(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Architectures and the latencies of every device, in milliseconds."""
    with _open(folder / "help" / "nasbench201_latency_ms.csv") as file:
        rows = list(csv.DictReader(file))
    devices = [name for name in rows[0] if name not in ("idx", "arch")]
    return [row["arch"] for row in rows], {d: np.array([float(row[d]) for row in rows]) for d in devices}


def middle(index: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Without the slowest and the fastest tenth, as HELP's loader does it."""
    order = index[np.argsort(ms[index], kind="stable")]
    return order[int(len(order) * 0.1) : int(len(order) * 0.9)]


def bench_help(folder: Path, repeats: int) -> Iterator[tuple[str, int, Callable[[], Metrics]]]:
    """(case, repeat, what measures it): Spearman, share within 10 %, interval coverage on one new device."""
    from scipy.stats import spearmanr

    architectures, latencies = read_help(folder)
    groups = cell_features(architectures)
    source_ms = np.full((len(SOURCES), len(architectures)), np.nan)
    for row, name in enumerate(SOURCES):
        source_ms[row, :KNOWN] = latencies[name][:KNOWN]
    space = ArchitectureTransfer.learn(groups, source_ms)
    candidates = space.common[space.common < KNOWN]
    picks: dict[int, np.ndarray] = {}

    def one(device: str, how: str, repeat: int) -> Metrics:
        ms = latencies[device]
        if how == "random":
            pool = middle(np.arange(KNOWN), ms)
            picked = np.random.default_rng([repeat, TARGETS.index(device)]).permutation(pool)[:SAMPLES]
        else:
            if repeat not in picks:
                picks[repeat] = space.choose(SAMPLES, candidates=candidates, seed=repeat)
            picked = picks[repeat]
        fitted = space.fit(picked, ms[picked])
        found: Metrics = {}
        everything = np.setdiff1d(np.arange(len(ms)), np.arange(KNOWN))
        for name, queries in (("", np.arange(KNOWN, KNOWN + QUERIES)), ("all_", everything)):
            rows = middle(queries, ms)
            predicted = fitted.predict(rows)
            found[f"{name}spearman"] = float(spearmanr(predicted.ms, ms[rows])[0])
            found[f"{name}within_10"] = float(np.mean(np.abs(predicted.ms / ms[rows] - 1) <= 0.1))
            inside = (predicted.low_ms <= ms[rows]) & (ms[rows] <= predicted.high_ms)
            found[f"{name}covered_90"] = float(np.mean(inside))
        return found

    for repeat in range(repeats):
        for how in ("random", "chosen"):
            for device in TARGETS:
                yield f"{how}/{device}", repeat, partial(one, device, how, repeat)


# ---------------------------------------------------------------- convolutions on GPUs


def read_gpu(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, GpuSpec]:
    """Shapes (N, 4), milliseconds (N,), place in the campaign (N,) from 0 to 1, data sheet."""
    table, sheet = GPUS[name]
    with _open(folder / "neusight" / table) as file:
        rows = list(csv.DictReader(file))
    columns = ("B", "Input_Channel", "Output_Channel", "Input_Size")
    shapes = np.array([[int(float(row[c])) for c in columns] for row in rows], dtype=np.int64)
    ms = np.array([float(row["Latency"]) for row in rows])
    with _open(folder / "neusight" / "device_configs" / sheet) as file:
        facts = json.load(file)
    gpu = GpuSpec(facts["SingleFLOPs"] * 1e9, facts["Mem_Bw"] * 1e9, int(facts["Num_Sm"]), facts["L2Cache"] * 2**20)
    return shapes, ms, np.arange(len(ms)) / max(len(ms) - 1, 1), gpu


def bench_neusight(folder: Path, repeats: int) -> Iterator[tuple[str, int, Callable[[], Metrics]]]:
    """(case, repeat, what measures it) on the T4: with and without the campaign's drift, with and without other GPUs.

    ``shape only`` sees nothing but the convolution. ``drift`` also knows when in the campaign a reading was made, and
    is asked for the reading (``within_10``) and, with the found drift taken out of the held-out readings, for the
    kernel alone (``kernel_within_10``). ``others`` has the four other GPUs' times of the same convolutions as well.
    """
    shapes, ms, position, gpu = read_gpu(folder, "T4")
    memory: list[np.ndarray] = []

    def others() -> np.ndarray:
        if not memory:
            tables = {}
            for name in GPUS:
                if name != "T4":
                    own_shapes, own_ms, _, own_gpu = read_gpu(folder, name)
                    tables[name] = (own_shapes, own_ms, own_gpu)
            memory.append(other_devices(shapes, tables))
        return memory[0]

    def one(samples: int | None, drift: bool, further: bool, repeat: int) -> Metrics:
        order = np.random.default_rng(repeat).permutation(len(ms))
        held, rest = order[:HELD_OUT], order[HELD_OUT:][:samples]
        extra = others() if further else None
        fitted = GpuConvolutions.fit(
            shapes[rest], ms[rest], gpu, position=position[rest] if drift else None,
            others=None if extra is None else extra[rest], seed=repeat,
        )  # fmt: skip
        given = None if extra is None else extra[held]
        predicted = fitted.predict(shapes[held], position=position[held] if drift else None, others=given)
        found = _errors("", predicted, ms[held])
        if drift:
            kernel = fitted.predict(shapes[held], others=given)
            found |= _errors("kernel_", kernel, np.maximum(ms[held] - fitted.drift.ms(position[held]), 0.1 * ms[held]))
            found |= {"drift_ms": fitted.drift.slope_ms}
        return found

    alone = [("shape only", None, False, False), ("drift", None, True, False)]
    helped = [("drift, others", None, True, True), ("others", None, False, True)]
    few = [
        (f"drift{', others' if further else ''}, n={count}", count, True, further)
        for count in (100, 300, 1000)
        for further in (False, True)
    ]
    for cases in (alone, helped, few):
        for repeat in range(repeats):
            for case, samples, drift, further in cases:
                yield case, repeat, partial(one, samples, drift, further, repeat)


def _errors(name: str, predicted: np.ndarray, measured: np.ndarray) -> Metrics:
    off = np.abs(predicted / measured - 1)
    return {
        f"{name}within_10": float(np.mean(off <= 0.1)),
        f"{name}within_5": float(np.mean(off <= 0.05)),
        f"{name}mape": float(np.mean(off)),
    }


# ---------------------------------------------------------------- whole networks, two simulated devices


def bench_networks(repeats: int) -> Iterator[tuple[str, int, Callable[[], Metrics]]]:
    """(case, repeat, what measures it): a simulated device from k networks, with and without another's help."""
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.profile import current_check, profile
    from hwsearch.latency.sample import SamplingPlan
    from hwsearch.latency.transfer import choose_networks, lower_plan, time_networks, transfer

    with tempfile.TemporaryDirectory() as folder:
        known = Device(name="known", runtime="simulated", home=Path(folder))
        new = Device(name="new", runtime="simulated", home=Path(folder), options={
            "block": 16, "gmacs": 60.0, "gbytes": 8.0, "node_us": 4.0, "overhead_us": 30.0, "seed": 3,
        })  # fmt: skip
        with open_session(known) as session:
            source = LatencyPredictor().fit(profile(known, minutes=60, networks=240, session=session))
        with open_session(new) as session:
            lowered = lower_plan(session, SamplingPlan(seed=5), 300)
            check = current_check(new, session, lambda text: None)
            networks = [network for network, _ in lowered]
            truth = time_networks(session, networks, reference_ms=check.reference_ms, noise_floor=check.noise_floor)
    timed = {n.id: n for n in truth.networks}
    order = np.random.default_rng(0).permutation(len(lowered))
    held, pool = [lowered[i] for i in order[:100]], [lowered[i] for i in order[100:]]

    def one(how: str, chosen: bool, count: int, repeat: int) -> Metrics:
        if chosen:
            picked = choose_networks([source], [kernels for _, kernels in pool], count, seed=repeat)
        else:
            picked = np.random.default_rng(repeat).permutation(len(pool))[:count]
        table = truth.with_networks([timed[pool[i][0].id] for i in picked])
        if how == "transfer":
            rest = [pool[i][1] for i in sorted(set(range(len(pool))) - set(picked.tolist()))]
            predictor = transfer([source], table, untimed=rest, seed=repeat)
        else:
            predictor = LatencyPredictor(seed=repeat).fit(table)
        found = [predictor.network(kernels) for _, kernels in held]
        measured = np.array([timed[network.id].measured_ms for network, _ in held])
        inside = [e.low_ms <= ms <= e.high_ms for e, ms in zip(found, measured, strict=True)]
        return _errors("", np.array([e.ms for e in found]), measured) | {"covered_90": float(np.mean(inside))}

    for repeat in range(repeats):
        for count in (4, 8, 16, 32):
            for chosen in (True, False):
                for how in ("transfer", "scratch"):
                    case = f"{how}, {'chosen' if chosen else 'random'}, k={count:02d}"
                    yield case, repeat, partial(one, how, chosen, count, repeat)


# ---------------------------------------------------------------- rows, report


def _open(path: Path):  # type: ignore[no-untyped-def]
    try:
        return path.open(newline="", encoding="utf-8")
    except OSError as error:
        reason = error.strerror
        raise InputError(f"cannot read {path} ({reason}); name the data folder: --data or $HWSEARCH_DATA") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """What was measured so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != HEADER:
            raise InputError(f"{path} is no file of this tool (its columns are not {','.join(HEADER)}); choose another")
        return list(reader)


def measure(bench: str, jobs: Iterator[tuple[str, int, Callable[[], Metrics]]], path: Path, seconds: float) -> bool:
    """Work off what is missing, a line a metric as soon as a job is done; False when the time was up first."""
    done = {(row["bench"], row["case"], row["repeat"]) for row in read_rows(path)}
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(HEADER)
        for case, repeat, job in jobs:
            if (bench, case, str(repeat)) in done:
                continue
            if time.monotonic() - start > seconds:
                return False
            writer.writerows([bench, case, repeat, name, f"{value:.6g}"] for name, value in job().items())
            file.flush()
    return True


def summary(rows: Sequence[dict[str, str]]) -> list[dict[str, object]]:
    """Mean and standard deviation over repeats of each case and metric; HELP's devices averaged first."""
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        cases = [row["case"]]
        if row["bench"] == "help":
            cases.append(row["case"].split("/")[0] + "/mean")
        for case in cases:
            own = values.setdefault((row["bench"], case, row["metric"]), {})
            own.setdefault(row["repeat"], []).append(float(row["value"]))
    found = []
    for (bench, case, metric), repeats in sorted(values.items()):
        each = np.array([np.mean(own) for own in repeats.values()])
        spread = float(each.std(ddof=1)) if len(each) > 1 else 0.0
        mean = float(each.mean())
        found.append({"bench": bench, "case": case, "metric": metric, "n": len(each), "mean": mean, "sd": spread})
    return found


def table(found: Sequence[dict[str, object]]) -> str:
    """The summary as Markdown: a line a case, a column a metric."""
    metrics = list(dict.fromkeys(str(row["metric"]) for row in found))
    lines = ["| case | n | " + " | ".join(metrics) + " |", "|---|---|" + "---|" * len(metrics)]
    for case in dict.fromkeys(str(row["case"]) for row in found):
        own = {str(row["metric"]): row for row in found if row["case"] == case}
        cells = [f"{own[m]['mean']:.4f} ± {own[m]['sd']:.4f}" if m in own else "" for m in metrics]
        lines.append(f"| {case} | {next(iter(own.values()))['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("help", "neusight", "networks", "report"))
    parser.add_argument("--data", type=Path, default=os.environ.get("HWSEARCH_DATA"), help="folder of the public data")
    parser.add_argument("--output", type=Path, required=True, help="CSV file that repeats are appended to")
    parser.add_argument("--repeats", type=int, help="30 for help, 5 for neusight, 3 for networks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further repeat after this long")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    if options.bench in ("help", "neusight") and options.data is None:
        raise InputError("the data folder is not given; use --data or $HWSEARCH_DATA")
    finished = True
    if options.bench == "help":
        finished = measure("help", bench_help(options.data, options.repeats or 30), options.output, options.seconds)
    elif options.bench == "neusight":
        jobs = bench_neusight(options.data, options.repeats or 5)
        finished = measure("neusight", jobs, options.output, options.seconds)
    elif options.bench == "networks":
        finished = measure("networks", bench_networks(options.repeats or 3), options.output, options.seconds)
    found = summary(read_rows(options.output))
    print(json.dumps(found, indent=1) if options.json else table(found))
    if not finished:
        print("the time was up: run the same command again to go on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    leave(main)
