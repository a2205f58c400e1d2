"""Weights carried from width to width: functions that are preserved, and the published transfer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.graph.surgery import randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models.mobilenetv2 import MobileNetV2
from hwsearch.models.resnet import ResNet
from hwsearch.search.transfer import carry_over, important_units, svd_transfer

torch.set_num_threads(1)


class Branches(nn.Module):
    """Concatenation, a grouped convolution, a transposed one and flattening to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.grouped = nn.Conv2d(10, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([functional.relu(self.a(x)), self.b(x)], 1)
        y = self.norm(self.up(functional.relu(self.grouped(y))))
        return self.head(functional.relu(y).flatten(1))  # type: ignore[no-any-return]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "resnet": ResNet((1, 1), (8, 12), in_channels=1, classes=3),
        "mobilenet": MobileNetV2(((1, 8, 1, 1), (2, 8, 1, 2)), in_channels=1, classes=3, stem=8, head=12, dropout=0.0),
        "branches": Branches(),
    }
    return made[name].eval()


@pytest.fixture(scope="module", params=["resnet", "mobilenet", "branches"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, WidthSpace]:
    model = build(request.param)
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))


def trained(model: nn.Module, space: WidthSpace, choice: WidthChoice) -> nn.Module:
    """A network at ``choice`` whose weights and statistics are no starting point's."""
    small = shrink(model, space, choice)
    torch.manual_seed(1)
    randomise(small)
    return small.eval()


def between(space: WidthSpace, one: WidthChoice, other: WidthChoice) -> tuple[WidthChoice, WidthChoice]:
    """Two choices of which the second is nowhere narrower."""
    pairs = [sorted(pair) for pair in zip(one.widths, other.widths, strict=True)]
    return WidthChoice(tuple(low for low, _ in pairs)), WidthChoice(tuple(high for _, high in pairs))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_growth_preserves_the_function(case: tuple[nn.Module, WidthSpace], seed: int) -> None:
    model, space = case
    rng = np.random.default_rng(seed)
    small, large = between(space, space.sample(rng), space.sample(rng))
    old = trained(model, space, small)
    new = carry_over(model, space, old, small, large, noise=0.0).eval()
    example = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(new(example), old(example), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in new.parameters()) == space.parameters(large)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), how=st.sampled_from(["preserve", "svd"]))
def test_any_choice_to_any_other_runs_and_is_deterministic(
    case: tuple[nn.Module, WidthSpace], seed: int, how: str
) -> None:
    model, space = case
    rng = np.random.default_rng(seed)
    before, after = space.sample(rng), space.sample(rng)
    old = trained(model, space, before)
    new, again = (carry_over(model, space, old, before, after, how=how, seed=seed) for _ in range(2))
    assert new.training
    assert new.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert {n: tuple(t.shape) for n, t in new.state_dict().items()} == {
        n: tuple(t.shape) for n, t in shrink(model, space, after).state_dict().items()
    }
    for (name, one), other in zip(new.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_nothing_changes_where_no_width_does(case: tuple[nn.Module, WidthSpace]) -> None:
    model, space = case
    choice = space.uniform(0.5)
    old = trained(model, space, choice)
    new = carry_over(model, space, old, choice, choice)
    for (name, one), other in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_dead_units_go_first(case: tuple[nn.Module, WidthSpace]) -> None:
    """A unit that nothing reads and nothing feeds is the least important, and dropping it changes nothing."""
    model, space = case
    full = space.full()
    old = trained(model, space, full)
    group = max((g for g in space.groups if g.units > 2), key=lambda g: len(g.slots))
    tensors = dict(old.named_parameters()) | dict(old.named_buffers())
    with torch.no_grad():
        for slot in group.slots:
            if tensors[slot.parameter].is_floating_point():
                where = torch.from_numpy(slot.positions[1].ravel())
                tensors[slot.parameter].index_fill_(slot.axis, where, 0.0)
    at = space.groups.index(group)
    assert int(np.argmin(important_units(space, {n: t.detach() for n, t in tensors.items()}, full)[at])) == 1
    fewer = WidthChoice(tuple(w - (i == at) for i, w in enumerate(full.widths)))
    new = carry_over(model, space, old, full, fewer).eval()
    example = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(new(example), old(example), rtol=1e-4, atol=1e-4)


def test_repeated_units_are_told_apart() -> None:
    model = build("resnet")
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))
    old = trained(model, space, space.uniform(0.5))
    new = carry_over(model, space, old, space.uniform(0.5), space.full(), noise=1e-3)
    rows = new.get_submodule("stages.0.0.conv1").weight.detach().flatten(1)  # type: ignore[union-attr, operator]
    assert torch.cdist(rows, rows).fill_diagonal_(1.0).min() > 0
    example = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(new.eval()(example), old(example), rtol=0.05, atol=0.05)


@settings(max_examples=30, deadline=None)
@given(
    o=st.integers(2, 12), i=st.integers(2, 12), rows=st.integers(2, 12), channels=st.integers(2, 12),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_published_transfer_is_a_truncated_product(o: int, i: int, rows: int, channels: int, seed: int) -> None:
    """The closed form of what the published code computes factor by factor, wherever both sides shrink."""
    weight = np.random.default_rng(seed).normal(size=(o, i, 3, 3))
    found = svd_transfer(weight, (rows, channels, 3, 3))
    assert found.shape == (rows, channels, 3, 3)
    if rows <= o and channels <= i:
        left, values, right = np.linalg.svd(weight.reshape(o, -1), full_matrices=True)
        width = channels * 9
        middle = np.zeros((o, i * 9))
        np.fill_diagonal(middle, values)
        product = left[:rows, :rows] @ middle[:rows, :width] @ right[:width, :width]
        np.testing.assert_allclose(found.reshape(rows, -1), product, atol=1e-9)
    if rows >= o and channels >= i:
        np.testing.assert_array_equal(found[:o, :i], weight)
        more = min(rows - o, o)
        np.testing.assert_array_equal(found[o : o + more, :i], weight[o - (rows - o) :][:more] if rows <= 2 * o else
                                      weight[:more])  # fmt: skip


def test_an_unknown_transfer_is_refused(case: tuple[nn.Module, WidthSpace]) -> None:
    model, space = case
    with pytest.raises(InputError, match="preserve, svd"):
        carry_over(model, space, model, space.full(), space.full(), how="magic")
