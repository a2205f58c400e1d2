#!/usr/bin/env python
"""Checks CONetV2 on Fashion-MNIST: does layer quality tell accuracy, and are the widths it finds worth having?

    python tools/bench_conetv2.py plan                                            # the arithmetic, nothing is trained
    python tools/bench_conetv2.py claim  --network resnet --part unequal          # widths of all sizes
    python tools/bench_conetv2.py claim  --network resnet --part equal            # widths of nearly equal MACs
    python tools/bench_conetv2.py search --network resnet --device NAME           # found against uniform, paired seeds
    python tools/bench_conetv2.py measure --network resnet --device NAME          # milliseconds of what search found
    python tools/bench_conetv2.py report                                          # tables from what is on the disk

**claim** trains a fixed list of random widths from scratch, all by the same recipe and from the same seed, and writes
the layer quality of each trained network (read off its weights) beside its accuracy on the 10,000 test images.
**search** searches widths under the *predicted* milliseconds of a uniform scaling, trains what was found and that
scaling by the same recipe from the same seed, and tests both.

Every finished training is a row of a CSV file in ``--output``; a killed command goes on where it was. Trainings and the
data are small on purpose (see ``plan``): compare rows, not with published accuracies.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import leave
from torch import nn
from width_timing import measured_ms

from hwsearch.console import Console
from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.models.mobilenetv2 import MobileNetV2
from hwsearch.models.resnet import resnet_small
from hwsearch.preparation import PREDICTOR
from hwsearch.search.baselines import uniform
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.conetv2 import ConetV2
from hwsearch.search.conetv2_config import ConetConfig
from hwsearch.search.quality import network_quality
from hwsearch.search.winner import train_choice
from hwsearch.train.data import Examples
from hwsearch.train.loop import TrainConfig, evaluate
from hwsearch.train.task import Task, load_task

TRAIN_IMAGES, VALID_IMAGES = 20_000, 2_000
EPOCHS, BATCH = 2, 128
WIDTHS = 20  # of each part of the claim
SEEDS = 6
SHARE = 0.5  # of the full network's predicted milliseconds: the widest uniform scaling below it is the budget
TRIALS, TRIAL_EPOCHS = 6, 0.5
EQUAL_SHARE, EQUAL_FLOOR = 0.35, 0.97  # of the full network's MACs; the narrowest of the equal ones, as a share of that
INPUT = (1, 1, 28, 28)
CLAIM_HEADER = (
    "network", "part", "number", "widths", "macs", "parameters", "accuracy", "loss",
    "quality", "published_quality", "rank", "gain", "stable_rank",
)  # fmt: skip
SEARCH_HEADER = (
    "network", "device", "budget_ms", "seed", "method", "widths", "predicted_ms", "macs", "parameters", "accuracy",
    "loss",
)  # fmt: skip
MEASURED_HEADER = ("network", "device", "widths", "measured_ms")
METRICS = ("quality", "published_quality", "rank", "gain", "stable_rank", "macs", "parameters")
METHODS = ("uniform", "metropolis", "conetv2")
RESAMPLES = 2000  # of the bootstrap
# Multiply-accumulates a second in training (forward and backward count three) on one core of a shared 2-core machine:
# for the plan only.
TRAINING_GMACS = {"resnet": 10.0, "mobilenetv2": 4.0}


def small_resnet() -> nn.Module:
    """Four basic blocks at 14x14, 7x7 and 4x4: a first convolution of stride 2 makes a quarter of ``resnet_small``."""
    model = resnet_small()
    model.stem[0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
    return model


def small_mobilenet() -> nn.Module:
    """Seven inverted residuals at 14x14, 7x7 and 4x4: ``mobilenetv2_small`` with a first convolution of stride 2."""
    settings = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 2, 1))
    return MobileNetV2(settings, in_channels=1, classes=10, stem=16, stem_stride=2, head=128, dropout=0.0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": small_resnet, "mobilenetv2": small_mobilenet}


@dataclass(frozen=True)
class Macs:
    """MMACs in the place of milliseconds: what the equal widths are equal in."""

    space: WidthSpace

    def evaluate(self, choices: np.ndarray) -> np.ndarray:
        return self.space.macs_array(choices) / 1e6


def model_and_space(network: str) -> tuple[nn.Module, WidthSpace]:
    """The full network with weights of seed 0, and its widths in steps of 2 channels from a quarter up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[network]().eval()
    return model, WidthSpace.from_model(model, torch.zeros(INPUT), quantum=2, minimum=0.25)


