"""Masks: exactly the sliced network whatever is masked, the paper's gradients, and units that come back."""

from __future__ import annotations

import ast
import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.surgery import randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models.repvgg import repvgg_small
from hwsearch.models.segmenter import segmenter_small
from hwsearch.models.translator import translator_small
from hwsearch.reparam.fold import fold
from hwsearch.search import pas, pas_config, pas_cost, pas_masks
from hwsearch.search.pas_masks import MaskedNet, binary_mask

torch.set_num_threads(1)


class Joined(nn.Module):
    """A residual sum, a depth-wise layer, a concatenation and a flatten: one group each of every kind of tie."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1))
        self.wide = nn.Sequential(nn.Conv2d(6, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.side = nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.neck = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.sigmoid(x + self.inner(x))
        x = torch.sigmoid(self.norm(torch.cat([self.wide(x), self.side(x)], 1)))
        return self.head(torch.sigmoid(self.neck(x)).flatten(1))


def branches() -> nn.Module:
    """A small RepVGG: its stages have identities, whose folds tie no widths."""
    return repvgg_small(in_channels=2, classes=3, widths=(4, 6, 6, 5))


def generator() -> nn.Module:
    """Instance norms, residual sums and transposed convolutions."""
    return translator_small(in_channels=2, out_channels=3, widths=(4, 5, 6))


def segmenter() -> nn.Module:
    """Upsampled maps concatenated with earlier ones."""
    return segmenter_small(in_channels=2, classes=3, widths=(4, 5, 6))


KINDS = {"joined": (Joined, 4), "branches": (branches, 4), "generator": (generator, 16), "segmenter": (segmenter, 8)}


@cache
def masked(kind: str) -> tuple[MaskedNet, Tensor]:
    torch.manual_seed(1)
    build, side = KINDS[kind]
    model, x = build().eval(), torch.randn(3, 2, side, side)
    randomise(model)
    space = WidthSpace.from_model(fold(model) if kind == "branches" else model, x[:1])
    return MaskedNet(model, space).eval(), x


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_sliced_network_is_the_masked_one_for_any_mask(kind: str, data: st.DataObject) -> None:
    net, x = masked(kind)
    kept = {
        group.name: np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=group.units, max_size=group.units)
                                             .filter(any)))
        for group in net.space.groups
    }  # fmt: skip
    net.set_masks(kept)
    choice = WidthChoice(net.widths())
    assert choice.widths == tuple(len(kept[group.name]) for group in net.space.groups)
    small = net.sliced(choice)
    with torch.no_grad():
        wanted, got = net(x), small(x)
    assert float((wanted - got).abs().max()) <= 1e-5 * max(float(wanted.abs().max()), 1.0)
    assert sum(p.numel() for p in small.parameters()) == net.space.parameters(choice)


def test_layers_of_one_stage_differ_in_width_where_identities_are_folded() -> None:
    net, x = masked("branches")
    assert net.has_blocks
    first, second = [group for group in net.space.groups if group.name.startswith("stages.0")]
    choice = WidthChoice(tuple({first.name: 2, second.name: 5}.get(g.name, g.units) for g in net.space.groups))
    small = net.sliced(choice, batches=[(x, x)])
    kinds = {type(module).__name__ for module in small.modules()}
    assert "ODBB" not in kinds
    assert "BatchNorm2d" not in kinds
    assert small.get_submodule(second.name).weight.shape[:2] == (5, 2)


class Padded(nn.Module):
    """Its code asks for a size, so that it cannot be followed without an input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = branches()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1, 0, 1))
        out: Tensor = self.body(x)
        return out


def test_branches_whose_code_asks_for_a_size_are_sliced() -> None:
    torch.manual_seed(0)
    model, example = Padded().eval(), torch.randn(1, 2, 4, 4)
    space = WidthSpace.from_model(fold(model, example), example)
    net = MaskedNet(model, space)
    small = net.sliced(space.uniform(0.5), net.largest(space.uniform(0.5)))
    assert small(example).shape == model(example).shape


def test_statistics_are_measured_under_the_masks() -> None:
    net, x = masked("joined")
    choice = net.space.smallest()
    kept = net.largest(choice)
    small = net.sliced(choice, kept, [(x, x), (2 * x, x)])
    by_hand = shrink(net.plain(), net.space, choice, kept)
    stem = by_hand.stem[0]
    with torch.no_grad():
        means = torch.stack([stem(part).mean((0, 2, 3)) for part in (x, 2 * x)]).mean(0)
    assert torch.allclose(small.stem[1].running_mean, means, atol=1e-6)


def test_the_threshold_is_strict_and_the_gradient_goes_straight_through_without_clipping() -> None:
    latent = torch.tensor([-40.0, 0.5, 0.50001, 0.3, 90.0], requires_grad=True)
    mask = binary_mask(latent)
    assert mask.tolist() == [0, 0, 1, 0, 1]
    weight = torch.tensor([3.0, -2.0, 5.0, 7.0, 11.0])
    (weight * mask).sum().backward()
    assert latent.grad is not None
    assert torch.equal(latent.grad, weight)


