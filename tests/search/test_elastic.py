"""Modules of any kind in a super-network: what is active computes what the shrunk network does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import UnsupportedModelError
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthSpace
from hwsearch.search.patterns import bins_of, draw, leftmost
from hwsearch.search.supernet import SuperNet


class Scaled(nn.Module):
    """A block as in ConvNeXt: a convolution a channel, layer normalisation on the last axis, a layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.back = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.back(functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Same(nn.Conv2d):
    """A user's own convolution, which pads as it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


class Odd(nn.Module):
    """Layers that have no elastic form of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = Same(1, 12, 2), nn.GroupNorm(3, 12), nn.PReLU(12)
        self.block = Scaled(12)
        self.down = nn.Conv2d(12, 8, 3, 2, 1)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.each = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=6)
        self.register_buffer("shift", torch.rand(1, 6, 1, 1))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.norm(self.stem(x))))
        y = self.each(self.up(functional.silu(self.instance(self.down(x))))) + self.shift
        out: Tensor = self.head(torch.cat((x, y), 1).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def odd() -> tuple[nn.Module, WidthSpace]:
    torch.manual_seed(0)
    model = Odd().eval()
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 12, 12))


IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def test_every_width_group_of_odd_layers_can_change(odd: tuple[nn.Module, WidthSpace]) -> None:
    _, space = odd
    cut = {slot.parameter for group in space.groups for slot in group.slots}
    assert {"norm.weight", "act.weight", "block.gamma", "block.norm.weight", "up.weight", "each.weight", "shift"} <= cut


def test_what_is_active_computes_what_the_shrunk_network_does(odd: tuple[nn.Module, WidthSpace]) -> None:
    model, space = odd
    net = SuperNet(model, space).eval()
    rng = np.random.default_rng(0)
    # the smallest one has convolutions of a single channel, which look like depth-wise ones; then wider again
    choices = [space.smallest(), space.uniform(0.5), space.sample(rng), space.full(), space.smallest()]
    with torch.no_grad():
        for choice in choices:
            pattern = draw(space, choice, 1, bins_of(space, None), rng)
            net.activate(pattern)
            small = shrink(model, space, choice, pattern.by_group(space))
            torch.testing.assert_close(net(IMAGES), small(IMAGES))
        net.activate(None)
        torch.testing.assert_close(net(IMAGES), model(IMAGES))


def test_only_what_is_kept_learns(odd: tuple[nn.Module, WidthSpace]) -> None:
    model, space = odd
    net = SuperNet(model, space).train()
    net.activate(leftmost(space.smallest()))
    net(IMAGES).sum().backward()
    for name, at in (("act.weight", 0), ("up.weight", 1), ("block.gamma", 0)):
        parameter = dict(net.model.named_parameters())[name]
        assert parameter.shape == dict(model.named_parameters())[name].shape
        assert parameter.grad is not None
        assert parameter.grad.movedim(at, 0)[0].abs().sum() > 0
        assert parameter.grad.movedim(at, 0)[-1].abs().sum() == 0


def test_the_model_comes_back_in_its_own_classes(odd: tuple[nn.Module, WidthSpace]) -> None:
    model, space = odd
    before = copy.deepcopy(model.state_dict())
    net = SuperNet(model, space)
    net.activate(leftmost(space.smallest()))
    plain = net.plain()
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), model.modules(), strict=True))
    assert [repr(module) for module in plain.modules()] == [repr(module) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    torch.testing.assert_close(plain.eval()(IMAGES), model(IMAGES))


def test_statistics_of_one_width_are_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv2d(8, 2, 3)
    )
    space = WidthSpace.from_model(model.eval(), torch.zeros(1, 1, 12, 12))
    with pytest.raises(UnsupportedModelError, match=r"^1 is a InstanceNorm2d with running statistics.*\[\[groups\]\]"):
        SuperNet(model, space)
