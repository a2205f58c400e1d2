#!/usr/bin/env python
"""Measures MGAS on Fashion-MNIST: cells under a budget in ms, staged against whole, and against what is simpler.

    python tools/bench_mgas.py plan    --device x86-ort-1t                     # costs, nothing is trained
    python tools/bench_mgas.py search  --device x86-ort-1t --output build/mgas.csv --seconds 600
    python tools/bench_mgas.py measure --device x86-ort-1t --output build/mgas.csv
    python tools/bench_mgas.py report  --output build/mgas.csv

The super-network is ``cells_small`` (three cells of two nodes, four operations, 14x14 pixels after the stem). Budgets
are shares of its predicted milliseconds with everything kept. All networks that are compared are trained from scratch
alike.

* ``MGAS``; without filters, without regrowing, in one stage (for as many epochs in all); ``sparse``: an operation has
  a price beside its milliseconds, so that skips are not free.
* ``random``: random cells, uniformly narrowed until they keep the budget; as good as the mean of several.
* ``single path``: the super-network trained like MGAS's but without a price, then the two strongest edges of every node
  with the strongest operation of each (as DARTS does), uniformly narrowed until the budget is kept.
* ``MobileNetV2, CafeNet``: widths of MobileNetV2 by CafeNet, at the same milliseconds.

Every finished network is a line of the output file; a run that was stopped goes on. One torch thread; milliseconds are
predictions until ``measure``, which takes the timing lock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import leave
from search_settings import Rows
from torch import Tensor, nn

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.errors import HwsearchError, InfeasibleBudgetError
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.graph.widths import WidthSpace
from hwsearch.latency.measure import measure_many
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import current_check
from hwsearch.models import mobilenetv2_small
from hwsearch.models.cells import Blueprint, CellNetwork, Genotype
from hwsearch.preparation import PREDICTOR
from hwsearch.reparam.fold import fold
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.mgas import MGAS
from hwsearch.search.mgas_config import MgasConfig, schedule
from hwsearch.search.mgas_cost import DeviceCost, Sized
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.search.winner import finish, reset
from hwsearch.train.data import Batch, Examples, Shuffle, limit, split
from hwsearch.train.fashion_mnist import load_fashion_mnist
from hwsearch.train.loop import OwnRate, TrainConfig, evaluate, run_steps
from hwsearch.train.seeds import generator
from hwsearch.train.task import Classification

IMAGES, VALID, BATCH = 6000, 1000, 64
SHARES = (0.4, 0.25)
EPOCHS = 12.0  # of every compared network
INPUT = (1, 1, 28, 28)
NAME = "cells"
RANDOM = 2  # random cells a seed and budget
ABLATIONS: dict[str, dict[str, Any]] = {
    "MGAS": {},
    "MGAS, no filters": {"filters": False},
    "MGAS, no regrowing": {"regrow": 0.0},
    "MGAS, one stage": {"stages": 1},
    "MGAS, sparse": {"rho": 0.02},
}


@dataclass(frozen=True)
class Ready:
    """The super-network with its predicted milliseconds on a device."""

    blueprint: Blueprint
    device: Device
    session: DeviceSession
    predictor: LatencyPredictor
    cost: DeviceCost
    full_ms: float

    def budget(self, share: float) -> Budget:
        """The share of the whole super-network's milliseconds; a choice of widths costs them all."""
        return Budget([Limit(_Whole(self.full_ms), share * self.full_ms, 0.5, self.device.name)])

    def task(self, seed: int) -> tuple[Classification, Examples]:
        """Training and held-out images of a seed, and the test set."""
        train, test = load_fashion_mnist()
        train_part, held_out = split(limit(train, IMAGES + VALID, seed), VALID, seed)
        return Classification(train_part, held_out), test


@dataclass(frozen=True)
class _Whole:
    """A latency that knows one network."""

    full_ms: float

    def evaluate(self, choices: Any) -> Any:
        """Milliseconds (N,)."""
        return np.full(len(choices), self.full_ms)


