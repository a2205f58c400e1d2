"""Families found by architecture search or compound scaling: MnasNet, FBNet, Single-Path NAS, EfficientNet, TinyNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from unseen.layers import Activation, classifier, conv_bn, divisible
from unseen.mobile import inverted_residual


@dataclass(frozen=True)
class Stage:
    """``count`` inverted residuals; the first has the stride.

    ``squeeze``: share of the block's *input* channels inside the squeeze-and-excitation; 0 for none.
    """

    expansion: int
    kernel: int
    stride: int
    channels: int
    count: int = 1
    squeeze: float = 0.0
    skip: bool = True


def stages(table: Sequence[Stage], stem: int, head: int, act: Activation = nn.ReLU, classes: int = 1000) -> nn.Module:
    """A 3x3 stem of stride 2, the stages, a 1x1 head, and a classifier."""
    layers: list[nn.Module] = [conv_bn(3, stem, 3, 2, act=act)]
    channels = stem
    for stage in table:
        for block in range(stage.count):
            layers.append(
                inverted_residual(
                    channels,
                    channels * stage.expansion,
                    stage.channels,
                    stage.kernel,
                    stage.stride if block == 0 else 1,
                    act,
                    squeeze=max(1, int(channels * stage.squeeze)) if stage.squeeze else 0,
                    squeeze_act=act,
                    skip=stage.skip,
                )
            )
            channels = stage.channels
    return nn.Sequential(*layers, conv_bn(channels, head, 1, act=act), classifier(head, classes))


def mnasnet(version: str) -> nn.Module:
    """MnasNet "A1", "B1" (no gates) or "small".

    Reference: Tan et al., MnasNet, CVPR 2019, figure 7 and section 5; B1 and small as in the authors' code.
    """
    if version == "A1":
        table = [
            Stage(1, 3, 1, 16, skip=False),
            Stage(6, 3, 2, 24, 2),
            Stage(3, 5, 2, 40, 3, 0.25),
            Stage(6, 3, 2, 80, 4),
            Stage(6, 3, 1, 112, 2, 0.25),
            Stage(6, 5, 2, 160, 3, 0.25),
            Stage(6, 3, 1, 320),
        ]
        return stages(table, 32, 1280)
    if version == "B1":
        table = [
            Stage(1, 3, 1, 16, skip=False),
            Stage(3, 3, 2, 24, 3),
            Stage(3, 5, 2, 40, 3),
            Stage(6, 5, 2, 80, 3),
            Stage(6, 3, 1, 96, 2),
            Stage(6, 5, 2, 192, 4),
            Stage(6, 3, 1, 320, skip=False),
        ]
        return stages(table, 32, 1280)
    table = [
        Stage(1, 3, 1, 8, skip=False),
        Stage(3, 3, 2, 16),
        Stage(6, 3, 2, 16, 2),
        Stage(6, 5, 2, 32, 4, 0.25),
        Stage(6, 3, 1, 32, 3, 0.25),
        Stage(6, 5, 2, 88, 3, 0.25),
        Stage(6, 3, 1, 144),
    ]
    return stages(table, 8, 1280)


def fbnet_c() -> nn.Module:
    """FBNet-C. Reference: Wu et al., FBNet, CVPR 2019, figure 4 (the searched blocks)."""
    table = [
        Stage(1, 3, 1, 16),
        Stage(6, 3, 2, 24),
        Stage(1, 3, 1, 24, 2),
        Stage(6, 5, 2, 32),
        Stage(3, 5, 1, 32),
        Stage(6, 5, 1, 32),
        Stage(6, 3, 1, 32),
        Stage(6, 5, 2, 64),
        Stage(3, 5, 1, 64),
        Stage(6, 5, 1, 64, 2),
        Stage(6, 5, 1, 112, 3),
        Stage(3, 5, 1, 112),
        Stage(6, 5, 2, 184, 4),
        Stage(6, 3, 1, 352),
    ]
    return stages(table, 16, 1984)


def single_path_nas() -> nn.Module:
    """Single-Path NAS. Reference: Stamoulis et al., ECML-PKDD 2019, figure 5 (the searched network)."""
    table = [
        Stage(1, 3, 1, 16, skip=False),
        Stage(3, 3, 2, 24, 3),
        Stage(6, 5, 2, 40),
        Stage(3, 3, 1, 40, 3),
        Stage(6, 5, 2, 80),
        Stage(3, 3, 1, 80, 3),
        Stage(6, 5, 1, 96),
        Stage(3, 5, 1, 96, 3),
        Stage(6, 5, 2, 192, 4),
        Stage(6, 3, 1, 320, skip=False),
    ]
    return stages(table, 32, 1280)


_EFFICIENTNET = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def efficientnet(width: float = 1.0, depth: float = 1.0, *, lite: bool = False) -> nn.Module:
    """EfficientNet; ``lite`` has ReLU6 and no gates. B0 and Lite0 are width 1, depth 1.

    Reference: Tan and Le, EfficientNet, ICML 2019, table 1; Lite: the authors' published code.
    """
    table = [
        Stage(expansion, kernel, stride, divisible(channels * width), math.ceil(count * depth), 0.0 if lite else 0.25)
        for expansion, kernel, stride, channels, count in _EFFICIENTNET
    ]
    return stages(table, divisible(32 * width), divisible(1280 * width), nn.ReLU6 if lite else nn.SiLU)


def tinynet(width: float, depth: float) -> nn.Module:
    """TinyNet: EfficientNet-B0 shrunk; stem and head keep their widths.

    Reference: Han et al., Model Rubik's Cube, NeurIPS 2020, table 2 (width and depth of A to E).
    """
    table = [
        Stage(expansion, kernel, stride, divisible(channels * width), max(1, round(count * depth)), 0.25)
        for expansion, kernel, stride, channels, count in _EFFICIENTNET
    ]
    return stages(table, 32, max(1280, divisible(1280 * width)), nn.SiLU)
