#!/usr/bin/env python
"""Measures the width table: how fast it prices candidates, and that its prices are the right ones.

    python tools/bench_width_table.py --device simulated
    python tools/bench_width_table.py --device x86-ort-1t --model resnet_small --quantum 1 --json

For each model and quantum, with the predictor of the device (a quick one is fitted for a simulated device without):

* **speed**: kernel terms a second on one core. Random candidates, as an array of widths, are priced by
  ``WidthTable.evaluate``: finding each width's class, all look-ups, and the network's own terms are in the time; laying
  out the table is not (its seconds are given). Terms are the kernels that the candidates' networks have, summed over
  the candidates, not the fewer look-ups that the table makes of them. The timing lock is held meanwhile.
* **difference**: largest relative difference to the predictor itself on the same kernels.
* **lowering**: relative difference to the predictor on the kernels that the runtime really makes of random candidates,
  which were not used for learning the template.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from ending import leave
from torch import Tensor, nn

from hwsearch.console import Console
from hwsearch.device.lock import timing_lock
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_template import LoweringTemplate
from hwsearch.latency.network import learnt
from hwsearch.latency.predictor import LatencyPredictor, OutOfRangeWarning
from hwsearch.latency.width_table import WidthTable
from hwsearch.models import mobilenetv2_small, resnet_small
from hwsearch.preparation import PREDICTOR
from hwsearch.reparam.fold import fold

REPEATS = 7


class DenseSmall(nn.Module):
    """Four dense steps (1x1, then 3x3) on 28x28, a transition and a head: every concatenation is a sum of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24 + 16 * i, 48, 1), nn.ReLU(), nn.Conv2d(48, 16, 3, padding=1), nn.ReLU())
            for i in range(4)
        )
        self.transition = nn.Conv2d(24 + 16 * 4, 32, 1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Conv2d(32, 64, 3, padding=1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(self.stem(x))]
        for step in self.steps:
            parts.append(step(torch.cat(parts, 1)))
        y = self.pool(torch.relu(self.transition(torch.cat(parts, 1))))
        logits: Tensor = self.classifier(torch.relu(self.head(y)).mean((2, 3)))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet_small": resnet_small, "mobilenetv2_small": mobilenetv2_small, "dense_small": DenseSmall,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One model at one quantum.

    Attributes:
        groups, log10_choices: of the space.
        asked, wrong, checked: choices lowered for the template, and how many of those of its last check were wrong.
        learn_s: 0 where the template was found beside the table.
        look_ups, entries, expand_s: tables, their entries, and seconds to price all entries.
        candidates, kernels, seconds, spread: how many were priced, their mean kernels, the median seconds of a few
            repeats and (largest - smallest) / median of them.
        terms_per_s: kernel terms a second.
        difference: largest relative difference to the predictor, over ``compared`` candidates.
        real, median_error, worst_error, unequal: candidates lowered for real, their relative errors, and how many had
            any.
    """

    model: str
    quantum: int
    groups: int
    log10_choices: float
    asked: int
    checked: int
    wrong: int
    learn_s: float
    look_ups: int
    entries: int
    expand_s: float
    candidates: int
    kernels: float
    seconds: float | None
    spread: float | None
    terms_per_s: float | None
    compared: int
    difference: float
    real: int = 0
    median_error: float | None = None
    worst_error: float | None = None
    unequal: int = 0


def predictor_of(device: Device, console: Console) -> LatencyPredictor:
    """The device's predictor; a quick one for a simulated device that has none."""
    folder = device.table_folder / PREDICTOR
    if (folder / "manifest.json").exists():
        return LatencyPredictor.load(folder)
    if not device.simulated:
        raise InputError(f"{device.name} has no predictor: run hwsearch profile and hwsearch fit first")
    from hwsearch.latency.profile import profile

    console.step(f"Profiling {device.name}: it has no predictor")
    with tempfile.TemporaryDirectory() as folder_name:
        away = replace(device, home=Path(folder_name))
        with open_session(away) as session:
            return LatencyPredictor(rounds=25, folds=3).fit(profile(away, minutes=60, networks=96, session=session))


def bench(name: str, quantum: int, session: DeviceSession, predictor: LatencyPredictor, asked: argparse.Namespace,
          console: Console) -> Result:  # fmt: skip
    """Both lines for one model at one quantum."""
    console.step(f"{name}, quantum {quantum}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    example = torch.zeros(1, 1, 28, 28)
    space = WidthSpace.from_model(model, example, quantum=quantum)
    lowering = Lowering(_Late(space, model, example), session)
    started = time.perf_counter()
    template = learnt(lowering, space, lambda done, most, words: console.say(f"  {done} of {most}: {words}"))
    learn_s = time.perf_counter() - started
    table = WidthTable(space, template, predictor)
    started = time.perf_counter()
    table.expand()
    expand_s = time.perf_counter() - started
    rng = np.random.default_rng(20)
    rows = _random(space, max(asked.candidates, asked.compared, 2000), rng)
    kernels = table.kernel_terms(rows[:2000]) / 2000
    compared = [WidthChoice(tuple(row)) for row in rows[: asked.compared].tolist()]
    own = np.array([predictor.network(template.kernels(choice)).ms for choice in compared])
    difference = float(np.abs(table.evaluate(rows[: asked.compared]) / own - 1).max())
    rows = rows[: asked.candidates]
    seconds = spread = rate = None
    if len(rows):
        times = _timed(lambda: table.evaluate(rows), console)
        seconds = float(np.median(times))
        spread, rate = float(np.ptp(times) / seconds), kernels * len(rows) / seconds
    result = Result(
        name, quantum, len(space.groups), round(space.log10_size, 2), template.check.asked, template.check.choices,
        template.check.wrong, round(learn_s, 1), len(table.factors), table.entries, round(expand_s, 1), len(rows),
        round(kernels, 2), seconds, spread, rate, len(compared), difference,
    )  # fmt: skip
    if asked.real:
        result = replace(result, **_against_runtime(space, template, table, predictor, lowering, asked.real))
    return result


class _Late:
    """A space's ONNX template, exported when the first network is wanted: a stored lowering needs none."""

    def __init__(self, space: WidthSpace, model: nn.Module, example: Tensor) -> None:
        self.space, self._made = space, None
        self._make = lambda: OnnxTemplate(space, fold(copy.deepcopy(model), example, require=False), example)

    def slice(self, choice: WidthChoice) -> bytes:
        self._made = self._made or self._make()
        return self._made.slice(choice)


def _random(space: WidthSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.choice(np.asarray(group.widths), count) for group in space.groups], axis=1)


def _timed(work: Callable[[], object], console: Console) -> np.ndarray:
    """Seconds of each repeat, after one to warm up."""
    with timing_lock(console.say):
        work()
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter_ns()
            work()
            times.append((time.perf_counter_ns() - started) / 1e9)
    return np.array(times)


def _against_runtime(
    space: WidthSpace, template: LoweringTemplate, table: WidthTable, predictor: LatencyPredictor, lowering: Lowering,
    count: int,
) -> dict[str, object]:  # fmt: skip
    rows = _random(space, count, np.random.default_rng(21))
    real = lowering.kernels([WidthChoice(tuple(row)) for row in rows.tolist()])
    wanted = np.array([predictor.network(kernels).ms for kernels in real])
    error = np.abs(table.evaluate(rows) / wanted - 1)
    return {
        "real": count, "median_error": float(np.median(error)), "worst_error": float(error.max()),
        "unequal": int((error > 1e-9).sum()),
    }  # fmt: skip


def _line(r: Result) -> str:
    real = (
        f"{r.real} lowered: median {r.median_error:.2%}, worst {r.worst_error:.2%}, {r.unequal} unequal"
        if r.median_error is not None and r.worst_error is not None
        else "not lowered"
    )
    speed = (
        f"{r.terms_per_s / 1e6:6.0f} M terms/s ({r.candidates} candidates of {r.kernels:.1f} kernels in"
        f" {r.seconds:.3f} s, n {REPEATS}, spread {r.spread:.0%}, {r.look_ups} look-ups)"
        if r.seconds is not None and r.terms_per_s is not None
        else f"not timed ({r.kernels:.1f} kernels, {r.look_ups} look-ups)"
    )
    return (
        f"{r.model:18} q{r.quantum:<2} {speed}; difference {r.difference:.1e} (n {r.compared}); "
        f"{real}; template: {r.asked} asked, {r.wrong} of {r.checked} wrong"
    )


def _cpu() -> str:
    """This machine's CPU, which need not be the device's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="name of the device, with its predictor beside its table")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--quantum", action="append", type=int, help="default: 1, 4 and 8")
    parser.add_argument("--candidates", type=int, default=1_000_000, help="candidates for the speed (1000000; 0: none)")
    parser.add_argument("--compared", type=int, default=500, help="candidates compared with the predictor (500)")
    parser.add_argument("--real", type=int, default=200, help="candidates lowered for real (200; 0: none)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    asked = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", OutOfRangeWarning)
    device = Device.load(asked.device)
    with open_session(device) as session:
        predictor = predictor_of(device, console)
        results = [
            bench(model, quantum, session, predictor, asked, console)
            for model in asked.model or MODELS
            for quantum in asked.quantum or (1, 4, 8)
        ]
    versions = {name: version(name) for name in ("numpy", "onnxruntime", "torch")}
    versions["python"] = platform.python_version()
    if asked.json:
        document = {
            "device": device.name, "machine": _cpu(), "cores": os.cpu_count(), "threads": 1, "versions": versions,
            "results": [asdict(result) for result in results],
        }  # fmt: skip
        print(json.dumps(document, indent=1))
    else:
        named = ", ".join(f"{name} {number}" for name, number in versions.items())
        print(f"device {device.name}; this machine: {_cpu()}, one thread; {named}")
        print("\n".join(map(_line, results)))
    return 0


if __name__ == "__main__":
    leave(main)
