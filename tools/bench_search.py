#!/usr/bin/env python
"""Measures the search: does the super-network rank widths rightly, and is what it finds better than what is simpler?

    python tools/bench_search.py plan    --device x86-ort-1t
    python tools/bench_search.py ranking --device x86-ort-1t --output build/ranking.csv --seconds 600
    python tools/bench_search.py search  --device x86-ort-1t --output build/search.csv --seconds 600
    python tools/bench_search.py measure --device x86-ort-1t --output build/search.csv
    python tools/bench_search.py step
    python tools/bench_search.py report  --output build/ranking.csv build/search.csv

Every finished training or search is a line of the output file, so a run that was stopped (``--seconds`` stops it in
time) goes on. One torch thread. Milliseconds are predictions from the device's table until ``measure``, which takes the
timing lock, has put measured ones beside them.

``ranking``: widths in strata of nearly equal milliseconds, each trained alone from scratch with two seeds (the truth:
accuracy and negative log-likelihood on the test set), against the held-out loss under shared weights: CafeNet
(r = 1, 2), slimmable (r = 0), BCNet, and MACs alone. ``report`` gives Kendall's tau within strata with bootstrap
intervals, the tau between the two seeds beside it.

``search``: found networks against uniform scaling, magnitude, MACs as the only constraint and Torch-Pruning, retrained
alike; see ``METHODS``. Cost is counted as image passes times MACs (three for a training pass, one for a forward pass).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
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
from torch import nn
from width_timing import measured_ms, text

from hwsearch.errors import HwsearchError, InfeasibleBudgetError, InputError
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.baselines import importances, knapsack, magnitude, uniform_choices
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet, CafeNetConfig, train_supernet
from hwsearch.search.grid import WidthGrid, Widths
from hwsearch.search.result import SearchResult
from hwsearch.search.scoring import Scorer
from hwsearch.search.stairs import stair_edges
from hwsearch.search.supernet import SuperNet
from hwsearch.search.supernet_training import min_min_step
from hwsearch.search.winner import finish, train_choice
from hwsearch.train.data import Batch, Examples, Shuffle
from hwsearch.train.loop import evaluate, settings, train, training_batch
from hwsearch.train.seeds import generator
from hwsearch.train.strides import strided_inputs
from hwsearch.train.task import Classification

# ---------------------------------------------------------------- ranking


STRATUM, IN_STRATUM, TRUTH_SEEDS = 0.02, 10, 2
SUPERNETS: dict[str, dict[str, object]] = {
    "cafenet r=1": {"offset": 1},
    "slimmable r=0": {"offset": 0},
    "cafenet r=2": {"offset": 2},
    "BCNet": {"sharing": "bilateral"},
    "cafenet r=1, distilled": {"offset": 1, "distillation": 0.5},
}
#: Trained for a share of the whole steps, from the shared weights of CafeNet r=1 or from scratch.
SHORT = {"inherited, 1/8": (0.125, False), "scratch, 1/4": (0.25, True)}


def strata(ready: Ready) -> list[tuple[float, Widths]]:
    """Widths (10, G) for every share, within 2 % of equal milliseconds, drawn from the stair edges."""
    found = []
    for share in ready.setting.shares:
        budget = ready.budget(share)
        grid = WidthGrid.of(stair_edges(ready.space, budget).space)
        rng = np.random.default_rng([7, round(share * 100)])
        rows = np.unique(grid.sample(200_000, rng), axis=0)
        use = budget.use(rows)
        inside = rows[(use <= 1) & (use > 1 - STRATUM)]
        if len(inside) < IN_STRATUM:
            raise InputError(f"only {len(inside)} widths lie within 2 % of {share:.0%}: widen the space")
        found.append((share, inside[rng.choice(len(inside), IN_STRATUM, replace=False)]))
    return found


def ranking(ready: Ready, rows: Rows) -> None:
    """The truth, seed by seed, then what each super-network says of the same widths."""
    layers = strata(ready)
    for seed in range(TRUTH_SEEDS):
        for share, choices in layers:
            for widths in choices.tolist():
                key = ("ranking", ready.name, "alone", share, seed, text(widths))
                if not rows.has(*key):
                    alone(ready, rows, key, WidthChoice(tuple(widths)), seed)
        first, *others = SUPERNETS
        score(ready, rows, first, seed, layers)
        for method, (part, scratch) in SHORT.items():
            for share, choices in layers:
                for widths in choices.tolist():
                    key = ("ranking", ready.name, method, share, seed, text(widths))
                    if not rows.has(*key):
                        shortly(ready, rows, key, WidthChoice(tuple(widths)), seed, part, scratch)
        for method in others:
            score(ready, rows, method, seed, layers)


def shortly(
    ready: Ready, rows: Rows, key: Sequence[object], choice: WidthChoice, seed: int, part: float, scratch: bool
) -> None:
    """Held-out loss after a short training, as finalists have it."""
    task, _ = ready.task(seed)
    training = ready.training(seed)
    training = replace(training, steps=max(round(training.total_steps(len(task.train)) * part), 1))
    if scratch:
        _, judged = train_choice(ready.model, ready.space, choice, task, training)
    else:
        net, scorer = scored(ready, rows, "cafenet r=1", seed)
        small = net.extract(scorer.pattern(choice), scorer.calibration())
        _, judged = finish(small, task, training)
    rows.add(key, nll=judged.loss)


def scored(ready: Ready, rows: Rows, method: str, seed: int) -> tuple[SuperNet, Scorer]:
    """A super-network, trained or read from its checkpoint, and what judges its sub-networks."""
    task, _ = ready.task(seed)
    config = ready.supernet(seed, **SUPERNETS[method])
    space = stair_edges(ready.space, ready.budget(ready.setting.shares[0])).space
    folder = rows.path.parent / "supernets" / f"{ready.name}-{method.replace(' ', '-')}-{seed}"
    net = train_supernet(space, ready.model, task, config, folder)
    return net, Scorer(
        net, task, config.scoring, config.training, offset=config.offset, bilateral=config.sharing == "bilateral"
    )


def score(ready: Ready, rows: Rows, method: str, seed: int, layers: list[tuple[float, Widths]]) -> None:
    """Train one super-network and score all strata; the lines are written together at its end."""
    keys = [
        ("ranking", ready.name, method, share, seed, text(row)) for share, choices in layers for row in choices.tolist()
    ]
    if all(rows.has(*key) for key in keys):
        return
    rows.check()
    _, scorer = scored(ready, rows, method, seed)
    every = np.concatenate([choices for _, choices in layers])
    losses = scorer(every)
    stop, rows.stop = rows.stop, float("inf")
    for key, loss in zip(keys, losses.tolist(), strict=True):
        if not rows.has(*key):
            rows.add(key, nll=loss)
    rows.stop = stop


# ---------------------------------------------------------------- search


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
    net, cost = shared.supernet(space, "stairs")
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


# ---------------------------------------------------------------- measuring and reporting


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
        for truth in ("accuracy", "nll"):
            report_ranking([r for r in lines if r["setting"] == name and r["part"] == "ranking"], name, truth)
        report_search([row for row in lines if row["setting"] == name and row["part"] in ("search", "measured")], name)


def report_ranking(lines: list[dict[str, str]], name: str, by: str) -> None:
    """Kendall's tau within strata, its bootstrap interval over widths, and the seeds' own tau; truth is ``by``."""
    sign = -1.0 if by == "accuracy" else 1.0
    truth: dict[tuple[str, str], dict[str, float]] = {}
    said: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    macs: dict[tuple[str, str], float] = {}
    for row in lines:
        place = (row["share"], row["widths"])
        table = truth if row["method"] == "alone" else said.setdefault(row["method"], {})
        table.setdefault(place, {})[row["seed"]] = sign * float(row[by]) if table is truth else float(row["nll"])
        if row["method"] == "alone":
            macs[place] = -float(row["note"].split()[0])
    seeds = sorted({seed for found in truth.values() for seed in found})
    whole = {place: float(np.mean(list(found.values()))) for place, found in truth.items() if len(found) == len(seeds)}
    if not whole:
        return
    shares = sorted({share for share, _ in whole})
    print(f"\n{name}: {len(whole)} widths in {len(shares)} strata; truth: test {by}, mean of {len(seeds)} seed(s)\n")
    print(f"| ranked by | seed | Kendall tau within strata | 90 % interval | {by} lost by its first choice |")
    print("|---|---|---|---|---|")
    candidates = {"MACs": {p: {"": m} for p, m in macs.items()}, **said}
    if len(seeds) > 1:
        candidates["the other seed, trained alone"] = {p: {"a": truth[p][seeds[0]]} for p in whole}
    for method, table in candidates.items():
        other = {p: truth[p][seeds[1]] for p in whole} if method.startswith("the other") else whole
        for seed in sorted({s for found in table.values() for s in found}):
            pairs = {p: (table[p][seed], other[p]) for p in whole if seed in table.get(p, {})}
            if pairs:
                tau, low, high, regret = strata_tau(pairs, shares)
                print(f"| {method} | {seed} | {tau:.3f} | {low:.3f} .. {high:.3f} | {regret:.4f} |")


def strata_tau(
    pairs: dict[tuple[str, str], tuple[float, float]], shares: Sequence[str]
) -> tuple[float, float, float, float]:
    """Mean over strata of Kendall's tau, 90 % bootstrap interval over widths, mean regret of the one ranked first."""
    from scipy.stats import kendalltau

    strata_ = [np.array([pair for (share, _), pair in pairs.items() if share == wanted]) for wanted in shares]
    strata_ = [values for values in strata_ if len(values) > 2]
    rng = np.random.default_rng(0)

    def tau(parts: list[np.ndarray]) -> float:
        return float(np.nanmean([kendalltau(part[:, 0], part[:, 1]).statistic for part in parts]))

    draws = [tau([part[rng.integers(0, len(part), len(part))] for part in strata_]) for _ in range(500)]
    regret = float(np.mean([part[np.argmin(part[:, 0]), 1] - part[:, 1].min() for part in strata_]))
    return tau(strata_), float(np.quantile(draws, 0.05)), float(np.quantile(draws, 0.95)), regret


