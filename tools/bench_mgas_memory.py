#!/usr/bin/env python
"""Measures what MGAS's search takes in three stages and in one: memory, and seconds of a step.

    python tools/bench_mgas_memory.py run    --device x86-ort-1t --output build/mgas_memory.csv
    python tools/bench_mgas_memory.py report --output build/mgas_memory.csv

The first steps of every phase of the search of ``bench_mgas.py`` at its first budget, each kind in a process of its
own: bytes that the forward pass keeps for the backward one, seconds of a step, and how far the process's resident
memory grew. One torch thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_mgas import NAME, SHARES, Ready, mgas_config, ready
from ending import leave
from search_settings import Rows
from torch import Tensor

from hwsearch.errors import HwsearchError
from hwsearch.search.mgas_config import schedule
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.search.mgas_stages import Stages, StageSearch
from hwsearch.train.data import Batch
from hwsearch.train.loop import OwnRate, run_steps

IMAGES, VALID, BATCH = 6000, 1000, 64


def memory(at: Ready, rows: Rows, device_name: str) -> None:
    """Both searches, each in a process of its own."""
    for stages in (3, 1):
        if rows.has_any("memory", NAME, f"{stages} stages"):
            continue
        command = [sys.executable, __file__, "one", "--device", device_name, "--stages", str(stages)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HwsearchError(f"the search in {stages} stages failed: {done.stderr.strip().splitlines()[-1]}")
        told = json.loads(done.stdout.splitlines()[-1])
        for phase in told["phases"]:
            key = ("memory", NAME, f"{stages} stages", "", phase["number"], "")
            rows.add(key, note=json.dumps({**phase, "resident_mb": told["resident_mb"]}))


def memory_of(at: Ready, stages: int, steps: int = 20) -> dict[str, Any]:
    """Bytes and seconds of the steps of every phase of a search at the first budget, its epochs cut to some steps."""
    task, _ = at.task(0)
    config = mgas_config(0, stages=stages)
    ends = [-(-at.blueprint.cells * (k + 1) // stages) for k in range(stages)]
    torch.manual_seed(0)
    net = CellSuperNet(at.blueprint, stages=ends, least=config.least)
    short = {"warmup_epochs": 0.25, "stage_epochs": 0.75, "final_epochs": 1.0, "prune_every": 0.25}
    if stages == 1:  # for as many steps in all as three stages have
        short |= {"warmup_epochs": 4 * 0.25, "final_epochs": 3 * 0.75 + 1.0}
    config = replace(config, **short)
    phases = schedule(config, steps, len(ends))
    inner = StageSearch(
        Stages(net, 8), task, at.cost, config.aim * SHARES[0] * at.full_ms, config, phases, seed=0,
        tell=lambda *_, **__: None,
    )  # fmt: skip
    found: dict[int, dict[str, list[float]]] = {}

    def step(number: int, batch: Batch) -> Tensor:
        at_phase = max(i for i, phase in enumerate(phases) if phase.start <= number)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        priced = (
            number in {phase.start for phase in phases}
            or number - phases[at_phase].start + 1 in phases[at_phase].commits
        )
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = inner.step(number, batch)
        mine = found.setdefault(at_phase, {"mb": [], "seconds": []})
        mine["mb"].append(sum(kept.values()) / 1e6)
        if not priced:  # asking the runtime is not the step's time
            mine["seconds"].append(time.perf_counter() - started)
        return loss

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = phases[-1].start + phases[-1].steps
    own = {
        name: OwnRate(speed / config.training.learning_rate, config.gate_momentum)
        for end, speed in (("score", config.score_rate), ("threshold", config.threshold_rate))
        for name, _ in inner.stages.named_parameters()
        if name.endswith(f".{end}")
    }
    run_steps(inner.stages, task.train, replace(config.training, steps=total), step, identity={}, own=own)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    told = [
        {
            "number": i,
            "stage": phases[i].stage,
            "steps": phases[i].steps,
            "mb": max(m["mb"]),
            "seconds": float(np.mean(m["seconds"])),
        }
        for i, m in sorted(found.items())
    ]
    return {"phases": told, "resident_mb": grown / 1e3}


def report(path: Path) -> None:
    """A Markdown table of the phases, and staged over whole."""
    lines = list(Rows(path, float("inf")).known.values())
    spent = [(r["method"], json.loads(r["note"])) for r in lines if r["part"] == "memory"]
    if spent:
        print("\n| search | phase | kept for backward, MB | s a step | largest resident growth, MB |")
        print("|---|---|---|---|---|")
        for method, phase in spent:
            cells = f"{phase['mb']:.1f} | {phase['seconds']:.3f} | {phase['resident_mb']:.0f}"
            print(f"| {method} | {phase['number']} | {cells} |")
        by_search = {m: [p for name, p in spent if name == m] for m in ("3 stages", "1 stages")}
        if all(by_search.values()):
            largest = [max(p["mb"] for p in phases) for phases in by_search.values()]
            seconds = [
                sum(p["seconds"] * p["steps"] for p in phases) / sum(p["steps"] for p in phases)
                for phases in by_search.values()
            ]
            print(
                f"\nstaged over whole: memory {largest[0] / largest[1]:.3f}, "
                f"seconds a step {seconds[0] / seconds[1]:.3f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "one", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the cells")
    parser.add_argument("--output", type=Path, default=Path("build/mgas_memory.csv"))
    parser.add_argument("--stages", type=int, default=3, help="one: of the search")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
        return 0
    at = ready(asked.device)
    with at.session:
        if asked.part == "one":
            print(json.dumps(memory_of(at, asked.stages)))
        else:
            memory(at, Rows(asked.output, float("inf")), asked.device)
    return 0


if __name__ == "__main__":
    leave(main)
