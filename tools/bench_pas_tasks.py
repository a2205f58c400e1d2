#!/usr/bin/env python
"""Measures PaS beyond classification: a segmentation network, an image translator and a one-stage detector.

    python tools/bench_pas_tasks.py plan    --device x86-ort-1t                        # costs, nothing is trained
    python tools/bench_pas_tasks.py search  --device x86-ort-1t --output build/pas_tasks.csv --seconds 600
    python tools/bench_pas_tasks.py measure --device x86-ort-1t --output build/pas_tasks.csv
    python tools/bench_pas_tasks.py report  --output build/pas_tasks.csv

The pictures are made of Fashion-MNIST's garments (``hwsearch.train.garments``); every setting has its own metric: mean
intersection over union, peak signal-to-noise ratio in dB, average precision at IoU 0.5, on 1000 test pictures that are
made of test garments. The methods are those of ``bench_pas.py``, all from one trained network a seed and with the same
steps in all, at the same predicted milliseconds; ``uniform, scratch`` trains the scaled network anew for as many.

Every finished network is a line of the output file (its metric in the column ``accuracy``, its loss in ``nll``); a run
that was stopped goes on. One torch thread; milliseconds are predictions until ``measure``, which takes the timing lock.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from bench_pas import METHODS, SEARCH_SHARE, TUNING_SHARE, measure_rows, pas_config
from ending import leave
from search_settings import Ready, Rows, Seed, Setting, loaded, training_cost
from search_tables import Found, spread

from hwsearch.models import detector_small, segmenter_small, translator_small
from hwsearch.search.baselines import uniform
from hwsearch.train.data import Examples
from hwsearch.train.garments import load_garments
from hwsearch.train.loop import TrainConfig
from hwsearch.train.task import Task

#: Of the garments' three tasks, each with its learning rate: losses differ in size.
SETTINGS = {
    "segmentation": Setting(segmenter_small, 56, 2, 0.125, 2000, 500, 10, 0, 32, (0.6, 0.4)),
    "translation": Setting(translator_small, 28, 2, 0.125, 4000, 500, 6, 0, 32, (0.6, 0.4)),
    "detection": Setting(detector_small, 56, 2, 0.125, 4000, 500, 12, 0, 32, (0.6, 0.4)),
}
RATES = {"segmentation": 0.1, "translation": 0.1, "detection": 0.02}
METRICS = {"segmentation": "mIoU", "translation": "PSNR, dB", "detection": "AP at IoU 0.5"}
COMPARED = ("PaS, ms", "magnitude", "uniform", "uniform, scratch")


@dataclass(frozen=True)
class TaskReady(Ready):
    """A setting whose task is its name."""

    def task(self, seed: int) -> tuple[Task, Examples]:  # type: ignore[override]
        """Training and held-out pictures of a seed, and the test set."""
        return pictures(self.name, self.setting.images, self.setting.valid, seed)

    def training(self, seed: int) -> TrainConfig:
        """How one network is trained alone."""
        return replace(super().training(seed), learning_rate=RATES[self.name])


@cache
def pictures(name: str, images: int, valid: int, seed: int) -> tuple[Task, Examples]:
    """A task, composed once a process."""
    return load_garments(name, count=images + valid, valid=valid, seed=seed)


def ready(name: str, device_name: str) -> TaskReady:
    """A setting with everything loaded; what lowers the space is learnt, not timed, where the device lacks it."""
    found = loaded(name, SETTINGS[name], device_name)
    return TaskReady(name, found.setting, found.model, found.space, found.latency, found.full_ms, device_name)


def search(ready: Ready, rows: Rows, seeds: int, methods: Sequence[str], shares: Sequence[float]) -> None:
    """Every method at every share, seed by seed, so that differences are paired."""
    for seed in range(seeds):
        shared = Seed(ready, seed, rows.path.parent / "pas_tasks")
        for share in shares or ready.setting.shares:
            for method in methods or COMPARED:
                if not rows.has_any("pas", ready.name, method, share, seed):
                    rows.check()
                    METHODS[method](shared, rows, method, share)


def plan(ready: Ready, seeds: int) -> float:
    """Print what a setting costs before it is started, and give its GMACs: image passes times MACs."""
    setting, space = ready.setting, ready.space
    full, train = space.macs(space.full()), ready.training(0)
    once = training_cost(ready, train, setting.images, full)
    config = pas_config(ready, 0, "ms")
    in_all = once
    print(f"{ready.name}: full {full / 1e6:.2f} MMACs, {1e3 * ready.full_ms:.1f} us predicted; GMACs a seed:")
    print(f"  the full network, once: {once:.0f}")
    for share in setting.shares:
        macs = space.macs(uniform(space, ready.budget(share)).candidate.choice)
        judged = 1e-9 * config.candidates * (config.calibration_images + setting.valid) * macs
        one = training_cost(ready, train, setting.images, macs)
        masks = training_cost(ready, config.training, setting.images, full)
        both = SEARCH_SHARE + TUNING_SHARE
        cost = masks + judged + TUNING_SHARE * one + 2 * both * one + (1 + both) * one
        print(f"  at {share:.0%}: a search {masks + judged:.0f}, all methods {cost:.0f}")
        in_all += cost
    print(f"  in all {in_all:.0f}, with {seeds} seeds {seeds * in_all:.0f}")
    return in_all


def report(path: Path) -> None:
    """A Markdown table a setting: means over seeds, and seed-paired differences to uniform scaling at the same
    milliseconds."""
    lines = list(Rows(path, float("inf")).known.values())
    for name in dict.fromkeys(row["setting"] for row in lines):
        found = Found.of(lines, name, "pas")
        print(f"\n{name}: {found.kind} ms; differences paired by seed, ± standard error\n")
        print(f"| ms share | method | n | ms | {METRICS.get(name, 'metric')} | over uniform | loss | GMACs |")
        print("|---|---|---|---|---|---|---|---|")
        for share in sorted({row["share"] for row in found.rows}, key=float, reverse=True):
            for method in METHODS:
                mine = [r for r in found.rows if (r["share"], r["method"]) == (share, method)]
                if not mine:
                    continue
                values, loss, gmacs = (
                    np.mean([float(row[column]) for row in mine]) for column in ("accuracy", "nll", "gmacs")
                )
                gain = "" if method == "uniform" else spread(found.above_uniform(mine), 1.0, 4)
                ms = np.mean([found.ms(r) for r in mine])
                numbers = f"{ms:.4f} | {values:.4f} | {gain} | {loss:.4f} | {gmacs:.0f}"
                print(f"| {share} | {method} | {len(mine)} | {numbers} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "search", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", action="append", default=[], choices=list(SETTINGS), help="all by default")
    parser.add_argument("--output", type=Path, default=Path("build/pas_tasks.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", default=[], choices=COMPARED, help="all of them by default")
    parser.add_argument("--share", action="append", default=[], type=float, help="by default all of the setting's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the line that ends later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
        return 0
    rows = Rows(asked.output, asked.seconds)
    for name in asked.setting or SETTINGS:
        prepared = ready(name, asked.device)
        if asked.part == "plan":
            plan(prepared, asked.seeds)
        elif asked.part == "measure":
            measure_rows(prepared, asked.output, asked.device)
        else:
            search(prepared, rows, asked.seeds, asked.method, asked.share)
    return 0


if __name__ == "__main__":
    leave(main)
