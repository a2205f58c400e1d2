"""Dependency extraction and surgery on micro networks with known answers, and on the reference networks."""

from __future__ import annotations

import re

import graph_zoo as zoo
import graph_zoo_attention as attention
import pytest
import torch
from graph_checks import check_exact
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.graph.capture import capture
from hwsearch.graph.dependencies import extract
from hwsearch.graph.ids import Ids
from hwsearch.graph.rules import RULES
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models import mobilenetv2_small, resnet_small, vgg_small
from hwsearch.models.resnet import BasicBlock


@pytest.mark.parametrize("network", zoo.GROUPS, ids=lambda network: network.__name__)
def test_micro_network_has_the_expected_groups_and_shrinks_exactly(network: type[nn.Module]) -> None:
    check_exact(network(), torch.randn(zoo.IMAGE), units=zoo.GROUPS[network])


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small], ids=lambda f: f.__name__)
def test_reference_network_shrinks_exactly(factory: type[nn.Module]) -> None:
    space = check_exact(factory(), torch.randn(1, 1, 28, 28), rounds=1)
    assert not space.unknown_operations
    assert all(group.neutral for group in space.groups)
    (reason,) = set(space.frozen_reasons.values())
    assert re.fullmatch(r"it is the network.s output, made at \S+ in \w+\.py:\d+", reason)


def test_residual_stage_is_one_group() -> None:
    space = WidthSpace.from_model(resnet_small(), torch.zeros(1, 1, 28, 28), verify=False)
    stage = next(group for group in space.groups if group.name == "stages.1.0.conv2")
    writers = [slot.parameter for slot in stage.slots if not slot.reads and slot.parameter.endswith("weight")]
    assert writers == [
        "stages.1.0.conv2.weight",
        "stages.1.0.bn2.weight",
        "stages.1.0.shortcut.0.weight",
        "stages.1.0.shortcut.1.weight",
    ]
    readers = [slot.parameter for slot in stage.slots if slot.reads]
    assert readers == ["stages.2.0.conv1.weight", "stages.2.0.shortcut.0.weight"]


def test_inverted_residual_hidden_width_spans_expansion_depthwise_and_projection() -> None:
    space = WidthSpace.from_model(mobilenetv2_small(), torch.zeros(1, 1, 28, 28), verify=False)
    hidden = next(group for group in space.groups if group.name == "blocks.1.body.0.0")
    places = [(slot.parameter, slot.axis, slot.reads) for slot in hidden.slots if slot.parameter.endswith("0.weight")]
    assert places == [
        ("blocks.1.body.0.0.weight", 0, False),
        ("blocks.1.body.1.0.weight", 0, False),
        ("blocks.1.body.2.0.weight", 1, True),
    ]


def test_flattened_channel_is_one_unit_of_height_times_width_features() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 6 * 5, 3))
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 6, 5))
    (group,) = space.groups
    reader = next(slot for slot in group.slots if slot.reads)
    assert reader.positions.tolist() == [list(range(30 * unit, 30 * unit + 30)) for unit in range(4)]


def test_unknown_operation_is_reported_with_its_line() -> None:
    found = extract(capture(zoo.UnknownOperation(), torch.randn(zoo.IMAGE)))
    (unknown,) = found.unknown
    assert unknown.startswith("cummax at graph_zoo.py:")
    assert any(item.parameter == "b.weight" and unknown in item.reason for item in found.frozen)


def test_unused_layer_is_listed() -> None:
    found = extract(capture(zoo.UnusedLayer(), torch.randn(zoo.IMAGE)))
    assert found.unused == ("z.bias", "z.weight")


def test_channels_tied_into_one_unit_are_listed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).flatten(1).view(x.shape[0], 4, -1)[:, :1] + self.c(x).mean()

    space = WidthSpace.from_model(Tied(), torch.zeros(zoo.IMAGE), verify=False)
    assert [group.name for group in space.groups] == ["c"]
    assert space.frozen_reasons["a.weight axis 0"] == "all its channels are tied into a single unit"


