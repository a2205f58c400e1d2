"""Small versions of residual, dense, inception and VGG-like families: the real wiring at a fraction of the width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arch_blocks import Branches, Head, LayerNorm2d, Residual, SqueezeExcite, cba
from torch import Tensor, nn

Seq = nn.Sequential


def _basic(i: int, o: int, s: int = 1) -> nn.Module:
    body = Seq(cba(i, o, 3, s), cba(o, o, act=None))
    return Residual(body, None if i == o and s == 1 else cba(i, o, 1, s, act=None), nn.ReLU())


def _bottleneck(i: int, w: int, o: int, s: int = 1, *, g: int = 1, se: int = 0, pool: bool = False) -> nn.Module:
    body = [cba(i, w, 1), cba(w, w, 3, s, g=g), *([SqueezeExcite(w, se)] if se else []), cba(w, o, 1, act=None)]
    shortcut: nn.Module | None = None
    if i != o or s > 1:
        shortcut = Seq(nn.AvgPool2d(s, s), cba(i, o, 1, act=None)) if pool else cba(i, o, 1, s, act=None)
    return Residual(Seq(*body), shortcut, nn.ReLU())


def resnet() -> nn.Module:
    """Basic blocks (He et al. 2016)."""
    return Seq(cba(3, 8), nn.MaxPool2d(3, 2, 1), _basic(8, 8), _basic(8, 12, 2), _basic(12, 12), Head(12))


def resnet_bottleneck() -> nn.Module:
    """Bottleneck blocks."""
    return Seq(cba(3, 8, 7, 2), _bottleneck(8, 4, 16), _bottleneck(16, 4, 16), _bottleneck(16, 6, 24, 2), Head(24))


def resnet_d() -> nn.Module:
    """Deep stem and pooled shortcuts (He et al. 2019)."""
    stem = Seq(cba(3, 4, 3, 2), cba(4, 4), cba(4, 8))
    return Seq(stem, _bottleneck(8, 4, 16, pool=True), _bottleneck(16, 6, 24, 2, pool=True), Head(24))


def resnext() -> nn.Module:
    """Grouped bottlenecks (Xie et al. 2017)."""
    return Seq(cba(3, 8), _bottleneck(8, 12, 16, g=3), _bottleneck(16, 12, 16, g=3), _bottleneck(16, 16, 24, 2, g=4),
               Head(24))  # fmt: skip


def seresnet() -> nn.Module:
    """Squeeze and excitation in the bottleneck."""
    return Seq(cba(3, 8), _bottleneck(8, 8, 16, se=4), _bottleneck(16, 8, 16, se=4), Head(16))


def regnet_x() -> nn.Module:
    """RegNetX: grouped bottlenecks of ratio one (Radosavovic et al. 2020)."""
    return Seq(cba(3, 8, 3, 2), _bottleneck(8, 8, 8, 2, g=2), _bottleneck(8, 16, 16, 2, g=4),
               _bottleneck(16, 16, 16, g=4), Head(16))  # fmt: skip


def regnet_y() -> nn.Module:
    """RegNetY: the same with gates."""
    return Seq(cba(3, 8, 3, 2), _bottleneck(8, 12, 12, 2, g=3, se=4), _bottleneck(12, 12, 12, g=3, se=4), Head(12))


class _PreActivation(nn.Module):
    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, s, 1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(i, o, 1, s, bias=False) if i != o or s > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.n1(x))
        shortcut = x if self.down is None else self.down(y)
        return self.c2(F.relu(self.n2(self.c1(y)))) + shortcut


def resnet_preact() -> nn.Module:
    """Normalisation before the convolution, nothing to fold into (He et al. 2016b)."""
    body = Seq(nn.Conv2d(3, 8, 3, 1, 1), _PreActivation(8, 8, 1), _PreActivation(8, 12, 2), nn.BatchNorm2d(12))
    return Seq(body, nn.ReLU(), Head(12))


class _Dense(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.body = Seq(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 2 * growth, 1), nn.BatchNorm2d(2 * growth),
                        nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, 1, 1))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet() -> nn.Module:
    """Dense layers of growth 4 and a transition (Huang et al. 2017)."""
    first = Seq(nn.Conv2d(3, 8, 3, 1, 1), _Dense(8, 4), _Dense(12, 4), _Dense(16, 4))
    transition = Seq(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
    return Seq(first, transition, _Dense(10, 4), _Dense(14, 4), nn.BatchNorm2d(18), nn.ReLU(), Head(18))


def googlenet() -> nn.Module:
    """Inception modules of 2014: four branches, one of them pooled first (Szegedy et al. 2015)."""

    def module(i: int) -> nn.Module:
        return Branches(cba(i, 4, 1), Seq(cba(i, 4, 1), cba(4, 6)), Seq(cba(i, 3, 1), cba(3, 4, 5)),
                        Seq(nn.MaxPool2d(3, 1, 1), cba(i, 3, 1)))  # fmt: skip

    return Seq(cba(3, 8), module(8), module(17), nn.Dropout(0.2), Head(17))


def inception_v3() -> nn.Module:
    """Factorised and nested branches (Szegedy et al. 2016)."""

    def line(i: int, o: int) -> nn.Module:
        return Seq(nn.Conv2d(i, o, (1, 7), padding=(0, 3)), nn.Conv2d(o, o, (7, 1), padding=(3, 0)), nn.BatchNorm2d(o))

    def split(i: int, o: int) -> nn.Module:
        return Branches(nn.Conv2d(i, o, (1, 3), padding=(0, 1)), nn.Conv2d(i, o, (3, 1), padding=(1, 0)))

    reduction = Branches(cba(19, 6, 3, 2), Seq(cba(19, 4, 1), cba(4, 6, 3, 2)), nn.MaxPool2d(3, 2, 1))
    first = Branches(cba(8, 6, 1), Seq(cba(8, 4, 1), line(4, 5)), Seq(nn.AvgPool2d(3, 1, 1), cba(8, 8, 1)))
    last = Branches(cba(31, 4, 1), Seq(cba(31, 4, 1), split(4, 4)), nn.AvgPool2d(3, 1, 1))
    return Seq(cba(3, 8), first, reduction, last, nn.ReLU(), Head(43))


class _Scaled(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.2 * self.body(x))


def inception_resnet() -> nn.Module:
    """Inception branches as a scaled residual (Szegedy et al. 2017)."""
    branches = Branches(cba(12, 4, 1), Seq(cba(12, 4, 1), cba(4, 5)), Seq(cba(12, 4, 1), cba(4, 4), cba(4, 6)))
    return Seq(cba(3, 12), _Scaled(Seq(branches, nn.Conv2d(15, 12, 1))), Head(12))


def squeezenet() -> nn.Module:
    """Fire modules (Iandola et al. 2016)."""

    def fire(i: int, s: int, e: int) -> nn.Module:
        return Seq(nn.Conv2d(i, s, 1), nn.ReLU(), Branches(nn.Conv2d(s, e, 1), nn.Conv2d(s, e, 3, 1, 1)), nn.ReLU())

    last = Seq(nn.Dropout(0.5), nn.Conv2d(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Seq(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2), fire(8, 4, 6), fire(12, 4, 8), last)


def vgg() -> nn.Module:
    """Plain stages, flattened into three linear layers (Simonyan, Zisserman 2015)."""
    stages = Seq(cba(3, 6), nn.MaxPool2d(2), cba(6, 8), nn.MaxPool2d(2), cba(8, 8), nn.AdaptiveAvgPool2d(3))
    return Seq(stages, nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10), nn.ReLU(),
               nn.Linear(10, 5))  # fmt: skip


def alexnet() -> nn.Module:
    """Grouped convolutions of the two-GPU network (Krizhevsky et al. 2012)."""
    stages = Seq(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 3, 1, 1, groups=2), nn.ReLU(),
                 nn.Conv2d(12, 8, 3, 1, 1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten())  # fmt: skip
    return Seq(stages, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))


class _RepBlock(nn.Module):
    def __init__(self, i: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.dense, self.point = cba(i, o, 3, s, act=None), cba(i, o, 1, s, act=None)
        self.norm = nn.BatchNorm2d(i) if i == o and s == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return F.relu(y if self.norm is None else y + self.norm(x))


def repvgg() -> nn.Module:
    """Three branches a block while training (Ding et al. 2021)."""
    return Seq(_RepBlock(3, 8, 2), _RepBlock(8, 8), _RepBlock(8, 12, 2), _RepBlock(12, 12), Head(12))


def xception() -> nn.Module:
    """Separable convolutions in residual blocks (Chollet 2017)."""

    def separable(i: int, o: int) -> nn.Module:
        return Seq(nn.Conv2d(i, i, 3, 1, 1, groups=i, bias=False), cba(i, o, 1, act=None))

    body = Seq(nn.ReLU(), separable(8, 12), nn.ReLU(), separable(12, 12), nn.MaxPool2d(3, 2, 1))
    return Seq(cba(3, 8), Residual(body, cba(8, 12, 1, 2, act=None)), nn.ReLU(), separable(12, 16), Head(16))


class _Res2(nn.Module):
    """A bottleneck whose middle is a chain over four quarters (Gao et al. 2019)."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.first, self.last = cba(c, 4 * w, 1), cba(4 * w, c, 1, act=None)
        self.chain = nn.ModuleList(cba(w, w) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.first(x), 4, 1)
        found = [parts[0]]
        for index, layer in enumerate(self.chain):
            found.append(layer(parts[index + 1] if index == 0 else parts[index + 1] + found[-1]))
        return F.relu(self.last(torch.cat(found, 1)) + x)


