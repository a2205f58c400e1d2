"""Filter gates on the widths of an ordinary network: what is masked is what is sliced; searches keep their budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.pas import PaS, PasConfig
from hwsearch.search.pas_gates import GatedNet
from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig
from hwsearch.train.task import Classification

torch.set_num_threads(1)
STEADY = TrainConfig(
    epochs=6, batch_size=16, learning_rate=0.05, final_rate=0.05, warmup=0.0, seed=2, checkpoint_s=0
)  # fmt: skip


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, WidthSpace]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))


def test_a_gated_network_computes_what_the_sliced_one_does(case: Any) -> None:
    model, space = case
    net = GatedNet(model, space).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(net(x), model.eval()(x), atol=1e-6)
    with torch.no_grad():
        for latent, threshold in zip(net.latents, net.thresholds, strict=True):
            latent.copy_(1 + torch.randn(len(latent)))
            threshold.fill_(0.5)
        widths = net.widths()
        assert all(0 < width < group.units for width, group in zip(widths, space.groups, strict=True))
        assert torch.allclose(net.sliced(WidthChoice(widths))(x), net(x), atol=1e-5)
    assert net.flips(WidthChoice(widths)) == 0.0
    assert net.flips(space.full()) > 0.0
    kept = net.largest(space.uniform(0.5))
    net.set_masks(kept, freeze=True)
    for group, mask in zip(space.groups, net.masks(), strict=True):
        assert torch.nonzero(mask).flatten().tolist() == kept[group.name].tolist()
    assert net.latent_names() == []


def test_a_group_keeps_its_smallest_width_under_any_threshold_and_its_units_pull_alike(case: Any) -> None:
    model, space = case
    net = GatedNet(model, space)
    with torch.no_grad():
        net.thresholds[0].fill_(9.0)
    assert net.widths()[0] == space.groups[0].widths[0]
    net = GatedNet(model, space)
    sum(mask.sum() for mask in net.masks()).backward()  # type: ignore[union-attr]
    for latent, threshold in zip(net.latents, net.thresholds, strict=True):
        assert latent.grad is not None
        assert threshold.grad is not None
        assert threshold.grad.item() == pytest.approx(-0.4)
        assert latent.grad.tolist() == pytest.approx([0.1] * len(latent))


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_search_under_gates_ends_on_the_budget(case: Any, toy: Any, share: float) -> None:
    model, space = case
    latency = toy.Staircase(block=1, fixed_ms=0.02)
    full = float(latency.evaluate(np.array([space.full().widths]))[0])
    task = Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )
    config = PasConfig(
        warmup=replace(STEADY, steps=20), training=STEADY, winner=replace(STEADY, steps=6), gate="threshold",
        calibration_images=32,
    )  # fmt: skip
    result = PaS(space, Budget([Limit(latency, share * full, 0.5)]), config, model=model).search(task, None)
    assert 0.97 <= result.predicted_ms / result.budget_ms <= 1.0
    way = result.extra["trajectory"]
    assert way[-1]["use"] < 0.8 * way[0]["use"]


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(InputError, match="gate is 'soft'; give one of binary, threshold"):
        PasConfig(gate="soft")