def report_search(lines: list[dict[str, str]], name: str) -> None:
    """Means over seeds, and the paired difference to uniform scaling interpolated at the same milliseconds."""
    measured = {r["widths"]: float(r["note"].split()[0]) for r in lines if r["part"] == "measured"}
    found = [row for row in lines if row["part"] == "search" and row["accuracy"]]
    if not found:
        return

    def ms(row: dict[str, str]) -> float:
        return measured.get(row["widths"], float(row["predicted_ms"]))

    kind = "measured" if all(row["widths"] in measured for row in found) else "predicted"
    curves: dict[str, np.ndarray] = {}
    for seed in {row["seed"] for row in found}:
        points = sorted((ms(r), float(r["accuracy"]), -float(r["nll"])) for r in found
                        if r["method"] == "uniform" and r["seed"] == seed)  # fmt: skip
        if len(points) > 1:
            curve = np.array(points)
            curve[:, 1:] = np.maximum.accumulate(curve[:, 1:], axis=0)  # a wider one that is worse is not used
            curves[seed] = curve
    print(f"\n{name}: retrained accuracy at {kind} ms; differences are seed-paired, ± standard error\n")
    print("| ms share | method | n | ms | accuracy | over uniform, points | NLL | TMACs in all |")
    print("|---|---|---|---|---|---|---|---|")
    for share in sorted({r["share"] for r in found if r["method"] != "uniform"}, reverse=True):
        for method in METHODS:
            mine = [r for r in found if r["method"] == method and r["share"] == share]
            if not mine:
                continue
            gains = [
                100 * (float(r["accuracy"]) - np.interp(ms(r), curves[r["seed"]][:, 0], curves[r["seed"]][:, 1]))
                for r in mine if r["seed"] in curves
            ]  # fmt: skip
            error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            accuracy, nll, gmacs = (np.mean([float(r[name]) for r in mine]) for name in ("accuracy", "nll", "gmacs"))
            time_ms = np.mean([ms(r) for r in mine])
            gain = f"{np.mean(gains):+.2f} ± {error:.2f}" if gains else ""
            print(
                f"| {share} | {method} | {len(mine)} | {time_ms:.4f} | {accuracy:.4f} | {gain} | {nll:.4f} | "
                f"{gmacs / 1e3:.2f} |"
            )


