"""Small models, one for each thing that makes lowering depend on widths, and their templates."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthSpace
from hwsearch.reparam.fold import fold


class Plain(nn.Sequential):
    """Convolutions, a pool, a flatten and linear layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 20, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(20 * 16, 12), nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip


class Residual(nn.Module):
    """Two additions in a row, so that a layout is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.inner:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class DepthWise(nn.Sequential):
    """Point-wise, depth-wise, point-wise."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 24, 1), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, stride=2, groups=24), nn.ReLU6(), nn.Conv2d(24, 16, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip


class Squeezed(nn.Module):
    """Squeeze and excitation: a product with one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.tail = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.tail(x * gate)).mean((2, 3)))


class Joined(nn.Module):
    """Dense connections: what follows a concatenation depends on sums of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.grow = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(2))
        self.mix = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(self.stem(x))]
        for layer in self.grow:
            parts.append(torch.relu(layer(torch.cat(parts, 1))))
        return self.head(torch.relu(self.mix(torch.cat(parts, 1))).mean((2, 3)))


MODELS: dict[str, type[nn.Module]] = {
    "plain": Plain, "residual": Residual, "depthwise": DepthWise, "squeezed": Squeezed, "joined": Joined,
}  # fmt: skip


@cache
def onnx_template(name: str, quantum: int = 1) -> OnnxTemplate:
    """A model's width space as ONNX, on 8x8 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    example = torch.zeros(1, 1, 8, 8)
    space = WidthSpace.from_model(model, example, quantum=quantum)
    return OnnxTemplate(space, fold(copy.deepcopy(model), example, require=False), example, check=False)


def other(space: Any, widths: dict[int, tuple[int, ...]]) -> WidthSpace:
    """The space with further widths dropped from some groups (by index)."""
    return space.restrict({space.groups[index].name: kept for index, kept in widths.items()})
