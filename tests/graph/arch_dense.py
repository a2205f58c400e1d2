"""Small versions of dense predictors and detectors: pyramids, U shapes, split necks, decoders, generators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arch_blocks import Branches, Residual, cba
from torch import Tensor, nn

Seq = nn.Sequential


class _UNet(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = Seq(cba(3, 6), cba(6, 6)), Seq(cba(6, 8), cba(8, 8)), Seq(cba(8, 12), cba(12, 12))
        self.u2 = nn.ConvTranspose2d(12, 8, 2, 2) if transposed else Seq(nn.Upsample(scale_factor=2), cba(12, 8, 1))
        self.u1 = nn.ConvTranspose2d(8, 6, 2, 2) if transposed else Seq(nn.Upsample(scale_factor=2), cba(8, 6, 1))
        self.c2, self.c1, self.out = cba(16, 8), cba(12, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.u2(self.d3(F.max_pool2d(b, 2)))
        y = self.u1(self.c2(torch.cat([b, y], 1)))
        return self.out(self.c1(torch.cat([y, a], 1)))


def unet() -> nn.Module:
    """Transposed convolutions up, concatenated skips (Ronneberger et al. 2015)."""
    return _UNet(True)


def unet_upsampled() -> nn.Module:
    """The same with interpolation."""
    return _UNet(False)


class _NestedUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x00, self.x10, self.x20 = cba(3, 4), cba(4, 6), cba(6, 8)
        self.x01, self.x11, self.x02 = cba(10, 4), cba(14, 6), cba(14, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.x00(x)
        b = self.x10(F.max_pool2d(a, 2))
        c = self.x20(F.max_pool2d(b, 2))
        a1 = self.x01(torch.cat([a, F.interpolate(b, scale_factor=2)], 1))
        b1 = self.x11(torch.cat([b, F.interpolate(c, scale_factor=2)], 1))
        return self.out(self.x02(torch.cat([a, a1, F.interpolate(b1, scale_factor=2)], 1)))


def unet_nested() -> nn.Module:
    """Dense skips (Zhou et al. 2018)."""
    return _NestedUNet()


class _Exchange(nn.Module):
    """Every resolution gets the sum of all, brought to its size."""

    def __init__(self, high: int, low: int) -> None:
        super().__init__()
        self.high, self.low = Residual(Seq(cba(high, high), cba(high, high, act=None))), cba(low, low)
        self.up, self.down = cba(low, high, 1, act=None), cba(high, low, 3, 2, act=None)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        high, low = self.high(x[0]), self.low(x[1])
        up = F.interpolate(self.up(low), size=high.shape[2:], mode="bilinear", align_corners=False)
        return F.relu(high + up), F.relu(self.down(high) + low)


class _HRNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = cba(3, 8, 3, 2), nn.ModuleList([cba(8, 6), cba(8, 10, 3, 2)])
        self.stages = nn.ModuleList([_Exchange(6, 10), _Exchange(6, 10)])
        self.head = Seq(cba(16, 12, 1), nn.Conv2d(12, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pair = (self.split[0](x), self.split[1](x))
        for stage in self.stages:
            pair = stage(pair)
        return self.head(torch.cat([pair[0], F.interpolate(pair[1], size=pair[0].shape[2:])], 1))


def hrnet() -> nn.Module:
    """Parallel resolutions that exchange (Sun et al. 2019)."""
    return _HRNet()


class _C2f(nn.Module):
    """A convolution chunked in halves, bottlenecks on the last part, all of it concatenated (YOLOv8)."""

    def __init__(self, i: int, o: int, n: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        w = o // 2
        self.first, self.last = cba(i, 2 * w, 1, act=nn.SiLU), cba((2 + n) * w, o, 1, act=nn.SiLU)
        steps = [Seq(cba(w, w, act=nn.SiLU), cba(w, w, act=nn.SiLU)) for _ in range(n)]
        self.steps = nn.ModuleList(Residual(step) if shortcut else step for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(step(parts[-1]) for step in self.steps)
        return self.last(torch.cat(parts, 1))


class _Sppf(nn.Module):
    """Three pools one after the other, concatenated with their input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = cba(c, c // 2, 1, act=nn.SiLU), cba(2 * c, c, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        found.extend(F.max_pool2d(found[-1], 5, 1, 2) for _ in range(3))
        return self.last(torch.cat(found, 1))


class _C3(nn.Module):
    """Two projections, one of them through bottlenecks (YOLOv5)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        w = o // 2
        self.left, self.right = cba(i, w, 1, act=nn.SiLU), cba(i, w, 1, act=nn.SiLU)
        self.last = cba(o, o, 1, act=nn.SiLU)
        self.steps = Residual(Seq(cba(w, w, 1, act=nn.SiLU), cba(w, w, act=nn.SiLU)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.steps(self.left(x)), self.right(x)], 1))


class _Elan(nn.Module):
    """Halves, two chains, everything concatenated (YOLOv7 and v9)."""

    def __init__(self, i: int, o: int, w: int) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = cba(i, 2 * w, 1), cba(w, w), cba(w, w), cba(4 * w, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.first(x).chunk(2, 1))
        found.append(self.a(found[-1]))
        found.append(self.b(found[-1]))
        return self.last(torch.cat(found, 1))


class _Detector(nn.Module):
    """Backbone, top-down and bottom-up neck, one decoupled head a level; predictions are flattened and joined."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        extra = (6,) if block is _Elan else ()
        self.stem, self.c3 = cba(3, 8, 3, 2, act=nn.SiLU), block(8, 12, *extra)
        self.d4, self.c4, self.spp = cba(12, 16, 3, 2, act=nn.SiLU), block(16, 16, *extra), _Sppf(16)
        self.n3, self.e4, self.n4 = block(28, 12, *extra), cba(12, 8, 3, 2, act=nn.SiLU), block(24, 16, *extra)
        self.boxes = nn.ModuleList(Seq(cba(c, 8, act=nn.SiLU), nn.Conv2d(8, 4, 1)) for c in (12, 16))
        self.classes = nn.ModuleList(Seq(cba(c, 6, act=nn.SiLU), nn.Conv2d(6, 3, 1)) for c in (12, 16))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.c3(self.stem(x))
        p4 = self.spp(self.c4(self.d4(p3)))
        n3 = self.n3(torch.cat([F.interpolate(p4, scale_factor=2), p3], 1))
        n4 = self.n4(torch.cat([self.e4(n3), p4], 1))
        heads = zip(self.boxes, self.classes, (n3, n4), strict=True)
        levels = [torch.cat([boxes(n), classes(n)], 1).flatten(2) for boxes, classes, n in heads]
        return torch.cat(levels, 2)


def yolo_c2f() -> nn.Module:
    """Neck of YOLOv8: C2f, SPPF, decoupled heads."""
    return _Detector(_C2f)


def yolo_c3() -> nn.Module:
    """Neck of YOLOv5."""
    return _Detector(_C3)


def yolo_elan() -> nn.Module:
    """Neck of YOLOv7 and v9."""
    return _Detector(_Elan)


def darknet_csp() -> nn.Module:
    """Cross-stage partial darknet with SPPF."""
    return Seq(cba(3, 8, 3, 2, act=nn.SiLU), _C3(8, 12), cba(12, 16, 3, 2), _C3(16, 16), _Sppf(16), nn.Conv2d(16, 4, 1))


class _Fpn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2, self.b3 = cba(3, 6, 3, 2), cba(6, 8, 3, 2), cba(8, 12, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (6, 8, 12))
        self.smooth, self.head = nn.Conv2d(8, 8, 3, 1, 1), Seq(nn.Conv2d(8, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.b1(x)
        b = self.b2(a)
        c = self.b3(b)
        p3 = self.lateral[2](c)
        p2 = self.lateral[1](b) + F.interpolate(p3, size=b.shape[2:])
        p1 = self.lateral[0](a) + F.interpolate(p2, size=a.shape[2:])
        return [self.head(self.smooth(level)) for level in (p1, p2, p3)]


def fpn_retina() -> nn.Module:
    """A feature pyramid under one head shared by all levels (Lin et al. 2017)."""
    return _Fpn()


class _Aspp(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cba(i, o, 1), cba(i, o, d=2), cba(i, o, d=4)])
        self.pool, self.last = cba(i, o, 1), cba(4 * o, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(self.pool(F.adaptive_avg_pool2d(x, 1)), size=x.shape[2:], mode="bilinear")
        return self.last(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


def deeplab() -> nn.Module:
    """Atrous spatial pyramid pooling (Chen et al. 2017)."""
    return Seq(cba(3, 8, 3, 2), cba(8, 12, d=2), _Aspp(12, 6), nn.Conv2d(6, 3, 1), nn.Upsample(scale_factor=2))


class _Attend(nn.Module):
    """Attention refinement and feature fusion of two paths (Yu et al. 2018, BiSeNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.context = Seq(cba(3, 8, 3, 2), cba(8, 10, 3, 2)), Seq(cba(3, 8, 3, 4), cba(8, 12, 3, 2))
        self.gate, self.fuse = Seq(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.Sigmoid()), cba(22, 16, 1)
        self.select = Seq(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid())
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        s, c = self.spatial(x), self.context(x)
        c = c * self.gate(c.mean((2, 3), keepdim=True))
        y = self.fuse(torch.cat([s, F.interpolate(c, size=s.shape[2:], mode="bilinear")], 1))
        return self.out(y + y * self.select(y.mean((2, 3), keepdim=True)))


def bisenet() -> nn.Module:
    """Two paths, gated and fused."""
    return _Attend()


def super_resolution() -> nn.Module:
    """Residual blocks, pixel shuffle (Lim et al. 2017, EDSR)."""
    block = Residual(Seq(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)))
    up = Seq(nn.Conv2d(8, 24, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(6, 3, 3, 1, 1))
    return Seq(nn.Conv2d(3, 8, 3, 1, 1), block, up)


class _Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = Seq(nn.Flatten(), nn.Linear(3 * 32 * 32, 12), nn.ReLU(), nn.Linear(12, 8 * 16), nn.ReLU())
        self.decode = Seq(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.ConvTranspose2d(6, 3, 4, 2, 1))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.decode(self.encode(x).view(x.shape[0], -1, 4, 4)))


def autoencoder() -> nn.Module:
    """Linear code, viewed as an image, transposed convolutions (DCGAN's generator)."""
    return _Generator()


class _Segmenter(nn.Module):
    """Encoder and decoder with unpooling by pixel shuffle and strided shortcuts (ENet-like)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 5, 3, 2, 1), nn.MaxPool2d(2)
        self.body = Residual(Seq(cba(8, 4, 1, act=nn.PReLU), cba(4, 4, d=2), cba(4, 8, 1, act=None)), None, nn.PReLU(8))
        line = Seq(nn.Conv2d(4, 4, (5, 1), padding=(2, 0)), nn.Conv2d(4, 4, (1, 5), padding=(0, 2)))
        self.asym = Residual(Seq(cba(8, 4, 1), line, nn.Conv2d(4, 8, 1)))
        self.out = nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.asym(self.body(torch.cat([self.conv(x), self.pool(x)], 1))))


def enet() -> nn.Module:
    """The input itself, pooled, among the first features."""
    return _Segmenter()


class _Aggregate(nn.Module):
    """Iterative and hierarchical aggregation (Yu et al. 2018, DLA)."""

    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.a, self.b = Seq(cba(i, o, 3, s), cba(o, o, act=None)), Seq(cba(o, o), cba(o, o, act=None))
        self.project, self.root = cba(i, o, 1, s, act=None), cba(2 * o, o, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x) + self.project(x))
        b = F.relu(self.b(a) + a)
        return F.relu(self.root(torch.cat([b, a], 1)) + b)


def dla() -> nn.Module:
    """Deep layer aggregation."""
    return Seq(cba(3, 8), _Aggregate(8, 8, 2), _Aggregate(8, 12, 2), nn.Conv2d(12, 3, 1))


def branches_of_branches() -> nn.Module:
    """Concatenations within concatenations, pooled and strided."""
    inner = Branches(cba(8, 4, 1), Branches(cba(8, 3), Seq(cba(8, 4, 1), cba(4, 5))))
    return Seq(cba(3, 8, 3, 2), inner, nn.BatchNorm2d(12), Branches(cba(12, 6, 1), nn.Identity()), nn.Conv2d(18, 2, 1))