def plan(ready: Ready, seeds: int) -> None:
    """What a setting costs before it is started: image passes times MACs, in TMACs."""
    setting, space = ready.setting, ready.space
    full = space.macs(space.full())
    rng = np.random.default_rng(0)
    drawn = float(space.macs_array(WidthGrid.of(space).sample(4000, rng)).mean())
    steps = ready.training(0).total_steps(setting.images)
    supernet = 1e-12 * setting.supernet_steps * setting.batch / 2 * (3 * full + 5 * drawn)
    one = {share: float(np.mean(space.macs_array(rows))) for share, rows in strata(ready)}
    alone_ = {share: 3e-12 * steps * setting.batch * macs for share, macs in one.items()}
    scored_ = {share: 1e-12 * CANDIDATES * (setting.valid + 512) * macs for share, macs in one.items()}
    truth = TRUTH_SEEDS * IN_STRATUM * sum(alone_.values())
    short = sum(part for part, _ in SHORT.values()) * truth
    print(f"{ready.name}: full {full / 1e6:.2f} MMACs, {1e3 * ready.full_ms:.1f} us predicted; TMACs:")
    nets = TRUTH_SEEDS * len(SUPERNETS) * supernet
    print(f"  ranking: truth {truth:.2f}, super-networks {nets:.2f}, short {short:.2f}")
    each = sum(len(METHODS) * alone_[share] + 4 * scored_[share] for share in setting.shares)
    whole = 3e-12 * steps * setting.batch * full
    uniform_ = 3e-12 * steps * setting.batch * sum(space.macs(space.uniform(ratio)) for ratio in UNIFORM)
    print(f"  search: {seeds * (2 * supernet + whole + uniform_ + each):.2f} with {seeds} seeds")


