#!/usr/bin/env python
"""Measures PaS on Fashion-MNIST: milliseconds against MACs in its loss, and both against what is simpler.

    python tools/bench_pas.py plan    --device x86-ort-1t --setting resnet-14      # costs, nothing is trained
    python tools/bench_pas.py search  --device x86-ort-1t --setting resnet-14 --output build/pas.csv --seconds 600
    python tools/bench_pas.py measure --device x86-ort-1t --setting resnet-14 --output build/pas.csv
    python tools/bench_pas.py report  --output build/pas.csv

Settings, data by seed and full networks are those of ``bench_search.py``. All methods but the two last start from one
trained network a seed and get the same steps in all: those of the full network, of the search, and of fine-tuning
(pruning without a search is fine-tuned for both).

* ``PaS, ms`` and ``PaS, MACs``: masks learnt under either loss; both end on the same predicted milliseconds.
* ``PaS, ms, short``: a third fewer steps of the search, which fine-tuning gets instead.
* ``magnitude`` and ``uniform``: pruned at once, the units with the largest weights kept.
* ``uniform, scratch``: the same widths, trained from scratch for all those steps.
* ``PaS, ms, widths alone`` and ``PaS, MACs, widths alone``: what was found, trained from scratch for the steps of one
  network, as ``bench_search.py`` trains what CafeNet found: there the rows compare.

Cost is counted as image passes times MACs (three for a training pass, one for a forward pass): ``gmacs`` is a method's
whole cost, the note says what its search took. Every finished network is a line of the output file; a run that was
stopped goes on. One torch thread; milliseconds are predictions until ``measure``, which takes the timing lock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ending import leave
from search_settings import CANDIDATES, SETTINGS, Ready, Rows, Seed, alone, ready, training_cost
from search_tables import Found, spread
from width_timing import measured_ms, text

from hwsearch.graph.widths import WidthChoice
from hwsearch.search.baselines import magnitude, uniform
from hwsearch.search.grid import WidthGrid
from hwsearch.search.pas import PaS, PasConfig
from hwsearch.search.winner import train_choice
from hwsearch.train.loop import TrainConfig, evaluate

#: Steps of the search and of fine-tuning, over those of the full network.
SEARCH_SHARE, TUNING_SHARE = 0.5, 0.5
SHORT_SHARE = 1 / 3
#: Learning rates of the search and of fine-tuning, over that of the full network.
SEARCH_RATE, TUNING_RATE = 0.2, 0.5
COSTS = {"PaS, ms": "ms", "PaS, MACs": "macs", "PaS, ms, short": "ms"}


def steps_of(ready: Ready, share: float) -> int:
    """Steps that are a share of one network's training."""
    return max(round(share * ready.training(0).total_steps(ready.setting.images)), 1)


def pas_config(ready: Ready, seed: int, cost: str, share: float = SEARCH_SHARE) -> PasConfig:
    """The search as it is by default, at the setting's sizes."""
    base, setting = PasConfig(), ready.setting
    rate = round(SEARCH_RATE * ready.training(seed).learning_rate, 9)
    training = replace(
        base.training, steps=steps_of(ready, share), batch_size=setting.batch, learning_rate=rate,
        final_rate=rate, seed=seed, checkpoint_s=15,
    )  # fmt: skip
    winner = tuning(ready, seed, SEARCH_SHARE + TUNING_SHARE - share)
    return replace(base, training=training, winner=winner, cost=cost, score_images=None)


def tuning(ready: Ready, seed: int, share: float) -> TrainConfig:
    """Fine-tuning for a share of one network's steps."""
    alone = ready.training(seed)
    return replace(alone, steps=steps_of(ready, share), learning_rate=TUNING_RATE * alone.learning_rate)


