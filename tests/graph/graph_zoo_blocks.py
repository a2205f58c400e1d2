"""Whole blocks of known networks, beside the micro networks of ``graph_zoo``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d as Conv


class ShuffleUnits(nn.Module):
    """ShuffleNetV2: half of the channels processed, concatenated and shuffled, three times over.

    A channel meets ever more of the others as halves and shuffles follow each other: of 16, two units of 8 are left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 16, 1), Conv(16, 2, 1)
        self.units = nn.ModuleList(
            nn.Sequential(Conv(8, 8, 1), Conv(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), Conv(8, 8, 1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for unit in self.units:
            first, second = x.chunk(2, 1)
            x = torch.cat([first, unit(second)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.b(x)


class GatedInvertedResidual(nn.Module):
    """EfficientNet's block: expansion, depth-wise, gate by convolutions, projection, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 6, 1), Conv(6, 2, 1)
        self.expand, self.bn, self.depthwise = Conv(6, 24, 1), nn.BatchNorm2d(24), Conv(24, 24, 5, padding=2, groups=24)
        self.squeeze, self.excite, self.project = Conv(24, 4, 1), Conv(4, 24, 1), Conv(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.silu(self.depthwise(F.silu(self.bn(self.expand(x)))))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return self.b(x + self.project(y))


class ConvNeXtBlock(nn.Module):
    """Depth-wise, channels last, layer normalisation, two linear layers, a scale per channel, back and add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise, self.norm = Conv(3, 6, 2, 2), Conv(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), nn.Parameter(torch.ones(6))
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))) * self.scale
        return self.b((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))
