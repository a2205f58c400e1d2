"""MobileNetV2: inverted residuals with depth-wise convolutions (Sandler et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hwsearch.models.vgg import scaled

#: The factories that a saved model folder may name.
FACTORIES = ("mobilenetv2", "mobilenetv2_small")


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool = True
) -> nn.Sequential:
    """A convolution, its batch normalisation, and ReLU6 unless ``act`` is false."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depth-wise, 1x1 linear projection; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.use_shortcut = stride == 1 and in_channels == out_channels
        self.body = nn.Sequential(
            *([conv_bn(in_channels, hidden, 1)] if expansion != 1 else []),
            conv_bn(hidden, hidden, 3, stride, hidden),
            conv_bn(hidden, out_channels, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H/stride, W/stride)``."""
        y: Tensor = self.body(x)
        return x + y if self.use_shortcut else y


class MobileNetV2(nn.Module):
    """A stem, inverted residuals, a 1x1 head, global mean, one linear layer.

    Args:
        settings: ``(expansion, channels, blocks, stride)`` per stage.
        stem: channels of the first convolution; ``stem_stride`` its stride.
        head: channels of the last convolution.
        dropout: before the classifier.
    """

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        stem: int = 32,
        stem_stride: int = 2,
        head: int = 1280,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.stem = conv_bn(in_channels, stem, 3, stem_stride)
        blocks: list[nn.Module] = []
        channels = stem
        for expansion, width, count, stride in settings:
            for block in range(count):
                blocks.append(InvertedResidual(channels, width, stride if block == 0 else 1, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(channels, head, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.dropout(self.head(self.blocks(self.stem(x))).mean((2, 3))))
        return logits


def mobilenetv2_small(
    in_channels: int = 1, classes: int = 10, width: float = 1.0, widths: Sequence[int] | None = None
) -> MobileNetV2:
    """Seven inverted residuals for small images (6.6 MMACs at 1x28x28).

    Args:
        width: multiplier on the default widths 16, 16, 24, 32, 64, 128 (stem, four stages, head), rounded to 8.
        widths: six explicit widths; ``width`` must then be 1.
    """
    w = scaled((16, 16, 24, 32, 64, 128), width, widths, divisor=8)
    settings = ((1, w[1], 1, 1), (4, w[2], 2, 2), (4, w[3], 2, 2), (4, w[4], 2, 1))
    return MobileNetV2(
        settings, in_channels=in_channels, classes=classes, stem=w[0], stem_stride=1, head=w[5], dropout=0.0
    )


def mobilenetv2(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2 for 3x224x224 (301 MMACs, 3.5 M parameters at width 1)."""
    w = scaled((32, 16, 24, 32, 64, 96, 160, 320, 1280), width, None, divisor=8)
    repeats = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
    settings = [
        (expansion, channels, count, stride)
        for (expansion, count, stride), channels in zip(repeats, w[1:8], strict=True)
    ]
    return MobileNetV2(settings, in_channels=in_channels, classes=classes, stem=w[0], head=max(w[8], 1280))
