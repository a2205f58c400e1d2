"""A generator of images from images (Johnson et al., 2016; CycleGAN, 2017): down, residual blocks, up again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hwsearch.models.vgg import scaled

#: The factories that a saved model folder may name.
FACTORIES = ("translator_small",)


def _norm(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels, affine=True), nn.ReLU(inplace=True)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance normalisation beside the identity; nothing behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm2d(channels, affine=True)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape."""
        y: Tensor = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return x + y


class Translator(nn.Module):
    """A stem, convolutions of stride 2, residual blocks, transposed convolutions back to the image's size.

    Args:
        widths: channels of the stem, then after every halving.
        blocks: number of residual blocks, at the smallest size.

    Sides of the image must be multiples of ``2 ** (len(widths) - 1)``.
    """

    def __init__(self, widths: Sequence[int], blocks: int, *, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), *_norm(widths[0]))
        down: list[nn.Module] = []
        for before, width in pairwise(widths):
            down += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), *_norm(width)]
        self.down = nn.Sequential(*down)
        self.blocks = nn.Sequential(*(ResidualBlock(widths[-1]) for _ in range(blocks)))
        up: list[nn.Module] = []
        for before, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            up += [nn.ConvTranspose2d(before, width, 4, stride=2, padding=1, bias=False), *_norm(width)]
        self.up = nn.Sequential(*up)
        self.head = nn.Sequential(nn.Conv2d(widths[0], out_channels, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to images ``(N, out_channels, H, W)`` from 0 to 1."""
        image: Tensor = self.head(self.up(self.blocks(self.down(self.stem(x)))))
        return image


def translator_small(
    in_channels: int = 1, out_channels: int = 1, width: float = 1.0, widths: Sequence[int] | None = None,
    blocks: int = 2,
) -> Translator:  # fmt: skip
    """Two halvings and two residual blocks for small images (12.5 MMACs at 1x28x28).

    Args:
        width: multiplier on the default widths 16, 32, 64.
        widths: three explicit widths; ``width`` must then be 1.
    """
    return Translator(scaled((16, 32, 64), width, widths), blocks, in_channels=in_channels, out_channels=out_channels)