def searched(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """A search by masks, fine-tuned."""
    ready, seed = shared.ready, shared.seed
    task, test = ready.task(seed)
    network, cost = shared.pretrained()
    config = pas_config(ready, seed, COSTS[method], SHORT_SHARE if method.endswith("short") else SEARCH_SHARE)
    folder = shared.path(f"{method.replace(' ', '-')}-{share}")
    found = PaS(ready.space, ready.budget(share), config, model=network, seed=seed, folder=folder).search(task, None)
    assert found.model is not None
    assert config.winner is not None
    tested = evaluate(found.model, task, test, config.winner)
    examples, full = len(task.train), ready.space.macs(ready.space.full())
    masks = training_cost(ready, config.training, examples, full)
    images = config.calibration_images + len(task.valid)
    judged = 1e-9 * images * sum(ready.space.macs(candidate.choice) for candidate in found.candidates)
    tuned = training_cost(ready, config.winner, examples, found.macs)
    last = found.extra["trajectory"][-1]
    rows.add(
        ("pas", ready.name, method, share, seed, text(found.choice.widths)),
        accuracy=tested.metric, nll=tested.loss, predicted_ms=predicted(ready, found.choice),
        gmacs=cost + masks + judged + tuned,
        note=f"search {masks + judged:.4g}, tuning {tuned:.4g}, before tuning {found.loss:.4g}, "
             f"masks at {last['use']:.3f} of the budget",
    )  # fmt: skip


def widths_alone(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Widths that a search found, trained from scratch as one network."""
    first = rows.find("pas", shared.ready.name, method.removesuffix(", widths alone"), share, shared.seed)
    choice = WidthChoice(tuple(map(int, first["widths"].split("-"))))
    key = ("pas", shared.ready.name, method, share, shared.seed, text(choice.widths))
    search = float(first["note"].split()[1].rstrip(","))
    alone(shared.ready, rows, key, choice, shared.seed, extra=shared.pretrained()[1] + search)


def pruned(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Magnitude or uniform scaling of the pretrained network, fine-tuned for the steps of search and fine-tuning."""
    ready, seed = shared.ready, shared.seed
    task, test = ready.task(seed)
    network, cost = shared.pretrained()
    budget = ready.budget(share)
    settled = magnitude(ready.space, budget, network) if method == "magnitude" else uniform(ready.space, budget)
    choice, config = settled.candidate.choice, tuning(ready, seed, SEARCH_SHARE + TUNING_SHARE)
    tuned, _ = train_choice(network, ready.space, choice, task, config, scratch=False)
    tested = evaluate(tuned, task, test, config)
    rows.add(
        ("pas", ready.name, method, share, seed, text(choice.widths)), accuracy=tested.metric, nll=tested.loss,
        predicted_ms=predicted(ready, choice),
        gmacs=cost + training_cost(ready, config, len(task.train), ready.space.macs(choice)),
    )  # fmt: skip


def scaled_from_scratch(shared: Seed, rows: Rows, method: str, share: float) -> None:
    """Uniform scaling trained from scratch for all the steps that a searched network has had."""
    ready, seed = shared.ready, shared.seed
    task, test = ready.task(seed)
    choice = uniform(ready.space, ready.budget(share)).candidate.choice
    config = replace(ready.training(seed), steps=steps_of(ready, 1 + SEARCH_SHARE + TUNING_SHARE))
    network, _ = train_choice(ready.model, ready.space, choice, task, config)
    tested = evaluate(network, task, test, config)
    rows.add(
        ("pas", ready.name, method, share, seed, text(choice.widths)), accuracy=tested.metric, nll=tested.loss,
        predicted_ms=predicted(ready, choice),
        gmacs=training_cost(ready, config, len(task.train), ready.space.macs(choice)),
    )  # fmt: skip


METHODS: dict[str, Callable[[Seed, Rows, str, float], None]] = {
    "PaS, ms": searched,
    "PaS, MACs": searched,
    "PaS, ms, short": searched,
    "magnitude": pruned,
    "uniform": pruned,
    "uniform, scratch": scaled_from_scratch,
    "PaS, ms, widths alone": widths_alone,
    "PaS, MACs, widths alone": widths_alone,
}


def predicted(ready: Ready, choice: WidthChoice) -> float:
    """Predicted milliseconds."""
    return float(ready.latency.evaluate([choice.widths])[0])


def search(ready: Ready, rows: Rows, seeds: int, methods: Sequence[str], shares: Sequence[float]) -> None:
    """Every method at every share, seed by seed, so that differences are paired."""
    for seed in range(seeds):
        shared = Seed(ready, seed, rows.path.parent / "pas")
        for share in shares or ready.setting.shares:
            for method in methods or METHODS:
                if not rows.has_any("pas", ready.name, method, share, seed):
                    rows.check()
                    METHODS[method](shared, rows, method, share)


def measure_rows(ready: Ready, path: Path, device_name: str) -> None:
    """Measure every network of the file that has no measured line yet; each is a line ``measured`` of its own."""
    rows = Rows(path, float("inf"))
    wanted = sorted({key[5] for key in rows.known if key[1] == ready.name and key[0] == "pas"})
    every = [text(ready.space.full().widths), *wanted]
    choices = [
        WidthChoice(tuple(map(int, widths.split("-"))))
        for widths in every
        if not rows.has("measured", ready.name, "", "", "", widths)
    ]
    example = torch.zeros(1, 1, ready.setting.side, ready.setting.side)
    for choice, ms in measured_ms(ready.model, ready.space, example, choices, device_name):
        rows.add(
            ("measured", ready.name, "", "", "", text(choice.widths)), predicted_ms=predicted(ready, choice),
            note=f"{ms:.6g} ms measured",
        )  # fmt: skip


def report(path: Path) -> None:
    """A Markdown table a setting: means over seeds, and seed-paired differences to ``PaS, MACs`` and to uniform scaling
    at the same milliseconds."""
    lines = list(Rows(path, float("inf")).known.values())
    for name in dict.fromkeys(row["setting"] for row in lines):
        found = Found.of(lines, name, "pas")
        print(f"\n{name}: {found.kind} ms; differences in points of accuracy, paired by seed, ± standard error\n")
        print("| ms share | method | n | ms | accuracy | over PaS, MACs | over uniform | NLL | GMACs |")
        print("|---|---|---|---|---|---|---|---|---|")
        for share in sorted({row["share"] for row in found.rows}, key=float, reverse=True):
            for method in METHODS:
                mine = [r for r in found.rows if (r["share"], r["method"]) == (share, method)]
                if not mine:
                    continue
                macs = {r["seed"]: r for r in found.rows if (r["share"], r["method"]) == (share, "PaS, MACs")}
                pairs = [(r, macs[r["seed"]]) for r in mine if r["seed"] in macs and method != "PaS, MACs"]
                other = spread([float(row["accuracy"]) - float(paired["accuracy"]) for row, paired in pairs])
                gain = "" if method == "uniform" else spread(found.above_uniform(mine))
                accuracy, nll, gmacs = (
                    np.mean([float(row[column]) for row in mine]) for column in ("accuracy", "nll", "gmacs")
                )
                numbers = f"{accuracy:.4f} | {other} | {gain} | {nll:.4f} | {gmacs:.1f}"
                print(f"| {share} | {method} | {len(mine)} | {np.mean([found.ms(r) for r in mine]):.4f} | {numbers} |")


def plan(ready: Ready, seeds: int) -> None:
    """What a setting costs before it is started, and PaS's search beside CafeNet's: image passes times MACs."""
    setting, space = ready.setting, ready.space
    full, examples = space.macs(space.full()), setting.images
    config, train = pas_config(ready, 0, "ms"), ready.training(0)
    assert config.winner is not None
    drawn = float(space.macs_array(WidthGrid.of(space).sample(4000, np.random.default_rng(0))).mean())
    whole = training_cost(ready, train, examples, full)
    masks = training_cost(ready, config.training, examples, full)
    print(f"{ready.name}: full {full / 1e6:.2f} MMACs, {1e3 * ready.full_ms:.1f} us predicted; GMACs a seed:")
    print(f"  the full network, once: {whole:.0f}")
    in_all = whole
    for share in setting.shares:
        macs = space.macs(uniform(space, ready.budget(share)).candidate.choice)
        judged = 1e-9 * config.candidates * (config.calibration_images + setting.valid) * macs
        one = training_cost(ready, train, examples, macs)
        searches = 2 * (masks + judged + TUNING_SHARE * one)
        others = (2 * (SEARCH_SHARE + TUNING_SHARE) + (1 + SEARCH_SHARE + TUNING_SHARE) + 2) * one
        cafenet = 1e-9 * setting.supernet_steps * setting.batch / 2 * (3 * full + 5 * drawn)
        cafenet += 1e-9 * CANDIDATES * (setting.valid + 512) * macs
        print(
            f"  at {share:.0%}: a search by masks {masks + judged:.0f} ({(masks + judged) / cafenet:.2f} of "
            f"CafeNet's {cafenet:.0f} before its finalists), all methods {searches + others:.0f}"
        )
        in_all += searches + others
    print(f"  in all {in_all:.0f}, with {seeds} seeds {seeds * in_all:.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "search", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", default="resnet-14", choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("build/pas.csv"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--method", action="append", default=[], choices=list(METHODS), help="all of them by default")
    parser.add_argument("--share", action="append", default=[], type=float, help="by default all of the setting's")
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
        measure_rows(prepared, asked.output, asked.device)
    else:
        search(prepared, Rows(asked.output, asked.seconds), asked.seeds, asked.method, asked.share)
    return 0


if __name__ == "__main__":
    leave(main)