def ready(device_name: str) -> Ready:
    """Load the device's predictor; its runtime is asked how it lowers networks, and nothing is timed."""
    device = Device.load(device_name)
    predictor = LatencyPredictor.load(device.table_folder / PREDICTOR)
    session = open_session(device)
    cost, whole = DeviceCost(predictor, session, INPUT), Genotype.full(Blueprint())
    return Ready(Blueprint(), device, session, predictor, cost, float(cost.ms([(whole, whole.widths())])[0]))


def training(seed: int) -> TrainConfig:
    """How one network is trained alone."""
    return replace(MgasConfig().winner, epochs=EPOCHS, batch_size=BATCH, seed=seed, checkpoint_s=15)


def mgas_config(seed: int, **changes: Any) -> MgasConfig:
    """The search as it is by default, at the bench's sizes; one stage has as many epochs in all as three."""
    base = MgasConfig()
    steady = replace(base.training, batch_size=BATCH, seed=seed, checkpoint_s=15)
    if changes.get("stages") == 1:
        changes["final_epochs"] = base.stages * base.stage_epochs + base.final_epochs
        changes["warmup_epochs"] = (base.stages + 1) * base.warmup_epochs
    return replace(base, training=steady, winner=training(seed), **changes)


# ---- what is compared ----


def searched(at: Ready, rows: Rows, method: str, share: float, seed: int) -> None:
    """A search and the network that it found."""
    task, test = at.task(seed)
    config = mgas_config(seed, **ABLATIONS[method])
    folder = rows.path.parent / "mgas" / f"{method.replace(', ', '-').replace(' ', '-')}-{share}-{seed}"
    network = CellNetwork(Genotype.full(at.blueprint))
    # the search is named by its blueprint; the whole super-network's own widths are not asked about
    space = WidthSpace((), network=None, model=network)  # type: ignore[arg-type]
    search = MGAS(space, at.budget(share), config, cost=at.cost, model=network, seed=seed, folder=folder)
    started = time.monotonic()
    found = search.search(task, None)
    assert found.model is not None
    tested = evaluate(found.model, task, test, config.winner)
    genotype = Genotype.from_dict(found.extra["genotype"])
    add(
        at, rows, method, share, seed, found.model, genotype, tested.metric, tested.loss, found.predicted_ms,
        {"cut_at_ends": found.extra["cut_at_ends"], "regrown": found.extra["regrown"],
         "seconds": round(time.monotonic() - started)},
    )  # fmt: skip


def drawn(at: Ready, rows: Rows, method: str, share: float, seed: int) -> None:
    """Random cells inside the budget."""
    rng, number = generator(seed, "random-cells", round(1000 * share)), 0
    while number < RANDOM:
        sized = narrowed(at, random_genotype(at.blueprint, rng), share * at.full_ms)
        if sized is not None:
            alone(at, rows, f"random {number}", share, seed, sized)
            number += 1


def random_genotype(blueprint: Blueprint, rng: np.random.Generator) -> Genotype:
    """One to three different operations on the edges into every node."""
    kept = []
    for _ in range(blueprint.cells):
        cell: list[list[str]] = [[] for _ in blueprint.edges()]
        for node in range(blueprint.nodes):
            units = [(e, o) for e, (_, n) in enumerate(blueprint.edges()) if n == node for o in blueprint.operations]
            for at in rng.choice(len(units), int(rng.integers(1, 4)), replace=False):
                cell[units[at][0]].append(units[at][1])
        kept.append(tuple(map(tuple, cell)))
    return Genotype(blueprint, tuple(kept))


def narrowed(at: Ready, genotype: Genotype, max_ms: float, nearest: float = 0.85) -> Sized | None:
    """The widest uniform scaling of a genotype inside the budget; None where it uses less than ``nearest`` of it."""
    quantum, full = MgasConfig().quantum, genotype.widths()
    tries = [
        {name: max(round(share * width / quantum), 1) * quantum for name, width in full.items()}
        for share in np.arange(1.0, 0.1, -0.0625)
    ]
    times = at.cost.ms([(genotype, widths) for widths in tries])
    fits = [(ms, number) for number, ms in enumerate(times) if ms <= max_ms]
    ms, number = max(fits, default=(0.0, 0))
    return (genotype, tries[number]) if ms >= nearest * max_ms else None


