"""Networks that hard use asks for: one that works, and many that do not."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

NOT_A_FACTORY = 3


def small(width: int = 8) -> nn.Module:
    """Two convolutions and a classifier on (N, 1, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def empty() -> nn.Module:
    """No layer at all."""
    return nn.Sequential()


def identity() -> nn.Module:
    """One layer that does nothing."""
    return nn.Identity()


def many(layers: int = 10_000) -> nn.Module:
    """A very deep network: convolutions of one channel."""
    return nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(layers)])


def deep_classifier() -> nn.Module:
    """A very deep network of ten classes."""
    return nn.Sequential(*many(), nn.Flatten(), nn.Linear(784, 10))


def deep_norms(pairs: int = 5000) -> nn.Module:
    """A very deep network of which half is folded away."""
    return nn.Sequential(*[layer for _ in range(pairs) for layer in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))])


def nested() -> nn.Module:
    """Modules inside each other, deeper than Python's stack."""
    model: nn.Module = nn.Conv2d(1, 1, 1)
    for _ in range(5000):
        model = nn.Sequential(model)
    return model


def spoilt(value: float = float("nan")) -> nn.Module:
    """A weight that is no number."""
    model = small()
    with torch.no_grad():
        model[7].weight[0, 0] = value  # type: ignore[index]
    return model


def raises() -> nn.Module:
    raise KeyError("no such weights")


def leaves() -> nn.Module:
    sys.exit(0)


def number() -> Any:
    return 42


class _Forward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)


class Broken(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("wires\ncrossed")


class Leaving(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        sys.exit(0)


class Pair(_Forward):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class Words(_Forward):
    def forward(self, x: Tensor) -> str:
        return "a label"


class Nothing(_Forward):
    def forward(self, x: Tensor) -> None:
        self.conv(x)


class DependsOnData(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > 0 else self.conv(-x)


class Grows(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, : int(x.abs().sum()) % 3 + 1]


class Recursive(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Empty(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :0]


class Complex(_Forward):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.conv(x))


def unbalanced() -> nn.Module:
    """Layers whose channels do not fit."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(8, 4, 3))


def loud() -> nn.Module:
    """A factory that prints: standard output belongs to results."""
    print("loading ...")
    return small()
