"""Small versions of the mobile families: depth-wise, inverted residual, shuffle, ghost, re-parametrised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arch_blocks import Head, Residual, SqueezeExcite, cba, shuffle
from torch import Tensor, nn

Seq = nn.Sequential


def mobilenet_v1() -> nn.Module:
    """Depth-wise separable convolutions (Howard et al. 2017)."""

    def step(i: int, o: int, s: int = 1) -> nn.Module:
        return Seq(cba(i, i, 3, s, g=i), cba(i, o, 1))

    return Seq(cba(3, 8, 3, 2), step(8, 12), step(12, 16, 2), step(16, 16), Head(16))


def _inverted(i: int, o: int, e: int, s: int = 1, *, k: int = 3, se: int = 0, act: type[nn.Module] = nn.ReLU6,
              gate: type[nn.Module] = nn.Sigmoid) -> nn.Module:  # fmt: skip
    body = [cba(i, e, 1, act=act), cba(e, e, k, s, g=e, act=act), *([SqueezeExcite(e, se, gate)] if se else []),
            cba(e, o, 1, act=None)]  # fmt: skip
    return Residual(Seq(*body)) if i == o and s == 1 else Seq(*body)


def mobilenet_v2() -> nn.Module:
    """Inverted residuals with linear bottlenecks (Sandler et al. 2018)."""
    return Seq(cba(3, 8, act=nn.ReLU6), _inverted(8, 6, 16), _inverted(6, 6, 18), _inverted(6, 8, 18, 2),
               cba(8, 20, 1, act=nn.ReLU6), nn.Dropout(0.2), Head(20))  # fmt: skip


def mobilenet_v3() -> nn.Module:
    """Hard swish, gates, and a convolutional head (Howard et al. 2019)."""
    blocks = Seq(_inverted(8, 8, 16, k=3, act=nn.ReLU), _inverted(8, 12, 24, 2, k=5, se=8, gate=nn.Hardsigmoid),
                 _inverted(12, 12, 30, k=5, se=8, act=nn.Hardswish, gate=nn.Hardsigmoid))  # fmt: skip
    head = Seq(cba(12, 24, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 20, 1), nn.Hardswish())
    return Seq(cba(3, 8, 3, 2, act=nn.Hardswish), blocks, head, nn.Flatten(), nn.Linear(20, 5))


class _Uib(nn.Module):
    """The universal inverted bottleneck: an optional depth-wise layer at the start and in the middle (2024)."""

    def __init__(self, c: int, e: int, start: bool, middle: bool) -> None:
        super().__init__()
        self.start = cba(c, c, 5, g=c, act=None) if start else nn.Identity()
        self.up, self.down = cba(c, e, 1), cba(e, c, 1, act=None)
        self.middle = cba(e, e, 3, g=e) if middle else nn.Identity()
        self.scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.middle(self.up(self.start(x))))


def mobilenet_v4() -> nn.Module:
    """Universal inverted bottlenecks of all four kinds (Qin et al. 2024)."""
    blocks = [_Uib(8, 20, start, middle) for start in (False, True) for middle in (False, True)]
    return Seq(cba(3, 8, 3, 2), cba(8, 16, 3, 2), cba(16, 8, 1), *blocks, cba(8, 24, 1), Head(24))


def mnasnet() -> nn.Module:
    """Separable stem, plain inverted residuals (Tan et al. 2019)."""
    return Seq(cba(3, 8), cba(8, 8, g=8), cba(8, 6, 1, act=None), _inverted(6, 8, 18, 2, act=nn.ReLU),
               _inverted(8, 8, 24, k=5, act=nn.ReLU), Head(8))  # fmt: skip


def efficientnet() -> nn.Module:
    """Gated inverted residuals with SiLU (Tan, Le 2019)."""
    blocks = Seq(_inverted(8, 6, 8, se=2, act=nn.SiLU), _inverted(6, 8, 24, 2, k=5, se=4, act=nn.SiLU),
                 _inverted(8, 8, 32, k=5, se=4, act=nn.SiLU))  # fmt: skip
    return Seq(cba(3, 8, 3, 2, act=nn.SiLU), blocks, cba(8, 24, 1, act=nn.SiLU), nn.Dropout(0.2), Head(24))


def efficientnet_v2() -> nn.Module:
    """Fused expansion in the early blocks (Tan, Le 2021)."""
    fused = Residual(Seq(cba(8, 24, act=nn.SiLU), cba(24, 8, 1, act=None)))
    return Seq(cba(3, 8, 3, 2, act=nn.SiLU), fused, _inverted(8, 10, 24, 2, se=4, act=nn.SiLU), Head(10))


class _ShuffleV1(nn.Module):
    """Grouped 1x1, shuffle, depth-wise, grouped 1x1 (Zhang et al. 2018)."""

    def __init__(self, i: int, w: int, o: int, s: int) -> None:
        super().__init__()
        self.first, self.middle = cba(i, w, 1, g=2), cba(w, w, 3, s, g=w, act=None)
        self.last = cba(w, o - i if s > 1 else o, 1, g=2, act=None)
        self.stride = s

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.middle(shuffle(self.first(x), 2)))
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1) if self.stride > 1 else x + y)


def shufflenet_v1() -> nn.Module:
    """Channel shuffles between grouped convolutions."""
    return Seq(cba(3, 8), _ShuffleV1(8, 8, 20, 2), _ShuffleV1(20, 8, 20, 1), Head(20))


class _ShuffleV2(nn.Module):
    """Half of the channels pass, or both sides are strided (Ma et al. 2018)."""

    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        w = o // 2
        inner = i if s > 1 else i // 2
        self.right = Seq(cba(inner, w, 1), cba(w, w, 3, s, g=w, act=None), cba(w, w, 1))
        self.left = Seq(cba(i, i, 3, s, g=i, act=None), cba(i, w, 1)) if s > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)
        first, second = x.chunk(2, 1)
        return shuffle(torch.cat([first, self.right(second)], 1), 2)


def shufflenet_v2() -> nn.Module:
    """Splits, concatenations and shuffles."""
    return Seq(cba(3, 8), _ShuffleV2(8, 16, 2), _ShuffleV2(16, 16, 1), _ShuffleV2(16, 24, 2), cba(24, 20, 1), Head(20))


class _Ghost(nn.Module):
    """Half of the outputs by a convolution, the other half cheaply from them (Han et al. 2020)."""

    def __init__(self, i: int, o: int, act: type[nn.Module] | None = nn.ReLU) -> None:
        super().__init__()
        self.primary, self.cheap = cba(i, o // 2, 1, act=act), cba(o // 2, o // 2, 3, g=o // 2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)


def ghostnet() -> nn.Module:
    """Ghost bottlenecks, with a gate and a strided depth-wise layer between."""
    first = Residual(Seq(_Ghost(8, 16), SqueezeExcite(16, 4, nn.Hardsigmoid), _Ghost(16, 8, None)))
    body = Seq(_Ghost(8, 20), cba(20, 20, 3, 2, g=20, act=None), _Ghost(20, 12, None))
    shortcut = Seq(cba(8, 8, 3, 2, g=8, act=None), cba(8, 12, 1, act=None))
    return Seq(cba(3, 8), first, Residual(body, shortcut), cba(12, 24, 1), Head(24))


class _MobileOne(nn.Module):
    """Several equal branches of a depth-wise and of a point-wise layer (Vasu et al. 2023)."""

    def __init__(self, i: int, o: int, k: int, g: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(cba(i, o, k, g=g, act=None) for _ in range(2))
        self.scale = cba(i, o, 1, g=g, act=None) if k > 1 else None
        self.norm = nn.BatchNorm2d(i) if i == o else None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for branch in self.branches)
        y = y if self.scale is None else y + self.scale(x)
        return F.relu(y if self.norm is None else y + self.norm(x))


def mobileone() -> nn.Module:
    """Over-parametrised depth-wise and point-wise layers."""
    return Seq(cba(3, 8, 3, 2), _MobileOne(8, 8, 3, 8), _MobileOne(8, 12, 1, 1), _MobileOne(12, 12, 3, 12), Head(12))


class _Mixing(nn.Module):
    """Token mixing by a difference of pooling and identity, a scale per channel, a convolutional MLP (PoolFormer)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)
        self.s1, self.s2 = nn.Parameter(torch.ones(c)), nn.Parameter(torch.ones(c))
        self.mlp = Seq(nn.Conv2d(c, 3 * c, 1), nn.GELU(), nn.Conv2d(3 * c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        x = x + self.s1.view(1, -1, 1, 1) * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return x + self.s2.unsqueeze(-1).unsqueeze(-1) * self.mlp(self.n2(x))


def poolformer() -> nn.Module:
    """Pooling as token mixer (Yu et al. 2022)."""
    return Seq(nn.Conv2d(3, 8, 7, 4, 2), _Mixing(8), nn.Conv2d(8, 12, 3, 2, 1), _Mixing(12), nn.GroupNorm(1, 12),
               Head(12))  # fmt: skip


class _Star(nn.Module):
    """Two branches multiplied (Ma et al. 2024, StarNet)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.f1, self.f2 = cba(c, c, 7, g=c, act=None), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, 3 * c, 1)
        self.back = Seq(cba(3 * c, c, 1, act=None), nn.Conv2d(c, c, 7, 1, 3, groups=c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        return x + self.back(F.relu6(self.f1(y)) * self.f2(y))


def starnet() -> nn.Module:
    """Element-wise products of two projections."""
    return Seq(cba(3, 8, 3, 2, act=nn.ReLU6), _Star(8), cba(8, 12, 3, 2, act=None), _Star(12), Head(12))


class _PartialConv(nn.Module):
    """A convolution over the first quarter of the channels, the rest passes (Chen et al. 2023, FasterNet)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c // 4, c // 4, 3, 1, 1)
        self.mlp = Seq(cba(c, 2 * c, 1), nn.Conv2d(2 * c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        quarter = x.shape[1] // 4
        y = torch.cat([self.conv(x[:, :quarter]), x[:, quarter:]], 1)
        return x + self.mlp(y)


def fasternet() -> nn.Module:
    """Partial convolutions."""
    return Seq(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), _PartialConv(16), _PartialConv(16), Head(16))


class _CrossGate(nn.Module):
    """A gated linear unit over channels and a depth-wise layer (as in conv-GLU blocks)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(2 * c, c, 1)
        self.depthwise = cba(2 * c, 2 * c, 3, g=2 * c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.depthwise(F.glu(self.up(x), 1)))


def gated_convnet() -> nn.Module:
    """Gated linear units."""
    return Seq(cba(3, 8, 3, 2), _CrossGate(8), _CrossGate(8), Head(8))
