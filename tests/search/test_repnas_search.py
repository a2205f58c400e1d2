"""Widths and branches together: any searcher of widths on a network of blocks, then branches, folded and exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.capture import capture
from hwsearch.graph.onnx_build import OnnxTemplate, export_onnx
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthSpace
from hwsearch.models.repvgg import repvgg_small
from hwsearch.models.vgg import vgg_small
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.rewrite import reparametrize
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet
from hwsearch.search.cafenet_config import CafeNetConfig
from hwsearch.search.conetv2 import ConetV2
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.repnas import BranchBudget, RepNASConfig
from hwsearch.search.repnas_search import BlockConfig, RepNASSearch, RepNASSearchConfig, branch_lines
from hwsearch.search.repnas_space import BranchSpace
from hwsearch.search.result import SearchResult
from hwsearch.search.winner import reset
from hwsearch.train.data import TensorExamples
from hwsearch.train.loop import TrainConfig, train
from hwsearch.train.task import Classification

torch.set_num_threads(1)

X = torch.zeros(1, 1, 12, 12)
TRAINING = TrainConfig(steps=10, batch_size=8, learning_rate=0.02)
SEARCH = RepNASConfig(BranchBudget(limit=9), warmup=0.1, search=0.4, training=TRAINING)


def task() -> Classification:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 12, 12, generator=generator), torch.arange(64) % 10
    return Classification(TensorExamples(x[:40], y[:40]), TensorExamples(x[40:], y[40:]))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return repvgg_small(branches="dbb", widths=(4, 4, 6, 8))


def budget(space: WidthSpace, share: float = 0.5) -> Budget:
    return Budget([Limit(MegaMacs(space), max_ms=share * space.macs(space.full()) / 1e6, name="MMACs")])


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_widths_of_blocks_by_cafenet_then_branches_then_the_fold(tmp_path: Path) -> None:
    model = blocks()
    space = WidthSpace.from_model(model, X)
    kept = budget(space)
    short = replace(TRAINING, steps=4)
    cafenet = CafeNet(
        space, kept, CafeNetConfig(training=short, winner=short, evolution=EvolutionSettings(6, 2, 10), finalists=0),
    )  # fmt: skip
    found = RepNASSearch(space, kept, RepNASSearchConfig(SEARCH), widths=cafenet, folder=tmp_path / "run").search(
        task(), None
    )
    assert found.extra["widths_by"] == "cafenet"
    assert kept.evaluate(space.choice_array([found.choice]))[0, 0] <= kept.limits[0].max_ms
    mask = np.array(found.extra["branches"]["mask"])
    assert mask.sum() == 9
    # What came out is exactly the plain training of these branches at these widths.
    by_hand = shrink(model, space, found.choice)
    reset(by_hand, 0)
    BranchSpace.of(by_hand).apply(by_hand, mask)
    train(by_hand, task(), replace(TRAINING, steps=6))
    assert found.model is not None
    assert same(found.model, by_hand)
    # Folded, it is the network that the widths were chosen by: its costs, and the very kernels of the sliced file.
    folded = fold(found.model, X)
    assert capture(folded, X).macs == found.macs == space.macs(found.choice)
    assert capture(folded, X).parameters == found.parameters
    template = OnnxTemplate(space, fold(model.eval(), X), X, check=False)
    assert convolutions(export_onnx(folded, X)) == convolutions(template.slice(found.choice))
    with torch.no_grad():
        x = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
        expected = found.model(x)
        assert float((folded(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert SearchResult.load(tmp_path / "run/result.json") == replace(found, model=None)
    lines = branch_lines(SearchResult.load(tmp_path / "run/result.json"))
    assert len(lines) == 7
    assert lines[0].startswith("stem.0")


def convolutions(onnx_file: bytes) -> list[tuple[int, ...]]:
    import onnx

    proto = onnx.load_from_string(onnx_file)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    return [shapes[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"]


def test_a_plain_network_gets_its_blocks_at_the_widths_that_fit() -> None:
    torch.manual_seed(0)
    model = vgg_small(width=0.125).eval()
    before = copy.deepcopy(model)
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 16, 16))
    kept = budget(space)
    config = RepNASSearchConfig(SEARCH, BlockConfig("dbb"))
    found = RepNASSearch(space, kept, config, uniform=True).search(bigger(), None)
    assert found.extra["widths_by"] == "uniform"
    assert found.model is not None
    assert sum(isinstance(module, ODBB) for module in found.model.modules()) == 6
    plain = fold(shrink(model, space, found.choice).eval(), torch.zeros(1, 1, 16, 16))
    folded = fold(found.model, torch.zeros(1, 1, 16, 16), minimal=False)
    assert {k: v.shape for k, v in folded.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert same(model, before), "the model that came in was changed"


def bigger() -> Classification:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 16, 16, generator=generator), torch.arange(64) % 10
    return Classification(TensorExamples(x[:40], y[:40]), TensorExamples(x[40:], y[40:]))


def test_without_a_budget_of_widths_they_stay_and_weights_may_be_kept() -> None:
    torch.manual_seed(0)
    model = vgg_small(width=0.125).eval()
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 16, 16))
    search = RepNASSearch(space, budget(space, 1.0), RepNASSearchConfig(SEARCH, BlockConfig("dbb", start="model")))
    start = search.blocks_at(search._widths(_Run(), None, None)).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(start(x), model(x), atol=1e-5), "blocks begin as the network that came in"
    assert search.identity()["settings"]["widths"] is False


class _Run:
    """Where a run would keep its state; nothing is measured, so nothing is kept."""

    state = Path("nowhere")


def test_reparametrized_networks_have_the_widths_of_plain_ones() -> None:
    torch.manual_seed(0)
    model = repvgg_small(branches=("kxk",), widths=(4, 4, 6, 8)).eval()
    plain = fold(model, X)
    reparametrize(plain, "dbb", keep=False)
    space, other = WidthSpace.from_model(plain, X), WidthSpace.from_model(model, X)
    assert [group.widths for group in space.groups] == [group.widths for group in other.groups]
    half = space.uniform(0.5)
    assert space.macs(half) == other.macs(half)


def test_searchers_that_cannot_take_blocks_say_so() -> None:
    model = blocks()
    space = WidthSpace.from_model(model, X, verify=False)
    with pytest.raises(InputError, match="search the plain network, and give its winner blocks afterwards"):
        ConetV2(space, budget(space)).search(None, None)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"search widths first, then give the winner to hwsearch.RepNAS"):
        RepNASSearchConfig(RepNASConfig(BranchBudget("ms", 1.0)))
    with pytest.raises(InputError, match="start is 'all': give scratch or model"):
        BlockConfig(start="all")