# ---------------------------------------------------------------- the cost of a step


STEPS = 60


def step_cost(ready: Ready) -> None:
    """CPU seconds and peak memory of super-network steps against plain steps at the same sampled widths."""
    task, _ = ready.task(0)
    training = ready.training(0)
    shuffle = Shuffle(len(task.train), training.batch_size, 0)
    print(f"{ready.name}: {STEPS} sampled steps, batch {training.batch_size}, one thread, CPU time\n")
    print("| step | CPU s | over plain | (m + 3) / 3 | allowed |\n|---|---|---|---|---|")
    spent: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, object]] = {
        "m = 1": {"patterns": 1}, "m = 2": {"patterns": 2}, "m = 4": {"patterns": 4},
        "m = 2, distilled": {"patterns": 2, "distillation": 0.5},
    }  # fmt: skip
    nets = {name: SuperNet(ready.model, ready.space).to(memory_format=torch.channels_last).train() for name in kinds}
    steps = {
        name: min_min_step(nets[name], task, ready.supernet(0, full_steps=False, **changes))
        for name, changes in kinds.items()
    }
    with settings(training), ExitStack() as guards:
        for net in nets.values():
            guards.enter_context(strided_inputs(net))
        for number in range(STEPS + 3):
            batch = training_batch(number, task.train, shuffle, training)
            choice = ready.space.sample(generator(0, "pattern", number))
            small = shrink(ready.model, ready.space, choice, check=False).to(memory_format=torch.channels_last).train()
            guards.enter_context(strided_inputs(small))

            def plain(_: int, batch: Batch, small: nn.Module = small) -> None:
                task.loss(small(batch[0]), batch).backward()

            for name, step in {"plain": plain, **steps}.items():
                step(number, batch)  # whoever is first at these widths pays for oneDNN's set-up of them
                started = time.process_time()
                step(number, batch)
                if number >= 3:  # the first ones warm up
                    spent.setdefault(name, []).append(time.process_time() - started)
    base = sum(spent["plain"])
    for name, seconds in spent.items():
        m = int(kinds[name]["patterns"]) if name in kinds else None  # type: ignore[call-overload]
        bound = f"{(m + 3) / 3:.2f} | {1.15 * (m + 3) / 3:.2f}" if m else " | "
        print(f"| {name} | {sum(seconds):.3f} | {sum(seconds) / base:.2f} | {bound} |")
    memory = {kind: peak_mib(ready, task, kind) for kind in ("plain", "supernet")}
    print(
        f"\nPeak memory over 20 steps of training: plain {memory['plain']:.0f} MiB, super-network (m = 2, full steps "
        f"between) {memory['supernet']:.0f} MiB: {memory['supernet'] / memory['plain']:.2f}"
    )


def peak_mib(ready: Ready, task: Classification, kind: str) -> float:
    """Peak resident memory of 20 steps in a process of its own, forked after everything was loaded."""
    import os
    import resource

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        training = replace(ready.training(0), steps=20)
        if kind == "plain":
            train(copy.deepcopy(ready.model), task, training)
        else:
            train_supernet(ready.space, ready.model, task, replace(ready.supernet(0), training=training))
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    return float(os.read(reader, 64).decode())


# ---------------------------------------------------------------- the command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "ranking", "search", "step", "measure", "report"))
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
    try:
        if asked.part == "report":
            report(asked.output)
            return 0
        prepared = ready(asked.setting, asked.device)
        if asked.part == "plan":
            plan(prepared, asked.seeds)
        elif asked.part == "step":
            step_cost(prepared)
        elif asked.part == "measure":
            measure_rows(prepared, asked.output[0], asked.device)
        elif asked.part == "ranking":
            ranking(prepared, Rows(asked.output[0], asked.seconds))
        else:
            search(prepared, Rows(asked.output[0], asked.seconds), asked.seeds, asked.method, asked.share)
    except HwsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