def test_depthwise_is_groups_equal_to_more_than_one_input_channel() -> None:
    space = WidthSpace.from_model(
        nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 1)), torch.zeros(zoo.IMAGE)
    )
    assert [(group.name, group.units) for group in space.groups] == [("1", 6)]


def test_weight_normalisation_is_frozen_not_broken() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
    )
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    assert [group.name for group in space.groups] == ["1"]
    assert any("_weight_norm" in operation for operation in space.unknown_operations)


@pytest.mark.parametrize(
    ("network", "free"),
    [(attention.HardCodedHeads, ["patches", "up"]), (attention.LibraryAttention, ["up"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sizes_of_heads_written_in_the_code_are_frozen_with_their_line(
    network: type[nn.Module], free: list[str]
) -> None:
    space = WidthSpace.from_model(network(), torch.randn(zoo.IMAGE))
    assert [group.name for group in space.groups] == free
    assert any("Python code" in reason for reason in space.frozen_reasons.values())
    reasons = [reason for reason in space.frozen_reasons.values() if "graph_zoo_attention.py:" in reason]
    assert reasons


def test_a_custom_operation_is_unknown_not_element_wise() -> None:
    library = torch.library.Library("hwsearch_test", "FRAGMENT")
    library.define("swap(Tensor x) -> Tensor")
    library.impl("swap", lambda x: x.flip(1), "CompositeExplicitAutograd")
    library.impl("swap", torch.empty_like, "Meta")

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.ops.hwsearch_test.swap(self.a(x))))

    space = check_exact(Custom(), torch.randn(zoo.IMAGE), units=(6,))
    (unknown,) = space.unknown_operations
    assert unknown.startswith("swap at test_dependencies.py:")


def test_inference_tensors_are_extracted_all_the_same() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    space = WidthSpace.from_model(model, torch.zeros(zoo.IMAGE))
    assert [group.units for group in space.groups] == [8]


def test_a_deep_network_needs_no_recursion() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(120)))
    found = extract(capture(model, torch.zeros(1, 2, 2, 2)))
    assert len(found.units) == 119


def test_weights_of_attention_are_in_the_closed_form_of_the_macs() -> None:
    space = WidthSpace.from_model(attention.QkvIndexed(), torch.zeros(zoo.IMAGE))
    layer = next(layer for layer in space.network.layers if layer.op == "scaled_dot_product_attention")
    half = WidthChoice((6, 2))
    others = sum(item.macs for item in space.network.layers) - layer.macs
    assert space.macs(half) < others + layer.macs
    assert capture(shrink(space.model, space, half), torch.zeros(zoo.IMAGE)).macs == space.macs(half)


def test_frozen_parameters_are_extracted_all_the_same() -> None:
    model = resnet_small().requires_grad_(False)
    assert len(WidthSpace.from_model(model, torch.zeros(1, 1, 28, 28), verify=False).groups) == 7


def test_extraction_is_deterministic() -> None:
    first, second = (extract(capture(resnet_small(), torch.zeros(1, 1, 28, 28))) for _ in range(2))
    assert [unit.slots for unit in first.units] == [unit.slots for unit in second.units]


def test_a_network_without_free_channels_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="no width of Conv2d can change") as caught:
        WidthSpace.from_model(nn.Conv2d(3, 4, 1), torch.zeros(zoo.IMAGE))
    assert "\n" not in str(caught.value)


def test_block_with_identity_shortcut_ties_input_and_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8, 1), nn.Conv2d(8, 2, 1))
    space = check_exact(model, torch.randn(zoo.IMAGE))
    assert [(group.name, group.units) for group in space.groups] == [("0", 8), ("1.conv1", 8)]


def test_facts_may_arrive_in_any_order() -> None:
    ids = Ids()
    a, b, c = ids.new(3), ids.new(3), ids.new(3)
    ids.freeze(c[:1], "fixed")
    ids.join(a, b)
    ids.join(b, c)
    classes = ids.solve()
    assert len(set(classes.roots.tolist())) == 3
    assert classes.frozen == {int(classes.roots[a[0]]): "fixed"}


def test_every_rule_has_its_in_place_form() -> None:
    assert all(name.endswith("_") or f"{name}_" in RULES for name in RULES)