def test_a_group_keeps_its_least_units_and_those_are_the_largest() -> None:
    latent = torch.tensor([-3.0, 0.1, -0.2, 0.1], requires_grad=True)
    mask = binary_mask(latent, least=2)
    assert mask.tolist() == [0, 1, 0, 1]
    mask.sum().backward()
    assert latent.grad is not None
    assert latent.grad.tolist() == [1, 1, 1, 1]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 1))
    net = MaskedNet(model, WidthSpace.from_model(model, torch.zeros(1, 1, 5, 5), quantum=2, minimum=4))
    with torch.no_grad():
        net.latents[0].fill_(-1.0)
    assert net.widths() == (4,)


def test_gradients_are_those_of_a_depth_wise_binary_convolution() -> None:
    """dL/dw_j is the sum of dL/dy_j * x_j over images and places, for masked units too; their producers get none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 2)
    ).eval()  # fmt: skip
    randomise(model)
    x = torch.randn(5, 2, 6, 6)
    space = WidthSpace.from_model(model, x[:1])
    net = MaskedNet(model, space).eval()
    off = 2
    net.set_masks({"0": np.array([0, 1, 3])})
    net(x).square().sum().backward()
    before = model[:3](x).detach()
    after = (before * torch.tensor([1.0, 1, 0, 1]).view(1, 4, 1, 1)).requires_grad_()
    model[3:](after).square().sum().backward()
    assert after.grad is not None
    wanted = (after.grad * before).sum((0, 2, 3))
    got = net.latents[0].grad
    assert got is not None
    assert torch.allclose(got, wanted, rtol=1e-4)
    assert float(wanted[off].abs()) > 1e-3
    producer, reader = net.model[0].weight.grad, net.model[3].weight.grad
    assert producer is not None
    assert reader is not None
    assert not producer[off].any()
    assert not reader[:, off].any()
    assert producer[0].any()


def test_a_switched_off_unit_that_the_task_needs_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    randomise(model)
    x = torch.randn(32, 1, 6, 6)
    net = MaskedNet(model, WidthSpace.from_model(model, x[:1]))
    with torch.no_grad():
        wanted = model(x)
        net.latents[0][3] = 0.3
    assert net.widths()[0] == 5
    optimiser = torch.optim.SGD(net.latents.parameters(), lr=0.05)
    for _ in range(40):
        optimiser.zero_grad()
        (net(x) - wanted).square().mean().backward()
        optimiser.step()
    assert net.widths()[0] == 6
    assert float(net.latents[0].detach()[3]) > pas_masks.THRESHOLD


def test_tied_layers_share_one_mask() -> None:
    net, _ = masked("joined")
    names = [group.name for group in net.space.groups]
    assert names == ["stem.0", "inner.0", "wide.0", "side", "neck"]
    assert [len(latent) for latent in net.latents] == [6, 5, 8, 4, 5]


def test_what_mixes_over_its_channels_keeps_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    net = MaskedNet(model, WidthSpace.from_model(model, torch.zeros(1, 4)), jitter=0.2)
    assert [net.space.groups[index].name for index in net.fixed] == ["0"]
    assert net.latent_names() == ["latents.1"]
    assert net.latents[0].tolist() == [1.0] * 6
    whole = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(InputError, match="no width of this network can be searched by masks"):
        MaskedNet(whole, WidthSpace.from_model(whole, torch.zeros(1, 4)))


def test_the_jitter_is_the_seeds() -> None:
    net, _ = masked("joined")
    first, same, other = (MaskedNet(net.plain(), net.space, jitter=0.1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.latents[0], same.latents[0])
    assert not torch.equal(first.latents[0], other.latents[0])
    assert float((first.latents[2].detach() - 1).abs().max()) <= 0.1
    assert first.widths() == net.space.full().widths


def test_copies_have_masks_of_their_own_and_leave_no_trace() -> None:
    net, x = masked("branches")
    net.set_masks({group.name: np.arange(group.units) for group in net.space.groups})
    whole = net(x)
    other = copy.deepcopy(net)
    other.set_masks({group.name: np.array([0]) for group in net.space.groups})
    assert not torch.allclose(other(x), whole)
    assert torch.equal(net(x), whole)
    plain = net.plain()
    assert torch.equal(plain(x), whole)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_a_choice_is_as_far_as_the_masks_that_it_switches() -> None:
    net, _ = masked("joined")
    net = MaskedNet(net.plain(), net.space)
    with torch.no_grad():
        net.latents[0].copy_(torch.tensor([0.9, 0.4, 0.9, 0.6, 0.9, 0.9]))
    here = WidthChoice(net.widths())
    assert here.widths[0] == 5
    assert net.flips(here) == 0
    one, two = (WidthChoice((width, *here.widths[1:])) for width in (4, 3))
    assert 0 < net.flips(one) < net.flips(two)
    assert net.largest(one)["stem.0"].tolist() == [0, 2, 4, 5]


def test_a_model_of_another_space_is_refused() -> None:
    net, _ = masked("joined")
    with pytest.raises(UnsupportedModelError, match="neither that weight nor a block"):
        MaskedNet(nn.Sequential(nn.Conv2d(2, 6, 3)), net.space)


def test_masks_go_where_the_network_goes_and_nothing_names_a_device() -> None:
    """Differentiable searches are known for hard-coded devices."""
    net, _ = masked("branches")
    moved = copy.deepcopy(net).to("meta")
    assert {tensor.device.type for tensor in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    double, x = copy.deepcopy(net).double(), torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    assert double(x).dtype == torch.float64
    for module in (pas, pas_config, pas_cost, pas_masks):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "cuda" not in words
