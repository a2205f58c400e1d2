"""Micro networks, one per pattern that channel-dependency extractors are known to get wrong."""

from __future__ import annotations

import graph_zoo_attention
import torch
import torch.nn.functional as F
from graph_zoo_blocks import ConvNeXtBlock, GatedInvertedResidual, ShuffleUnits
from torch import Tensor, nn
from torch.nn import Conv2d as Conv

IMAGE = (2, 3, 8, 8)


class CatTwice(nn.Module):
    """The same tensor concatenated with itself: one unit, two places in the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 6, 3), Conv(12, 5, 1), Conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(torch.cat([x, x], 1)))


class CatIndependent(nn.Module):
    """Two producers side by side keep widths of their own, through a shared batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.c = Conv(3, 6, 3), Conv(3, 4, 3), nn.BatchNorm2d(10), Conv(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.bn(torch.cat([self.a(x), self.b(x)], 1)))


class LinkedCats(nn.Module):
    """Two concatenations with different seams, added: three groups, cut at every seam."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 6, 1), Conv(3, 4, 1), Conv(3, 3, 1), Conv(3, 7, 1)
        self.e = Conv(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1))


class Chunked(nn.Module):
    """A C2f block: halves of one convolution, the second one processed, all concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 8, 1), Conv(4, 4, 3, padding=1), Conv(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.c(torch.cat([first, second, self.b(second)], 1))


class Halves(nn.Module):
    """A gate by slicing at a computed middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 8, 1), Conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        middle = x.shape[1] // 2
        return self.b(x[:, :middle] * torch.sigmoid(x[:, middle:]))


class UnevenSplit(nn.Module):
    """A split by sizes written in the code cannot shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 8, 1), Conv(3, 2, 1), Conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split([3, 5], 1)
        return self.b(first) + self.c(second)


class Shuffled(nn.Module):
    """A channel shuffle written as view, transpose, reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 12, 1), Conv(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.b(x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


class NativeShuffle(nn.Module):
    """The same shuffle as an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b = Conv(3, 12, 1), nn.ChannelShuffle(3), Conv(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.shuffle(self.a(x)))


class PixelShuffled(nn.Module):
    """Blocks of r*r channels go together before a pixel shuffle, and come back after its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = Conv(3, 12, 1), nn.PixelShuffle(2), Conv(3, 8, 1)
        self.down, self.c = nn.PixelUnshuffle(2), Conv(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.down(self.b(self.up(self.a(x)))))


class Grouped(nn.Module):
    """A grouped convolution loses the same share of every group, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.bn, self.b = Conv(3, 12, 1), Conv(12, 8, 3, groups=4), nn.BatchNorm2d(8), Conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn(self.g(self.a(x))))


class DepthwiseMultiplier(nn.Module):
    """A depth-wise convolution with three outputs per input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.bn, self.b = Conv(3, 4, 1), Conv(4, 12, 3, groups=4), nn.BatchNorm2d(12), Conv(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn(self.g(self.a(x))))


class Transposed(nn.Module):
    """Transposed convolutions, plain and depth-wise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.bn = Conv(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)
        self.d, self.b = nn.ConvTranspose2d(6, 6, 2, 2, groups=6), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.d(self.bn(self.t(self.a(x)))))


class SpatialCat(nn.Module):
    """A concatenation in space ties the channels of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 4, 1), Conv(3, 4, 1), Conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 2))


class CoordinateAttention(nn.Module):
    """Means over one side, concatenated and split in space, gate the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.b = Conv(3, 6, 1), Conv(6, 4, 1), Conv(6, 2, 1)
        self.h, self.w = Conv(4, 6, 1), Conv(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        h, w = x.shape[2:]
        sides = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        rows, columns = torch.split(F.hardswish(self.m(sides)), [h, w], 2)
        return self.b(x * self.h(rows).sigmoid() * self.w(columns.permute(0, 1, 3, 2)).sigmoid())


class SpatialAttention(nn.Module):
    """Mean and maximum over the channels: legal to shrink, but not neutral; the map has one channel and groups=1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.b = Conv(3, 6, 1), Conv(2, 1, 3, padding=1), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.b(x * self.m(both).sigmoid())


class LinearToImage(nn.Module):
    """Linear to view to transposed convolution to flatten to linear: every channel stands for many features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(192, 5 * 16), nn.ConvTranspose2d(5, 4, 2, 2)
        self.b, self.c = nn.Linear(4 * 64, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.t(self.a(x.flatten(1)).view(x.shape[0], -1, 4, 4)).flatten(1)))


class BareParameters(nn.Module):
    """Parameters and buffers of no layer, per channel and per position, and PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = Conv(3, 6, 1), Conv(6, 2, 1), nn.PReLU(6)
        self.scale, self.place = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.randn(1, 6, 8, 8))
        self.register_buffer("shift", torch.ones(1, 6, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x) * self.scale + self.shift + self.place))


class SharedLayer(nn.Module):
    """One convolution used twice ties its input to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 6, 1), Conv(6, 6, 3, padding=1), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.b(self.a(x)))))


class TiedWeights(nn.Module):
    """Two layers that hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 6, 1), Conv(6, 5, 1), Conv(6, 5, 1), Conv(5, 2, 1)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(self.b(x) + self.c(x.relu()))


class Norms(nn.Module):
    """Group, instance and layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gn, self.inn = Conv(3, 8, 1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.ln, self.b = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.ln(self.inn(self.gn(self.a(x))).mean((2, 3))))


