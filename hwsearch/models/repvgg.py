"""RepVGG (Ding et al., CVPR 2021): 3x3 convolutions in a row, each trained as a block of branches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.odbb import ODBB

#: The factories that a saved model folder may name.
FACTORIES = ("repvgg_a0", "repvgg_small")


class RepVGG(nn.Module):
    """A stem block, stages of blocks (the first of a stage with the stage's stride), global mean, one linear layer.

    Args:
        blocks: number of blocks per stage.
        widths: channels of the stem, then of each stage.
        strides: of the stem, then of the first block of each stage.
        branches: of every block, see ``ODBB``; ``("kxk",)`` is the plain network.
        border, post_norm: see ``ODBB``.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        branches: str | Sequence[str] = "repvgg",
        border: str = "pad_first",
        post_norm: bool = False,
    ) -> None:
        super().__init__()

        def block(channels_in: int, channels: int, stride: int) -> nn.Sequential:
            host = ConvShape(channels_in, channels, (3, 3), (stride, stride), padding=((1, 1), (1, 1)))
            return nn.Sequential(ODBB(host, branches, border=border, post_norm=post_norm), nn.ReLU(inplace=True))

        self.stem = block(in_channels, widths[0], strides[0])
        stages = []
        for (before, width), count, stride in zip(pairwise(widths), blocks, strides[1:], strict=True):
            stage = [block(before, width, stride)] + [block(width, width, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def repvgg_a0(
    in_channels: int = 3, classes: int = 1000, branches: str | Sequence[str] = "repvgg", post_norm: bool = False
) -> RepVGG:
    """RepVGG-A0 for 3x224x224 (1.36 GMACs and 8.3 M parameters when folded)."""
    widths, strides = (48, 48, 96, 192, 1280), (2, 2, 2, 2, 2)
    return RepVGG(
        (2, 4, 14, 1), widths, strides, in_channels=in_channels, classes=classes, branches=branches,
        post_norm=post_norm,
    )  # fmt: skip


def repvgg_small(
    in_channels: int = 1,
    classes: int = 10,
    branches: str | Sequence[str] = "repvgg",
    widths: Sequence[int] = (16, 24, 48, 96),
    border: str = "pad_first",
    post_norm: bool = False,
) -> RepVGG:
    """Seven blocks for small images (6.3 MMACs at 1x28x28 when folded)."""
    return RepVGG(
        (2, 3, 1), widths, (1, 2, 2, 1), in_channels=in_channels, classes=classes, branches=branches, border=border,
        post_norm=post_norm,
    )  # fmt: skip
