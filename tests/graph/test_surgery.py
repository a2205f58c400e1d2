"""Surgery: weights carried over, attributes fixed, ties kept, dead units dropped without a trace, refusals."""

from __future__ import annotations

import graph_zoo as zoo
import numpy as np
import pytest
import torch
from graph_checks import difference_to_dead, random_keep
from torch import nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.surgery import kept_units, put_tensors, randomise, shrink, tensor_owners
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models import mobilenetv2_small, resnet_small, vgg_small

EXAMPLE = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small], ids=lambda f: f.__name__)
def test_dropping_dead_units_keeps_the_function(factory: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = factory().eval()
    randomise(model)
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    rng = np.random.default_rng(0)
    choice = space.uniform(0.6)
    keep = random_keep(space, choice, rng)
    assert difference_to_dead(model, shrink(model, space, choice, keep), space, keep, EXAMPLE) < 1e-5


def test_the_first_units_are_kept_by_default_and_weights_are_carried_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    small = shrink(model, space, WidthChoice((3,)))
    assert torch.equal(small[0].weight, model[0].weight[:3])
    assert torch.equal(small[2].weight, model[2].weight[:, :3])
    assert torch.equal(small[1].running_var, model[1].running_var[:3])
    picked = shrink(model, space, WidthChoice((3,)), {"0": np.array([7, 1, 4])})
    assert torch.equal(picked[0].weight, model[0].weight[[1, 4, 7]])
    assert torch.equal(picked[2].bias, model[2].bias)


def test_the_given_model_is_not_touched_and_shares_nothing() -> None:
    model = vgg_small().train()
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    small = shrink(model, space, space.full())
    assert small.training
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    small.classifier[0].bias.data.add_(1.0)
    assert not torch.equal(small.classifier[0].bias, model.classifier[0].bias)


def test_module_attributes_follow_the_weights() -> None:
    model = mobilenetv2_small()
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    small = shrink(model, space, space.uniform(0.5))
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.in_channels == module.weight.shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    depthwise = small.blocks[1].body[1][0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 32
    assert "groups=32" in repr(depthwise)


def test_shrunk_model_trains() -> None:
    model = resnet_small()
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    small = shrink(model, space, space.uniform(0.5)).train()
    small(EXAMPLE).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.Conv2d(8, 2, 1))
    small = shrink(model, WidthSpace.from_model(model, torch.zeros(zoo.IMAGE)), WidthChoice((4,)))
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]


def test_tied_weights_stay_tied() -> None:
    model = zoo.TiedWeights()
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    small = shrink(model, space, WidthChoice((2, 3)))
    assert small.c.weight is small.b.weight
    assert small.b.weight.shape == (3, 2, 1, 1)
    assert sorted(local for _, local in tensor_owners(small)["b.weight"]) == ["weight", "weight"]


def test_shrinking_in_two_steps_equals_one() -> None:
    model = resnet_small().eval()
    space = WidthSpace.from_model(model, EXAMPLE, verify=False)
    middle = shrink(model, space, space.uniform(0.75))
    again = WidthSpace.from_model(middle, EXAMPLE, verify=False)
    assert [group.name for group in again.groups] == [group.name for group in space.groups]
    goal = space.uniform(0.5)
    twice, once = shrink(middle, again, goal), shrink(model, space, goal)
    assert torch.equal(twice(EXAMPLE), once(EXAMPLE))


def test_folded_form_is_cut_with_the_space_of_the_original() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    folded = nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), nn.Identity(), nn.Conv2d(8, 2, 1))
    small = shrink(folded, space, WidthChoice((5,)), {"0": np.array([0, 2, 3, 5, 7])})
    assert torch.equal(small[0].bias, folded[0].bias[[0, 2, 3, 5, 7]])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"9": [0, 1, 2]}, "no group of this space: '9'"),
        ({"0": [0, 1]}, "must hold 3 distinct units, got 2"),
        ({"0": [0, 1, 1]}, "must hold 3 distinct units"),
        ({"0": [0, 1, 8]}, "must lie in 0 to 7"),
        ({"0": [-1, 1, 2]}, "must lie in 0 to 7"),
        ({"0": [8, 0, 1]}, "must lie in 0 to 7"),
    ],
)
def test_bad_keep(keep: dict[str, list[int]], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    with pytest.raises(InputError, match=message):
        kept_units(space, WidthChoice((3,)), {name: np.array(units) for name, units in keep.items()})


def test_choice_of_another_space_is_refused() -> None:
    model = vgg_small()
    space = WidthSpace.from_model(model, EXAMPLE, quantum=8, verify=False)
    with pytest.raises(InputError, match="cannot be 9 wide"):
        shrink(model, space, WidthChoice((9, 8, 8, 8, 8, 8)))


def test_hard_coded_size_is_one_clear_line() -> None:
    model = zoo.HardCodedView()
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE), verify=False)
    with pytest.raises(UnsupportedModelError, match=r"HardCodedView cannot run at widths \[1, 1, 1\]") as caught:
        shrink(model, space, space.smallest())
    assert "\n" not in str(caught.value)


def test_put_tensors_resizes_depthwise_layers() -> None:
    model = nn.Conv2d(8, 8, 3, groups=8)
    put_tensors(model, {"weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)})
    assert (model.in_channels, model.out_channels, model.groups) == (3, 3, 3)
    assert model(torch.zeros(1, 3, 5, 5)).shape == (1, 3, 3, 3)
