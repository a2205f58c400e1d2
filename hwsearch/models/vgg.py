"""VGG: plain stacks of 3x3 convolutions (Simonyan and Zisserman, 2015), with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hwsearch.errors import InputError

#: The factories that a saved model folder may name.
FACTORIES = ("vgg11", "vgg_small")


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each stage ended by 2x2 max pooling, then one linear layer (or three).

    Args:
        stages: output channels of every convolution, one sequence per stage.
        in_channels: channels of the input image.
        classes: size of the output.
        pooled: side of the average-pooled map before the classifier.
        hidden: widths of hidden linear layers, empty for a single linear layer.
        dropout: dropout before each hidden layer's successor.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        pooled: int = 1,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        head: list[nn.Module] = []
        features = channels * pooled * pooled
        for width in hidden:
            head += [nn.Linear(features, width), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            features = width
        head.append(nn.Linear(features, classes))
        self.classifier = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg_small(in_channels: int = 1, classes: int = 10, width: float = 1.0, widths: Sequence[int] | None = None) -> VGG:
    """Six convolutions in three stages for small images (about 29 MMACs at 1x28x28).

    Args:
        width: multiplier on the default widths 32, 32, 64, 64, 128, 128.
        widths: six explicit widths; ``width`` must then be 1.
    """
    w = scaled((32, 32, 64, 64, 128, 128), width, widths)
    return VGG((w[:2], w[2:4], w[4:]), in_channels=in_channels, classes=classes)


def vgg11(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> VGG:
    """VGG-11 with batch normalisation, for 3x224x224 (7.6 GMACs, 133 M parameters)."""
    w = scaled((64, 128, 256, 256, 512, 512, 512, 512), width, None)
    hidden = scaled((4096, 4096), width, None)
    stages = (w[:1], w[1:2], w[2:4], w[4:6], w[6:])
    return VGG(stages, in_channels=in_channels, classes=classes, pooled=7, hidden=hidden, dropout=0.5)


def scaled(defaults: Sequence[int], width: float, widths: Sequence[int] | None, divisor: int = 1) -> tuple[int, ...]:
    """Channel counts: ``widths`` as given, or the defaults times ``width``, rounded to ``divisor`` and at least that.

    Raises:
        InputError: a width that is not positive, the wrong number of them, or both arguments at once.
    """
    if widths is None:
        if not width > 0:
            raise InputError(f"the width multiplier must be above 0, got {width!r}")
        return tuple(max(divisor, int(channels * width / divisor + 0.5) * divisor) for channels in defaults)
    if width != 1.0:
        raise InputError("give either width (a multiplier) or widths (explicit channels), not both")
    if len(widths) != len(defaults) or any(not isinstance(w, int) or w < 1 for w in widths):
        raise InputError(f"widths must be {len(defaults)} positive whole numbers, got {list(widths)}")
    return tuple(widths)
