"""The few layers that most of the families share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


def divisible(channels: float, divisor: int = 8) -> int:
    """Channels rounded to a multiple, never down by more than a tenth.

    Reference: Sandler et al., MobileNetV2, CVPR 2018, the authors' published code.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    padding: int | None = None,
    act: Activation | None = nn.ReLU,
) -> nn.Sequential:
    """A convolution ("same" padding unless given), its batch normalisation, and an activation unless None."""
    pad = kernel // 2 if padding is None else padding
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


def depthwise(channels: int, kernel: int = 3, stride: int = 1, *, act: Activation | None = nn.ReLU) -> nn.Sequential:
    """A depth-wise convolution with its batch normalisation and activation."""
    return conv_bn(channels, channels, kernel, stride, groups=channels, act=act)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels.

    Reference: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, section 3.
    """

    def __init__(self, channels: int, hidden: int, *, act: Activation = nn.ReLU, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = act()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape."""
        scale: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * scale


class Residual(nn.Module):
    """``body(x) + shortcut(x)``, then an activation unless None."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: Activation | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.act = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the body's shape."""
        y: Tensor = self.act(self.body(x) + self.shortcut(x))
        return y


class Branches(nn.Module):
    """Runs branches side by side and joins their channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, sum of the branches' channels, H', W')``."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Global mean and one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
