"""Property: whatever small network is drawn, its groups shrink exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from graph_checks import check_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One step of a random network: its kind, and numbers that the kind reads as it likes."""

    kind: str
    channels: int
    number: int
    norm: bool


class RandomNetwork(nn.Module):
    """A chain of steps on a feature map; steps can reach back to any earlier map of the same extent."""

    def __init__(self, steps: list[Step], head: str) -> None:
        super().__init__()
        self.steps, self.head = steps, head
        self.layers = nn.ModuleList()
        self.even: list[bool] = []  # decided at full width: the forward must not depend on how wide it is
        channels = [4]
        self.stem = nn.Conv2d(3, 4, 1)
        for step in steps:
            before = channels[-1]
            self.even.append(before % 2 == 0)
            other = channels[step.number % len(channels)]
            layer: nn.Module = nn.Identity()
            after = before
            if step.kind == "conv":
                layer, after = nn.Conv2d(before, step.channels, 3, padding=1, bias=step.norm), step.channels
            elif step.kind == "grouped":
                groups = next(g for g in (3, 2, 1) if before % g == 0)
                after = groups * (1 + step.channels % 3)
                layer = nn.Conv2d(before, after, 1, groups=groups)
            elif step.kind == "depthwise":
                after = before * (1 + step.number % 2)
                layer = nn.Conv2d(before, after, 3, padding=1, groups=before)
            elif step.kind == "residual":
                layer = nn.Conv2d(before, other, 1)
                after = other
            elif step.kind == "concat":
                after = before + other
            elif step.kind == "gate":
                layer = nn.Sequential(nn.Linear(before, 3), nn.ReLU(), nn.Linear(3, before))
            norm = nn.BatchNorm2d(after) if step.norm else nn.Identity()
            self.layers.append(nn.ModuleList([layer, norm]))
            channels.append(after)
        self.last = nn.Linear(channels[-1] * (16 if head == "flatten" else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for step, even, (layer, norm) in zip(self.steps, self.even, self.layers, strict=True):
            y, other = maps[-1], maps[step.number % len(maps)]
            if step.kind == "residual":
                y = layer(y) + other
            elif step.kind == "concat":
                y = torch.cat([y, other] if step.channels % 2 else [other, y], 1)
            elif step.kind == "gate":
                y = y * layer(y.mean((2, 3))).sigmoid()[:, :, None, None]
            elif step.kind == "halves" and even:
                a, b = y.chunk(2, 1)
                y = torch.cat([b, a], 1)
            elif step.kind in ("conv", "grouped", "depthwise"):
                y = layer(y)
            maps.append(F.silu(norm(y)))
        return self.last(maps[-1].flatten(1) if self.head == "flatten" else maps[-1].mean((2, 3)))


steps = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(["conv", "grouped", "depthwise", "residual", "concat", "gate", "halves"]),
        channels=st.integers(2, 6),
        number=st.integers(0, 5),
        norm=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(steps=steps, head=st.sampled_from(["flatten", "mean"]), seed=st.integers(0, 99))
def test_random_networks_shrink_exactly(steps: list[Step], head: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_exact(RandomNetwork(steps, head), torch.randn(2, 3, 4, 4, generator=generator), seed=seed)
