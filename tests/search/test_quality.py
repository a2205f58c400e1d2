"""Layer quality: the published figures, the guard, and which sides of which layers are measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.widths import WidthSpace
from hwsearch.models.mobilenetv2 import MobileNetV2
from hwsearch.search.layer_rates import rate_factors, scale_gradients
from hwsearch.search.quality import NetworkQuality, SideQuality, network_quality, sides_of_groups, unfold

torch.set_num_threads(1)


def layer_of_rank(rank: int, outputs: int = 64, inputs: int = 64, seed: int = 0) -> nn.Conv2d:
    """A 3x3 convolution as it is drawn at first, and ``rank`` strong directions."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(outputs, inputs * 9)) * math.sqrt(2 / (inputs * 9))
    left, right = rng.normal(size=(outputs, rank)), rng.normal(size=(rank, inputs * 9))
    conv = nn.Conv2d(inputs, outputs, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight + 0.2 * left @ right).view_as(conv.weight))
    return conv


@pytest.mark.parametrize("rank", [0, 1, 2, 8, 32])
def test_the_published_form_of_qc(rank: int) -> None:
    """r and QC of a 64 x 576 weight of known rank; the jump at rank 1 is the published code's, the guard removes it."""
    outputs = network_quality(layer_of_rank(rank)).sides[0]
    assert outputs.directions == rank
    assert outputs.rank == rank / 64
    if rank == 0:
        assert (outputs.published_quality, outputs.quality, outputs.condition) == (0.0, 0.0, 0.0)
    elif rank == 1:
        assert outputs.published_quality == pytest.approx(1.564, abs=1e-3)
        assert outputs.quality == 1 / 64
    else:
        expected = math.atan2(rank / 64, 1 - 1 / outputs.condition)
        assert outputs.quality == outputs.published_quality == pytest.approx(expected)
        assert outputs.quality < 1


def test_guarded_quality_rises_with_what_was_learnt() -> None:
    found = [network_quality(layer_of_rank(rank)).sides[0].quality for rank in (0, 1, 4, 16)]
    assert found == sorted(found)
    assert found[0] == 0


@settings(max_examples=50, deadline=None)
@given(channels=st.integers(1, 300), directions=st.integers(0, 300), condition=st.floats(1, 1e9))
def test_quality_is_a_share_of_a_right_angle(channels: int, directions: int, condition: float) -> None:
    directions = min(directions, channels)
    rank = directions / channels
    side = SideQuality("w", "outputs", channels, directions, rank, rank, condition if directions else 0.0, rank)
    assert 0 <= side.quality <= math.pi / 2
    assert 0 <= side.published_quality <= math.pi / 2
    if directions <= 1:
        assert side.quality == rank


def test_both_unfoldings_and_turned_layers() -> None:
    weight = np.arange(2 * 3 * 2, dtype=float).reshape(2, 3, 2)
    assert unfold(weight, 0).shape == (2, 6)
    assert unfold(weight, 1)[1].tolist() == [2.0, 3.0, 8.0, 9.0]
    conv = layer_of_rank(5, outputs=24, inputs=16)
    turned = nn.ConvTranspose2d(24, 16, 3, bias=False)
    with torch.no_grad():
        turned.weight.copy_(conv.weight)  # its first axis is its input
    plain, other = network_quality(conv).by_side("rank"), network_quality(turned).by_side("rank")
    assert plain["weight", "outputs"] == other["weight", "inputs"]
    assert plain["weight", "inputs"] == other["weight", "outputs"]


def test_depth_wise_layers_have_no_input_side_and_tall_layers_are_measured() -> None:
    model = nn.Sequential(nn.Conv2d(2, 40, 1), nn.Conv2d(40, 40, 3, groups=40), nn.Linear(40, 3))
    sides = [(s.parameter, s.side, s.channels) for s in network_quality(model).sides]
    assert sides == [("0.weight", "outputs", 40), ("0.weight", "inputs", 2), ("1.weight", "outputs", 40)]
    assert len(network_quality(model, linear=True).sides) == 5
    with pytest.raises(InputError, match="no convolution"):
        network_quality(nn.Linear(3, 3))


def test_the_mean_is_over_layers_and_records_read_back() -> None:
    sides = [
        SideQuality("a", "outputs", 4, 4, 1.0, 1.0, 2.0, 1.0),
        SideQuality("a", "inputs", 4, 0, 0.0, 0.0, 0.0, 0.0),
        SideQuality("b", "outputs", 4, 2, 0.5, 0.5, 2.0, 0.5),
    ]
    quality = NetworkQuality(tuple(sides))
    assert quality.mean_of("rank") == pytest.approx((0.5 + 0.5) / 2)
    assert NetworkQuality.from_list(quality.to_list()) == quality
    with pytest.raises(SchemaError, match="damaged"):
        NetworkQuality.from_list([{"parameter": "a"}])


def test_groups_know_the_sides_that_they_decide() -> None:
    torch.manual_seed(0)
    model = MobileNetV2(((1, 8, 1, 1), (2, 8, 1, 1)), in_channels=1, classes=3, stem=8, head=16).eval()
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))
    sides = dict(zip((group.name for group in space.groups), sides_of_groups(space), strict=True))
    measured = {(s.parameter, s.side) for s in network_quality(model).sides}
    assert all(measured & set(found) for found in sides.values())
    head = next(found for found in sides.values() if ("head.0.weight", "outputs") in found)
    assert ("classifier.weight", "inputs") in head  # known, though only convolutions are measured
    # Every measured side but the image's own belongs to exactly one group.
    owners = [side for found in sides.values() for side in found if side in measured]
    assert len(owners) == len(set(owners))
    assert measured - set(owners) == set()


def test_rates_follow_the_gain_and_scale_gradients() -> None:
    def quality(gain: float) -> NetworkQuality:
        return NetworkQuality((SideQuality("0.weight", "outputs", 4, 2, 0.5, gain, 2.0, 0.5),))

    assert rate_factors([], 0.1, 0.8) == {}
    assert rate_factors([quality(0.3)], 0.1, 0.8)["0.weight"] == pytest.approx(1.8)
    # 0.8 * 0.18 + (0.35 - 0.30), over the first rate
    assert rate_factors([quality(0.30), quality(0.35)], 0.1, 0.8)["0.weight"] == pytest.approx(0.194 / 0.1)
    falling = rate_factors([quality(0.9), quality(0.1)], 0.1, 0.8)
    assert falling["0.weight"] == pytest.approx(1e-19)

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scale_gradients(model, {"0.weight": 0.5, "2.weight": 3.0})
    found = {name: float(p.grad.flatten()[0]) for name, p in model.named_parameters() if p.grad is not None}
    assert found == {
        "0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.5, "1.bias": 0.5,
        "2.weight": 3.0, "2.bias": 3.0, "4.weight": 3.0, "4.bias": 3.0,
    }  # fmt: skip
