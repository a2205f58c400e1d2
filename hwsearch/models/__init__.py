"""Reference networks in plain PyTorch, a file each, and the loader of user-named models.

Every factory is named ``hwsearch.models.<file>:<factory>``, and can be imported from here as well (``mobilenetv2``
alone, named like its file, is ``hwsearch.models.mobilenetv2.mobilenetv2``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwsearch.models.cells import cells_full, cells_small
    from hwsearch.models.detector import detector_small
    from hwsearch.models.loading import load_factory
    from hwsearch.models.mobilenetv2 import mobilenetv2_small
    from hwsearch.models.mobileone import mobileone_s0, mobileone_small
    from hwsearch.models.repvgg import repvgg_a0, repvgg_small
    from hwsearch.models.resnet import resnet18, resnet_small
    from hwsearch.models.segmenter import segmenter_small
    from hwsearch.models.translator import translator_small
    from hwsearch.models.vgg import vgg11, vgg_small

__all__ = [
    "cells_full",
    "cells_small",
    "detector_small",
    "load_factory",
    "mobilenetv2_small",
    "mobileone_s0",
    "mobileone_small",
    "repvgg_a0",
    "repvgg_small",
    "resnet18",
    "resnet_small",
    "segmenter_small",
    "translator_small",
    "vgg11",
    "vgg_small",
]

_FILES = {
    "cells_full": "cells",
    "cells_small": "cells",
    "detector_small": "detector",
    "load_factory": "loading",
    "mobilenetv2_small": "mobilenetv2",
    "mobileone_s0": "mobileone",
    "mobileone_small": "mobileone",
    "repvgg_a0": "repvgg",
    "repvgg_small": "repvgg",
    "resnet18": "resnet",
    "resnet_small": "resnet",
    "segmenter_small": "segmenter",
    "translator_small": "translator",
    "vgg11": "vgg",
    "vgg_small": "vgg",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing the package must not load torch.
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
