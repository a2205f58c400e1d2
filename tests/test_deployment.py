"""``deploy`` on the command line: what its options ask for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from hwsearch.console import Console
from hwsearch.deployment import DeployOptions, deploy_model
from hwsearch.device.spec import Device
from hwsearch.model_argument import ModelArgument


def network() -> ModelArgument:
    torch.manual_seed(0)
    module = nn.Sequential(  # a batch norm that nothing can be folded into
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    return ModelArgument("net", (1, 3, 12, 12), module=module.eval())


def test_a_small_folder_of_pictures_calibrates_at_the_networks_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, bright in (("dark", 20), ("bright", 220)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(10):
            image.new("RGB", (20, 16), (bright, bright + number, bright)).save(
                tmp_path / "pictures" / name / f"{number}.png"
            )
    options = DeployOptions(precision="int8", data=str(tmp_path / "pictures"))
    with caplog.at_level(logging.WARNING):
        bundle = deploy_model(network(), Device("d", "simulated"), tmp_path / "bundle", options, Console(json=True))
    assert bundle.precision == "int8"
    assert [record.message for record in caplog.records if "out-of-range" in record.message] == []