def res2net() -> nn.Module:
    """Hierarchical splits inside a block."""
    return Seq(cba(3, 8), _Res2(8, 4), _Res2(8, 4), Head(8))


class _SplitAttention(nn.Module):
    """Two groups of channels, weighted by a softmax across the groups (Zhang et al. 2020, ResNeSt)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.f1, self.f2 = cba(c, 2 * c, g=2), cba(c, 6, 1), nn.Conv2d(6, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.conv(x).view(n, 2, -1, h, w)
        gap = y.sum(1).mean((2, 3), keepdim=True)
        weight = F.softmax(self.f2(self.f1(gap)).view(n, 2, -1, 1, 1), 1)
        return (y * weight).sum(1)


def resnest() -> nn.Module:
    """Split attention in the bottleneck."""
    return Seq(cba(3, 8), Residual(Seq(cba(8, 8, 1), _SplitAttention(8), cba(8, 8, 1, act=None)), None, nn.ReLU()),
               Head(8))  # fmt: skip


class _Osa(nn.Module):
    """One-shot aggregation: every layer's output concatenated once (Lee et al. 2019, VoVNet)."""

    def __init__(self, i: int, w: int, o: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cba(i if index == 0 else w, w) for index in range(3))
        self.join = cba(i + 3 * w, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return self.join(torch.cat(found, 1))


def vovnet() -> nn.Module:
    """One-shot aggregation modules."""
    return Seq(cba(3, 8), _Osa(8, 4, 12), nn.MaxPool2d(2), _Osa(12, 5, 16), Head(16))


class _Cbam(nn.Module):
    """Channel attention from mean and maximum, then spatial attention (Woo et al. 2018)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mlp, self.map = Seq(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c)), nn.Conv2d(2, 1, 7, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate[..., None, None]
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.map(both))


def cbam_resnet() -> nn.Module:
    """Attention over channels and space in a residual block."""
    return Seq(cba(3, 8), Residual(Seq(cba(8, 8), cba(8, 8, act=None), _Cbam(8)), None, nn.ReLU()), Head(8))


class _ConvNeXt(nn.Module):
    def __init__(self, c: int, grn: bool) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.scale = nn.Parameter(torch.ones(c))
        self.gamma = nn.Parameter(torch.ones(3 * c)) if grn else None
        self.beta = nn.Parameter(torch.zeros(3 * c)) if grn else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.gamma is not None:
            spread = y.pow(2).sum((1, 2), keepdim=True).sqrt()
            y = y + self.gamma * (y * (spread / (spread.mean(-1, keepdim=True) + 1e-6))) + self.beta
        return x + (self.scale * self.down(y)).permute(0, 3, 1, 2)


def _convnext(grn: bool) -> nn.Module:
    stem = Seq(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8))
    down = Seq(LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2))
    head = Seq(nn.AdaptiveAvgPool2d(1), LayerNorm2d(12), nn.Flatten(), nn.Linear(12, 5))
    return Seq(stem, _ConvNeXt(8, grn), down, _ConvNeXt(12, grn), head)


def convnext() -> nn.Module:
    """Layer normalisation, channels last, scale per channel (Liu et al. 2022)."""
    return _convnext(False)


def convnext_v2() -> nn.Module:
    """With global response normalisation (Woo et al. 2023)."""
    return _convnext(True)