def recipe(seed: int) -> TrainConfig:
    """How every network of the benchmark is trained."""
    return TrainConfig(epochs=EPOCHS, batch_size=BATCH, learning_rate=0.1, seed=seed, checkpoint_s=10)


def data() -> tuple[Task, Examples]:
    """The task on a fixed subset, and the 10,000 test images."""
    return load_task("fashion-mnist", valid=VALID_IMAGES, limit_to=TRAIN_IMAGES + VALID_IMAGES, seed=0)


def claim_choices(space: WidthSpace, part: str) -> list[WidthChoice]:
    """The fixed widths of a part: uniformly drawn, as they are or moved to nearly equal MACs."""
    rng = np.random.default_rng(7)
    rows = space.choice_array([space.sample(rng) for _ in range(WIDTHS)])
    if part == "equal":
        most = space.macs(space.full()) * EQUAL_SHARE / 1e6
        rows = Budget([Limit(Macs(space), most, 0.5)], floor=EQUAL_FLOOR).repair(space, rows, rng)
    return space.choices(rows)


def run_claim(network: str, part: str, output: Path, console: Console) -> None:
    """Train what is left of a part's widths; each finished network is a row."""
    path = output / "claim.csv"
    model, space = model_and_space(network)
    task, test = data()
    done = {(row["network"], row["part"], row["number"]) for row in rows_of(path)}
    for number, choice in enumerate(claim_choices(space, part)):
        if (network, part, str(number)) in done:
            continue
        config, folder = recipe(0), output / "checkpoints" / f"{network}-{part}-{number}"
        small, _ = train_choice(model, space, choice, task, config, folder=folder)
        tested, quality = evaluate(small, task, test, config), network_quality(small)
        append(path, CLAIM_HEADER, (
            network, part, number, " ".join(map(str, choice.widths)), space.macs(choice), space.parameters(choice),
            tested.metric, round(tested.loss, 6),
            *(f"{quality.mean_of(name):.6g}" for name in CLAIM_HEADER[8:]),
        ))  # fmt: skip
        console.say(f"{network} {part} {number}: accuracy {tested.metric:.4f}, QC {quality.mean:.4f}")


def search_config(method: str, seed: int) -> ConetConfig:
    """Short searches: all trials together see as many images as one and a half final trainings."""
    short = TrainConfig(epochs=TRIAL_EPOCHS, batch_size=BATCH, learning_rate=0.1, seed=seed, checkpoint_s=10)
    if method == "metropolis":
        return ConetConfig(trials=TRIALS, training=short, winner=recipe(seed))
    steady = replace(short, learning_rate=0.03, final_rate=0.03, warmup=0.0, nesterov=False, weight_decay=5e-4)
    return ConetConfig.published(trials=TRIALS, training=steady, winner=recipe(seed))


def run_search(network: str, device_name: str, methods: Sequence[str], output: Path, console: Console) -> None:
    """Search, train and test what is left of the paired seeds; each finished network is a row."""
    path = output / "search.csv"
    model, space = model_and_space(network)
    latency = latency_on(device_name, space, console)
    task, test = data()
    full_ms = float(latency.evaluate(space.choice_array([space.full()]))[0])
    # The milliseconds of a uniform scaling, so that both sides have the same: its steps are coarser than a search's.
    scaled = uniform(space, Budget([Limit(latency, SHARE * full_ms, 0.5, device_name)])).candidate
    budget_ms = scaled.predicted_ms * (1 + 1e-9)
    budget = Budget([Limit(latency, budget_ms, 0.5, device_name)])
    done = {(row["network"], row["device"], row["seed"], row["method"]) for row in rows_of(path)}
    for seed in range(SEEDS):
        for method in methods:
            if (network, device_name, str(seed), method) in done:
                continue
            folder = output / "runs" / f"{network}-{device_name}-{method}-{seed}"
            if method == "uniform":
                choice = scaled.choice
                small, _ = train_choice(model, space, choice, task, recipe(seed), folder=folder)
            else:
                search = ConetV2(space, budget, search_config(method, seed), model=model, seed=seed, folder=folder)
                result = search.search(task, None)
                assert result.model is not None
                choice, small = result.choice, result.model
            tested = evaluate(small, task, test, recipe(seed))
            ms = float(latency.evaluate(space.choice_array([choice]))[0])
            append(path, SEARCH_HEADER, (
                network, device_name, f"{budget_ms:.6g}", seed, method, " ".join(map(str, choice.widths)),
                f"{ms:.6g}", space.macs(choice), space.parameters(choice), tested.metric, round(tested.loss, 6),
            ))  # fmt: skip
            console.say(f"{network} seed {seed} {method}: {ms:.4g} ms predicted, accuracy {tested.metric:.4f}")


