"""MobileOne (Vasu et al., CVPR 2023): depth-wise and point-wise convolutions, each over-parameterised in training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.odbb import ODBB

#: The factories that a saved model folder may name.
FACTORIES = ("mobileone_s0", "mobileone_small")


class MobileOne(nn.Module):
    """A 3x3 stem, stages of (depth-wise 3x3, 1x1) pairs, global mean, one linear layer.

    Each convolution is ``copies`` convolutions of its own size beside each other, a 1x1 one where its kernel is larger
    (the "scale" branch), and the identity where the shape allows.

    Args:
        blocks: pairs per stage; the first of each stage has stride 2.
        widths: channels of the stem, then of each stage.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        copies: int = 4,
    ) -> None:
        super().__init__()
        branches = (*["kxk"] * copies, "1x1", "identity")

        def unit(channels_in: int, channels: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
            side = kernel // 2
            host = ConvShape(
                channels_in, channels, (kernel, kernel), (stride, stride), padding=((side, side), (side, side)),
                groups=groups,
            )  # fmt: skip
            return nn.Sequential(ODBB(host, branches), nn.ReLU(inplace=True))

        self.stem = unit(in_channels, widths[0], 3, 2, 1)
        stages, channels = [], widths[0]
        for count, width in zip(blocks, widths[1:], strict=True):
            stage: list[nn.Module] = []
            for index in range(count):
                stage.append(unit(channels, channels, 3, 1 if index else 2, channels))
                stage.append(unit(channels, width, 1, 1, 1))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def mobileone_s0(in_channels: int = 3, classes: int = 1000) -> MobileOne:
    """MobileOne-S0 for 3x224x224 (0.27 GMACs and 2.1 M parameters when folded)."""
    return MobileOne((2, 8, 10, 1), (48, 48, 128, 256, 1024), in_channels=in_channels, classes=classes)


def mobileone_small(in_channels: int = 1, classes: int = 10) -> MobileOne:
    """Three pairs for small images."""
    return MobileOne((1, 2), (16, 24, 48), in_channels=in_channels, classes=classes, copies=2)
