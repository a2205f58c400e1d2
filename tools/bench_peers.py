#!/usr/bin/env python
"""hwsearch beside the tools of the field: the same network, images, training steps, device and budget for each.

    pip install --no-deps torch-pruning==1.6.1                      # what is missing is left out, and said
    pip install optuna==5.0.0 nvidia-modelopt==0.47.0 torchprofile==0.0.4
    python tools/bench_peers.py run     --device x86-ort-1t --output build/peers.csv --seconds 600
    python tools/bench_peers.py measure --device x86-ort-1t --output build/peers.csv
    python tools/bench_peers.py report  --output build/peers.csv

Networks, images by seed and recipes are those of ``bench_search.py``. Every tool is told a network's *predicted*
milliseconds, and what it makes is measured afterwards.

* ``hwsearch, CafeNet`` (200 candidates) and ``Optuna`` (TPE over the same widths, each trial trained for a quarter of
  the steps, for as many image passes times MACs as the former's search took) end with widths that are trained from
  scratch.
* ``hwsearch, PaS``, ``Torch-Pruning`` (magnitude) and ``ModelOpt FastNAS`` start from one trained network and
  fine-tune: the first for half of one network's steps behind a search of as many, the others for all of one
  network's steps.
* ``uniform``: all widths scaled alike, the widest that keeps the budget, trained from scratch.

Every tool runs in a process of its own: CPU seconds and peak memory are of everything it did, the network it starts
from included. ``tools/peers`` has what a user writes for each, and the report counts its lines: for hwsearch that is a
whole run with data, trainings and verification, for the others the search alone. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_pas import METHODS as PAS
from bench_search import FINE_TUNING_RATE, cafenet, measure_rows
from ending import leave
from search_settings import HEADER, SETTINGS, Ready, Rows, Seed, alone, ready, training_cost
from torch import nn
from width_timing import text

from hwsearch.graph.widths import WidthChoice
from hwsearch.search.baselines import uniform
from hwsearch.search.winner import train_choice
from hwsearch.train.loop import evaluate, train

SHORT = 0.25  # of one network's steps: a trial of Optuna's
HERE = Path(__file__).resolve().parent
#: What stands in ``tools/peers`` for a method, and what it needs.
PEERS = {
    "hwsearch, CafeNet": ("with_hwsearch.toml", "hwsearch"),
    "hwsearch, PaS": ("with_hwsearch.toml", "hwsearch"),
    "Torch-Pruning": ("with_torch_pruning.py", "torch_pruning"),
    "Torch-Pruning, multiples of 8": ("with_torch_pruning.py", "torch_pruning"),
    "ModelOpt FastNAS": ("with_fastnas.py", "modelopt"),
    "Optuna": ("with_optuna.py", "optuna"),
}


def ours(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """CafeNet by its defaults."""
    cafenet(shared, rows, "ours", share)


def masks(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """PaS by its defaults."""
    PAS["PaS, ms"](shared, rows, "PaS, ms", share)


def scaled(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Uniform scaling, from scratch."""
    choice = uniform(shared.ready.space, shared.ready.budget(share)).candidate.choice
    key = ("search", shared.ready.name, method, share, shared.seed, text(choice.widths))
    alone(shared.ready, rows, key, choice, shared.seed)


