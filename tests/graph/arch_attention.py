"""Small attention networks, whose code reads every size from its tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arch_blocks import Head, LayerNorm2d, Residual, cba
from torch import Tensor, nn

Seq = nn.Sequential


class _Attention(nn.Module):
    """Multi-head attention with heads of a fixed size: as many heads as the weights hold."""

    def __init__(self, c: int, heads: int, size: int, fused: bool) -> None:
        super().__init__()
        self.size, self.fused = size, fused
        self.qkv, self.proj = nn.Linear(c, 3 * heads * size), nn.Linear(heads * size, c)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, -1, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.size**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class _Encoder(nn.Module):
    def __init__(self, c: int, fused: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attention, self.mlp = _Attention(c, 3, 4, fused), Seq(nn.Linear(c, 20), nn.GELU(), nn.Linear(20, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class _ViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.zeros(1, 1, 12))
        self.place = nn.Parameter(torch.randn(1, 17, 12) * 0.02)
        self.blocks = Seq(_Encoder(12, fused), _Encoder(12, fused))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit() -> nn.Module:
    """Patches, a class token, fused attention (Dosovitskiy et al. 2021)."""
    return _ViT(True)


def vit_by_hand() -> nn.Module:
    """The same attention as two products and a softmax."""
    return _ViT(False)


class _Mixer(nn.Module):
    def __init__(self, tokens: int, c: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.tokens = Seq(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
        self.channels = Seq(nn.Linear(c, 20), nn.GELU(), nn.Linear(20, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.n2(x))


class _MixerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 12, 8, 8), Seq(_Mixer(16, 12), _Mixer(16, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def mlp_mixer() -> nn.Module:
    """Linear layers over tokens and over channels (Tolstikhin et al. 2021)."""
    return _MixerNet()


class _LinearAttention(nn.Module):
    """Keys times values first, without a softmax (as in EfficientViT)."""

    def __init__(self, c: int, size: int) -> None:
        super().__init__()
        self.qkv, self.size, self.proj = nn.Conv2d(c, 3 * 2 * size, 1), size, cba(2 * size, c, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, -1, self.size, h * w).unbind(1)
        y = torch.matmul(torch.matmul(v, F.relu(k).transpose(-1, -2)), F.relu(q))
        return x + self.proj(y.reshape(n, -1, h, w) / (h * w))


def efficientvit() -> nn.Module:
    """Linear attention in a convolutional network (Cai et al. 2023)."""
    return Seq(cba(3, 8, 3, 4), _LinearAttention(8, 4), cba(8, 12, 3, 2), _LinearAttention(12, 4), Head(12))


class _Unfolded(nn.Module):
    """Patches of a feature map as tokens of a transformer, folded back and fused (Mehta, Rastegari 2022)."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.inside, self.encoder, self.outside = nn.Conv2d(c, d, 1), _Encoder(d, True), cba(d, c, 1)
        self.fuse = cba(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        n, d, h, w = y.shape
        y = y.reshape(n, d, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(n * 4, (h // 2) * (w // 2), d)
        y = self.encoder(y).reshape(n, 2, 2, h // 2, w // 2, d).permute(0, 5, 3, 1, 4, 2).reshape(n, d, h, w)
        return self.fuse(torch.cat([x, self.outside(y)], 1))


def mobilevit() -> nn.Module:
    """Convolutions outside, attention over unfolded patches inside."""
    return Seq(cba(3, 8, 3, 4), _Unfolded(8, 12), cba(8, 16, 1), Head(16))


class _EinsumAttention(nn.Module):
    """Attention written with ``einsum`` over convolutional queries, with a relative position table."""

    def __init__(self, c: int, size: int, places: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(c, 3 * size, 1, bias=False) for _ in range(3))
        self.size, self.proj = size, nn.Conv2d(3 * size, c, 1)
        self.table = nn.Parameter(torch.randn(places, 3) * 0.1)
        index = torch.arange(places)
        self.register_buffer("index", (index[:, None] - index[None, :]).abs().flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = (layer(x).reshape(n, -1, self.size, h * w) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) * self.size**-0.5
        bias = self.table[self.index].view(h * w, h * w, -1).permute(2, 0, 1)
        y = torch.einsum("bhij,bhdj->bhdi", (scores + bias).softmax(-1), v)
        return x + self.proj(y.reshape(n, -1, h, w))


def coatnet() -> nn.Module:
    """Convolution, then attention with relative positions (Dai et al. 2021)."""
    mlp = Residual(Seq(LayerNorm2d(12), nn.Conv2d(12, 24, 1), nn.GELU(), nn.Conv2d(24, 12, 1)))
    return Seq(cba(3, 8, 3, 4), cba(8, 12, 3, 2), _EinsumAttention(12, 4, 16), mlp, Head(12))