def single_path(at: Ready, rows: Rows, method: str, share: float, seed: int) -> None:
    """The strongest paths of a super-network that was trained without a price."""
    scores = rows.path.parent / "mgas" / f"single-path-{seed}"
    task, _ = at.task(seed)
    genotype = strongest(at.blueprint, task, scores, seed)
    sized = narrowed(at, genotype, share * at.full_ms, nearest=0.0)
    if sized is None:
        raise HwsearchError(f"the single path of seed {seed} is above the budget at every width")
    alone(at, rows, method, share, seed, sized)


def strongest(blueprint: Blueprint, task: Classification, folder: Path, seed: int) -> Genotype:
    """Of every node the two edges of highest scores, each with its best operation (DARTS's discretisation)."""
    config = mgas_config(seed)
    torch.manual_seed(seed)
    net = CellSuperNet(blueprint, stages=(blueprint.cells,), filters=False)
    per_epoch = Shuffle(len(task.train), BATCH, 0).steps_per_epoch
    phases = schedule(config, per_epoch, config.stages)
    total = phases[-1].start + phases[-1].steps

    def step(_: int, batch: Batch) -> Tensor:
        loss: Tensor = task.loss(net(batch[0]), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in net.named_parameters():
            if name.endswith("threshold"):
                parameter.grad = None
        nn.utils.clip_grad_norm_([p for n, p in net.named_parameters() if "gates" not in n], config.clip)
        return loss.detach()

    own = {
        name: OwnRate(config.score_rate / config.training.learning_rate, config.gate_momentum)
        for name, _ in net.named_parameters()
        if name.endswith(".score")
    }
    run_steps(
        net, task.train, replace(config.training, steps=total), step,
        identity={"kind": "single-path"}, own=own, folder=folder,
    )  # fmt: skip
    kept = []
    for c in range(blueprint.cells):
        cell: list[list[str]] = [[] for _ in blueprint.edges()]
        for n, units in enumerate(net.of_node):
            scores = net.operation_gate(c, n).scores().tolist()
            best: dict[int, tuple[float, str]] = {}
            for (edge, name), score in zip(units, scores, strict=True):
                best[edge] = max(best.get(edge, (0.0, "")), (score, name))
            for edge in sorted(best, key=lambda e: best[e], reverse=True)[:2]:
                cell[edge] = [best[edge][1]]
        kept.append(tuple(map(tuple, cell)))
    return Genotype(blueprint, tuple(kept))


def alone(at: Ready, rows: Rows, method: str, share: float, seed: int, sized: Sized) -> None:
    """Train one network of cells from scratch and test it."""
    genotype, widths = sized
    if rows.has_any("mgas", NAME, method, share, seed):
        return
    task, test = at.task(seed)
    network = CellNetwork(genotype, widths)
    reset(network, seed)
    finish(network, task, training(seed))
    tested = evaluate(network, task, test, training(seed))
    ms = float(at.cost.ms([sized])[0])
    add(at, rows, method, share, seed, network, genotype, tested.metric, tested.loss, ms, {})


def mobilenet(at: Ready, rows: Rows, method: str, share: float, seed: int) -> None:
    """MobileNetV2 with widths by CafeNet at the same milliseconds."""
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.search.cafenet import CafeNet, CafeNetConfig
    from hwsearch.search.evolution import EvolutionSettings
    from hwsearch.search.scoring import ScoringConfig

    torch.manual_seed(0)
    model = mobilenetv2_small().eval()
    space = WidthSpace.from_model(model, torch.zeros(INPUT), quantum=2, minimum=0.125)
    latency = NetworkLatency(space, at.predictor).prepare()
    budget = Budget([Limit(latency, share * at.full_ms, 0.5, at.device.name)])
    task, test = at.task(seed)
    config = CafeNetConfig(
        training=TrainConfig(steps=1200, batch_size=BATCH, seed=seed, checkpoint_s=15), winner=training(seed),
        evolution=EvolutionSettings(population=20, generations=50, evaluations=200), scoring=ScoringConfig(images=1000),
    )  # fmt: skip
    try:
        budget.check_reachable(space)
    except InfeasibleBudgetError as error:
        print(f"MobileNetV2 is left out at {share}: {error}", file=sys.stderr)
        return
    folder = rows.path.parent / "mgas" / f"mobilenet-{share}-{seed}"
    found = CafeNet(space, budget, config, model=model, seed=seed, folder=folder).search(task, None)
    assert found.model is not None
    tested = evaluate(found.model, task, test, training(seed))
    note = {"mobilenet": list(found.choice.widths)}
    add(at, rows, method, share, seed, found.model, None, tested.metric, tested.loss, found.predicted_ms, note)


METHODS: dict[str, Callable[[Ready, Rows, str, float, int], None]] = {
    **dict.fromkeys(ABLATIONS, searched),
    "random": drawn,
    "single path": single_path,
    "MobileNetV2, CafeNet": mobilenet,
}


def add(
    at: Ready,
    rows: Rows,
    method: str,
    share: float,
    seed: int,
    network: nn.Module,
    genotype: Genotype | None,
    accuracy: float,
    nll: float,
    predicted_ms: float,
    note: dict[str, Any],
) -> None:
    """A line of a finished network, whose ONNX file is kept for ``measure``."""
    onnx = export_onnx(fold(network.eval(), torch.zeros(INPUT), require=False), torch.zeros(INPUT))
    name = hashlib.sha256(onnx).hexdigest()[:16]
    folder = rows.path.parent / "mgas" / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.onnx").write_bytes(onnx)
    if genotype is not None:
        note = {**note, "kept": genotype.count, "genotype": genotype.to_dict()["kept"]}
    parameters = sum(p.numel() for p in network.parameters())
    rows.add(
        ("mgas", NAME, method, share, seed, name), accuracy=accuracy, nll=nll, predicted_ms=predicted_ms,
        note=json.dumps({**note, "parameters": parameters}),
    )  # fmt: skip


def search(at: Ready, rows: Rows, seeds: int, methods: Sequence[str], shares: Sequence[float]) -> None:
    """Every method at every budget, seed by seed; ablations at the first budget alone."""
    for seed in range(seeds):
        for share in shares or SHARES:
            for method in methods or METHODS:
                ablation = method in ABLATIONS and method != "MGAS"
                if ablation and share != SHARES[0]:
                    continue
                last = f"random {RANDOM - 1}" if method == "random" else method
                if not rows.has_any("mgas", NAME, last, share, seed):
                    rows.check()
                    METHODS[method](at, rows, method, share, seed)


def measure_rows(at: Ready, rows: Rows) -> None:
    """Every network of the file that has no measured line yet; networks are timed in turn, a dozen together."""
    wanted = sorted({key[5] for key in rows.known if key[0] == "mgas"})
    left = [name for name in wanted if not rows.has("measured", NAME, "", "", "", name)]
    reference_ms = current_check(at.device, at.session, lambda line: print(line, file=sys.stderr)).reference_ms
    folder = rows.path.parent / "mgas" / "networks"
    for start in range(0, len(left), 12):
        part = left[start : start + 12]
        files = [(name, (folder / f"{name}.onnx").read_bytes()) for name in part]
        timings = measure_many(files, at.session, reference_ms=reference_ms, allow_unfolded=True)
        for name, found in zip(part, timings, strict=True):
            rows.add(("measured", NAME, "", "", "", name), note=f"{found.measured_ms:.6g} ms measured")


def report(path: Path) -> None:
    """A Markdown table: accuracy at milliseconds by method and budget."""
    lines = list(Rows(path, float("inf")).known.values())
    measured = {r["widths"]: float(r["note"].split()[0]) for r in lines if r["part"] == "measured"}
    ours = [r for r in lines if r["part"] == "mgas"]
    kind = "measured" if ours and all(r["widths"] in measured for r in ours) else "predicted"
    if ours:
        print(f"\nAccuracy on the test set, mean over seeds ± standard error; {kind} ms\n")
        print("| ms share | method | n | ms | accuracy | over random | NLL | parameters |")
        print("|---|---|---|---|---|---|---|---|")
    for share in sorted({r["share"] for r in ours}, key=float, reverse=True):
        by_method: dict[str, dict[str, list[dict[str, str]]]] = {}
        for row in ours:
            if row["share"] == share:
                method = "random" if row["method"].startswith("random") else row["method"]
                by_method.setdefault(method, {}).setdefault(row["seed"], []).append(row)
        for method in (m for m in METHODS if m in by_method):
            print(f"| {share} | {method} | {row_text(by_method[method], by_method.get('random'), measured, kind)} |")


def row_text(
    mine: dict[str, list[dict[str, str]]],
    random: dict[str, list[dict[str, str]]] | None,
    measured: dict[str, float],
    kind: str,
) -> str:
    """The numbers of one line; several networks of a seed count as their mean."""

    def mean(rows: list[dict[str, str]], name: str) -> float:
        return float(np.mean([float(r[name]) for r in rows]))

    every = [row for rows in mine.values() for row in rows]
    ms = np.mean([measured[r["widths"]] if kind == "measured" else float(r["predicted_ms"]) for r in every])
    accuracy = np.asarray([mean(rows, "accuracy") for rows in mine.values()])
    gain = ""
    if random is not None and mine is not random:
        gains = [
            100 * (mean(rows, "accuracy") - mean(random[s], "accuracy")) for s, rows in mine.items() if s in random
        ]
        if gains:
            error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
            gain = f"{np.mean(gains):+.2f}{error}"
    error = f" ± {accuracy.std(ddof=1) / len(accuracy) ** 0.5:.4f}" if len(accuracy) > 1 else ""
    nll = np.mean([mean(rows, "nll") for rows in mine.values()])
    parameters = np.mean([json.loads(r["note"])["parameters"] for r in every])
    return f"{len(accuracy)} | {ms:.4f} | {accuracy.mean():.4f}{error} | {gain} | {nll:.4f} | {parameters:,.0f}"


def plan(at: Ready, seeds: int) -> None:
    """What it costs before it is started: seconds of a step of the whole super-network, here and now, times steps."""
    per_epoch = Shuffle(IMAGES, BATCH, 0).steps_per_epoch
    phases = schedule(mgas_config(0), per_epoch, 3)
    task, _ = at.task(0)
    batch = tuple(task.train.take(np.arange(BATCH)))
    net = CellSuperNet(at.blueprint, stages=(1, 2, 3)).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = (batch[0].to(memory_format=torch.channels_last), *batch[1:])
    each = []
    for stage in range(3):
        times = []
        for _ in range(4):
            started = time.perf_counter()
            task.loss(net(batch[0], stage), batch).backward()
            times.append(time.perf_counter() - started)
        each.append(min(times))
    staged = sum(phase.steps * each[phase.stage] for phase in phases)
    whole = sum(phase.steps for phase in phases) * each[2]
    train = EPOCHS * per_epoch * each[2]
    print(
        f"whole super-network {1e3 * at.full_ms:.0f} us predicted; seconds a step of stages 1, 2, 3: "
        f"{', '.join(f'{seconds:.3f}' for seconds in each)}"
    )
    print(f"a search in three stages {staged / 60:.1f} min at most (nothing pruned), in one {whole / 60:.1f} min")
    in_all = 0.0
    for share in SHARES:
        one = share * train
        searches = staged + one + (2 * (staged + one) + whole + one if share == SHARES[0] else 0.0)
        in_all += searches + RANDOM * one + one + 6 * one
    in_all += whole
    print(f"a compared network {SHARES[0] * train / 60:.1f} and {SHARES[1] * train / 60:.1f} min")
    print(f"a seed {in_all / 60:.0f} min, {seeds} seeds {seeds * in_all / 60:.0f} min of one core")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "search", "measure", "report"))
    parser.add_argument("--device", default="x86-ort-1t", help="its predictor prices the cells")
    parser.add_argument("--output", type=Path, default=Path("build/mgas.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", default=[], choices=list(METHODS), help="all of them by default")
    parser.add_argument("--share", action="append", default=[], type=float, help=f"by default {SHARES}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the line that ends later")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        report(asked.output)
        return 0
    at = ready(asked.device)
    with at.session:
        if asked.part == "plan":
            plan(at, asked.seeds)
        else:
            rows = Rows(asked.output, asked.seconds)
            if asked.part == "measure":
                measure_rows(at, rows)
            else:
                search(at, rows, asked.seeds, asked.method, asked.share)
    return 0


if __name__ == "__main__":
    leave(main)
