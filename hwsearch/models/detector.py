"""A one-stage detector: plain convolutions down to a map of cells, each of which says one box (after YOLO)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hwsearch.models.vgg import scaled

#: The factories that a saved model folder may name.
FACTORIES = ("detector_small",)

_BOX = 5  # object, x, y, width, height: see hwsearch.train.detection


class Detector(nn.Module):
    """Stages of 3x3 convolutions, the first of each with stride 2, then a head of two more.

    Args:
        widths: channels per stage; the output's cells are ``2 ** stages`` pixels wide.
        convolutions: per stage.
        classes: of an object.
    """

    def __init__(
        self, widths: Sequence[int], convolutions: Sequence[int], *, in_channels: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width, count in zip(widths, convolutions, strict=True):
            for index in range(count):
                layers += [
                    nn.Conv2d(channels, width, 3, 1 if index else 2, padding=1, bias=False), nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]  # fmt: skip
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, _BOX + classes, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to cells ``(N, 5 + classes, H / 8, W / 8)`` (of three stages)."""
        cells: Tensor = self.head(self.features(x))
        return cells


def detector_small(
    in_channels: int = 1, classes: int = 10, width: float = 1.0, widths: Sequence[int] | None = None
) -> Detector:
    """Six convolutions and a head for small images (9.2 MMACs at 1x56x56).

    Args:
        width: multiplier on the default stage widths 16, 32, 64.
        widths: three explicit stage widths; ``width`` must then be 1.
    """
    return Detector(scaled((16, 32, 64), width, widths), (1, 2, 3), in_channels=in_channels, classes=classes)