def optuna(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Optuna, for the cost of CafeNet's search."""
    peer = importlib.import_module("peers.with_optuna")
    ready_, seed = shared.ready, shared.seed
    task, _ = ready_.task(seed)
    full = ready_.training(seed)
    short = replace(full, steps=max(round(full.total_steps(len(task.train)) * SHORT), 1))
    allowed, spent = searched_gmacs(rows, ready_, share, seed), 0.0

    def loss(widths: list[int]) -> float:
        nonlocal spent
        choice = WidthChoice(tuple(widths))
        spent += training_cost(ready_, short, len(task.train), ready_.space.macs(choice))
        return train_choice(ready_.model, ready_.space, choice, task, short)[1].loss

    found = peer.search(
        {group.name: group.widths for group in ready_.space.groups},
        lambda widths: float(ready_.latency.evaluate([widths])[0]),
        share * ready_.full_ms, loss, lambda: spent >= allowed, seed,
    )  # fmt: skip
    key = ("search", ready_.name, method, share, seed, text(found))
    alone(ready_, rows, key, WidthChoice(tuple(found)), seed, extra=spent)


def searched_gmacs(rows: Rows, ready_: Ready, share: float, seed: int) -> float:
    """What CafeNet's search cost beyond the training of its winner."""
    note = rows.find("search", ready_.name, "hwsearch, CafeNet", share, seed)["note"]
    parts = [part.rsplit(" ", 1) for part in note.split(";")[0].split(", ")]
    return sum(float(value) for name, value in parts if name != "winner")


def pruned(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Torch-Pruning or FastNAS on the trained network, fine-tuned for the steps of one network."""
    ready_, seed = shared.ready, shared.seed
    task, test = ready_.task(seed)
    network, cost = shared.pretrained()
    fine = ready_.one_channel()
    example = torch.zeros(1, 1, ready_.setting.side, ready_.setting.side)

    def widths_of(model: nn.Module) -> tuple[int, ...]:
        shapes = {name: value.shape for name, value in model.named_parameters()}
        slots = [next(s for s in group.slots if s.axis == 0 and not s.reads) for group in fine.space.groups]
        return tuple(shapes[slot.parameter][0] // slot.elements_per_unit for slot in slots)

    def milliseconds(model: nn.Module) -> float:
        return float(fine.latency.evaluate([widths_of(model)])[0])

    training = replace(ready_.training(seed), learning_rate=FINE_TUNING_RATE)
    budget_ms = share * ready_.full_ms
    if method == "ModelOpt FastNAS":
        batches = [task.train.take(np.arange(start, start + 128))[0] for start in range(0, 1024, 128)]
        folder = shared.path("fastnas")
        folder.mkdir(parents=True, exist_ok=True)
        model = importlib.import_module("peers.with_fastnas").prune(
            network, example, batches, lambda candidate: evaluate(candidate, task, task.valid, training).metric,
            milliseconds, budget_ms, folder,
        )  # fmt: skip
    else:
        peer = importlib.import_module("peers.with_torch_pruning")
        round_to = 8 if method.endswith("8") else None
        model = peer.prune(network, example, ["classifier"], milliseconds, budget_ms, round_to)
    if model is None:
        rows.add(("search", ready_.name, method, share, seed, ""), note="no ratio keeps the budget")
        return
    widths = widths_of(model)
    train(model, task, training)
    tested = evaluate(model, task, test, training)
    tuning = training_cost(ready_, training, len(task.train), fine.space.macs(WidthChoice(widths)))
    rows.add(
        ("search", ready_.name, method, share, seed, text(widths)), accuracy=tested.metric, nll=tested.loss,
        predicted_ms=float(fine.latency.evaluate([widths])[0]), gmacs=cost + tuning,
    )  # fmt: skip


METHODS: dict[str, Callable[[Seed, Rows, str, float], None]] = {
    "hwsearch, CafeNet": ours,
    "hwsearch, PaS": masks,
    "Torch-Pruning": pruned,
    "Torch-Pruning, multiples of 8": pruned,
    "ModelOpt FastNAS": pruned,
    "Optuna": optuna,
    "uniform": scaled,
}


def one(ready_: Ready, output: Path, method: str, share: float, seed: int) -> None:
    """One method in this process, which is its own: its line with CPU seconds and peak memory, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder) / "rows.csv", float("inf"))
        if output.exists():
            rows.known = Rows(output, float("inf")).known
        before, started = set(rows.known), time.process_time()
        METHODS[method](Seed(ready_, seed, Path(folder)), rows, method, share)
        cpu_s = time.process_time() - started
        line = next(row for key, row in rows.known.items() if key not in before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note = f"{line['note']}; cpu {cpu_s:.1f} s, peak {peak:.0f} MiB"
    print(json.dumps(line | {"part": "search", "method": method, "note": note}))


def installed(method: str) -> bool:
    """Whether a method's package is there."""
    needed = PEERS.get(method, ("", "hwsearch"))[1]
    if importlib.util.find_spec(needed) is not None:
        return True
    print(f"{method}: {needed} is not installed, left out", file=sys.stderr)
    return False


def run(asked: argparse.Namespace) -> None:
    """Every method, seed by seed, each in a process."""
    rows = Rows(asked.output, asked.seconds)
    methods = [name for name in METHODS if installed(name)]
    for seed in range(asked.seeds):
        for method in methods:
            if rows.has_any("search", asked.setting, method, asked.share, seed):
                continue
            rows.check()
            command = [sys.executable, __file__, "one", "--device", asked.device, "--setting", asked.setting]
            command += ["--output", str(asked.output), "--share", str(asked.share), "--seed", str(seed)]
            done = subprocess.run([*command, "--method", method], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"bench_peers: {method} failed, exit status {done.returncode}")
            line = json.loads(done.stdout.splitlines()[-1])
            rows.add([line[name] for name in HEADER[:6]], **{name: line[name] for name in HEADER[6:]})


def written(method: str) -> str:
    """Lines that a user writes: those of the peer's file that are neither blank, comment nor docstring."""
    if method not in PEERS:
        return ""
    import ast

    source = (HERE / "peers" / PEERS[method][0]).read_text(encoding="utf-8")
    if PEERS[method][0].endswith(".py"):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        source = ast.unparse(tree)
    return str(sum(bool(line.strip()) and not line.startswith("#") for line in source.splitlines()))


def report(path: Path) -> None:
    """A Markdown table a setting and share."""
    lines = list(Rows(path, float("inf")).known.values())
    measured = {(r["setting"], r["widths"]): float(r["note"].split()[0]) for r in lines if r["part"] == "measured"}
    found = [row for row in lines if row["part"] == "search"]
    for name, share in dict.fromkeys((row["setting"], row["share"]) for row in found):
        mine = [row for row in found if (row["setting"], row["share"]) == (name, share)]
        scaled_ = {row["seed"]: float(row["accuracy"]) for row in mine if row["method"] == "uniform"}
        kind = "measured" if all((name, r["widths"]) in measured for r in mine if r["widths"]) else "predicted"
        print(f"\n{name}, {float(share):.0%} of the full network's predicted ms\n")
        print(f"| tool | n | {kind} ms | accuracy | over uniform, points | NLL | TMACs | CPU s | peak MiB | lines |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for method in METHODS:
            rows = [row for row in mine if row["method"] == method and row["accuracy"]]
            if not rows:
                continue
            ms = np.mean([measured.get((name, r["widths"]), float(r["predicted_ms"])) for r in rows])
            accuracy, nll, gmacs = (np.mean([float(r[key]) for r in rows]) for key in ("accuracy", "nll", "gmacs"))
            gains = 100 * np.array([float(r["accuracy"]) - scaled_[r["seed"]] for r in rows if r["seed"] in scaled_])
            error = f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
            gain = "" if method == "uniform" or not len(gains) else f"{gains.mean():+.2f}{error}"
            spent = [r["note"].split("cpu ")[1].replace(",", "").split() for r in rows]
            cpu_s, peak = (np.mean([float(s[at]) for s in spent]) for at in (0, 3))
            print(
                f"| {method} | {len(rows)} | {ms:.4f} | {accuracy:.4f} | {gain} | {nll:.4f} | {gmacs / 1e3:.2f} | "
                f"{cpu_s:.0f} | {peak:.0f} | {written(method)} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "one", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", default="resnet-14", choices=list(SETTINGS))
    parser.add_argument("--share", type=float, default=0.4, help="of the full network's predicted milliseconds")
    parser.add_argument("--output", type=Path, default=Path("build/peers.csv"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="one: the seed")
    parser.add_argument("--method", choices=list(METHODS), help="one: the method")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the line that ends later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
    elif asked.part == "run":
        run(asked)
    elif asked.part == "measure":
        measure_rows(ready(asked.setting, asked.device), asked.output, asked.device)
    else:
        one(ready(asked.setting, asked.device), asked.output, asked.method, asked.share, asked.seed)
    return 0


if __name__ == "__main__":
    leave(main)
