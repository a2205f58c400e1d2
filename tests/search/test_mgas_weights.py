"""Masks on single weights: the surrogate, 2:4 blocks, size budgets that are real, and searches that survive a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hwsearch.errors import AnswerIsNo, InputError
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.onnx_packed import pack
from hwsearch.reparam.fold import fold
from hwsearch.search.mgas_config import Phase
from hwsearch.search.mgas_weight_search import SizeCount, Weights, WeightSearch, size_of, thin_weights
from hwsearch.search.mgas_weights import BlockGate, WeightGate, WeightNet, is_two_of_four, two_of_four
from hwsearch.search.mgas_weights_config import WeightConfig
from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.task import Classification

torch.set_num_threads(1)
STEADY = TrainConfig(batch_size=16, learning_rate=0.02, warmup=0.0, seed=2, checkpoint_s=0)
QUICK = WeightConfig(
    max_parameters=1500, training=STEADY, epochs=3, tuning_epochs=1, prune_every=0.5, rate=200.0, threshold_rate=0.002
)  # fmt: skip
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    """Norms, a depth-wise layer, and layers whose inputs are and are not a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 18, 1),
        )  # fmt: skip
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def task_() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    train(net, task_(), replace(STEADY, learning_rate=0.1, steps=40))
    return net


def real(model: nn.Module) -> tuple[int, int, list[np.ndarray]]:
    """What the deployed file holds: (numbers that are not zero, bytes packed, its tensors)."""
    file = export_onnx(fold(model, EXAMPLE), EXAMPLE)
    tensors = [numpy_helper.to_array(t) for t in onnx.load_from_string(file).graph.initializer]
    floats = [t for t in tensors if t.dtype == np.float32]
    return sum(int(np.count_nonzero(t)) for t in floats), len(pack(file)), floats


# ---- gates ----


def test_the_surrogate_of_a_weight_is_that_of_its_distance_to_the_threshold() -> None:
    weight = torch.tensor([[0.3, -0.5, 0.7], [-0.71, 1.3, -1.31]], requires_grad=True)
    gate = WeightGate(weight)
    with torch.no_grad():
        gate.threshold.fill_(0.3)
    mask = gate.mask(weight)
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    mask.sum().backward()
    slopes = [2.0, 1.2, 0.4, 0.4, 0.4, 0.0]  # at 0, 0.2, 0.4, 0.41, 1, 1.01
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([s * (-1) ** (i in (1, 3, 5)) for i, s in enumerate(slopes)])
    assert float(gate.threshold.grad) == pytest.approx(-sum(slopes))


def test_a_layer_keeps_its_smallest_share_under_any_threshold() -> None:
    weight = torch.randn(6, 5)
    gate = WeightGate(weight, least=4)
    with torch.no_grad():
        gate.threshold.fill_(9.0)
    mask = gate.mask(weight)
    assert int(mask.sum()) == 4
    assert float(weight.abs()[mask > 0].min()) > float(weight.abs()[mask == 0].max())
    with pytest.raises(InputError, match="cannot keep 40"):
        WeightGate(weight, least=40)


def test_of_four_consecutive_inputs_the_two_largest_stay() -> None:
    weight = torch.zeros(1, 8, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, -6.0])
    mask = two_of_four(weight.abs())
    assert mask[0, :, 0, 0].tolist() == [False, True, True, False, True, False, False, True]
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False] * 2, "equal sizes in order"
    assert is_two_of_four(weight * mask)
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(2, 6))
    grown = (0.1 * torch.randn(3, 8, 3, 3)).requires_grad_()
    found = BlockGate(grown).mask(grown)
    assert torch.equal(found.bool(), two_of_four(grown.detach().abs()))
    found.sum().backward()
    assert grown.grad is not None
    assert float(grown.grad.abs().min()) > 0, "what is off still hears"


def test_a_masked_network_computes_what_the_baked_one_does(model: nn.Module) -> None:
    x = torch.randn(3, 1, 8, 8)
    for pattern in ("free", "2:4"):
        net = WeightNet(model, pattern).eval()
        with torch.no_grad():
            if pattern == "free":
                assert torch.equal(net(x), model.eval()(x)), "a threshold of 0 leaves everything on"
                for gate in net.gates:
                    gate.threshold.fill_(0.1)  # type: ignore[operator,union-attr]
            thin = net.baked()
            assert torch.allclose(thin(x), net(x), atol=1e-6)
            assert not torch.allclose(thin(x), model(x), atol=1e-3)
        assert not any(isinstance(module, WeightGate | BlockGate) for module in thin.modules())
    assert WeightNet(model).names == ("body.0.weight", "body.4.weight", "body.7.weight", "body.9.weight", "head.weight")
    assert WeightNet(model, "2:4").names == ("body.4.weight", "body.9.weight")


# ---- whole searches ----


