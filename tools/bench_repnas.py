#!/usr/bin/env python
"""Measures branch search: is a network with searched branches as accurate as one with all, and cheaper to train?

    python tools/bench_repnas.py plan                                             what the training will take
    python tools/bench_repnas.py train  --output build/repnas.csv --seconds 600   resumes
    python tools/bench_repnas.py time   --output build/repnas.csv                 on a quiet machine
    python tools/bench_repnas.py time   --output build/repnas.csv --device x86-ort-1t
    python tools/bench_repnas.py report --output build/repnas.csv

A RepVGG-like host on Fashion-MNIST, trained on the same batches for the same number of steps: ``plain`` (3x3 alone),
``repvgg``, ``dbb`` (four branches), ``random`` (subsets of the ODBB space, drawn once from those that the search may
choose), ``searched`` (RepNAS, in those same steps) and ``published`` (RepNAS as its paper has it) at one number of
branches. Six paired seeds. Every finished training is a
line of the output file and an unfinished one has a checkpoint beside it, so a run that was stopped goes on.

Activation memory is what autograd keeps for the backward pass of one batch, counted, not sampled. ``time`` takes the
timing lock: seconds of a training step of every method in turn (for ``searched`` the found network's, and that of the
search's own steps beside it), and with ``--device`` the folded networks' milliseconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from ending import leave
from torch import Tensor, nn

from hwsearch.device.check import DeviceCheck
from hwsearch.device.lock import background_lock, timing_lock
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.latency.measure import measure_many
from hwsearch.models.repvgg import repvgg_small
from hwsearch.reparam.fold import fold
from hwsearch.search.repnas import BranchBudget, RepNAS, RepNASConfig
from hwsearch.search.repnas_sampler import choose, noise
from hwsearch.search.repnas_space import BranchSpace, Mask
from hwsearch.train.data import Examples
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.task import Task, load_task

METHODS = ("plain", "repvgg", "dbb", "random", "searched", "published")
BRANCHES = {"plain": ("kxk",), "repvgg": "repvgg", "dbb": "dbb"} | dict.fromkeys(METHODS[3:], "odbb")
WIDTHS = (12, 16, 32, 64)
BATCH = 64
#: Share of all searchable branches that random and searched keep: two a layer on average.
KEPT = 0.34


@dataclass(frozen=True)
class Line:
    """One finished training."""

    method: str
    seed: int
    steps: int
    accuracy: float
    nll: float
    branches: int
    activation_mb: float
    fold_error: float
    folded: str
    mask: str


def config(seed: int, steps: int) -> TrainConfig:
    """The same training for all methods."""
    return TrainConfig(steps=steps, batch_size=BATCH, learning_rate=0.1, seed=seed, threads=1, checkpoint_s=10)


def make(method: str, seed: int) -> nn.Module:
    """The host with a method's branches; first weights by seed."""
    torch.manual_seed(seed)
    return repvgg_small(branches=BRANCHES[method], widths=WIDTHS)


def random_mask(space: BranchSpace, seed: int) -> Mask:
    """As many branches as the search may keep, drawn evenly."""
    units = space.legal.astype(np.float64)
    return choose(space, noise(seed, 0, space.legal.shape), units, BranchBudget(limit=KEPT).amount(units), whole=True)


def train_one(method: str, seed: int, steps: int, task: Task, test: Examples, folder: Path) -> Line:
    """Train one network, or go on with it."""
    model, mask, settings = make(method, seed), None, config(seed, steps)
    space = BranchSpace.of(model)
    if method in ("searched", "published"):
        made = RepNASConfig if method == "searched" else RepNASConfig.published
        found = RepNAS(model, made(budget=BranchBudget(limit=KEPT), training=settings)).search(
            task, None, folder=folder
        )
        mask = np.array(found.mask)
    else:
        if method == "random":
            mask = random_mask(space, seed)
            space.apply(model, mask)
        train(model, task, settings, folder=folder)
    with background_lock():
        told = evaluate(model, task, test, settings)
        x = test.take(np.arange(64))[0]
        folded = fold(model, x, minimal=False)
        with torch.no_grad():
            expected = model(x)
            error = float((folded(x) - expected).abs().max() / expected.abs().max())
    running = [sum(block.mask) - int("identity" in block.kinds) for block in space.blocks(model)]
    return Line(
        method, seed, steps, told.metric, told.loss, sum(running), activation_mb(model), error, shapes(folded),
        "" if mask is None else json.dumps(np.asarray(mask, dtype=int).tolist()),
    )  # fmt: skip


