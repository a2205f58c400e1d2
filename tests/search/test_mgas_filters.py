"""Filter gates on ordinary networks: one gate for what is tied, silent where off, folded away without a trace."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.surgery import randomise
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models.repvgg import repvgg_small
from hwsearch.search.mgas_filters import FilterNet

torch.set_num_threads(1)


def unit(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Residual(nn.Module):
    """A residual sum of normed layers, and a depth-wise layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(2, 6)
        self.wide, self.deep = unit(6, 8, 1), unit(8, 8, groups=8)
        self.back = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.back(self.deep(self.wide(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """Two layers side by side under one norm, and one without any norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = unit(2, 6), nn.Conv2d(2, 5, 3, padding=1)
        self.norm, self.neck = nn.BatchNorm2d(11), nn.Conv2d(11, 7, 1)
        self.head = nn.Linear(7 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(torch.sigmoid(self.neck(x)).flatten(1))  # type: ignore[no-any-return]


KINDS = {"residual": Residual, "joined": Joined}


@cache
def trained(kind: str) -> tuple[nn.Module, WidthSpace, Tensor]:
    torch.manual_seed(1)
    model = KINDS[kind]().eval()
    randomise(model)
    x = torch.randn(3, 2, 4, 4)
    return model, WidthSpace.from_model(model, x[:1]), x


@torch.no_grad()
def scattered(net: FilterNet, seed: int) -> FilterNet:
    """Random scores, of which about half are above the thresholds."""
    rng = torch.Generator().manual_seed(seed)
    for _, gate in net.searched():
        gate.score.copy_(torch.randn(len(gate), generator=rng))
        gate.threshold.fill_(0.5)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_network_begins_as_the_network_that_came(kind: str) -> None:
    model, space, x = trained(kind)
    net = FilterNet(model, space).eval()
    with torch.no_grad():
        assert torch.allclose(net(x), model(x), atol=1e-5)
    assert net.widths() == space.full().widths
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net.train()(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_physical_network_is_the_gated_one(kind: str, seed: int) -> None:
    model, space, x = trained(kind)
    net = scattered(FilterNet(model, space), seed).eval()
    choice = WidthChoice(net.widths())
    assert choice != space.full()
    small = net.physical(choice, net.on())
    with torch.no_grad():
        assert float((small(x) - net(x)).abs().max()) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) == space.parameters(choice), "counted size is real size"
    assert not any("gate" in name for name, _ in small.named_modules())


def test_tied_layers_are_under_one_gate_behind_each_of_their_norms() -> None:
    model, space, x = trained("residual")
    net = FilterNet(model, space).eval()
    stem = next(index for index, group in enumerate(space.groups) if "stem" in group.name)
    assert {"stem.0", "back.0"} <= {name for name in space.groups[stem].layers}
    net.gate(stem).close([1, 4])
    silent: dict[str, Tensor] = {}
    for name in ("stem.1", "back.1"):
        net.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: silent.update({name: output})
        )
    with torch.no_grad():
        net(x)
    for name, output in silent.items():
        assert output[:, [1, 4]].abs().max() == 0, name
        assert output[:, [0, 2, 3, 5]].abs().amin((0, 2, 3)).min() >= 0
        assert output[:, 0].abs().max() > 0
    inner = next(index for index, group in enumerate(space.groups) if "wide" in group.name)
    assert "deep.0" in space.groups[inner].layers, "a depth-wise layer has no gate of its own"
    assert len(list(net.searched())) == len(space.groups) == 2


def test_behind_a_norm_a_unit_is_multiplied_by_mask_times_score() -> None:
    model, space, x = trained("residual")
    net = FilterNet(model, space).eval()
    seen: list[Tensor] = []
    net.model.get_submodule("stem.1").register_forward_hook(lambda *call: seen.append(call[2]))
    stem = next(index for index, group in enumerate(space.groups) if "stem" in group.name)
    with torch.no_grad():
        net(x)
        net.gate(stem).score[2] = 1.5
        net(x)
    ratio = float(torch.sigmoid(torch.tensor(1.5)) / 0.5)
    assert torch.allclose(seen[1][:, 2], ratio * seen[0][:, 2], atol=1e-6)
    assert torch.equal(seen[1][:, 3], seen[0][:, 3])


def test_a_group_keeps_its_smallest_width_and_those_that_cannot_be_silenced_all() -> None:
    model, _, x = trained("residual")
    space = WidthSpace.from_model(model, x[:1], minimum=3)
    net = FilterNet(model, space)
    with torch.no_grad():
        for _, gate in net.searched():
            gate.threshold.fill_(9.0)
    assert net.widths() == tuple(group.widths[0] for group in space.groups) == (3, 3)
    assert [gate.commit(now=True) for _, gate in net.searched()] == [3, 5]
    assert net.alive() == (3, 3)
    torch.manual_seed(0)
    mixed = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
                          nn.LayerNorm(8), nn.Linear(8, 3))  # fmt: skip
    space = WidthSpace.from_model(mixed, x[:1])
    net = FilterNet(mixed, space)
    assert [space.groups[index].name for index in net.fixed] == ["4"]
    assert all(not p.requires_grad for p in net.gate(net.fixed[0]).parameters())


def test_masks_fall_for_good_only_and_the_living_are_kept_first() -> None:
    model, space, _ = trained("joined")
    net = FilterNet(model, space)
    seen = [net.alive()]
    for seed in range(3):
        scattered(net, seed)
        net.observe()
        with torch.no_grad():
            for _, gate in net.searched():
                gate.commit(now=True)
        assert all(now <= before for now, before in zip(net.alive(), seen[-1], strict=True))
        seen.append(net.alive())
    assert seen[-1] < seen[0]
    kept = net.largest(WidthChoice(net.alive()))
    for index, group in enumerate(space.groups):
        assert kept[group.name].tolist() == torch.nonzero(net.gate(index).alive).flatten().tolist()
    wider = net.largest(space.full())
    assert all(np.array_equal(wider[group.name], np.arange(group.units)) for group in space.groups)


def test_what_cannot_be_gated_is_refused() -> None:
    model = repvgg_small(in_channels=2, classes=3, widths=(4, 6, 6, 5)).eval()
    with pytest.raises(InputError, match="has blocks of branches"):
        FilterNet(model, WidthSpace.from_model(model, torch.zeros(1, 2, 4, 4)))
    _, space, _ = trained("residual")
    with pytest.raises(UnsupportedModelError, match="make the width space from this model"):
        FilterNet(trained("joined")[0], space)
