"""The list of unseen networks. It was fixed before any predictor met it; nothing may be fitted or tuned on it.

Every configuration is one that its authors publish, at an input size in use for it. ``beyond`` marks a family whose
kernels (layer normalisation, GELU) are not those of a convolutional network proper; it is reported apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from unseen.inception import googlenet, inception_bn
from unseen.mobile import ghostnet, mobilenetv1, mobilenetv2, mobilenetv3, shufflenetv2
from unseen.plain import cspdarknet53, darknet19, darknet53, repvgg, squeezenet, vgg, yolov5_classifier
from unseen.residual import RESNET_CELL, SEARCHED_CELL, convnext, densenet, draw_cell, nasbench201, regnet, resnet
from unseen.searched import efficientnet, fbnet_c, mnasnet, single_path_nas, tinynet


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        name: also the name of its file.
        make: builds it, weights untouched.
        size: height and width of its 3-channel input.
        source: where it was published.
        published_mmacs: the published figure for exactly this network and size, where there is one.
        beyond: see the module.
    """

    family: str
    name: str
    size: int
    make: Callable[[], nn.Module] = field(compare=False, repr=False)
    source: str
    published_mmacs: float | None = None
    beyond: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """One image, ``(1, 3, H, W)``."""
        return (1, 3, self.size, self.size)


def _family(
    family: str, source: str, *networks: tuple[str, int, Callable[[], nn.Module], float | None], beyond: bool = False
) -> list[Entry]:
    return [Entry(family, f"{name}_{size}", size, make, source, mmacs, beyond) for name, size, make, mmacs in networks]


#: Slope, start, step, depth and group width of the published RegNets.
_REGNET_X = {200: (36.44, 24, 2.49, 13, 8), 400: (24.48, 24, 2.54, 22, 16)}
_REGNET_Y = {200: (36.44, 24, 2.49, 13, 8), 400: (27.89, 48, 2.09, 16, 8)}