def run_measure(network: str, device_name: str, output: Path, console: Console) -> None:
    """Measure every network of ``search.csv`` that has no measured row yet."""
    path = output / "measured.csv"
    model, space = model_and_space(network)
    known = {(row["network"], row["device"], row["widths"]) for row in rows_of(path)}
    wanted = {row["widths"] for row in rows_of(output / "search.csv") if row["network"] == network}
    missing = sorted(widths for widths in wanted if (network, device_name, widths) not in known)
    choices = [WidthChoice(tuple(map(int, widths.split()))) for widths in missing]
    for choice, ms in measured_ms(model, space, torch.zeros(INPUT), choices, device_name):
        widths = " ".join(map(str, choice.widths))
        append(path, MEASURED_HEADER, (network, device_name, widths, f"{ms:.6g}"))
        console.say(f"{network} {widths}: {ms:.4g} ms measured")


def latency_on(device_name: str, space: WidthSpace, console: Console) -> NetworkLatency:
    """Predicted milliseconds on a device that was profiled before; nothing is timed here."""
    folder = Device.load(device_name).table_folder / PREDICTOR
    if not (folder / "manifest.json").exists():
        raise InputError(f"{device_name} has no predictor: run hwsearch profile and hwsearch fit first")
    latency = NetworkLatency(space, LatencyPredictor.load(folder))
    with console.bar("lowering") as bar:
        return latency.prepare(bar)


def run_plan(console: Console) -> None:
    """What would be trained, before anything is."""
    for network in NETWORKS:
        _, space = model_and_space(network)
        macs = space.macs(space.full())
        per_part = {part: [space.macs(c) for c in claim_choices(space, part)] for part in ("unequal", "equal")}
        rate = TRAINING_GMACS[network] * 1e9
        console.show(
            f"{network}: {macs / 1e6:.2f} MMACs at full width, {len(space.groups)} width groups, "
            f"10^{space.log10_size:.1f} choices"
        )
        for part, found in per_part.items():
            seconds = sum(found) * 3 * TRAIN_IMAGES * EPOCHS / rate
            console.show(
                f"  claim, {part}: {len(found)} trainings of {TRAIN_IMAGES * EPOCHS // BATCH} steps, "
                f"{min(found) / 1e6:.2f} to {max(found) / 1e6:.2f} MMACs, about {seconds / 60:.0f} core-minutes"
            )
        half = macs * SHARE * 3 / rate
        images = {"uniform": EPOCHS, "metropolis": EPOCHS + TRIALS * TRIAL_EPOCHS}
        seconds = SEEDS * sum(images.values()) * TRAIN_IMAGES * half
        console.show(f"  search: {SEEDS} seeds of uniform and metropolis, about {seconds / 60:.0f} core-minutes")


