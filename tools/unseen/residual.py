"""ResNet, RegNet, DenseNet, the cells of NAS-Bench-201, and ConvNeXt (beyond the kernels of CNNs proper)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unseen.layers import Residual, SqueezeExcite, classifier, conv_bn


def _stem(channels: int) -> list[nn.Module]:
    return [conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return None if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride, act=None)


def resnet(repeats: Sequence[int], *, bottleneck: bool = False, small: bool = False, classes: int = 1000) -> nn.Module:
    """ResNet: basic or bottleneck blocks; ``small`` is the form for 32x32 images (3x3 stem, three stages from 16).

    Reference: He et al., CVPR 2016, table 1 and section 4.2; projection shortcuts (option B) where the shape changes,
    and the stride of a bottleneck in its 3x3 layer, as in every library since.
    """
    layers: list[nn.Module] = [conv_bn(3, 16)] if small else _stem(64)
    channels = width = 16 if small else 64
    for stage, count in enumerate(repeats):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                outputs = 4 * width
                body = nn.Sequential(
                    conv_bn(channels, width, 1),
                    conv_bn(width, width, 3, stride),
                    conv_bn(width, outputs, 1, act=None),
                )
            else:
                outputs = width
                body = nn.Sequential(conv_bn(channels, width, 3, stride), conv_bn(width, width, 3, act=None))
            layers.append(Residual(body, _shortcut(channels, outputs, stride), nn.ReLU))
            channels = outputs
        width *= 2
    return nn.Sequential(*layers, classifier(channels, classes))


def regnet_stages(slope: float, start: int, step: float, depth: int, group: int) -> list[tuple[int, int]]:
    """(width, blocks) of each stage: a line of widths, quantised to powers of ``step`` and to the group's width.

    Reference: Radosavovic et al., Designing Network Design Spaces, CVPR 2020, section 3.3, equations 2 to 4.
    """
    widths = []
    for block in range(depth):
        power = round(math.log((start + slope * block) / start) / math.log(step))
        width = round(start * step**power / 8) * 8
        widths.append(max(group, round(width / group) * group))
    return [(width, widths.count(width)) for width in sorted(set(widths))]


def regnet(
    slope: float, start: int, step: float, depth: int, group: int, *, squeeze: bool = False, classes: int = 1000
) -> nn.Module:
    """RegNetX, or RegNetY with ``squeeze`` (squeeze-and-excitation, a quarter of the block's input width).

    Reference: as ``regnet_stages``; bottleneck ratio 1, stem of 32 channels (section 4, figures 16 to 18).
    """
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
    channels = 32
    for width, count in regnet_stages(slope, start, step, depth, group):
        for block in range(count):
            stride = 2 if block == 0 else 1
            body = nn.Sequential(
                conv_bn(channels, width, 1),
                conv_bn(width, width, 3, stride, groups=width // group),
                *([SqueezeExcite(width, round(channels * 0.25))] if squeeze else []),
                conv_bn(width, width, 1, act=None),
            )
            layers.append(Residual(body, _shortcut(channels, width, stride), nn.ReLU))
            channels = width
    return nn.Sequential(*layers, classifier(channels, classes))


def _norm_relu_conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)]


class _DenseBlock(nn.Module):
    """Layers that each read the joined outputs of all before."""

    def __init__(self, inputs: int, growth: int, count: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for at in range(count):
            channels = inputs + at * growth
            first = _norm_relu_conv(channels, 4 * growth, 1) if bottleneck else []
            last = _norm_relu_conv(4 * growth if bottleneck else channels, growth, 3)
            self.layers.append(nn.Sequential(*first, *last))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet(
    repeats: Sequence[int],
    growth: int,
    stem: int,
    *,
    bottleneck: bool = True,
    small: bool = False,
    classes: int = 1000,
) -> nn.Module:
    """DenseNet(-BC, with ``bottleneck``: 1x1 layers and halving transitions); ``small`` is the form for 32x32 images.

    Reference: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 1 and section 4.2.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False)] if small else _stem(stem)
    channels = stem
    for at, count in enumerate(repeats):
        layers.append(_DenseBlock(channels, growth, count, bottleneck=bottleneck))
        channels += count * growth
        if at < len(repeats) - 1:
            reduced = channels // 2 if bottleneck else channels
            layers += [*_norm_relu_conv(channels, reduced, 1), nn.AvgPool2d(2)]
            channels = reduced
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), classifier(channels, classes))


