"""Re-parameterised networks of timm fold through our adapters; skipped where timm is not installed.

torchvision, which timm imports, may have been built for another torch: its compiled operators are then missing, and
two empty definitions let it be imported (nothing here calls them).
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from hwsearch.errors import CheckFailedError
from hwsearch.reparam.fold import fold, plan_fold
from hwsearch.reparam.statistics import is_norm

NAMES = (
    "repvgg_a0", "mobileone_s0", "mobileone_s1", "fastvit_t8", "fastvit_mci0", "repvit_m0_9", "repghostnet_050",
    "ghostnetv3_050", "levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "nextvit_small", "shvit_s1", "lcnetv2_base",
    "iformer_t", "efficientvim_m1",
)  # fmt: skip


@pytest.fixture(scope="module")
def timm() -> Any:
    pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                 "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
        try:
            library.define(name)
        except RuntimeError:  # the real one is there
            break
    try:
        yield importlib.import_module("timm")
    except ImportError:
        pytest.skip("timm is not installed")


def trained_like(model: nn.Module, x: torch.Tensor) -> None:
    """Statistics that are not trivial, and tame: ``randomise`` makes attention chaotic (float32 alone is 6 % off)."""
    generator = torch.Generator().manual_seed(2)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
            norm.bias.copy_(0.4 * torch.rand(norm.num_features, generator=generator) - 0.2)
            norm.momentum = 1.0
            norm.train()
        model(torch.cat([x, *(torch.randn(x.shape, generator=generator) for _ in range(7))]))
        for norm in norms:
            norm.eval()
            norm.momentum = 0.1
            norm.running_mean.add_(0.1 * torch.randn(norm.num_features, generator=generator) * norm.running_var.sqrt())
            norm.running_var.mul_(0.8 + 0.5 * torch.rand(norm.num_features, generator=generator)).add_(1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_networks_of_timm_fold(timm: Any, name: str) -> None:
    """Within 4 times the noise of float32, with trained-like statistics; every batch norm is accounted for."""
    torch.set_num_threads(1)
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)) + 0.2
    trained_like(model, x)
    plan = plan_fold(model, x)
    assert plan.blocks, "no block of this network was recognised"
    folded = fold(model, x)
    left = [inner for inner in folded.modules() if is_norm(inner)]
    assert len(left) == len(plan.left), "a batch norm stays that the plan does not tell of, or the other way round"
    assert sum(isinstance(m, nn.Conv2d) for m in folded.modules()) <= sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        scale = expected.abs().max()
        noise = float((model(x).double() - expected).abs().max() / scale)
        error = float((folded(x).double() - expected).abs().max() / scale)
    if noise > 1e-2:
        raise CheckFailedError(f"{name} is chaotic under these statistics: {noise:.2g}")
    assert error <= 4 * noise + 1e-6, (error, noise)
