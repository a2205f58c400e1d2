"""What the tests of CafeNet share: a small network, its space and task, and quick settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwsearch.graph.widths import WidthSpace
from hwsearch.search.cafenet import CafeNetConfig
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train.data import Batch, Shuffle, synthetic_images
from hwsearch.train.loop import TrainConfig, training_batch
from hwsearch.train.task import Classification

TRAINING = TrainConfig(steps=12, batch_size=16, learning_rate=0.1, seed=2, checkpoint_s=0)
CONFIG = CafeNetConfig(training=TRAINING, scoring=ScoringConfig(calibration_images=32, images=48, batch_size=16))


def small_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, 4),
    )  # fmt: skip


def small_space(model: nn.Module, quantum: int = 2) -> WidthSpace:
    return WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8), quantum=quantum)


def small_task() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batch_of(task: Classification, step: int) -> Batch:
    return training_batch(step, task.train, Shuffle(len(task.train), 16, 2), TRAINING)
