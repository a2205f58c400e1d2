"""ResNet with basic blocks (He et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hwsearch.models.vgg import scaled

#: The factories that a saved model folder may name.
FACTORIES = ("resnet18", "resnet_small")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, channels, H/stride, W/stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A stem, stages of basic blocks (the first of each later stage halves the map), global mean, one linear layer.

    Args:
        blocks: number of blocks per stage.
        widths: channels per stage.
        stem: ``"small"`` for one 3x3 convolution, ``"large"`` for 7x7 with stride 2 and max pooling.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        stem: str = "small",
    ) -> None:
        super().__init__()
        large = stem == "large"
        size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], size, stride, padding, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            *([nn.MaxPool2d(3, 2, 1)] if large else []),
        )
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for block in range(count):
                stage.append(BasicBlock(channels, width, 2 if index > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def resnet_small(
    in_channels: int = 1, classes: int = 10, width: float = 1.0, widths: Sequence[int] | None = None
) -> ResNet:
    """Four basic blocks in three stages for small images (13.0 MMACs at 1x28x28).

    Args:
        width: multiplier on the default stage widths 16, 32, 64.
        widths: three explicit stage widths; ``width`` must then be 1.
    """
    return ResNet((1, 1, 2), scaled((16, 32, 64), width, widths), in_channels=in_channels, classes=classes)


def resnet18(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> ResNet:
    """ResNet-18 for 3x224x224 (1.81 GMACs, 11.7 M parameters)."""
    widths = scaled((64, 128, 256, 512), width, None)
    return ResNet((2, 2, 2, 2), widths, in_channels=in_channels, classes=classes, stem="large")
