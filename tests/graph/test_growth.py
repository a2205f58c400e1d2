"""Growth: copies follow their originals, refusals are one line. That functions are kept, ``check_exact`` checks."""

from __future__ import annotations

import graph_zoo as zoo
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.growth import grow
from hwsearch.graph.surgery import randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models import resnet_small
from hwsearch.reparam.fold import fold

EXAMPLE = torch.zeros(zoo.IMAGE)


def test_copies_lie_behind_their_originals_and_readers_are_divided() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2))
    space = WidthSpace.from_model(model, torch.zeros(1, 3, 2, 2))
    wide = grow(model, space, {"0": 7}, source={"0": [1, 1, 3]})
    assert torch.equal(wide[0].weight, model[0].weight[[0, 1, 1, 1, 2, 3, 3]])
    assert torch.equal(wide[1].running_var, model[1].running_var[[0, 1, 1, 1, 2, 3, 3]])
    features = model[3].weight.view(2, 4, 4) / torch.tensor([1.0, 3.0, 1.0, 2.0])[:, None]
    assert torch.allclose(wide[3].weight.view(2, 7, 4), features[:, [0, 1, 1, 1, 2, 3, 3]])
    assert (wide[0].out_channels, wide[1].num_features, wide[3].in_features) == (7, 7, 28)


def test_the_model_is_left_alone_and_its_parameters_stay_parameters() -> None:
    model = resnet_small().train()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 28, 28), verify=False)
    wide = grow(model, space, {space.groups[0].name: 20})
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert wide.training
    wide(torch.randn(2, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in wide.parameters())


def test_shrinking_the_copies_away_gives_the_network_back() -> None:
    model = resnet_small().eval()
    example = torch.randn(1, 1, 28, 28)
    space = WidthSpace.from_model(model, example, verify=False)
    wide = grow(model, space, {group.name: group.units + 4 for group in space.groups})
    again = WidthSpace.from_model(wide, example, verify=False)
    assert [group.units for group in again.groups] == [group.units + 4 for group in space.groups]
    # The first four units of every group have a copy right behind them; dropping it drops half of what is read.
    keep = {group.name: np.array([0, 2, 4, 6, *range(8, group.units)]) for group in again.groups}
    small = shrink(wide, again, space.full(), keep)
    assert {name: t.shape for name, t in small.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    assert torch.equal(small.stem[0].weight, model.stem[0].weight)


def test_folded_form_grows_with_the_space_of_the_original() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    randomise(model)
    space = WidthSpace.from_model(model, EXAMPLE)
    folded = fold(model)
    wide = grow(folded, space, {"0": 9})
    example = torch.randn(zoo.IMAGE)
    assert torch.allclose(wide(example), model(example), atol=1e-5)


def test_bias_added_by_folding_follows_the_outputs_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 6, 2, bias=False), nn.Conv2d(6, 2, 1))
    space = WidthSpace.from_model(model, EXAMPLE)
    assert [group.name for group in space.groups] == ["0", "1"]
    biased = nn.Sequential(model[0], nn.ConvTranspose2d(6, 6, 2, bias=True), model[2])
    assert shrink(biased, space, WidthChoice((3, 6)))[1].bias.shape == (6,)
    assert shrink(biased, space, WidthChoice((6, 4)), {"1": np.array([0, 2, 3, 5])})[1].bias.tolist() == (
        biased[1].bias[[0, 2, 3, 5]].tolist()
    )


def test_noise_breaks_the_symmetry_of_copies_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    space = WidthSpace.from_model(model, EXAMPLE)
    wide = grow(model, space, {"0": 8}, noise=0.1, seed=3)
    assert torch.equal(wide[0].weight[::2], model[0].weight)
    assert not torch.equal(wide[0].weight[1::2], model[0].weight)
    assert torch.equal(grow(model, space, {"0": 8}, noise=0.1, seed=3)[0].weight, wide[0].weight)


@pytest.mark.parametrize(
    ("widths", "source", "message"),
    [
        ({"9": 8}, {}, "no group named '9'"),
        ({"0": 3}, {}, "has 4 units and cannot grow to 3"),
        ({"0": True}, {}, "cannot grow to True"),
        ({"0": 6}, {"0": [1]}, "must hold 2 units"),
        ({"0": 5}, {"0": [4]}, "must hold 1 units of 0 to 3"),
    ],
)
def test_refusals(widths: dict[str, int], source: dict[str, list[int]], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(InputError, match=message):
        grow(model, WidthSpace.from_model(model, EXAMPLE), widths, source=source)


def test_hard_coded_size_is_one_clear_line_with_its_place() -> None:
    model = zoo.HardCodedView()
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    message = r"HardCodedView cannot grow: .* at graph_zoo.py:\d+; a size"
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        grow(model, space, {"b": 12})
    assert "\n" not in str(caught.value)


def test_a_function_that_would_silently_change_is_refused() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sum(1, keepdim=True))

    model = Summed()
    space = WidthSpace.from_model(model, EXAMPLE)
    with pytest.raises(UnsupportedModelError, match="growing Summed changes its output by"):
        grow(model, space, {"a": 8})
