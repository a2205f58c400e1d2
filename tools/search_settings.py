"""What the benches of searches share: networks on Fashion-MNIST, their data by seed, and files of finished rows.

``SETTINGS`` names networks with an amount of data, ``ready`` loads one with its width space and predicted milliseconds,
``Seed`` holds what one seed's searches share, ``Rows`` is the CSV file that a stopped run goes on with.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hwsearch.device.spec import Device
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.models import mobilenetv2_small, resnet_small, vgg_small
from hwsearch.preparation import PREDICTOR
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.cafenet import CafeNetConfig, train_supernet
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.grid import WidthGrid
from hwsearch.search.scoring import ScoringConfig
from hwsearch.search.supernet import SuperNet
from hwsearch.search.winner import train_choice
from hwsearch.train.data import Examples, TensorExamples, limit, split
from hwsearch.train.fashion_mnist import MEAN, STD, load_fashion_mnist
from hwsearch.train.loop import TrainConfig, evaluate
from hwsearch.train.task import Classification

HEADER = ("part", "setting", "method", "share", "seed", "widths", "accuracy", "nll", "predicted_ms", "gmacs", "note")


@dataclass(frozen=True)
class Setting:
    """One network on one amount of data.

    Attributes:
        side: images are averaged down to this many pixels a side (28 as they are).
        images: training images; ``valid`` more are held out for choosing.
        epochs: of a network trained alone; ``supernet_steps`` of the super-network.
        shares: budgets, as shares of the full network's predicted milliseconds.
    """

    model: Callable[[], nn.Module]
    side: int
    quantum: int
    minimum: float | int
    images: int
    valid: int
    epochs: float
    supernet_steps: int
    batch: int = 64
    shares: tuple[float, ...] = (0.6, 0.4, 0.28)


SETTINGS = {
    "resnet-14": Setting(resnet_small, 14, 2, 0.125, 2000, 1000, 16, 1000, shares=(0.4, 0.28, 0.6)),
    "resnet-14-all": Setting(resnet_small, 14, 2, 0.125, 55000, 5000, 2, 500, 128, shares=(0.5, 0.4)),
    "resnet-28": Setting(resnet_small, 28, 2, 0.125, 2000, 1000, 30, 1500),
    "resnet-28-all": Setting(resnet_small, 28, 2, 0.125, 55000, 5000, 2, 1000, 128),
    "vgg-14": Setting(lambda: vgg_small(width=0.5), 14, 2, 0.125, 2000, 1000, 30, 1500, shares=(0.4,)),
    "mobilenet-14": Setting(mobilenetv2_small, 14, 2, 0.125, 2000, 1000, 30, 1500, shares=(0.4,)),
}


@dataclass(frozen=True)
class Ready:
    """A setting with everything loaded."""

    name: str
    setting: Setting
    model: nn.Module
    space: WidthSpace
    latency: NetworkLatency
    full_ms: float
    device_name: str

    def one_channel(self) -> Ready:
        """The same network with widths in steps of one channel, which other tools' networks need."""
        return loaded(self.name, replace(self.setting, quantum=1, minimum=1), self.device_name)

    def budget(self, share: float) -> Budget:
        """The share of the full network's milliseconds, as a budget on the prediction itself."""
        return Budget([Limit(self.latency, share * self.full_ms, quantile=0.5)])

    def task(self, seed: int) -> tuple[Classification, Examples]:
        """Training and held-out images of a seed, and the test set."""
        train, test = (smaller(part, self.setting.side) for part in load_fashion_mnist())
        few = limit(train, self.setting.images + self.setting.valid, seed)
        train_part, held_out = split(few, self.setting.valid, seed)
        return Classification(train_part, held_out), test

    def training(self, seed: int) -> TrainConfig:
        """How one network is trained alone."""
        return TrainConfig(epochs=self.setting.epochs, batch_size=self.setting.batch, seed=seed, checkpoint_s=15)

    def supernet(self, seed: int, **changes: object) -> CafeNetConfig:
        """How a super-network is trained and judged."""
        training = TrainConfig(
            steps=self.setting.supernet_steps, batch_size=self.setting.batch, seed=seed, checkpoint_s=15
        )
        return CafeNetConfig(training=training, scoring=ScoringConfig(images=None), **changes)  # type: ignore[arg-type]

    def supernet_tmacs(self) -> float:
        """Image passes times MACs of that training, about: every other step the full network, else two patterns."""
        drawn = WidthGrid.of(self.space).sample(4000, np.random.default_rng(0))
        full, mean = self.space.macs(self.space.full()), float(self.space.macs_array(drawn).mean())
        return 1e-12 * self.setting.supernet_steps * self.setting.batch / 2 * (3 * full + 5 * mean)


def smaller(examples: TensorExamples, side: int) -> TensorExamples:
    """Images averaged down to ``side`` pixels a side."""
    if side == 28:
        return examples
    images = functional.adaptive_avg_pool2d(examples.inputs.float(), side).round().to(torch.uint8)
    return TensorExamples(images, examples.targets, mean=(MEAN,), std=(STD,))