@pytest.mark.parametrize("limit", [{"max_parameters": 1500}, {"max_parameters": None, "max_bytes": 8_500}])
def test_the_size_budget_is_kept_exactly_and_the_counted_size_is_the_real_one(
    model: nn.Module, limit: dict[str, Any]
) -> None:
    config, events = replace(QUICK, **limit), []
    found = thin_weights(model, task_(), config, EXAMPLE, tell=lambda name, **values: events.append((name, values)))
    parameters, size, tensors = real(found.model)
    assert found.size.parameters == parameters
    if config.max_parameters is not None:
        assert parameters == config.max_parameters
    else:
        assert found.size.bytes == size
        assert 8_500 - 8 <= size <= 8_500
        assert size_of(found.model, EXAMPLE) == found.size
    assert any((tensor == 0).mean() > 0.3 for tensor in tensors if tensor.ndim > 1), "zeros are in the ONNX file"
    assert all(0.05 <= share <= 1.0 for share in found.kept.values())
    counts = [values["parameters"] for _, values in events]
    assert counts == sorted(counts, reverse=True), "what was committed as off stays off"
    assert found.before.parameters == 108 + 1728 + 12 + 16 + 144 + 16 + 288 + 18 + 72 + 4
    assert evaluate(found.model, task_(), task_().valid, STEADY).metric == found.evaluation.metric > 0.5
    facts = found.facts(config)
    assert (facts["parameters"], facts["pattern"]) == (parameters, "free")


def test_two_of_every_four_are_left_and_survive_tuning_folding_and_export(model: nn.Module) -> None:
    config = WeightConfig(pattern="2:4", training=STEADY, epochs=2, tuning_epochs=1)
    found = thin_weights(model, task_(), config, EXAMPLE)
    weights = dict(found.model.named_parameters())
    for name in ("body.4.weight", "body.9.weight"):
        assert is_two_of_four(weights[name])
        assert int(torch.count_nonzero(weights[name])) == weights[name].numel() // 2
    assert found.kept == {"body.4.weight": 0.5, "body.9.weight": 0.5}
    _, _, tensors = real(found.model)
    blocked = [tensor for tensor in tensors if tensor.shape in ((16, 12, 3, 3), (18, 16, 1, 1))]
    assert len(blocked) == 2
    assert all(is_two_of_four(torch.from_numpy(tensor.copy())) for tensor in blocked)
    assert found.evaluation.metric > 0.5


def test_a_killed_search_ends_the_same_as_an_unbroken_one(model: nn.Module, tmp_path: Path) -> None:
    def search(folder: Path, kill: bool = False) -> dict[str, Tensor]:
        def progress(done: int, total: int, text: str) -> None:
            if kill:
                raise KeyboardInterrupt

        config = replace(QUICK, epochs=2)
        found = thin_weights(model, task_(), config, EXAMPLE, folder=folder, progress=progress)
        return {**found.model.state_dict(), "kept": torch.tensor(list(found.kept.values()))}

    whole = search(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", kill=True)
    for again in (search(tmp_path / "killed"), search(tmp_path / "another")):
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_network_that_keeps_the_size_already_is_left_whole(model: nn.Module) -> None:
    found = thin_weights(model, task_(), replace(QUICK, max_parameters=10_000, epochs=1), EXAMPLE)
    assert found.size == found.before
    assert set(found.kept.values()) == {1.0}


# ---- commits and refusals ----


def test_a_commit_takes_what_is_furthest_below_its_threshold_and_no_more_than_asked(model: nn.Module) -> None:
    net = WeightNet(model, least=0.1)
    count = SizeCount.of(net, EXAMPLE, in_bytes=False)
    config = replace(QUICK, max_parameters=count.at(count.numbers).parameters)
    search = WeightSearch(
        Weights(net), task_(), count, config, Phase(0, 0, 4, 0, (4,), final=True), tell=lambda *_, **__: None
    )
    for gate in net.gates:
        gate.average.fill_(0.2)  # type: ignore[operator,union-attr]
    net.gate(1).average[0, 0, 1] = torch.tensor([-0.1, -0.3, -0.2])
    full = config.max_parameters
    assert full is not None
    assert search.commit((full - 2) / full) == 2
    assert torch.nonzero(~net.gate(1).alive).tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]
    assert search.commit(0.1) == 1, "nothing above its threshold falls before the end"
    assert search.commit(0.1, cut=True) > 1000
    assert all(on >= 0.1 * n for on, n in zip(search.alive(), count.numbers, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_parameters": None}, "single weights cannot be searched for milliseconds: dense kernels take the same"),
        ({"pattern": "2:4"}, "leaves exactly two of four, whatever the size"),
        ({"pattern": "1:4"}, "pattern is '1:4'; give one of free, 2:4"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"least": 0.0}, "least is 0.0"),
        ({"threshold_rate": 0.0}, "threshold_rate is 0.0"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        replace(QUICK, **changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_size_that_no_masks_keep_is_refused_before_anything_is_trained(model: nn.Module) -> None:
    config = replace(QUICK, max_parameters=150)
    with pytest.raises(AnswerIsNo, match=r"no masks on the weights of this network keep 150 parameters: with 5 % of"):
        thin_weights(model, task_(), config, EXAMPLE)
    narrow = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(InputError, match="no layer of Sequential can have a 2:4 mask"):
        WeightNet(narrow, "2:4")
