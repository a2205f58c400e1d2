"""Whole architectures: a few in the suite, all of them (with torchvision's and timm's where installed) when long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, IMAGE
from graph_checks import check_architecture
from installed_zoo import factories, image
from torch import nn

from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthSpace

#: One of each kind of wiring; their number of groups is known.
FEW = {
    "resnet_bottleneck": 9, "densenet": 12, "shufflenet_v2": 7, "mobilenet_v3": 9, "convnext": 4, "unet": 10,
    "yolo_c2f": 25, "vit": 5,
}  # fmt: skip
REST = sorted(ARCHITECTURES.keys() - FEW.keys())


class Joined(nn.Module):
    """Several outputs as one tensor, which is what the exporter takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.model(x)
        return found if isinstance(found, torch.Tensor) else torch.cat([one.flatten(1) for one in found], dim=1)


def test_there_are_enough_of_them() -> None:
    assert len(ARCHITECTURES) >= 40


@pytest.mark.parametrize("name", FEW)
def test_architecture(name: str) -> None:
    torch.manual_seed(0)
    space = check_architecture(ARCHITECTURES[name](), torch.randn(IMAGE))
    assert len(space.groups) == FEW[name]
    assert not space.unknown_operations


@pytest.mark.long
@pytest.mark.parametrize("name", REST)
def test_architecture_long(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    example = torch.randn(IMAGE)
    found = WidthSpace.from_model(model, example, verify=False)
    space = check_architecture(model, example)
    assert [group.name for group in space.groups] == [group.name for group in found.groups]  # nothing failed the check
    assert not space.unknown_operations


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shrunk_architecture_exports_to_onnx(name: str) -> None:
    torch.manual_seed(0)
    model, example = ARCHITECTURES[name]().eval(), torch.randn(IMAGE)
    space = WidthSpace.from_model(model, example, verify=False)
    assert export_onnx(Joined(shrink(model, space, space.uniform(0.5))), example)


@pytest.mark.long
@pytest.mark.parametrize("name", factories() or [pytest.param("", marks=pytest.mark.skip(reason="not installed"))])
def test_installed_architecture(name: str) -> None:
    make: Callable[[], nn.Module] = factories()[name]
    torch.manual_seed(0)
    space = check_architecture(make(), torch.randn(image(name)))
    assert space.groups