CATALOGUE: tuple[Entry, ...] = (
    *_family(
        "vgg",
        "Simonyan and Zisserman, ICLR 2015 (CIFAR form)",
        ("vgg11", 32, partial(vgg, 11), None),
        ("vgg16", 32, partial(vgg, 16), 313),
        ("vgg19", 32, partial(vgg, 19), 398),
        ("vgg16_half", 32, partial(vgg, 16, 0.5), None),
    ),
    *_family(
        "resnet",
        "He et al., CVPR 2016",
        ("resnet20", 32, partial(resnet, (3, 3, 3), small=True, classes=10), 41),
        ("resnet56", 32, partial(resnet, (9, 9, 9), small=True, classes=10), 126),
        ("resnet18", 112, partial(resnet, (2, 2, 2, 2)), None),
        ("resnet50", 64, partial(resnet, (3, 4, 6, 3), bottleneck=True), None),
    ),
    *_family(
        "regnet",
        "Radosavovic et al., CVPR 2020",
        ("regnetx_200mf", 224, partial(regnet, *_REGNET_X[200]), 200),
        ("regnetx_400mf", 160, partial(regnet, *_REGNET_X[400]), None),
        ("regnety_200mf", 160, partial(regnet, *_REGNET_Y[200], squeeze=True), None),
        ("regnety_400mf", 224, partial(regnet, *_REGNET_Y[400], squeeze=True), 400),
    ),
    *_family(
        "densenet",
        "Huang et al., CVPR 2017",
        ("densenet40_k12", 32, partial(densenet, (12, 12, 12), 12, 16, bottleneck=False, small=True, classes=10), None),
        ("densenet100_bc_k12", 32, partial(densenet, (16, 16, 16), 12, 24, small=True, classes=10), None),
        ("densenet121", 96, partial(densenet, (6, 12, 24, 16), 32, 64), None),
        ("densenet169", 64, partial(densenet, (6, 12, 32, 32), 32, 64), None),
    ),
    *_family(
        "squeezenet",
        "Iandola et al., arXiv 1602.07360",
        ("squeezenet1_1", 96, partial(squeezenet, "1.1"), None),
        ("squeezenet1_1", 224, partial(squeezenet, "1.1"), 350),
        ("squeezenet1_0", 128, partial(squeezenet, "1.0"), None),
        ("squeezenet1_0_bypass", 160, partial(squeezenet, "1.0", bypass=True), None),
    ),
    *_family(
        "inception",
        "Szegedy et al., CVPR 2015; Ioffe and Szegedy, ICML 2015",
        ("googlenet", 96, googlenet, None),
        ("googlenet_bn", 128, partial(googlenet, norm=True), None),
        ("inception_bn", 96, inception_bn, None),
        ("inception_bn", 112, inception_bn, None),
    ),
    *_family(
        "mobilenetv1",
        "Howard et al., arXiv 1704.04861",
        ("mobilenetv1_100", 160, partial(mobilenetv1, 1.0), 290),
        ("mobilenetv1_075", 224, partial(mobilenetv1, 0.75), 325),
        ("mobilenetv1_050", 160, partial(mobilenetv1, 0.5), 76),
        ("mobilenetv1_025", 128, partial(mobilenetv1, 0.25), 14),
    ),
    *_family(
        "mobilenetv2",
        "Sandler et al., CVPR 2018",
        ("mobilenetv2_100", 224, partial(mobilenetv2, 1.0), 300),
        ("mobilenetv2_075", 160, partial(mobilenetv2, 0.75), 107),
        ("mobilenetv2_050", 224, partial(mobilenetv2, 0.5), 97),
        ("mobilenetv2_035", 96, partial(mobilenetv2, 0.35), 11),
    ),
    *_family(
        "mobilenetv3",
        "Howard et al., ICCV 2019",
        ("mobilenetv3_large_100", 224, partial(mobilenetv3, "large"), 219),
        ("mobilenetv3_small_100", 224, partial(mobilenetv3, "small"), 56),
        ("mobilenetv3_small_075", 160, partial(mobilenetv3, "small", 0.75), None),
        ("mobilenetv3_large_minimal_100", 160, partial(mobilenetv3, "large", minimal=True), None),
    ),
    *_family(
        "mnasnet",
        "Tan et al., CVPR 2019; Wu et al., CVPR 2019; Stamoulis et al., ECML-PKDD 2019",
        ("mnasnet_a1", 224, partial(mnasnet, "A1"), 312),
        ("mnasnet_small", 224, partial(mnasnet, "small"), None),
        ("fbnet_c", 160, fbnet_c, None),
        ("single_path_nas", 128, single_path_nas, None),
    ),
    *_family(
        "efficientnet",
        "Tan and Le, ICML 2019; Han et al., NeurIPS 2020",
        ("efficientnet_b0", 224, efficientnet, 390),
        ("efficientnet_lite0", 160, partial(efficientnet, lite=True), None),
        ("tinynet_c", 184, partial(tinynet, 0.54, 0.85), 100),
        ("tinynet_e", 106, partial(tinynet, 0.51, 0.6), 24),
    ),
    *_family(
        "shufflenetv2",
        "Ma et al., ECCV 2018",
        ("shufflenetv2_050", 224, partial(shufflenetv2, "0.5x"), 41),
        ("shufflenetv2_100", 224, partial(shufflenetv2, "1.0x"), 146),
        ("shufflenetv2_150", 160, partial(shufflenetv2, "1.5x"), None),
        ("shufflenetv2_200", 128, partial(shufflenetv2, "2.0x"), None),
    ),
    *_family(
        "ghostnet",
        "Han et al., CVPR 2020",
        ("ghostnet_050", 224, partial(ghostnet, 0.5), 42),
        ("ghostnet_100", 224, partial(ghostnet, 1.0), 141),
        ("ghostnet_100", 128, partial(ghostnet, 1.0), None),
        ("ghostnet_130", 160, partial(ghostnet, 1.3), None),
    ),
    *_family(
        "repvgg",
        "Ding et al., CVPR 2021 (as deployed)",
        ("repvgg_a0", 96, partial(repvgg, (2, 4, 14, 1), 0.75, 2.5), None),
        ("repvgg_a0", 128, partial(repvgg, (2, 4, 14, 1), 0.75, 2.5), None),
        ("repvgg_a1", 96, partial(repvgg, (2, 4, 14, 1), 1.0, 2.5), None),
        ("repvgg_b0", 64, partial(repvgg, (4, 6, 16, 1), 1.0, 2.5), None),
    ),
    *_family(
        "darknet",
        "Redmon and Farhadi, CVPR 2017 and arXiv 1804.02767; Bochkovskiy et al., arXiv 2004.10934; YOLOv5 6.2",
        ("darknet19", 96, darknet19, None),
        ("darknet53", 64, darknet53, None),
        ("cspdarknet53", 64, cspdarknet53, None),
        ("yolov5n_classifier", 224, partial(yolov5_classifier, 0.33, 0.25), None),
    ),
    *_family(
        "nasbench201",
        "Dong and Yang, ICLR 2020",
        *((f"nasbench201_cell{seed}", 32, partial(nasbench201, draw_cell(seed)), None) for seed in range(3)),
        ("nasbench201_resnet", 32, partial(nasbench201, RESNET_CELL), None),
        ("nasbench201_searched", 32, partial(nasbench201, SEARCHED_CELL), None),
    ),
    *_family(
        "convnext",
        "Liu et al., CVPR 2022",
        ("convnext_atto", 96, partial(convnext, (40, 80, 160, 320)), None),
        ("convnext_atto", 128, partial(convnext, (40, 80, 160, 320)), None),
        ("convnext_femto", 128, partial(convnext, (48, 96, 192, 384)), None),
        ("convnext_pico", 96, partial(convnext, (64, 128, 256, 512)), None),
        beyond=True,
    ),
)
