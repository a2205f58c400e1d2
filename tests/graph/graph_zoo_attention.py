"""Micro networks with attention, einsum, negative axes and other ways to pick and repeat, beside ``graph_zoo``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d as Conv


class _Tokens(nn.Module):
    """Patches as tokens, something in the middle, a mean over the tokens, a classifier."""

    def __init__(self, c: int = 6) -> None:
        super().__init__()
        self.patches, self.head = Conv(3, c, 2, 2), nn.Linear(c, 2)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.middle(x)).mean(1))


class QkvIndexed(_Tokens):
    """Queries, keys and values picked from one projection by index, heads of a fixed size: whole heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * 4 * 2), nn.Linear(4 * 2, 6)

    def middle(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, -1, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y.transpose(1, 2).reshape(n, tokens, -1))


class QkvSplit(_Tokens):
    """The same through a split of the last axis, and attention as two products and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * 4 * 2), nn.Linear(4 * 2, 6)

    def middle(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (q * 2**-0.5) @ k.mT
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GroupedQueries(_Tokens):
    """Two query heads share a key head: both go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 6)

    def middle(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class OneHead(_Tokens):
    """One head: queries and keys are multiplied over their whole width, which stays; the values are free."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(4, 6)

    def middle(self, x: Tensor) -> Tensor:
        return self.proj(torch.bmm((self.q(x) @ self.k(x).mT / 5).softmax(-1), self.v(x)))


class EinsumLayers(_Tokens):
    """Linear layers and attention written with einsum, with bare matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 6) * 0.3), nn.Parameter(torch.randn(6, 8) * 0.3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(6, 3, 4) * 0.3) for _ in range(3))
        self.out = nn.Parameter(torch.randn(3, 4, 6) * 0.3)

    def middle(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        y = torch.einsum("bhnm,bmhd->bnhd", scores, v)
        x = x + torch.einsum("bnhd,hdc->bnc", y, self.out)
        return torch.einsum("cd,bnd->bnc", self.down, torch.einsum("dc,bnc->bnd", self.up, x).relu())


class ChannelAttention(nn.Module):
    """Keys times values before the queries: what is summed over is positions, then the features of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.qkv, self.b = Conv(3, 6, 1), Conv(6, 3 * 4 * 2, 1), Conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.a(x))
        n, _, h, w = y.shape
        q, k, v = y.reshape(n, 3, -1, 2, h * w).unbind(1)
        y = torch.matmul(torch.matmul(v, k.transpose(-1, -2)) / (h * w), q)
        return self.b(y.reshape(n, -1, h, w))


class HardCodedHeads(_Tokens):
    """Four heads written as a number: the attention stays, the perceptron behind it is free."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(6, 3 * 8), nn.Linear(8, 6), 4
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def middle(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, 8))
        return y + self.down(self.up(y).relu())


class LibraryAttention(_Tokens):
    """PyTorch's own module, which checks every size: frozen, the perceptron behind it is free."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def middle(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return y + self.down(self.up(y).relu())


class NegativeAxes(_Tokens):
    """Chunks, splits, concatenations and means over axes counted from the end, of maps and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(9, 6)
        self.map, self.last = Conv(6, 6, 1), Conv(3, 6, 1)

    def middle(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, -1)
        y = torch.cat([first * second, self.b(torch.cat([second, first], -1))], -1)
        y = self.map(self.c(y).transpose(-2, -1).unflatten(-1, (4, 4)))
        left, right = torch.split(y, y.shape[-3] // 2, -3)
        return self.last(left + right).flatten(-2).movedim(-1, -2)


class Gated(nn.Module):
    """A gated linear unit: the two halves go together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 8, 1), Conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.glu(self.a(x), 1))


class Repeated(nn.Module):
    """Channels repeated in blocks and one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 4, 1), Conv(8, 5, 1), Conv(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).repeat(1, 2, 1, 1)).repeat_interleave(2, 1))


class Patched(nn.Module):
    """A convolution by hand: patches, a linear layer, back to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 4, 1), nn.Linear(4 * 9, 5 * 4), Conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.unfold(self.a(x), 3, padding=1, stride=2).transpose(1, 2)).transpose(1, 2)
        return self.c(F.fold(y, (8, 8), 2, stride=2))


class WindowShift(nn.Module):
    """Windows of a map shifted around, with a learnt table of positions (as in Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.down, self.b = Conv(3, 6, 1), nn.Linear(6, 9), nn.Linear(9, 6), Conv(6, 2, 1)
        self.table = nn.Parameter(torch.randn(7, 6))
        self.register_buffer("index", torch.arange(16) % 7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.a(x).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        n, h, w, c = y.shape
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = y + self.down(F.gelu(self.up(y + self.table[self.index])))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.b(torch.roll(y, (1, 1), (1, 2)).permute(0, 3, 1, 2))


class FrozenNorm(nn.Module):
    """Batch normalisation as constant buffers (detection backbones)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 6, 1, bias=False), Conv(6, 2, 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(6) + 0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.b(self.a(x) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1))


class ManyOutputs(nn.Module):
    """A module that returns several maps of different widths, used in another order."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Conv(3, 4, 1), Conv(4, 6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            x = self.a(x)
            return x, {"deep": self.b(x)}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c, self.d = self.Stem(), Conv(6, 5, 1), Conv(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow, rest = self.stem(x)
        return self.d(torch.cat([self.c(rest["deep"]), shallow], 1))


class CascadedConcat(nn.Module):
    """A concatenation of concatenations and splits of it, side by side with its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Conv(3, 4, 1), Conv(3, 4, 1), Conv(8, 6, 1), Conv(22, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = torch.cat([a, b], 1)
        first, second = both.split(both.shape[1] // 2, 1)
        return self.d(torch.cat([torch.cat([self.c(both), both], 1), first + a, second * b], 1))


class MaskedWeight(nn.Module):
    """A convolution whose weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mask = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.rand(6, 3, 3, 3))
        self.b = Conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(x, self.weight * self.mask.sigmoid(), padding=1))


#: Network class -> units of its groups in order, as in ``graph_zoo.GROUPS``.
GROUPS: dict[type[nn.Module], tuple[int, ...]] = {
    QkvIndexed: (6, 4),
    QkvSplit: (6, 4),
    GroupedQueries: (6, 2),
    OneHead: (6, 4),
    EinsumLayers: (6, 3, 4, 8),
    ChannelAttention: (6, 4),
    NegativeAxes: (6, 4, 5, 6, 3),
    Gated: (4,),
    Repeated: (4, 5),
    Patched: (4, 5),
    WindowShift: (6, 9),
    FrozenNorm: (6,),
    ManyOutputs: (4, 6, 5),
    CascadedConcat: (4, 6),
    MaskedWeight: (6,),
}