def shapes(folded: nn.Module) -> str:
    """The convolutions of a folded network: what its milliseconds follow from."""
    layers = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    return " ".join(f"{c.in_channels}-{c.out_channels}:{c.kernel_size[0]}x{c.kernel_size[1]}" for c in layers)


def activation_mb(model: nn.Module) -> float:
    """Megabytes of activations that autograd keeps of one training batch (parameters and equal storages once)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
        size = sum(kept.values()) / 1e6
    del out
    model.eval()
    model.load_state_dict(state)
    return size


def restored(line: Line) -> nn.Module:
    """The method's network with its branches, untrained."""
    model = make(line.method, line.seed)
    if line.mask:
        BranchSpace.of(model).apply(model, np.array(json.loads(line.mask), dtype=np.bool_))
    return model


def time_steps(lines: Sequence[Line], repeats: int) -> dict[str, float]:
    """Median seconds of a training step, methods in turn; ``search``: the steps of the search itself; ``searched
    run``: the mean over both."""
    networks = {line.method: restored(line).train() for line in lines}
    searching = make("searched", 0).train()
    space = BranchSpace.of(searching)
    x = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    for model in (*networks.values(), searching):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, list[float]] = {name: [] for name in (*networks, "search")}
    with timing_lock():
        for repeat in range(repeats + 2):
            space.apply(searching, random_mask(space, repeat), torch.ones(space.legal.shape))
            for name, model in (*networks.items(), ("search", searching)):
                start = time.perf_counter_ns()
                model.zero_grad(set_to_none=True)
                model(x).square().mean().backward()
                if repeat >= 2:
                    found[name].append((time.perf_counter_ns() - start) / 1e9)
    medians = {name: statistics.median(values) for name, values in found.items()}
    if "searched" in medians:
        share = RepNASConfig().search
        medians["searched run"] = share * medians["search"] + (1 - share) * medians["searched"]
    return medians


def plan(steps: int, seeds: int, methods: Sequence[str]) -> str:
    """Minutes of the whole training, from a few steps of every method beside whatever else this machine does."""
    x = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    rows, total = [], 0.0
    for method in methods:
        model = make(method, 0).train()
        space = BranchSpace.of(model)
        if BRANCHES[method] == "odbb":
            space.apply(model, random_mask(space, 0))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        start = 0.0
        with background_lock():
            for step in range(6):
                start = time.process_time() if step <= 1 else start  # the first step is a warm-up
                model(x).square().mean().backward()
            seconds = (time.process_time() - start) / 5
        total += seconds
        rows.append(f"{method}: {1000 * seconds:.0f} ms a step, {steps * seconds / 60:.1f} min a seed")
    rows.append(f"{seeds} seeds of {steps} steps: {seeds} x {steps} x {1000 * total:.0f} ms = "
                f"{seeds * steps * total / 60:.0f} min of one core")  # fmt: skip
    return "\n".join(rows)


def folded_ms(lines: Sequence[Line], device: str) -> dict[str, str]:
    """Measured milliseconds of every method's folded network (minimal support), with their spread."""
    with background_lock():
        example = torch.zeros(1, 1, 28, 28)
        files = [(line.method, export_onnx(fold(restored(line).eval(), example), example)) for line in lines]
    with open_session(Device.load(device)) as session:
        check = None if session.device.simulated else DeviceCheck.load(session.device.table_folder)
        found = measure_many(files, session, reference_ms=check.reference_ms if check else None)
    return {name: f"{m.measured_ms:.4g} ms ±{m.spread:.1%}" for (name, _), m in zip(files, found, strict=True)}


