"""Chains of convolutions: VGG, RepVGG as deployed, SqueezeNet, Darknet with and without cross-stage partial blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from unseen.layers import Activation, Branches, Residual, classifier, conv_bn

_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, width: float = 1.0, classes: int = 10) -> nn.Module:
    """VGG with batch normalisation for 32x32 images: five stages, each ended by a 2x2 maximum, and one linear layer.

    Reference: Simonyan and Zisserman, ICLR 2015, table 1 (columns A, B, D, E); one linear layer as usual for CIFAR.
    """
    layers: list[nn.Module] = []
    channels = 3
    for repeats, full in zip(_VGG[depth], (64, 128, 256, 512, 512), strict=True):
        for _ in range(repeats):
            layers.append(conv_bn(channels, int(full * width)))
            channels = int(full * width)
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def repvgg(repeats: tuple[int, int, int, int], a: float, b: float, classes: int = 1000) -> nn.Module:
    """RepVGG as deployed: each block's three branches are one 3x3 convolution with a bias (section 3.3).

    Reference: Ding et al., RepVGG, CVPR 2021, tables 2 and 3; ``a`` and ``b`` scale the first four stages and the last.
    """
    widths = (int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    channels = min(64, widths[0])
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU()]
    for count, width in zip(repeats, widths, strict=True):
        for block in range(count):
            layers += [nn.Conv2d(channels, width, 3, 2 if block == 0 else 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, *classifier(channels, classes))


def _fire(inputs: int, squeeze: int, expand: int, *, bypass: bool = False) -> nn.Module:
    def relu_conv(source: int, outputs: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(source, outputs, kernel, padding=kernel // 2), nn.ReLU())

    both = Branches(relu_conv(squeeze, expand, 1), relu_conv(squeeze, expand, 3))
    body = nn.Sequential(*relu_conv(inputs, squeeze, 1), both)
    return Residual(body) if bypass and inputs == 2 * expand else body


def squeezenet(version: str = "1.1", *, bypass: bool = False, classes: int = 1000) -> nn.Module:
    """SqueezeNet, with the simple bypass around every second fire module where asked for.

    Reference: Iandola et al., arXiv 1602.07360, table 1 and figure 2; version 1.1 from the authors' repository.
    """
    fires = [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]
    if version == "1.0":
        layers: list[nn.Module] = [nn.Conv2d(3, 96, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
        channels, pools = 96, (2, 6)
    else:
        layers = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
        channels, pools = 64, (1, 3)
    for at, (squeeze, expand) in enumerate(fires):
        layers.append(_fire(channels, squeeze, expand, bypass=bypass))
        channels = 2 * expand
        if at in pools:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    return nn.Sequential(*layers, nn.Conv2d(channels, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


_leaky: Activation = functools.partial(nn.LeakyReLU, 0.1)


def darknet19(classes: int = 1000) -> nn.Module:
    """Darknet-19. Reference: Redmon and Farhadi, YOLO9000, CVPR 2017, table 6."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, count) in enumerate(((32, 1), (64, 1), (128, 3), (256, 3), (512, 5), (1024, 5))):
        for at in range(count):
            narrow = at % 2 == 1
            outputs = width // 2 if narrow else width
            layers.append(conv_bn(channels, outputs, 1 if narrow else 3, act=_leaky))
            channels = outputs
        if stage < 5:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Conv2d(channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _dark_block(channels: int, hidden: int, act: Activation = _leaky) -> nn.Module:
    body = nn.Sequential(conv_bn(channels, hidden, 1, act=act), conv_bn(hidden, channels, 3, act=act))
    return Residual(body)


def darknet53(classes: int = 1000) -> nn.Module:
    """Darknet-53. Reference: Redmon and Farhadi, YOLOv3, arXiv 1804.02767, table 1."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, act=_leaky)]
    channels = 32
    for count in (1, 2, 8, 8, 4):
        layers.append(conv_bn(channels, 2 * channels, 3, 2, act=_leaky))
        channels *= 2
        layers += [_dark_block(channels, channels // 2) for _ in range(count)]
    return nn.Sequential(*layers, classifier(channels, classes))


class _CrossStage(nn.Module):
    """A stage of which one part of the channels goes round the blocks."""

    def __init__(self, channels: int, part: int, blocks: nn.Module, act: Activation, *, closing: bool) -> None:
        super().__init__()
        self.into = conv_bn(channels, part, 1, act=act)
        self.around = conv_bn(channels, part, 1, act=act)
        self.blocks = nn.Sequential(blocks, *([conv_bn(part, part, 1, act=act)] if closing else []))
        self.join = conv_bn(2 * part, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.join(torch.cat((self.blocks(self.into(x)), self.around(x)), 1))
        return y


def cspdarknet53(classes: int = 1000) -> nn.Module:
    """CSPDarknet-53 with leaky ReLUs.

    Reference: Wang et al., CSPNet, CVPR workshops 2020; Bochkovskiy et al., YOLOv4, arXiv 2004.10934.
    """
    layers: list[nn.Module] = [conv_bn(3, 32, 3, act=_leaky)]
    channels = 32
    for stage, count in enumerate((1, 2, 8, 8, 4)):
        layers.append(conv_bn(channels, 2 * channels, 3, 2, act=_leaky))
        channels *= 2
        part = channels if stage == 0 else channels // 2
        blocks = nn.Sequential(*[_dark_block(part, channels // 2) for _ in range(count)])
        layers.append(_CrossStage(channels, part, blocks, _leaky, closing=True))
    return nn.Sequential(*layers, classifier(channels, classes))


def yolov5_classifier(depth: float, width: float, classes: int = 1000) -> nn.Module:
    """The classifier of YOLOv5: cross-stage partial blocks with SiLU, a 1280-channel head.

    Reference: Jocher, YOLOv5 6.2, its published model tables (n: depth 0.33, width 0.25; s: 0.33, 0.50).
    """
    w = [int(c * width) for c in (64, 128, 256, 512, 1024)]
    layers: list[nn.Module] = [conv_bn(3, w[0], 6, 2, padding=2, act=nn.SiLU)]
    for at, count in enumerate((3, 6, 9, 3)):
        channels, part = w[at + 1], w[at + 1] // 2
        blocks = nn.Sequential(*[_dark_block(part, part, nn.SiLU) for _ in range(max(1, round(count * depth)))])
        layers.append(conv_bn(w[at], channels, 3, 2, act=nn.SiLU))
        layers.append(_CrossStage(channels, part, blocks, nn.SiLU, closing=False))
    return nn.Sequential(*layers, conv_bn(w[4], 1280, 1, act=nn.SiLU), classifier(1280, classes))
