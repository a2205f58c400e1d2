"""The super-network: any pattern runs as the plain smaller network would, on sliced weights, at that network's cost."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hwsearch.errors import InputError, InternalError, UnsupportedModelError
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.search.patterns import Pattern, bins_of, draw, leftmost
from hwsearch.search.supernet import ElasticConv2d, SuperNet


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A tied group by addition, with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv_norm(1, 12), conv_norm(12, 10, stride=2), conv_norm(10, 16)
        self.shortcut = nn.Conv2d(12, 16, 1, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head((self.second(self.first(x)) + self.shortcut(x)).mean((2, 3)))
        return out


class Separable(nn.Module):
    """Depth-wise layers between pointwise ones, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = (
            conv_norm(1, 12),
            conv_norm(12, 12, 5, 2, groups=12),
            conv_norm(12, 8, 1),
        )
        self.expand2, self.depth2, self.project2 = (
            conv_norm(8, 20, 1),
            conv_norm(20, 20, groups=20),
            conv_norm(20, 8, 1),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depth(self.expand(x)))
        out: Tensor = self.head((x + self.project2(self.depth2(self.expand2(x)))).mean((2, 3)))
        return out


class Flattened(nn.Module):
    """A convolution into a linear layer through flatten: one channel is many features; batch norm over features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(4))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 9, 14, bias=False), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Concatenated(nn.Module):
    """Two branches laid end to end, one of them of fixed size because the input takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = conv_norm(1, 8), conv_norm(1, 6), conv_norm(8 + 6 + 1, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.join(torch.cat([self.left(x), x, self.right(x)], 1)).mean((2, 3)))
        return out


torch.set_num_threads(1)  # several threads wait for each other where anything else runs

MODELS = [Residual, Separable, Flattened, Concatenated]


def made(kind: type[nn.Module], quantum: int = 1) -> tuple[nn.Module, WidthSpace]:
    torch.manual_seed(0)
    model = kind()
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 12, 12), quantum=quantum)


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_pattern_equals_the_plain_network_cut_to_it(kind: type[nn.Module], offset: int) -> None:
    model, space = made(kind)
    net = SuperNet(model, space)
    batches, rng = [(images(seed=1),), (images(seed=2) * 2,)], np.random.default_rng(offset)
    for choice in [space.full(), space.smallest(), *(space.sample(rng) for _ in range(4))]:
        pattern = draw(space, choice, offset, bins_of(space, None), rng)
        net.activate(pattern)
        net.calibrate(batches)
        small = net.extract(pattern, batches)
        assert sum(p.numel() for p in small.parameters()) == space.parameters(choice)
        with torch.no_grad():
            torch.testing.assert_close(net(images()), small(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_training_mode_and_gradients_equal_those_of_the_cut_network(kind: type[nn.Module]) -> None:
    model, space = made(kind)
    rng = np.random.default_rng(0)
    pattern = draw(space, space.sample(rng), 2, bins_of(space, None), rng)
    net = SuperNet(model, space).train()
    net.activate(pattern)
    small = shrink(model, space, pattern.choice, pattern.by_group(space)).train()
    (net(images()) ** 2).sum().backward()
    (small(images()) ** 2).sum().backward()
    unit_gradients = {name: p.grad.abs().sum() for name, p in net.model.named_parameters() if p.grad is not None}
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None
        # all other positions have no gradient, so the sums agree
        torch.testing.assert_close(unit_gradients[name], parameter.grad.abs().sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_cost_falls_with_width(kind: type[nn.Module]) -> None:
    model, space = made(kind)
    net = SuperNet(model, space).train()
    rng = np.random.default_rng(1)
    for choice in (space.smallest(), space.sample(rng), space.full()):
        net.activate(draw(space, choice, 1, bins_of(space, None), rng))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images(4))
        assert counter.get_total_flops() == 2 * 4 * space.macs(choice)


def test_ranges_are_views_and_gaps_are_not() -> None:
    model, space = made(Residual)
    net = SuperNet(model, space)
    conv = net.model.get_submodule("first.0")
    assert isinstance(conv, ElasticConv2d)
    net.activate(leftmost(space.uniform(0.5)))
    assert isinstance(conv.outputs, slice)
    assert isinstance(conv.inputs, slice)
    kept = [np.arange(group.units - 1) for group in space.groups]
    kept[0] = np.array([0, 2, 5])
    net.activate(Pattern(tuple(kept)))
    assert isinstance(conv.inputs, Tensor)
    net.activate(leftmost(space.full()))
    assert conv.outputs is None
    net.activate(None)
    assert (conv.outputs, conv.inputs) == (None, None)


def test_the_users_model_is_not_touched_and_comes_back_in_its_own_classes() -> None:
    model, space = made(Separable)
    before = copy.deepcopy(model.state_dict())
    net = SuperNet(model, space).train()
    net.activate(leftmost(space.smallest()))
    net(images()).sum().backward()
    plain = net.plain()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), model.modules(), strict=True))


def test_training_changes_no_statistics_and_evaluation_needs_its_own() -> None:
    model, space = made(Residual)
    net = SuperNet(model, space).train()
    before = copy.deepcopy(dict(net.named_buffers()))
    net.activate(leftmost(space.smallest()))
    net(images())
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    net.eval()
    with pytest.raises(InternalError, match="calibrate"):
        net(images())
    with pytest.raises(InputError, match="at least one batch"):
        net.calibrate([])
    net.calibrate([(images(),)])
    net(images())
    net.activate(leftmost(space.full()))
    with pytest.raises(InternalError, match="calibrate"):
        net(images())


def test_calibration_is_fresh_every_time() -> None:
    model, space = made(Residual)
    net = SuperNet(model, space)
    net.activate(leftmost(space.uniform(0.5)))
    outputs = []
    for _ in range(2):
        net.calibrate([(images(seed=3),), (images(seed=4),)])
        with torch.no_grad():
            outputs.append(net(images()))
    assert torch.equal(*outputs)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3, padding=1), norm, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return out


class OwnNorm(nn.BatchNorm2d):
    """A user's subclass, of which nobody knows what it does."""


def test_norms_of_other_kinds_are_named() -> None:
    model = Normed(OwnNorm(8))
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 12, 12))
    with pytest.raises(UnsupportedModelError, match="norm is a OwnNorm"):
        SuperNet(model, space)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 5)
    )
    model[5].weight = model[3].weight
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 12, 12))
    net = SuperNet(model, space)
    pattern = leftmost(space.smallest())
    net.activate(pattern)
    net.eval()
    small = shrink(model, space, pattern.choice)
    torch.testing.assert_close(net(images()), small(images()))


def test_a_restricted_space_runs_the_same_patterns() -> None:
    model, space = made(Residual)
    small = space.restrict({group.name: (3, group.units) for group in space.groups})
    net = SuperNet(model, small)
    choice = WidthChoice(tuple(3 for _ in small.groups))
    net.activate(leftmost(choice))
    net.calibrate([(images(),)])
    assert net(images()).shape == (16, 5)
    assert net.extract(leftmost(choice), [(images(),)])(images()).shape == (16, 5)
