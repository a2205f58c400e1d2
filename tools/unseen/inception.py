"""GoogLeNet and Inception with batch normalisation: parallel branches of different kernels, joined."""

from __future__ import annotations

from torch import nn

from unseen.layers import Branches, classifier, conv_bn

#: Per module of GoogLeNet: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection. None is a maximum with stride 2.
_GOOGLENET: tuple[tuple[int, ...] | None, ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)

#: Per module of Inception-BN: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool projection; the pool.
#: No 1x1 branch and no projection: a module of stride 2.
_INCEPTION_BN = (
    (64, 64, 64, 64, 96, 32, "mean"),
    (64, 64, 96, 64, 96, 64, "mean"),
    (0, 128, 160, 64, 96, 0, "max"),
    (224, 64, 96, 96, 128, 128, "mean"),
    (192, 96, 128, 96, 128, 128, "mean"),
    (160, 128, 160, 128, 160, 96, "mean"),
    (96, 128, 192, 160, 192, 96, "mean"),
    (0, 128, 192, 192, 256, 0, "max"),
    (352, 192, 320, 160, 224, 128, "mean"),
    (352, 192, 320, 192, 224, 128, "max"),
)


def googlenet(*, norm: bool = False, classes: int = 1000) -> nn.Module:
    """GoogLeNet without its auxiliary heads and local response normalisation; ``norm`` adds batch normalisation.

    Reference: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, table 1.
    """

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
        if norm:
            return conv_bn(inputs, outputs, kernel, stride)
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU())

    def halve() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers = [conv(3, 64, 7, 2), halve(), conv(64, 64, 1), conv(64, 192, 3), halve()]
    channels = 192
    for module in _GOOGLENET:
        if module is None:
            layers.append(halve())
            continue
        one, reduce3, three, reduce5, five, projection = module
        layers.append(
            Branches(
                conv(channels, one, 1),
                nn.Sequential(conv(channels, reduce3, 1), conv(reduce3, three, 3)),
                nn.Sequential(conv(channels, reduce5, 1), conv(reduce5, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, projection, 1)),
            )
        )
        channels = one + three + five + projection
    return nn.Sequential(*layers, classifier(channels, classes))


def inception_bn(classes: int = 1000) -> nn.Module:
    """Inception with batch normalisation ("Inception-v2").

    Reference: Ioffe and Szegedy, Batch Normalization, ICML 2015, figure 5 (the table of the network).
    """
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), conv_bn(64, 64, 1), conv_bn(64, 192)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 192
    for one, reduce3, three, reduce_double, double, projection, pool in _INCEPTION_BN:
        stride = 1 if one else 2
        pooling: nn.Module = nn.AvgPool2d(3, 1, 1) if pool == "mean" else nn.MaxPool2d(3, stride, 1)
        branches = [
            nn.Sequential(conv_bn(channels, reduce3, 1), conv_bn(reduce3, three, 3, stride)),
            nn.Sequential(
                conv_bn(channels, reduce_double, 1), conv_bn(reduce_double, double), conv_bn(double, double, 3, stride)
            ),
            nn.Sequential(pooling, *([conv_bn(channels, projection, 1)] if projection else [])),
        ]
        layers.append(Branches(*([conv_bn(channels, one, 1)] if one else []), *branches))
        channels = one + three + double + (projection or channels)
    return nn.Sequential(*layers, classifier(channels, classes))
