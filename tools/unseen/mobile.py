"""Hand-designed mobile families: MobileNetV1, V2 and V3, ShuffleNetV2, GhostNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unseen.layers import Activation, Branches, Residual, SqueezeExcite, classifier, conv_bn, depthwise, divisible


def mobilenetv1(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """MobileNetV1. Reference: Howard et al., MobileNets, arXiv 1704.04861, table 1."""
    table = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    channels = int(32 * width)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2)]
    for full, stride in table:
        outputs = int(full * width)
        layers += [depthwise(channels, 3, stride), conv_bn(channels, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, classifier(channels, classes))


def inverted_residual(
    inputs: int,
    hidden: int,
    outputs: int,
    kernel: int,
    stride: int,
    act: Activation,
    *,
    squeeze: int = 0,
    gate: Activation = nn.Sigmoid,
    squeeze_act: Activation = nn.ReLU,
    skip: bool = True,
) -> nn.Module:
    """1x1 expansion (where ``hidden`` is not ``inputs``), depth-wise layer, gate, linear 1x1 projection, shortcut.

    Args:
        squeeze: channels inside the squeeze-and-excitation, 0 for none.
        skip: whether there is a shortcut where the shape stays.
    """
    body = nn.Sequential(
        *([conv_bn(inputs, hidden, 1, act=act)] if hidden != inputs else []),
        depthwise(hidden, kernel, stride, act=act),
        *([SqueezeExcite(hidden, squeeze, act=squeeze_act, gate=gate)] if squeeze else []),
        conv_bn(hidden, outputs, 1, act=None),
    )
    return Residual(body) if skip and stride == 1 and inputs == outputs else body


def mobilenetv2(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """MobileNetV2. Reference: Sandler et al., CVPR 2018, table 2."""
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    channels = divisible(32 * width)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2, act=nn.ReLU6)]
    for expansion, full, count, first_stride in table:
        for block in range(count):
            stride = first_stride if block == 0 else 1
            outputs = divisible(full * width)
            layers.append(inverted_residual(channels, channels * expansion, outputs, 3, stride, nn.ReLU6))
            channels = outputs
    head = max(1280, divisible(1280 * width))
    return nn.Sequential(*layers, conv_bn(channels, head, 1, act=nn.ReLU6), classifier(head, classes))


#: (kernel, hidden, outputs, gate, hard swish, stride); tables 1 and 2 of the paper.
_V3_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
_V3_SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


def mobilenetv3(size: str, width: float = 1.0, *, minimal: bool = False, classes: int = 1000) -> nn.Module:
    """MobileNetV3 "large" or "small"; ``minimal`` has no gates, no hard swish and no 5x5 kernels.

    Reference: Howard et al., Searching for MobileNetV3, ICCV 2019, tables 1 and 2; the minimalistic models are those
    published with the authors' code.
    """
    table, last = (_V3_LARGE, 1280) if size == "large" else (_V3_SMALL, 1024)
    swish: Activation = nn.ReLU if minimal else nn.Hardswish
    channels = divisible(16 * width)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2, act=swish)]
    for kernel, full_hidden, full, gated, swishes, stride in table:
        hidden, outputs = divisible(full_hidden * width), divisible(full * width)
        layers.append(
            inverted_residual(
                channels,
                hidden,
                outputs,
                3 if minimal else kernel,
                stride,
                swish if swishes else nn.ReLU,
                squeeze=divisible(hidden / 4) if gated and not minimal else 0,
                gate=nn.Hardsigmoid,
            )
        )
        channels = outputs
    head, last = 6 * channels, divisible(last * width)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, last), swish(), nn.Linear(last, classes)]
    return nn.Sequential(*layers, conv_bn(channels, head, 1, act=swish), *tail)


class _Shuffle(nn.Module):
    """Interleaves the two halves of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def _shuffle_branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    middle = depthwise(outputs, 3, stride, act=None)
    return nn.Sequential(conv_bn(inputs, outputs, 1), middle, conv_bn(outputs, outputs, 1))


class _ShuffleUnit(nn.Module):
    """Half of the channels passes by, the other half is worked on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _shuffle_branch(channels // 2, channels // 2, 1)
        self.shuffle = _Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = x.chunk(2, 1)
        y: Tensor = self.shuffle(torch.cat((passed, self.branch(worked)), 1))
        return y


def shufflenetv2(width: str, classes: int = 1000) -> nn.Module:
    """ShuffleNetV2 "0.5x" to "2.0x". Reference: Ma et al., ShuffleNet V2, ECCV 2018, table 5 and figure 3."""
    widths = {
        "0.5x": (48, 96, 192, 1024),
        "1.0x": (116, 232, 464, 1024),
        "1.5x": (176, 352, 704, 1024),
        "2.0x": (244, 488, 976, 2048),
    }[width]
    layers: list[nn.Module] = [conv_bn(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for outputs, count in zip(widths[:3], (4, 8, 4), strict=True):
        half = outputs // 2
        beside = nn.Sequential(depthwise(channels, 3, 2, act=None), conv_bn(channels, half, 1))
        layers += [Branches(beside, _shuffle_branch(channels, half, 2)), _Shuffle()]
        layers += [_ShuffleUnit(outputs) for _ in range(count - 1)]
        channels = outputs
    return nn.Sequential(*layers, conv_bn(channels, widths[3], 1), classifier(widths[3], classes))


class _Ghost(nn.Module):
    """Half of the outputs by a 1x1 convolution, the other half by a cheap depth-wise layer on them."""

    def __init__(self, inputs: int, outputs: int, act: Activation | None) -> None:
        super().__init__()
        self.primary = conv_bn(inputs, outputs // 2, 1, act=act)
        self.cheap = depthwise(outputs // 2, 3, act=act)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), 1)


#: (kernel, hidden, outputs, gate, stride); table 1 of the paper.
_GHOST = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


def ghostnet(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """GhostNet. Reference: Han et al., GhostNet, CVPR 2020, table 1 and figure 3."""
    channels = divisible(16 * width, 4)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2)]
    hidden = channels
    for kernel, full_hidden, full, gated, stride in _GHOST:
        hidden, outputs = divisible(full_hidden * width, 4), divisible(full * width, 4)
        body = nn.Sequential(
            _Ghost(channels, hidden, nn.ReLU),
            *([depthwise(hidden, kernel, stride, act=None)] if stride > 1 else []),
            *([SqueezeExcite(hidden, divisible(hidden / 4, 4), gate=nn.Hardsigmoid)] if gated else []),
            _Ghost(hidden, outputs, None),
        )
        shortcut = None
        if stride > 1 or channels != outputs:
            shortcut = nn.Sequential(
                depthwise(channels, kernel, stride, act=None), conv_bn(channels, outputs, 1, act=None)
            )
        layers.append(Residual(body, shortcut))
        channels = outputs
    tail = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, 1280, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers, conv_bn(channels, hidden, 1), *tail)