def ready(name: str, device_name: str) -> Ready:
    """Load a setting; the space's lowering is learnt (not timed) where the device's folder lacks it."""
    return loaded(name, SETTINGS[name], device_name)


@cache
def loaded(name: str, setting: Setting, device_name: str) -> Ready:
    """The same of a setting itself."""
    torch.manual_seed(0)
    model = setting.model().eval()
    space = WidthSpace.from_model(
        model, torch.zeros(1, 1, setting.side, setting.side), quantum=setting.quantum, minimum=setting.minimum
    )
    device = Device.load(device_name)
    predictor = LatencyPredictor.load(device.table_folder / PREDICTOR)
    latency = NetworkLatency(space, predictor).prepare()
    return Ready(name, setting, model, space, latency, float(latency.evaluate([space.full().widths])[0]), device_name)


class Rows:
    """The output file: lines that are there are not made again."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.stop = path, time.monotonic() + seconds
        self.known: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.known = {self.key(row): row for row in csv.DictReader(file)}

    @staticmethod
    def key(row: dict[str, str]) -> tuple[str, ...]:
        """What a line is about."""
        return tuple(row[name] for name in HEADER[:6])

    def has(self, *key: object) -> bool:
        """Whether this line is there."""
        return tuple(map(str, key)) in self.known

    def add(self, key: Sequence[object], **values: object) -> None:
        """Append one line; stop the program where its time is over."""
        row = {name: "" for name in HEADER} | dict(zip(HEADER[:6], map(str, key), strict=True))
        row |= {name: f"{v:.6g}" if isinstance(v, float) else str(v) for name, v in values.items()}
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, HEADER, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.known[self.key(row)] = row
        print(" ".join(f"{row[name]}" for name in HEADER if row[name]), flush=True)
        self.check()

    def find(self, *key: object) -> dict[str, str]:
        """The line of these first columns."""
        wanted = tuple(map(str, key))
        return next(row for known, row in self.known.items() if known[: len(wanted)] == wanted)

    def has_any(self, *key: object) -> bool:
        """Whether a line of these first columns is there."""
        wanted = tuple(map(str, key))
        return any(known[: len(wanted)] == wanted for known in self.known)

    def check(self) -> None:
        """Stop where the time is over."""
        if time.monotonic() > self.stop:
            print("time is over; the same command goes on", file=sys.stderr)
            raise SystemExit(0)


CANDIDATES, UNIFORM = 200, (0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass
class Seed:
    """What one seed's searches share; each is made when it is first asked for, and its cost counted once."""

    ready: Ready
    seed: int
    folder: Path

    def path(self, name: str) -> Path:
        """A folder of this seed."""
        return self.folder / f"{self.ready.name}-{self.seed}" / name

    def config(self, **changes: object) -> CafeNetConfig:
        """The search as it is by default, at the settings' sizes."""
        base = self.ready.supernet(self.seed)
        evolution = EvolutionSettings(population=20, generations=50, evaluations=CANDIDATES)
        winner = self.ready.training(self.seed)
        return replace(base, evolution=evolution, winner=winner, **changes)  # type: ignore[arg-type]

    def pretrained(self) -> tuple[nn.Module, float]:
        """The full network, trained once, and what that cost."""
        task, _ = self.ready.task(self.seed)
        training = self.ready.training(self.seed)
        space = self.ready.space
        network, _ = train_choice(self.ready.model, space, space.full(), task, training, folder=self.path("full"))
        return network, training_cost(self.ready, training, len(task.train), space.macs(space.full()))

    def supernet(self, space: WidthSpace, name: str, **changes: object) -> tuple[SuperNet, float]:
        """A super-network over a space, and what it cost: full and sampled steps, patterns included."""
        config, (task, _) = self.config(**changes), self.ready.task(self.seed)
        net = train_supernet(space, self.ready.model, task, config, self.path(f"supernet-{name}"))
        full = space.macs(space.full())
        drawn = float(space.macs_array(WidthGrid.of(space).sample(4000, np.random.default_rng(0))).mean())
        passes = config.training.steps * config.training.batch_size / 2  # type: ignore[operator]  # every other step
        return net, 1e-9 * passes * (3 * full + (config.patterns + 3) * drawn)


def training_cost(ready: Ready, training: TrainConfig, examples: int, macs: int) -> float:
    """GMACs of one training: three passes a step."""
    return 3e-9 * training.total_steps(examples) * training.batch_size * macs


def alone(ready: Ready, rows: Rows, key: Sequence[object], choice: WidthChoice, seed: int, extra: float = 0.0) -> None:
    """Train one network from scratch and test it; ``extra`` is what finding its widths cost."""
    task, test = ready.task(seed)
    training = ready.training(seed)
    network, _ = train_choice(ready.model, ready.space, choice, task, training)
    tested = evaluate(network, task, test, training)
    steps = training.total_steps(len(task.train))
    rows.add(
        key, accuracy=tested.metric, nll=tested.loss,
        predicted_ms=float(ready.latency.evaluate([choice.widths])[0]),
        gmacs=extra + 3e-9 * steps * training.batch_size * ready.space.macs(choice),
        note=f"{ready.space.macs(choice)} MACs",
    )  # fmt: skip