def run_report(output: Path, console: Console) -> None:
    """Tables in Markdown from what is on the disk."""
    claim, search = rows_of(output / "claim.csv"), rows_of(output / "search.csv")
    if not claim and not search:
        raise InputError(f"{output} holds no finished row: run claim or search first")
    for line in [*claim_table(claim), "", *search_table(search, rows_of(output / "measured.csv"))]:
        console.show(line)
    console.show("")
    console.show(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread.")


def claim_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Spearman between accuracy and each figure over the networks of a part, with its 95 % bootstrap interval."""
    from scipy.stats import spearmanr

    lines = [
        "| network | widths | n | MMACs | accuracy, mean ± sd (range) | " + " | ".join(METRICS) + " |",
        "|---" * (5 + len(METRICS)) + "|",
    ]
    for network, part in dict.fromkeys((row["network"], row["part"]) for row in rows):
        chosen = [row for row in rows if (row["network"], row["part"]) == (network, part)]
        accuracy = np.array([float(row["accuracy"]) for row in chosen])
        macs = np.array([float(row["macs"]) for row in chosen]) / 1e6
        cells = []
        for metric in METRICS:
            values = np.array([float(row[metric]) for row in chosen])
            if len(chosen) < 3 or np.ptp(values) == 0:
                cells.append("")
                continue
            low, high = bootstrap(values, accuracy)
            cells.append(f"{float(spearmanr(values, accuracy).statistic):+.2f} ({low:+.2f} to {high:+.2f})")
        spread = f"{accuracy.mean():.4f} ± {accuracy.std(ddof=1):.4f}" if len(chosen) > 1 else f"{accuracy.mean():.4f}"
        lines.append(
            f"| {network} | {part} | {len(chosen)} | {macs.min():.2f} to {macs.max():.2f} | "
            f"{spread} ({accuracy.min():.4f} to {accuracy.max():.4f}) | " + " | ".join(cells) + " |"
        )
    return lines


def bootstrap(values: np.ndarray, accuracy: np.ndarray) -> tuple[float, float]:
    """95 % interval of Spearman's coefficient when networks are drawn again with replacement."""
    from scipy.stats import rankdata

    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(values), len(values))
        x, y = rankdata(values[at]), rankdata(accuracy[at])
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            found.append(float(np.corrcoef(x, y)[0, 1]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def search_table(rows: Sequence[Mapping[str, str]], measured: Sequence[Mapping[str, str]]) -> list[str]:
    """Each method against uniform scaling of the same seed; milliseconds are measured ones where all of them are."""
    known = {(row["network"], row["device"], row["widths"]): row["measured_ms"] for row in measured}
    kind = "measured" if all((r["network"], r["device"], r["widths"]) in known for r in rows) else "predicted"
    lines = [
        f"| network | device | budget ms | method | seeds | {kind} ms, mean (range) | MMACs | accuracy, mean ± sd | "
        "against uniform, mean ± sd of pairs | better in |",
        "|---" * 10 + "|",
    ]
    for network, device in dict.fromkeys((row["network"], row["device"]) for row in rows):
        here = [row for row in rows if (row["network"], row["device"]) == (network, device)]
        base = {row["seed"]: float(row["accuracy"]) for row in here if row["method"] == "uniform"}
        for method in METHODS:
            found = {row["seed"]: row for row in here if row["method"] == method}
            if not found:
                continue
            accuracy = np.array([float(row["accuracy"]) for row in found.values()])
            keys = [(network, device, row["widths"]) for row in found.values()]
            times = [known[key] for key in keys] if kind == "measured" else [r["predicted_ms"] for r in found.values()]
            ms = np.array(times, dtype=float)
            macs = np.array([float(row["macs"]) for row in found.values()]) / 1e6
            pairs = np.array([float(found[seed]["accuracy"]) - base[seed] for seed in found if seed in base])
            against = better = ""
            if method != "uniform" and len(pairs) > 1:
                against = f"{100 * pairs.mean():+.2f} ± {100 * pairs.std(ddof=1):.2f} points"
                better = f"{int((pairs > 0).sum())} of {len(pairs)}"
            spread = f" ± {accuracy.std(ddof=1):.4f}" if len(accuracy) > 1 else ""
            lines.append(
                f"| {network} | {device} | {float(next(iter(found.values()))['budget_ms']):.4f} | {method} | "
                f"{len(accuracy)} | {ms.mean():.4f} ({ms.min():.4f} to {ms.max():.4f}) | {macs.mean():.2f} | "
                f"{accuracy.mean():.4f}{spread} | {against} | {better} |"
            )
    return lines


def rows_of(path: Path) -> list[dict[str, str]]:
    """Finished rows; a torn last line is cut off, so that the next row is whole."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def append(path: Path, header: Sequence[str], values: Iterable[Any]) -> None:
    """One row more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(header)
        writer.writerow(list(values))
        file.flush()
        os.fsync(file.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("plan", "claim", "search", "measure", "report"))
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet")
    parser.add_argument("--part", choices=("unequal", "equal"), default="unequal")
    parser.add_argument("--device", default="simulated", help="a profiled device; only its predictor is used")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["uniform", "metropolis"])
    parser.add_argument("--output", type=Path, default=Path("build/conetv2"))
    asked = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    if asked.step == "plan":
        run_plan(console)
    elif asked.step == "claim":
        run_claim(asked.network, asked.part, asked.output, console)
    elif asked.step == "search":
        run_search(asked.network, asked.device, asked.methods, asked.output, console)
    elif asked.step == "measure":
        run_measure(asked.network, asked.device, asked.output, console)
    else:
        run_report(asked.output, console)
    return 0


if __name__ == "__main__":
    leave(main)