def read(path: Path) -> list[Line]:
    """The lines so far; a torn last one is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("mask") is not None]
    kinds = {"seed": int, "steps": int, "branches": int}
    floats = ("accuracy", "nll", "activation_mb", "fold_error")
    kinds.update(dict.fromkeys(floats, float))  # type: ignore[arg-type]
    return [Line(**{name: kinds.get(name, str)(value) for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]


def append(path: Path, line: Line) -> None:
    """Add one line, with a header where the file is new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(line)))
            if new:
                writer.writeheader()
            writer.writerow(asdict(line))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable path") from error


def run_train(arguments: argparse.Namespace) -> None:
    """Seed by seed, so that what is finished is always paired."""
    end = time.monotonic() + arguments.seconds
    with background_lock():
        task, test = load_task(arguments.data, valid=2000, limit_to=arguments.images + 2000, seed=0)
    done = {(line.method, line.seed, line.steps) for line in read(arguments.output)}
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            if (method, seed, arguments.steps) in done:
                continue
            if time.monotonic() > end:
                return
            folder = arguments.output.with_suffix("") / f"{method}-{seed}-{arguments.steps}"
            line = train_one(method, seed, arguments.steps, task, test, folder)
            append(arguments.output, line)
            print(f"{method} seed {seed}: {line.accuracy:.2%}, {line.branches} branches", file=sys.stderr, flush=True)


def report(lines: Sequence[Line], chosen: Sequence[str]) -> str:
    """A table of means over the seeds that all methods have, and paired differences to dbb."""
    by = {(line.method, line.seed): line for line in lines}
    seeds = [s for s in sorted({line.seed for line in lines}) if all((m, s) in by for m in chosen)]
    if not seeds:
        return "no seed is finished for all methods"
    rows = [f"n = {len(seeds)} paired seeds, {lines[0].steps} steps of {BATCH}",
            "| method | accuracy | against dbb (paired, ± standard error) | branches | activations MB | fold error |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for method in chosen:
        mine = [by[method, s] for s in seeds]
        gaps = [100 * (by[method, s].accuracy - by["dbb", s].accuracy) for s in seeds]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        accuracy = 100 * statistics.mean(line.accuracy for line in mine)
        wrong = max(line.fold_error for line in mine)
        rows.append(
            f"| {method} | {accuracy:.2f} % | {statistics.mean(gaps):+.2f} ± {error:.2f} | "
            f"{statistics.mean(line.branches for line in mine):.1f} | "
            f"{statistics.mean(line.activation_mb for line in mine):.1f} | {wrong:.1g} |"
        )
    same = len({by[m, s].folded for m in chosen for s in seeds}) == 1
    rows.append(f"folded networks (whole kernels) have the same convolutions for all methods and seeds: {same}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["plan", "train", "time", "report"])
    parser.add_argument("--output", type=Path, default=Path("build/repnas.csv"))
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=list(METHODS[:5]), help="with dbb; published by wish"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", help="time: measure folded networks on this device too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(arguments.methods) - set(METHODS):
        raise InputError(f"there is no method {min(unknown)!r}: give some of {','.join(METHODS)}")
    if arguments.part == "plan":
        print(plan(arguments.steps, arguments.seeds, arguments.methods))
        return 0
    if arguments.part == "train":
        run_train(arguments)
        return 0
    lines = [line for line in read(arguments.output) if line.steps == arguments.steps]
    if arguments.part == "report":
        print(report(lines, arguments.methods))
        return 0
    seeds = sorted({line.seed for line in lines})
    chosen = [line for line in lines if seeds and line.seed == seeds[0]]
    steps = time_steps(chosen, arguments.repeats)
    for name, seconds in steps.items():
        print(f"{name}: {1000 * seconds:.1f} ms a step, {seconds / steps.get('dbb', seconds):.2f} of dbb")
    if arguments.device:
        for name, told in folded_ms(chosen, arguments.device).items():
            print(f"{name}: folded {told}")
    return 0


if __name__ == "__main__":
    leave(main)
