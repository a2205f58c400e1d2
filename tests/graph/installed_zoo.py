"""torchvision and timm where they are installed: never dependencies of the package, only more networks to try it on.

torchvision's wheels bring compiled operations for one build of PyTorch. Beside another build only two of their names
are missing at import, and networks need neither: they are declared without an implementation.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

#: ``source:name`` of the networks to try: each family at a small size where it has one.
TORCHVISION = (
    "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "googlenet", "inception_v3",
    "shufflenet_v2_x1_0", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "squeezenet1_1", "vgg11_bn", "alexnet", "convnext_tiny",
    "vit_b_16", "swin_t",
)  # fmt: skip
TIMM = (
    "resnet26d", "seresnet50", "mobilenetv1_100", "mobilenetv4_conv_small", "efficientnet_lite0", "mixnet_s",
    "repvgg_a0", "ghostnet_100", "ghostnetv2_100", "hrnet_w18_small", "res2net50_26w_4s", "resnest14d",
    "dla34", "cspdarknet53", "darknet53", "ese_vovnet19b_dw", "xception41", "inception_v4", "inception_resnet_v2",
    "convnextv2_atto", "regnetx_002", "regnety_002", "mobileone_s0", "fastvit_t8", "fasternet_t0", "starnet_s1",
    "poolformer_s12", "edgenext_xx_small", "efficientvit_b0", "repvit_m0_9", "levit_128s", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224", "coat_lite_tiny", "lcnet_050", "tinynet_e",
    "hardcorenas_a", "skresnet18", "selecsls42b", "rexnet_100", "dpn68", "nf_resnet50", "tf_efficientnetv2_b0",
    "fbnetc_100",
)  # fmt: skip
#: Input extents other than 64 that a network insists on (or needs, to have any map left at its end).
EXTENT = {
    "inception_v3": 160, "vit_b_16": 224, "swin_t": 64, "vgg11_bn": 64, "alexnet": 64, "googlenet": 64,
    "levit_128s": 224, "vit_tiny_patch16_224": 224, "deit_tiny_patch16_224": 224, "mixer_s32_224": 224,
    "resmlp_12_224": 224, "coat_lite_tiny": 224, "inception_v4": 128, "inception_resnet_v2": 128, "hrnet_w18_small": 64,
}  # fmt: skip


@cache
def package(name: str) -> Any:
    """``torchvision.models`` or ``timm``, or None where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        declare_operations()
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module("torchvision.models" if name == "torchvision" else name)


@cache
def declare_operations() -> Any:
    """The two operations that torchvision looks for while it is imported; the library lives as long as the process."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    return library


def factories() -> dict[str, Callable[[], nn.Module]]:
    """``torchvision:resnet18`` and so on, without weights; empty where neither package is installed."""
    found: dict[str, Callable[[], nn.Module]] = {}
    vision, timm = package("torchvision"), package("timm")
    for name in TORCHVISION if vision is not None else ():
        found[f"torchvision:{name}"] = _vision(vision, name)
    for name in TIMM if timm is not None else ():
        if timm.is_model(name):
            found[f"timm:{name}"] = lambda name=name: timm.create_model(name, pretrained=False)
    return found


def image(name: str) -> tuple[int, int, int, int]:
    """The input shape to try a network of ``factories`` on."""
    extent = EXTENT.get(name.partition(":")[2], 64)
    return (1, 3, extent, extent)


def _vision(vision: Any, name: str) -> Callable[[], nn.Module]:
    extra = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return lambda: vision.get_model(name, weights=None, **extra)
