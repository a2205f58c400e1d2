"""User control over groups, and the space in words."""

from __future__ import annotations

import re

import graph_zoo as zoo
import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.capture import capture
from hwsearch.graph.control import GroupRule, apply_rules, bounded, matching
from hwsearch.graph.space_table import SpaceTable
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthSpace
from hwsearch.models import resnet_small

EXAMPLE = torch.zeros(1, 1, 28, 28)


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    return WidthSpace.from_model(resnet_small(), EXAMPLE, quantum=8, verify=False)


def test_a_pattern_means_the_layers_that_produce_a_group(space: WidthSpace) -> None:
    assert matching(space, "stem.0") == ["stem.0"]
    assert matching(space, "stages.2.*") == ["stages.2.0.conv1", "stages.2.0.conv2", "stages.2.1.conv1"]
    # The stage's sum is produced by its shortcut as well.
    assert matching(space, "*shortcut*") == ["stages.1.0.conv2", "stages.2.0.conv2"]
    with pytest.raises(InputError, match=r"no group matches 'stages.9.\*'; the nearest layers .* are stages"):
        matching(space, "stages.9.*")


def test_freezing_keeps_the_width_and_says_who_asked(space: WidthSpace) -> None:
    found = apply_rules(space, [GroupRule("stages.2.*", freeze=True)])
    assert [group.name for group in found.groups] == [g.name for g in space.groups if not g.name.startswith("stages.2")]
    assert found.frozen_reasons["stages.2.0.conv1.weight axis 0"] == "frozen by the user (stages.2.*)"
    small = capture(shrink(space.model, found, found.smallest()), EXAMPLE)
    assert small.shapes["stages.2.1.conv2.weight"] == (64, 64, 3, 3)
    assert small.macs == found.macs(found.smallest())


def test_quantum_and_minimum_by_pattern_and_the_last_rule_wins(space: WidthSpace) -> None:
    rules = [
        GroupRule("*", minimum=0.5),
        GroupRule("stages.2.*", quantum=16),
        GroupRule("stages.2.1.conv1", minimum=48),
    ]
    found = {group.name: group.widths for group in apply_rules(space, rules).groups}
    assert found["stem.0"] == (8, 16)
    assert found["stages.1.0.conv1"] == (16, 24, 32)
    assert found["stages.2.0.conv1"] == (16, 32, 48, 64)
    assert found["stages.2.1.conv1"] == (48, 64)


def test_quantum_is_the_least_common_multiple_with_a_grouped_convolution() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=3), nn.Conv2d(24, 2, 1))
    space = apply_rules(WidthSpace.from_model(grouped, torch.zeros(zoo.IMAGE)), [GroupRule("0", quantum=4)])
    assert [(group.quantum, group.widths) for group in space.groups] == [(4, (4, 8)), (1, tuple(range(1, 9)))]


def test_maximum_makes_a_narrower_network(space: WidthSpace) -> None:
    rules = [GroupRule("stages.2.*", maximum=0.5, minimum=16), GroupRule("stem.0", maximum=8)]
    found = bounded(space, EXAMPLE, rules)
    assert [group.units for group in found.groups] == [8, 16, 32, 32, 32, 32, 32]
    assert [group.widths for group in found.groups][:2] == [(8,), (8, 16)]
    assert found.groups[-1].widths == (16, 24, 32)
    assert found.model is not None
    assert found.model is not space.model
    assert found.network.macs == found.macs(found.full()) < space.network.macs
    with pytest.raises(InputError, match="needs a narrower network; use bounded"):
        apply_rules(space, rules)


def test_bounded_without_a_maximum_is_the_same_network(space: WidthSpace) -> None:
    assert bounded(space, EXAMPLE, [GroupRule("stem.0", quantum=4)]).model is space.model


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GroupRule("*", freeze=True), "freeze every group"),
        (GroupRule("*", quantum=0), "quantum must be"),
        (GroupRule("*", minimum=0), "minimum must be"),
        (GroupRule("stem.0", minimum=17), "cannot keep at least 17"),
        (GroupRule("nothing"), "no group matches"),
    ],
)
def test_refusals(space: WidthSpace, rule: GroupRule, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        apply_rules(space, [rule])
    assert "\n" not in str(caught.value)


def test_a_maximum_above_the_network_is_refused(space: WidthSpace) -> None:
    with pytest.raises(InputError, match="allows 32 units, but there are 16"):
        bounded(space, EXAMPLE, [GroupRule("stem.0", maximum=32)])


def test_costs_move_one_group_at_a_time(space: WidthSpace) -> None:
    lines = SpaceTable.of(space, space.macs_array).groups
    assert [line.name for line in lines] == [group.name for group in space.groups]
    costs = [line.cost for line in lines if line.cost is not None]
    assert len(costs) == len(lines)
    assert all(cost.smallest < cost.full == space.network.macs for cost in costs)
    assert all(cost.smallest <= cost.middle <= cost.full for cost in costs)
    with pytest.raises(InputError, match="one number per choice"):
        SpaceTable.of(space, lambda choices: [1.0])


def test_table_shows_groups_slots_costs_and_frozen_axes_with_their_line() -> None:
    model = zoo.UnknownOperation()
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    text = SpaceTable.of(space, space.macs_array, unit="MACs").text()
    lines = text.splitlines()
    assert lines[0].split() == ["group", "units", "widths", "step", "min", "MACs", "mid", "MACs", "max", "MACs"]
    assert "    writes a.weight[0], a.bias[0]" in lines
    assert "    reads b.weight[1]" in lines
    assert any(re.fullmatch(r"  no rule for cummax at graph_zoo.py:\d+", line) for line in lines)
    assert f"2 groups, 10^{space.log10_size:.1f} choices" in lines
    assert "MACs" not in SpaceTable.of(space).text()
    assert "writes" not in SpaceTable.of(space).text(slots=False)


def test_table_marks_groups_whose_channels_are_mixed() -> None:
    space = WidthSpace.from_model(zoo.SpatialAttention(), torch.zeros(zoo.IMAGE))
    text = SpaceTable.of(space).text()
    assert "a *" in text
    assert "* an operation mixes over these channels" in text
