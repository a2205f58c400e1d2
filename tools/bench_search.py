#!/usr/bin/env python
"""Measures the search: is what it finds better than what is simpler?

    python tools/bench_search.py plan    --device x86-ort-1t
    python tools/bench_search.py search  --device x86-ort-1t --output build/search.csv --seconds 600
    python tools/bench_search.py measure --device x86-ort-1t --output build/search.csv
    python tools/bench_search.py report  --output build/search.csv

Every finished training or search is a line of the output file, so a run that was stopped (``--seconds`` stops it in
time) goes on. One torch thread. Milliseconds are predictions from the device's table until ``measure``, which takes the
timing lock, has put measured ones beside them.

Found networks against uniform scaling, magnitude, MACs as the only constraint and Torch-Pruning, retrained alike; see
``METHODS``. Cost is counted as image passes times MACs (three for a training pass, one for a forward pass).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_ranking import strata
from ending import leave
from search_settings import (
    CANDIDATES,
    SETTINGS,
    UNIFORM,
    Ready,
    Rows,
    Seed,
    alone,
    ready,
    training_cost,
)
from search_tables import Found, spread
from torch import nn
from width_timing import measured_ms, text

from hwsearch.errors import InfeasibleBudgetError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.baselines import importances, knapsack, magnitude, uniform_choices
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet, CafeNetConfig
from hwsearch.search.result import SearchResult
from hwsearch.search.stairs import stair_edges
from hwsearch.search.winner import train_choice
from hwsearch.train.data import Examples
from hwsearch.train.loop import evaluate, train


def search(ready: Ready, rows: Rows, seeds: int, methods: Sequence[str], shares: Sequence[float]) -> None:
    """Every method at every share, seed by seed, so that means over seeds are paired."""
    for seed in range(seeds):
        shared = Seed(ready, seed, rows.path.parent / "search")
        for share in shares or ready.setting.shares:
            for method in [name for name in METHODS if not methods or name in methods]:
                if not rows.has_any("search", ready.name, method, share, seed):
                    rows.check()
                    try:
                        METHODS[method](shared, rows, method, share)
                    except InfeasibleBudgetError as error:
                        print(f"{method}: {error}", file=sys.stderr)
                        rows.add(("search", ready.name, method, share, seed, ""), note="infeasible")
        for ratio in UNIFORM if not methods or "uniform" in methods else ():
            choice = ready.space.uniform(ratio)
            key = ("search", ready.name, "uniform", ratio, seed, text(choice.widths))
            if not rows.has(*key):
                alone(ready, rows, key, choice, seed)


def cafenet(shared: Seed, rows: Rows, method: str, share: float, **changes: object) -> None:
    """A search of ours under milliseconds; the winner is trained from scratch."""
    ready, seed = shared.ready, shared.seed
    config, (task, test), budget = shared.config(**changes), ready.task(seed), ready.budget(share)
    space = stair_edges(ready.space, budget).space
    free = {"offset": config.offset, "patterns": config.patterns}
    net, cost = shared.supernet(space, "stairs" if config.offset else "stairs-slimmable", **free)
    found = CafeNet(
        ready.space, budget, config, model=ready.model, seed=seed, supernet=net,
        folder=shared.path(f"{method.replace(' ', '-')}-{share}"),
    ).search(task, None)  # fmt: skip
    write(shared, rows, method, share, found, cost, config, test)


def by_macs(shared: Seed, rows: Rows, method: str, share: float, multiple: int) -> None:
    """The same search with MACs as its only constraint: as many as uniform scaling has at this share."""
    ready, seed = shared.ready, shared.seed
    task, test = ready.task(seed)
    scalings = uniform_choices(ready.space)
    widest = scalings[np.flatnonzero(ready.budget(share).feasible(scalings))[-1]]
    limit_ = Limit(MegaMacs(ready.space), float(ready.space.macs_array(widest[None])[0]) / 1e6, quantile=0.5)
    net, cost = shared.supernet(ready.space, "free")
    config = shared.config(bins="none")
    space = ready.space
    if multiple > 1:
        space = space.restrict({
            g.name: [w for w in g.widths if w % multiple == 0] or [g.units] for g in space.groups
        })  # fmt: skip
        net = copy.deepcopy(net)
        net.space = space
        net.get_buffer("recorded").zero_()  # its columns are those of the wider space
    found = CafeNet(
        space, Budget([limit_]), config, model=ready.model, seed=seed, supernet=net,
        folder=shared.path(f"{method.replace(' ', '-')}-{share}"),
    ).search(task, None)  # fmt: skip
    write(shared, rows, method, share, found, cost, config, test)


def write(
    shared: Seed, rows: Rows, method: str, share: float, found: SearchResult, cost: float, config: CafeNetConfig,
    test: Examples,
) -> None:  # fmt: skip
    """The line of a search; cost: super-network, scored candidates, finalists and the winner."""
    ready, task = shared.ready, shared.ready.task(shared.seed)[0]
    assert found.model is not None
    assert config.winner is not None
    tested = evaluate(found.model, task, test, config.winner)
    images = config.scoring.calibration_images + len(task.valid)
    scored = sum(ready.space.macs(c.choice) for c in found.candidates) * images * 1e-9
    winner = training_cost(ready, config.winner, len(task.train), found.macs)
    shorts = [ready.space.macs(WidthChoice(tuple(f["widths"]))) for f in found.extra["finalists"]]
    short = sum(training_cost(ready, config.winner, len(task.train), m) for m in shorts) * config.finalist_share
    rows.add(
        ("search", ready.name, method, share, shared.seed, text(found.choice.widths)),
        accuracy=tested.metric, nll=tested.loss,
        predicted_ms=float(ready.latency.evaluate([found.choice.widths])[0]),
        gmacs=cost + scored + short + winner,
        note=f"supernet {cost:.4g}, scored {scored:.4g}, finalists {short:.4g}, winner {winner:.4g}",
    )  # fmt: skip


def simple(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Magnitude or knapsack of the pretrained full network; its network is trained from scratch as all are."""
    ready, budget = shared.ready, shared.ready.budget(share)
    network, cost = shared.pretrained()
    if method == "knapsack":
        choice = knapsack(ready.space, budget, importances(ready.space, network)).choice
    else:
        choice = magnitude(ready.space, budget, network).candidate.choice
    key = ("search", ready.name, method, share, shared.seed, text(choice.widths))
    alone(ready, rows, key, choice, shared.seed, extra=cost)


