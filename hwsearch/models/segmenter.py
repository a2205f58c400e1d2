"""A segmentation network: encoder, decoder, concatenated shortcuts, after U-Net (Ronneberger et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hwsearch.models.vgg import scaled

#: The factories that a saved model folder may name.
FACTORIES = ("segmenter_small",)


def _conv(channels_in: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
    ]  # fmt: skip


class Segmenter(nn.Module):
    """Stages of two 3x3 convolutions going down, the same going up beside what was seen on the way, a class a pixel.

    Args:
        widths: channels per stage, from the image's own size down to the smallest map.
        classes: of a pixel.

    Sides of the image must be multiples of ``2 ** (stages - 1)``.
    """

    def __init__(self, widths: Sequence[int], *, in_channels: int = 1, classes: int = 11) -> None:
        super().__init__()
        down, channels = [], in_channels
        for width in widths:
            down.append(nn.Sequential(*_conv(channels, width), *_conv(width, width)))
            channels = width
        self.down = nn.ModuleList(down)
        self.pool = nn.MaxPool2d(2)
        self.larger = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.up = nn.ModuleList(
            nn.Sequential(*_conv(below + width, width), *_conv(width, width))
            for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.classifier = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes, H, W)``."""
        seen = []
        for index, stage in enumerate(self.down):
            x = stage(self.pool(x) if index else x)
            seen.append(x)
        for stage, shortcut in zip(self.up, seen[-2::-1], strict=True):
            x = stage(torch.cat([self.larger(x), shortcut], dim=1))
        logits: Tensor = self.classifier(x)
        return logits


def segmenter_small(
    in_channels: int = 1, classes: int = 11, width: float = 1.0, widths: Sequence[int] | None = None
) -> Segmenter:
    """Three stages for small images (22.2 MMACs at 1x56x56).

    Args:
        width: multiplier on the default stage widths 8, 16, 32.
        widths: three explicit stage widths; ``width`` must then be 1.
    """
    return Segmenter(scaled((8, 16, 32), width, widths), in_channels=in_channels, classes=classes)