_CELL_OPERATIONS = ("none", "skip", "conv1x1", "conv3x3", "avgpool3x3")
_CELL_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
#: The cell that makes the skeleton a ResNet, and one that searches in this space end at.
RESNET_CELL = ("conv3x3", "none", "conv3x3", "skip", "none", "skip")
SEARCHED_CELL = ("conv3x3", "conv3x3", "conv3x3", "skip", "conv3x3", "conv3x3")


def draw_cell(seed: int) -> tuple[str, ...]:
    """Operations on the six edges of a cell, drawn evenly until the input reaches the output.

    Reference: Dong and Yang, NAS-Bench-201, ICLR 2020, section 2.1. A cell whose output hangs on nothing is no network.
    """
    generator = random.Random(seed)
    while True:
        cell = tuple(generator.choice(_CELL_OPERATIONS) for _ in _CELL_EDGES)
        reached = {0}
        for (source, target), operation in zip(_CELL_EDGES, cell, strict=True):
            if source in reached and operation != "none":
                reached.add(target)
        if 3 in reached:
            return cell


def _relu_conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), *conv_bn(inputs, outputs, kernel, stride, act=None))


class _Cell(nn.Module):
    """Four nodes; each is the sum of its edges, and an edge that hangs on nothing is left out."""

    def __init__(self, cell: Sequence[str], channels: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict()
        reached = {0}
        for (source, target), operation in zip(_CELL_EDGES, cell, strict=True):
            if source in reached and operation != "none":
                reached.add(target)
                self.edges[f"{source}{target}"] = self._operation(operation, channels)

    @staticmethod
    def _operation(name: str, channels: int) -> nn.Module:
        if name == "skip":
            return nn.Identity()
        if name == "avgpool3x3":
            return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        return _relu_conv_norm(channels, channels, int(name[-1]))

    def forward(self, x: Tensor) -> Tensor:
        nodes = {0: x}
        for key, edge in self.edges.items():
            source, target = int(key[0]), int(key[1])
            value = edge(nodes[source])
            nodes[target] = nodes[target] + value if target in nodes else value
        return nodes[3]


def nasbench201(cell: Sequence[str], classes: int = 10) -> nn.Module:
    """The skeleton of NAS-Bench-201 for 32x32 images: three stages of five cells, 16, 32 and 64 channels.

    Reference: Dong and Yang, NAS-Bench-201, ICLR 2020, figure 1 and section 2.1.
    """
    layers: list[nn.Module] = [conv_bn(3, 16, act=None)]
    channels = 16
    for stage in range(3):
        if stage:
            wide = 2 * channels
            body = nn.Sequential(_relu_conv_norm(channels, wide, 3, 2), _relu_conv_norm(wide, wide, 3))
            layers.append(Residual(body, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, wide, 1, bias=False))))
            channels = wide
        layers += [_Cell(cell, channels) for _ in range(5)]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), classifier(channels, classes))


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``(N, C, H, W)``."""

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = super().forward(input.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.mlp(self.norm(self.mix(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


def convnext(widths: Sequence[int], repeats: Sequence[int] = (2, 2, 6, 2), classes: int = 1000) -> nn.Module:
    """ConvNeXt: 7x7 depth-wise layers, layer normalisation, GELU.

    Reference: Liu et al., A ConvNet for the 2020s, CVPR 2022; the widths of atto, femto and pico are those of timm.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ChannelNorm(widths[0], eps=1e-6)]
    for stage, (width, count) in enumerate(zip(widths, repeats, strict=True)):
        if stage:
            before = widths[stage - 1]
            layers += [_ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, 2)]
        layers += [_ConvNeXtBlock(width) for _ in range(count)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1], eps=1e-6))
    return nn.Sequential(*layers, *head, nn.Linear(widths[-1], classes))