class SqueezeExcite(nn.Module):
    """A gate of shape (N, C, 1, 1) ties the channels, and its own hidden width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f1, self.f2, self.b = Conv(3, 8, 1), nn.Linear(8, 4), nn.Linear(4, 8), Conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.f2(F.relu(self.f1(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
        return self.b(x * gate[:, :, None, None])


class SqueezeExciteExpanded(SqueezeExcite):
    """The same, with the gate viewed and expanded."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.f2(F.relu(self.f1(x.mean([2, 3])))).sigmoid().view(*x.shape[:2], 1, 1)
        return self.b(x * gate.expand_as(x))


class UpAndJoin(nn.Module):
    """A small U: down, up by interpolation, concatenate, pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 3, 2, 1), Conv(4, 8, 3, 2, 1), Conv(8, 4, 1), Conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.interpolate(self.c(self.b(x)), scale_factor=2, mode="bilinear")
        return self.d(F.avg_pool2d(torch.cat([x, y], 1), 2))


class Dense(nn.Module):
    """Two dense layers with batch normalisation before the activation (nothing to fold into)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 6, 1), Conv(6, 4, 1), Conv(10, 2, 1)
        self.n1, self.n2 = nn.BatchNorm2d(6), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.n1(x)))], 1)
        return self.c(F.relu(self.n2(x)))


class Perceptron(nn.Module):
    """Linear layers with and without batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.c = nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(F.relu(self.bn(self.a(x.flatten(1)))))))


class MatrixParameter(nn.Module):
    """A product with a bare matrix is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.b = Conv(3, 6, 1), nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean((2, 3)) @ self.w)


class Mixer(nn.Module):
    """Linear layers over the positions: the channels they run along stay, the hidden widths are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t1, self.t2 = Conv(3, 8, 2, 2), nn.Linear(16, 10), nn.Linear(10, 16)
        self.c1, self.c2, self.b = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2)
        x = (x + self.t2(F.gelu(self.t1(x)))).transpose(1, 2)
        return self.b((x + self.c2(F.gelu(self.c1(x)))).mean(1))


class PaddedShortcut(nn.Module):
    """A shortcut padded with zero channels freezes both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 1), Conv(4, 8, 3, 2, 1), Conv(8, 6, 1), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(self.c(self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


class Rolled(nn.Module):
    """Channels rolled round have to stay: where one ends up depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 1), Conv(4, 8, 1), Conv(8, 6, 1), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.roll(self.b(self.a(x)), 1, 1)))


class UnknownOperation(nn.Module):
    """A running maximum over the channels has no rule: they are frozen, their neighbours are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 1), Conv(4, 8, 1), Conv(8, 6, 1), Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.cummax(self.b(self.a(x)), 1)[0]))


class UnusedLayer(nn.Module):
    """A layer that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z, self.b = Conv(3, 4, 1), Conv(4, 8, 1), Conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class OneChannel(nn.Module):
    """Convolutions to and from a single channel are not depth-wise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 1, 1), Conv(1, 8, 1), Conv(8, 1, 1), Conv(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


class HardCodedView(nn.Module):
    """A view to 512 features written as a number: shrinking ``b`` breaks it, ``a`` and ``c`` are fine."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 1), Conv(4, 8, 1), nn.Linear(512, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).view(-1, 512)))


class HardCodedMiddle(nn.Module):
    """A slice at a middle written as a number still runs when it is narrower, and then computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 8, 1), Conv(8, 2, 1), Conv(3, 5, 1)
        self.d = Conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.cat([y[:, 4:], y[:, :4]], 1)
        return self.b(y) + self.d(self.c(x))


class TupleOutput(nn.Module):
    """Several outputs are all frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 6, 1), Conv(6, 4, 1), Conv(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.b(self.a(x))
        return self.c(x), x


#: Network class -> units of its groups in order. Each is checked exactly: structure, function, MACs, parameters.
GROUPS: dict[type[nn.Module], tuple[int, ...]] = {
    CatTwice: (6, 5),
    CatIndependent: (6, 4),
    LinkedCats: (3, 3, 4),
    Chunked: (4, 4),
    Halves: (4,),
    Shuffled: (4,),
    NativeShuffle: (4,),
    PixelShuffled: (3, 8),
    Grouped: (3, 2),
    DepthwiseMultiplier: (4,),
    Transposed: (4, 6),
    SpatialCat: (4,),
    CoordinateAttention: (6, 4),
    SpatialAttention: (6,),
    LinearToImage: (5, 4, 7),
    BareParameters: (6,),
    SharedLayer: (6,),
    TiedWeights: (6, 5),
    Norms: (4,),
    SqueezeExcite: (8, 4),
    SqueezeExciteExpanded: (8, 4),
    UpAndJoin: (4, 8, 4),
    Dense: (6, 4),
    Perceptron: (8, 6),
    MatrixParameter: (6, 5),
    Mixer: (10, 12),
    ShuffleUnits: (2, 8, 8, 8),
    GatedInvertedResidual: (6, 24, 4),
    ConvNeXtBlock: (6, 12),
    PaddedShortcut: (6,),
    Rolled: (4, 6),
    UnknownOperation: (4, 6),
    UnusedLayer: (4,),
    OneChannel: (8,),
    TupleOutput: (6,),
    **graph_zoo_attention.GROUPS,
}
