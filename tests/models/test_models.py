"""Reference networks: sizes from their papers, arguments, and a lean package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import hwsearch.models
from hwsearch.errors import InputError
from hwsearch.graph.capture import capture
from hwsearch.graph.widths import WidthSpace
from hwsearch.models import (
    detector_small,
    mobilenetv2_small,
    resnet_small,
    segmenter_small,
    translator_small,
    vgg_small,
)
from hwsearch.models.mobilenetv2 import mobilenetv2
from hwsearch.models.resnet import resnet18
from hwsearch.models.vgg import vgg11

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("factory", "mega_macs", "parameters"),
    [(vgg_small, 29.128, 288170), (resnet_small, 12.959, 151738), (mobilenetv2_small, 6.598, 86634)],
)
def test_small_networks(factory: type[nn.Module], mega_macs: float, parameters: int) -> None:
    network = capture(factory(), torch.zeros(1, 1, 28, 28))
    assert network.output_shape == (1, 10)
    assert network.macs / 1e6 == pytest.approx(mega_macs, abs=1e-3)
    assert network.parameters == parameters


@pytest.mark.parametrize(
    ("factory", "side", "mega_macs", "output"),
    [
        (segmenter_small, 56, 22.178, (1, 11, 56, 56)), (translator_small, 28, 12.469, (1, 1, 28, 28)),
        (detector_small, 56, 9.192, (1, 15, 7, 7)),
    ],
)  # fmt: skip
def test_networks_of_other_tasks(factory: type[nn.Module], side: int, mega_macs: float, output: tuple[int]) -> None:
    example = torch.zeros(1, 1, side, side)
    network = capture(factory(), example)
    assert network.output_shape == output
    assert network.macs / 1e6 == pytest.approx(mega_macs, abs=1e-3)
    space = WidthSpace.from_model(factory().eval(), example)
    assert not space.unknown_operations
    assert len(space.groups) == {56: 10 if output[1] == 11 else 7, 28: 7}[side], "all widths but the output's are free"


@pytest.mark.parametrize(
    ("factory", "parameters"),
    # VGG-11's 132,868,840 count a bias per convolution, which the batch normalisation behind it makes pointless.
    [(resnet18, 11_689_512), (mobilenetv2, 3_504_872), (vgg11, 132_868_840 - 2752)],
)
def test_full_networks_have_the_published_number_of_parameters(factory: type[nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        model = factory()
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_mobilenetv2_macs_match_the_paper() -> None:
    assert capture(mobilenetv2(), torch.zeros(1, 3, 224, 224)).macs == 300_774_272


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small])
def test_arguments(factory: type[nn.Module]) -> None:
    model = factory(in_channels=3, classes=7, width=0.5).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(InputError, match="width multiplier must be above 0"):
        factory(width=0.0)
    with pytest.raises(InputError, match="positive whole numbers"):
        factory(widths=[8])
    with pytest.raises(InputError, match="not both"):
        factory(width=0.5, widths=[8])


def test_explicit_widths() -> None:
    assert vgg_small(widths=[8, 9, 10, 11, 12, 13]).features[3].out_channels == 9
    assert resnet_small(widths=[4, 5, 6]).classifier.in_features == 6
    assert mobilenetv2_small(widths=[8, 8, 8, 8, 8, 16]).classifier.in_features == 16


def test_every_listed_factory_exists() -> None:
    for name in hwsearch.models.__all__:
        assert callable(getattr(hwsearch.models, name))
    for module in (sys.modules[f"hwsearch.models.{file}"] for file in ("vgg", "resnet", "mobilenetv2")):
        assert all(callable(getattr(module, name)) for name in module.FACTORIES)
    with pytest.raises(AttributeError, match="no attribute 'alexnet'"):
        hwsearch.models.alexnet  # noqa: B018


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, hwsearch.models, hwsearch.graph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
