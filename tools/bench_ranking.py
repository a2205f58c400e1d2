#!/usr/bin/env python
"""Measures the ranking: does a super-network rank widths of equal milliseconds as training them alone does?

    python tools/bench_ranking.py plan   --device x86-ort-1t
    python tools/bench_ranking.py run    --device x86-ort-1t --output build/ranking.csv --seconds 600
    python tools/bench_ranking.py report --output build/ranking.csv

Widths in strata of nearly equal milliseconds, each trained alone from scratch with two seeds (the truth: accuracy and
negative log-likelihood on the test set), against the held-out loss under shared weights: CafeNet (r = 1, 2), slimmable
(r = 0), BCNet, and MACs alone. ``report`` gives Kendall's tau within strata with bootstrap intervals, the tau between
the two seeds beside it.

Settings are those of ``search_settings.py``. Every finished training is a line of the output file, so a run that was
stopped (``--seconds`` stops it in time) goes on. One torch thread; milliseconds are predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ending import leave
from search_settings import (
    SETTINGS,
    Ready,
    Rows,
    alone,
    ready,
)
from width_timing import text

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.cafenet import train_supernet
from hwsearch.search.grid import WidthGrid, Widths
from hwsearch.search.scoring import Scorer
from hwsearch.search.stairs import stair_edges
from hwsearch.search.supernet import SuperNet
from hwsearch.search.winner import finish, train_choice

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


def report(path: Path) -> None:
    """Markdown tables of what the file holds."""
    lines = [row for row in Rows(path, float("inf")).known.values() if row["part"] == "ranking"]
    for name in dict.fromkeys(row["setting"] for row in lines):
        for truth in ("accuracy", "nll"):
            report_by([row for row in lines if row["setting"] == name], name, truth)


def report_by(lines: list[dict[str, str]], name: str, by: str) -> None:
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


def plan(ready: Ready) -> None:
    """What a setting costs before it is started: image passes times MACs, in TMACs."""
    setting, space = ready.setting, ready.space
    steps = ready.training(0).total_steps(setting.images)
    one = [float(np.mean(space.macs_array(rows))) for _, rows in strata(ready)]
    truth = TRUTH_SEEDS * IN_STRATUM * sum(3e-12 * steps * setting.batch * macs for macs in one)
    short = sum(part for part, _ in SHORT.values()) * truth
    nets = TRUTH_SEEDS * len(SUPERNETS) * ready.supernet_tmacs()
    print(f"{ready.name}: truth {truth:.2f} TMACs, super-networks {nets:.2f}, short trainings {short:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "run", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", default="resnet-14", choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("build/ranking.csv"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the line that ends later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
    elif asked.part == "plan":
        plan(ready(asked.setting, asked.device))
    else:
        ranking(ready(asked.setting, asked.device), Rows(asked.output, asked.seconds))
    return 0


if __name__ == "__main__":
    leave(main)
