#!/usr/bin/env python
"""Is choosing the networks to time worth it? A campaign replayed from its own table, with and without the choice.

    python tools/bench_sampling.py --device x86-ort-1t

A fifth of the table's networks is held out. Of the others ``START`` are taken at random, then round by round more:
either at random, or, for every other place, the one of three candidates of which most is to be learnt
(``hwsearch.latency.active``). After some rounds a predictor is fitted to what was taken and judged on the held-out
networks. Nothing is timed. The table was itself measured by an actively sampled campaign, so its random part is less
plain than a plan's own draws.
"""

from __future__ import annotations

import argparse

import numpy as np
from ending import leave

from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.latency.active import CANDIDATES, Need
from hwsearch.latency.boosting import BoostSettings
from hwsearch.latency.model import KernelModel
from hwsearch.latency.table import LatencyTable, NetworkSample
from hwsearch.latency.training import Rows
from hwsearch.latency.validation import Calibration, out_of_fold, random_folds

START, ROUND, JUDGED = 96, 48, (192, 336)
SEEDS = 3


def error(taken: list[NetworkSample], held_out: list[NetworkSample]) -> np.ndarray:
    """Absolute relative error of each held-out network by a predictor of the taken ones."""
    rows, settings = Rows.of(taken), BoostSettings()
    checked = out_of_fold(rows, random_folds(len(taken), 3, 0), settings)
    model = KernelModel.fit(rows, settings, checked.kinds)
    calibration = Calibration.fit(checked.total_ms, rows.nodes, rows.measured_ms, model.overhead_ms)
    asked = Rows.of(held_out)
    kernel = model.row_ms(asked)[asked.kernel]
    kernel = kernel + model.context_ms(asked.network_mb)[asked.network] * asked.weight_mb[asked.kernel]
    total = np.bincount(asked.network, kernel, minlength=len(held_out))
    return np.asarray(np.abs(calibration.apply(total, asked.nodes) / asked.measured_ms - 1))


def replay(networks: list[NetworkSample], active: bool, seed: int) -> dict[int, np.ndarray]:
    """Errors by number of networks taken."""
    rng = np.random.default_rng([seed, 17])
    order = rng.permutation(len(networks)).tolist()
    held_out = [networks[at] for at in order[: len(order) // 5]]
    pool = order[len(order) // 5 :]
    taken, pool = pool[:START], pool[START:]
    found = {}
    while len(taken) < max(JUDGED):
        need = Need.of([networks[at] for at in taken], seed) if active else None
        for place in range(ROUND):
            candidates = pool[:CANDIDATES] if need is not None and place % 2 else pool[:1]
            chosen = 0
            if len(candidates) > 1 and need is not None:
                chosen = int(np.argmax(need.scores([networks[at].kernels for at in candidates])))
            taken.append(candidates[chosen])
            pool.remove(candidates[chosen])
        if len(taken) in JUDGED:
            found[len(taken)] = error([networks[at] for at in taken], held_out)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="x86-ort-1t", help="its table is replayed")
    asked = parser.parse_args()
    networks = list(LatencyTable.load(Device.load(asked.device).table_folder).networks)
    if len(networks) < 1.5 * max(JUDGED):
        raise InputError(f"the table has {len(networks)} networks; {round(1.5 * max(JUDGED))} are needed")
    print("| seed | networks | MAPE at random | chosen | within 10 % at random | chosen |\n|---|---|---|---|---|---|")
    pairs: dict[int, list[tuple[float, float]]] = {}
    for seed in range(SEEDS):
        plain, chosen = replay(networks, False, seed), replay(networks, True, seed)
        for count in JUDGED:
            a, b = plain[count], chosen[count]
            pairs.setdefault(count, []).append((float(a.mean()), float(b.mean())))
            inside = f"{(a <= 0.1).mean():.1%} | {(b <= 0.1).mean():.1%}"
            print(f"| {seed} | {count} | {a.mean():.2%} | {b.mean():.2%} | {inside} |", flush=True)
    for count, both in pairs.items():
        gains = np.array([1 - b / a for a, b in both])
        print(f"{count} networks: error {gains.mean():.1%} smaller, ± {gains.std(ddof=1):.1%} over {SEEDS} seeds")
    return 0


if __name__ == "__main__":
    leave(main)