def inherited(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Our widths, but with the pretrained network's largest units, fine-tuned: beside Torch-Pruning."""
    ready = shared.ready
    first = rows.find("search", ready.name, "ours", share, shared.seed)
    choice = WidthChoice(tuple(map(int, first["widths"].split("-"))))
    network, cost = shared.pretrained()
    key = ("search", ready.name, method, share, shared.seed, text(choice.widths))
    task, test = ready.task(shared.seed)
    training = replace(ready.training(shared.seed), learning_rate=FINE_TUNING_RATE)
    tuned, _ = train_choice(network, ready.space, choice, task, training, scratch=False)
    tested = evaluate(tuned, task, test, training)
    searched = float(first["gmacs"])
    rows.add(
        key, accuracy=tested.metric, nll=tested.loss, gmacs=cost + searched,
        predicted_ms=float(ready.latency.evaluate([choice.widths])[0]),
    )  # fmt: skip


FINE_TUNING_RATE = 0.05


def torch_pruning(shared: Seed, rows: Rows, method: str, share: float, round_to: int | None) -> None:
    """Torch-Pruning on the same pretrained network: the smallest ratio whose network keeps the same milliseconds."""
    try:
        import torch_pruning as tp  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        print(f"{method}: Torch-Pruning is not installed, left out", file=sys.stderr)
        return
    ready, (task, test) = shared.ready, shared.ready.task(shared.seed)
    network, cost = shared.pretrained()
    fine = ready.one_channel()
    example = torch.zeros(1, 1, ready.setting.side, ready.setting.side)

    def pruned(ratio: float) -> tuple[nn.Module, tuple[int, ...], float]:
        model = copy.deepcopy(network)
        tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio, round_to=round_to,
            ignored_layers=[model.classifier],
        ).step()  # fmt: skip
        shapes = {name: value.shape for name, value in model.named_parameters()}
        widths = []
        for group in fine.space.groups:
            slot = next(slot for slot in group.slots if slot.axis == 0 and not slot.reads)
            widths.append(shapes[slot.parameter][0] // slot.elements_per_unit)
        return model, tuple(widths), float(fine.latency.evaluate([widths])[0])

    smallest: tuple[float, int] = (float("inf"), 0)
    for percent in range(5, 95):
        model, widths, ms = pruned(percent / 100)
        smallest = min(smallest, (ms, percent))
        if ms <= share * ready.full_ms:
            break
    else:  # rounding down to nothing, it leaves a layer as it was
        percent = smallest[1]
        model, widths, ms = pruned(percent / 100)
    training = replace(ready.training(shared.seed), learning_rate=FINE_TUNING_RATE)
    train(model, task, training)
    tested = evaluate(model, task, test, training)
    tuning = training_cost(ready, training, len(task.train), fine.space.macs(WidthChoice(widths)))
    rows.add(
        ("search", ready.name, method, share, shared.seed, text(widths)), accuracy=tested.metric, nll=tested.loss,
        predicted_ms=ms, gmacs=cost + tuning,
        note=f"ratio {percent / 100}" + (", no ratio fits" if ms > share * ready.full_ms else ""),
    )  # fmt: skip


METHODS: dict[str, Callable[[Seed, Rows, str, float], None]] = {
    "ours": cafenet,
    "ours, no finalists": partial(cafenet, finalists=0),
    "ours, slimmable": partial(cafenet, offset=0, patterns=1),
    "knapsack": simple,
    "magnitude": simple,
    "ours, inherited": inherited,
    "Torch-Pruning": partial(torch_pruning, round_to=None),
    "Torch-Pruning 8": partial(torch_pruning, round_to=8),
    "Torch-Pruning 16": partial(torch_pruning, round_to=16),
    "MACs": partial(by_macs, multiple=1),
    "MACs, multiples of 8": partial(by_macs, multiple=8),
    "MACs, multiples of 16": partial(by_macs, multiple=16),
}


def measure_rows(ready: Ready, path: Path, device_name: str) -> None:
    """Measure every network of the file that has no measured line yet; each is a line ``measured`` of its own."""
    rows = Rows(path, float("inf"))
    fine = ready.one_channel()
    wanted = sorted({key[5] for key in rows.known if key[1] == ready.name and key[0] in ("search", "full") and key[5]})
    every = [text(ready.space.full().widths), *wanted]
    missing = [w for w in every if not rows.has("measured", ready.name, "", "", "", w)]
    choices = [WidthChoice(tuple(map(int, w.split("-")))) for w in missing]
    example = torch.zeros(1, 1, ready.setting.side, ready.setting.side)
    for choice, ms in measured_ms(ready.model, fine.space, example, choices, device_name):
        rows.add(
            ("measured", ready.name, "", "", "", text(choice.widths)),
            predicted_ms=float(fine.latency.evaluate([choice.widths])[0]),
            note=f"{ms:.6g} ms measured",
        )


def report(paths: Sequence[Path]) -> None:
    """Markdown tables of what the files hold."""
    lines = [row for path in paths for row in Rows(path, float("inf")).known.values()]
    for name in dict.fromkeys(row["setting"] for row in lines):
        report_search(Found.of(lines, name, "search"), name)


def report_search(found: Found, name: str) -> None:
    """Means over seeds, and the paired difference to uniform scaling at the same milliseconds."""
    if not found.rows:
        return
    print(f"\n{name}: retrained accuracy at {found.kind} ms; differences are seed-paired, ± standard error\n")
    print("| ms share | method | n | ms | accuracy | over uniform, points | NLL | TMACs in all |")
    print("|---|---|---|---|---|---|---|---|")
    for share in sorted({r["share"] for r in found.rows if r["method"] != "uniform"}, reverse=True):
        for method in METHODS:
            mine = [r for r in found.rows if r["method"] == method and r["share"] == share]
            if not mine:
                continue
            accuracy, nll, gmacs = (np.mean([float(r[name]) for r in mine]) for name in ("accuracy", "nll", "gmacs"))
            time_ms, gain = np.mean([found.ms(r) for r in mine]), spread(found.above_uniform(mine))
            print(
                f"| {share} | {method} | {len(mine)} | {time_ms:.4f} | {accuracy:.4f} | {gain} | {nll:.4f} | "
                f"{gmacs / 1e3:.2f} |"
            )


def plan(ready: Ready, seeds: int) -> None:
    """What a setting costs before it is started: image passes times MACs, in TMACs."""
    setting, space = ready.setting, ready.space
    full = space.macs(space.full())
    steps = ready.training(0).total_steps(setting.images)
    one = {share: float(np.mean(space.macs_array(rows))) for share, rows in strata(ready)}
    alone_ = {share: 3e-12 * steps * setting.batch * macs for share, macs in one.items()}
    scored_ = {share: 1e-12 * CANDIDATES * (setting.valid + 512) * macs for share, macs in one.items()}
    print(f"{ready.name}: full {full / 1e6:.2f} MMACs, {1e3 * ready.full_ms:.1f} us predicted")
    each = sum(len(METHODS) * alone_[share] + 4 * scored_[share] for share in setting.shares)
    whole = 3e-12 * steps * setting.batch * full
    uniform_ = 3e-12 * steps * setting.batch * sum(space.macs(space.uniform(ratio)) for ratio in UNIFORM)
    total = seeds * (2 * ready.supernet_tmacs() + whole + uniform_ + each)
    print(f"{total:.2f} TMACs with {seeds} seeds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "search", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", default="resnet-14", choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, nargs="+", default=[Path("build/search.csv")])
    parser.add_argument("--seeds", type=int, default=6, help="of search")
    every = ["uniform", *METHODS]
    parser.add_argument("--method", action="append", default=[], choices=every, help="of search; all of them")
    parser.add_argument("--share", action="append", default=[], type=float, help="of search; all of the setting's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the line that ends later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
        return 0
    prepared = ready(asked.setting, asked.device)
    if asked.part == "plan":
        plan(prepared, asked.seeds)
    elif asked.part == "measure":
        measure_rows(prepared, asked.output[0], asked.device)
    else:
        search(prepared, Rows(asked.output[0], asked.seconds), asked.seeds, asked.method, asked.share)
    return 0


if __name__ == "__main__":
    leave(main)
