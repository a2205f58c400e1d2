"""WidthSpace: allowed widths, rounding, arrays, restriction, closed forms, refusals."""

from __future__ import annotations

import dataclasses

import graph_zoo as zoo
import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.capture import capture
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models import resnet_small

EXAMPLE = torch.zeros(1, 1, 28, 28)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return resnet_small()


@pytest.fixture(scope="module")
def space(model: nn.Module) -> WidthSpace:
    return WidthSpace.from_model(model, EXAMPLE, quantum=8, verify=False)


def test_widths_are_multiples_of_the_quantum_and_the_full_width(space: WidthSpace) -> None:
    assert [group.units for group in space.groups] == [16, 16, 32, 32, 64, 64, 64]
    assert space.groups[2].widths == (8, 16, 24, 32)
    odd = WidthSpace.from_model(zoo.CatTwice(), torch.zeros(zoo.IMAGE), quantum=4, verify=False)
    assert [group.widths for group in odd.groups] == [(4, 6), (4, 5)]


def test_quantum_counts_channels_where_a_unit_is_several() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 2, 1))
    space = WidthSpace.from_model(grouped, torch.zeros(zoo.IMAGE), quantum=8, verify=False)
    assert [(group.units, group.quantum, group.widths) for group in space.groups] == [(8, 2, (2, 4, 6, 8))] * 2


@pytest.mark.parametrize(
    ("minimum", "smallest"),
    [(None, (8, 8, 8, 8)), (10, (16, 16, 16, 16)), (0.25, (8, 8, 16, 16)), (1.0, (16, 32, 64, 64))],
)
def test_minimum(model: nn.Module, minimum: float | None, smallest: tuple[int, ...]) -> None:
    space = WidthSpace.from_model(model, EXAMPLE, quantum=8, minimum=minimum, verify=False)
    assert tuple(space.smallest().widths[index] for index in (0, 2, 4, 6)) == smallest


@pytest.mark.parametrize(
    ("quantum", "minimum"), [(0, None), (2.5, None), (True, None), (1, 0), (1, 0.0), (1, 1.5), (1, "a")]
)
def test_bad_settings(model: nn.Module, quantum: int, minimum: float) -> None:
    with pytest.raises(InputError, match="must be a"):
        WidthSpace.from_model(model, EXAMPLE, quantum=quantum, minimum=minimum)


def test_full_smallest_uniform(space: WidthSpace) -> None:
    assert space.full().widths == (16, 16, 32, 32, 64, 64, 64)
    assert space.uniform(1.0) == space.full()
    assert space.uniform(0.5).widths == (8, 8, 16, 16, 32, 32, 32)
    assert space.uniform(0.375).widths == (8, 8, 16, 16, 24, 24, 24)  # 6 -> 8, 12 -> 16 (halfway up), 24
    assert space.uniform(1e-9) == space.smallest()
    for ratio in (0.0, 1.01, float("nan"), -1.0):
        with pytest.raises(InputError, match="ratio"):
            space.uniform(ratio)


def test_sample_is_uniform_over_allowed_widths_and_seeded(space: WidthSpace) -> None:
    rng = np.random.default_rng(0)
    drawn = space.choice_array([space.sample(rng) for _ in range(400)])
    assert set(drawn[:, 2].tolist()) == {8, 16, 24, 32}
    assert (drawn[0] == space.choice_array([space.sample(np.random.default_rng(0))])[0]).all()


def test_arrays_and_back(space: WidthSpace) -> None:
    choices = [space.full(), space.smallest()]
    array = space.choice_array(choices)
    assert array.dtype == np.int64
    assert array.shape == (2, 7)
    assert space.choices(array) == choices
    assert space.choice_array([]).shape == (0, 7)


def test_validate_names_group_width_and_neighbours(space: WidthSpace) -> None:
    with pytest.raises(InputError, match=r"needs 7 widths, got 2"):
        space.validate(WidthChoice((8, 8)))
    wrong = WidthChoice((8, 8, 8, 9, 64, 64, 64))
    with pytest.raises(InputError, match=r"stages.1.0.conv2 cannot be 9 wide; .*\[8, 16"):
        space.validate(wrong)
    with pytest.raises(InputError, match="cannot be 9 wide"):
        space.choices([wrong.widths])


def test_restrict(space: WidthSpace) -> None:
    small = space.restrict({"stem.0": [8], "stages.2.0.conv1": [24, 40, 24]})
    assert small.groups[0].widths == (8, 16)
    assert small.groups[4].widths == (24, 40, 64)
    assert small.groups[4].minimum == 24
    assert small.groups[1] is space.groups[1]
    assert small.log10_size < space.log10_size
    with pytest.raises(InputError, match="no group named 'stem'"):
        space.restrict({"stem": [8]})
    with pytest.raises(InputError, match="from 1 to 16"):
        space.restrict({"stem.0": [0, 17]})


def test_log10_size_and_table(space: WidthSpace) -> None:
    assert space.log10_size == pytest.approx(np.log10(2 * 2 * 4 * 4 * 8 * 8 * 8))
    row = space.table()[1]
    assert (row.name, row.units, row.smallest, row.steps) == ("stages.0.0.conv1", 16, 8, 2)
    assert row.layers == "stages.0.0.conv1 stages.0.0.bn1 stages.0.0.conv2"


def test_closed_forms_equal_the_shrunk_network(space: WidthSpace, model: nn.Module) -> None:
    rng = np.random.default_rng(1)
    choices = [space.full(), space.sample(rng)]
    array = space.choice_array(choices)
    for index, choice in enumerate(choices):
        found = capture(shrink(model, space, choice), EXAMPLE)
        assert space.macs(choice) == space.macs_array(array)[index] == found.macs
        assert space.parameters(choice) == space.parameters_array(array)[index] == found.parameters


def test_types_are_frozen(space: WidthSpace) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.groups = ()  # type: ignore[misc]
    assert hash(space.full()) == hash(WidthChoice(space.full().widths))


def test_verification_freezes_a_hard_coded_size_with_its_reason_and_keeps_the_rest() -> None:
    space = WidthSpace.from_model(zoo.HardCodedView(), torch.zeros(zoo.IMAGE))
    assert [group.name for group in space.groups] == ["a", "c"]
    assert "Python code" in space.frozen_reasons["b.weight axis 0"]


def test_verification_notices_a_function_that_silently_changes() -> None:
    space = WidthSpace.from_model(zoo.HardCodedMiddle(), torch.zeros(zoo.IMAGE))
    assert [group.name for group in space.groups] == ["c"]
    assert "Python code" in space.frozen_reasons["a.weight axis 0"]


def test_uneven_split_is_frozen() -> None:
    with pytest.raises(InputError, match="no width of UnevenSplit can change"):
        WidthSpace.from_model(zoo.UnevenSplit(), torch.zeros(zoo.IMAGE))


def test_verification_leaves_the_model_and_the_random_state_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.train()
    WidthSpace.from_model(model, EXAMPLE)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_model_keeps_its_widths() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).bfloat16()
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE).bfloat16())
    assert [group.units for group in space.groups] == [8]
