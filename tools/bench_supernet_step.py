#!/usr/bin/env python
"""Measures what a step of a super-network costs beside a plain step at the same widths: CPU time and memory.

python tools/bench_supernet_step.py --device x86-ort-1t --setting resnet-14
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import ExitStack
from dataclasses import replace

import torch
from ending import leave
from search_settings import (
    SETTINGS,
    Ready,
    ready,
)
from torch import nn

from hwsearch.graph.surgery import shrink
from hwsearch.search.cafenet import train_supernet
from hwsearch.search.supernet import SuperNet
from hwsearch.search.supernet_training import min_min_step
from hwsearch.train.data import Batch, Shuffle
from hwsearch.train.loop import settings, train, training_batch
from hwsearch.train.seeds import generator
from hwsearch.train.strides import strided_inputs
from hwsearch.train.task import Classification

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the widths")
    parser.add_argument("--setting", default="resnet-14", choices=list(SETTINGS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    step_cost(ready(asked.setting, asked.device))
    return 0


if __name__ == "__main__":
    leave(main)
