"""Widths of a network of blocks: one group through all branches, costs of the fold, and the fold of a cut network."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import HwsearchError
from hwsearch.graph.capture import capture
from hwsearch.graph.model_folder import load_model, save_model
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models.repvgg import repvgg_small
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.rewrite import reparametrize
from hwsearch.reparam.statistics import randomise

torch.set_num_threads(1)

BLOCKS = {
    "odbb": "odbb",
    "one sequence": ("1x1-kxk",),
    "no identity": ("1xk", "kx1", "1x1-avg", "dw-pw"),
}


@dataclass(frozen=True)
class Case:
    """A network of blocks with random statistics, its space and its fold."""

    model: nn.Module
    space: WidthSpace
    folded: nn.Module
    x: Tensor


def made(model: nn.Module, channels: int = 1) -> Case:
    x = torch.randn(2, channels, 12, 12, generator=torch.Generator().manual_seed(3)) + 0.2
    model = model.eval()
    randomise(model, x, torch.Generator().manual_seed(1))
    return Case(model, WidthSpace.from_model(model, x[:1]), fold(model, x, minimal=False), x)


@pytest.fixture(scope="module", params=BLOCKS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return made(repvgg_small(branches=BLOCKS[request.param], widths=(4, 6, 8, 10)))


def choices(space: WidthSpace) -> list[WidthChoice]:
    rng = np.random.default_rng(0)
    return [space.smallest(), space.sample(rng), space.full()]


def test_groups_are_those_of_the_network_not_of_its_branches(case: Case) -> None:
    identities = any("identity" in block.kinds for block in case.model.modules() if isinstance(block, ODBB))
    names = ["stem.0", "stages.0.0.0", "stages.1.0.0", "stages.2.0.0"]
    every = ["stem.0", "stages.0.0.0", "stages.0.1.0", "stages.1.0.0", "stages.1.1.0", "stages.1.2.0", "stages.2.0.0"]
    assert [group.name for group in case.space.groups] == (names if identities else every)
    assert {layer.name for layer in case.space.network.layers} == {*every, "classifier"}
    inside = [name for name, why in case.space.frozen_reasons.items() if "inside a branch" in why]
    middles = [name for name, _ in case.model.named_parameters() if "1x1-kxk.pointwise" in name]
    assert bool(inside) == bool(middles)


def test_costs_are_those_of_the_fold_at_every_width(case: Case) -> None:
    for choice in choices(case.space):
        network = capture(shrink(case.folded, case.space, choice), case.x[:1])
        assert case.space.macs(choice) == network.macs
        assert case.space.parameters(choice) == network.parameters


def test_every_slot_has_a_shape_and_follows_the_widths(case: Case) -> None:
    choice = case.space.smallest()
    small, folded = shrink(case.model, case.space, choice), shrink(case.folded, case.space, choice)
    tensors = {**dict(small.named_parameters()), **dict(small.named_buffers()), **dict(folded.named_parameters())}
    for group in case.space.groups:
        for slot in group.slots:
            assert case.space.axis_sizes(slot.parameter, choice) == tuple(tensors[slot.parameter].shape)


def test_cutting_and_folding_can_be_exchanged(case: Case) -> None:
    """Exactly in float64, and the cut network still folds into what it computes."""
    exact = copy.deepcopy(case.model).double()
    whole = fold(exact, case.x.double(), minimal=False)
    for choice in choices(case.space):
        small = shrink(exact, case.space, choice).eval()
        first, last = fold(small, case.x.double(), minimal=False), shrink(whole, case.space, choice).eval()
        for (name, one), other in zip(first.state_dict().items(), last.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        with torch.no_grad():
            expected = small(case.x.double())
            assert float((first(case.x.double()) - expected).abs().max() / expected.abs().max()) < 1e-12


def test_slices_of_the_folded_file_are_the_cut_networks(case: Case) -> None:
    """``OnnxTemplate`` runs two slices against the shrunk modules itself, and refuses where they differ."""
    template = OnnxTemplate(case.space, case.folded, case.x[:1])
    sizes = [len(template.slice(choice)) for choice in choices(case.space)]
    assert sizes[0] == min(sizes) < sizes[-1] == max(sizes)


def test_a_cut_block_knows_its_size_and_its_mask_is_kept(case: Case) -> None:
    model = copy.deepcopy(case.model)
    block = model.get_submodule("stages.0.0.0")
    assert isinstance(block, ODBB)
    block.activate([index == 0 for index in range(len(block.kinds))])
    small = shrink(model, case.space, case.space.smallest()).get_submodule("stages.0.0.0")
    assert isinstance(small, ODBB)
    assert small.mask == block.mask
    assert (small.host.in_channels, small.host.out_channels) == (1, 1)
    assert small.fold().weight.shape[:2] == (1, 1)


def test_depthwise_blocks_are_cut_with_the_layers_around_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    plain = WidthSpace.from_model(model.eval(), torch.zeros(1, 1, 12, 12))
    reparametrize(model, "odbb", keep=False, middle_ratio=1)
    case = made(model)
    assert [group.units for group in case.space.groups] == [group.units for group in plain.groups] == [6]
    for choice in choices(case.space):
        assert case.space.macs(choice) == plain.macs(choice)
        small = shrink(case.model, case.space, choice).eval()
        with torch.no_grad():
            expected = small(case.x)
            assert float((fold(small, case.x)(case.x) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_model_folder_keeps_a_cut_network_of_blocks(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    small = shrink(case.model, case.space, case.space.smallest()).eval()
    save_model(folder, small, factory=None, input_shape=(1, 1, 12, 12))
    again = load_model(folder, build_full=lambda: copy.deepcopy(case.model))
    assert torch.equal(again(case.x), small(case.x))


def test_a_block_alone_is_refused_in_one_line() -> None:
    block = repvgg_small(branches="dbb", widths=(4, 6, 8, 10)).stages[0][0][0]  # type: ignore[index]
    with pytest.raises(HwsearchError, match=r"is a single block: put it into a module|no width of ODBB can change"):
        WidthSpace.from_model(block.eval(), torch.zeros(1, 4, 8, 8))
