"""PaS: searches that end on the budget, survive a kill, never collapse, and lack the known bugs of their kind."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models.repvgg import repvgg_small
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.grid import WidthGrid
from hwsearch.search.pas import PaS, PasConfig, Steered, mask_step
from hwsearch.search.pas_cost import BudgetTerm
from hwsearch.search.pas_masks import MaskedNet
from hwsearch.search.result import SearchResult
from hwsearch.search.stairs import stair_edges
from hwsearch.search.winner import train_choice
from hwsearch.train.data import Batch, synthetic_images
from hwsearch.train.loop import OwnRate, TrainConfig, evaluate, run_steps, train
from hwsearch.train.task import Classification

sys.path.insert(0, str(Path(__file__).parent))

from mortal import Killed, Mortal

torch.set_num_threads(1)

STEADY = TrainConfig(
    epochs=4, batch_size=16, learning_rate=0.05, final_rate=0.05, warmup=0.0, seed=2, checkpoint_s=0
)  # fmt: skip
QUICK = PasConfig(
    training=STEADY, winner=replace(STEADY, steps=8, final_rate=0.0), score_images=None, calibration_images=32
)  # fmt: skip


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12, eps=0.01, momentum=0.3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.125), nn.Linear(16, 4),
    )  # fmt: skip


def small_task() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, WidthSpace]:
    """A trained network and all its widths."""
    model = small_model()
    train(model, small_task(), replace(STEADY, learning_rate=0.1, final_rate=0.0, steps=40))
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))


def budget_of(toy: Any, space: WidthSpace, share: float = 0.5, measured: bool = False, block: int = 1) -> Budget:
    latency = toy.Staircase(block=block, fixed_ms=0.02)
    full = float(latency.evaluate(np.array([space.full().widths]))[0])
    measure = (lambda choice: 1.04 * float(latency.evaluate(np.array([choice.widths]))[0])) if measured else None
    return Budget([Limit(latency, full * share, 0.5, measure=measure)])


# ---- the whole search ----


@pytest.mark.parametrize("share", [0.6, 0.4, 0.28])
def test_a_search_ends_on_the_budget_and_on_stair_edges(case: Any, toy: Any, tmp_path: Path, share: float) -> None:
    model, space = case
    task, budget = small_task(), budget_of(toy, space, share, block=2)
    phases: list[str] = []
    search = PaS(space, budget, QUICK, model=model, seed=1, folder=tmp_path / "run")
    result = search.search(task, None, progress=lambda *call: phases.append(call[2].split(":")[0]))
    edges = stair_edges(space, budget).space
    edges.validate(result.choice)
    assert 0.98 <= result.predicted_ms / result.budget_ms <= 1.0
    assert result.model is not None
    assert result.model(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.parameters
    assert result.metric == pytest.approx(evaluate(result.model, task, task.valid, STEADY).metric)
    assert result.metric > 0.5
    assert list(dict.fromkeys(phases)) == ["masks", "winner"]
    way = result.extra["trajectory"]
    assert way[0]["widths"] == list(space.full().widths)
    assert [point["step"] for point in way] == list(range(1, 25))
    assert way[-1]["use"] < 1.5 * way[0]["use"] * share
    assert [len(units) for units in result.extra["kept_units"].values()] == list(result.choice.widths)
    assert SearchResult.load(tmp_path / "run" / "result.json").to_json() == result.to_json()


def test_what_is_measured_decides(case: Any, toy: Any) -> None:
    model, space = case
    budget = budget_of(toy, space, measured=True)
    result = PaS(space, budget, QUICK, model=model).search(small_task(), None)
    assert result.measured_ms is not None
    assert 0.95 * result.budget_ms <= result.measured_ms <= result.budget_ms
    assert result.extra["within_band"]


def test_several_limits_are_all_kept_and_the_one_that_binds_is_filled(case: Any, toy: Any) -> None:
    model, space = case
    binding, loose = (budget_of(toy, space, share).limits[0] for share in (0.4, 0.9))
    budget = Budget([loose, replace(binding, name="other"), Limit(MegaMacs(space), 1e6, 0.5, "MMACs")])
    result = PaS(space, budget, QUICK, model=model).search(small_task(), None)
    uses = [limit.predicted_ms / limit.max_ms for limit in result.limits]
    assert 0.98 <= uses[1] <= 1.0
    assert uses[0] < 0.6
    assert uses[2] < 0.1


def test_a_budget_that_the_full_network_keeps_leaves_it_whole(case: Any, toy: Any) -> None:
    model, space = case
    result = PaS(space, budget_of(toy, space, 1.2), QUICK, model=model).search(small_task(), None)
    assert result.choice == space.full()


@pytest.mark.parametrize("cost", ["macs", "parameters"])
def test_what_the_loss_counts_is_a_choice_and_the_budget_is_kept_all_the_same(case: Any, toy: Any, cost: str) -> None:
    model, space = case
    budget = budget_of(toy, space, 0.4)
    found = {
        config.cost: PaS(space, budget, config, model=model).search(small_task(), None)
        for config in (replace(QUICK, winner=None), replace(QUICK, winner=None, cost=cost))
    }
    assert 0.98 <= found[cost].predicted_ms / found[cost].budget_ms <= 1.0
    ways = [result.extra["trajectory"][-1]["widths"] for result in found.values()]
    assert ways[0] != ways[1]


def test_the_published_settings_search_as_well(case: Any, toy: Any) -> None:
    model, space = case
    config = PasConfig.published(training=replace(STEADY, nesterov=False), winner=None, calibration_images=32)
    result = PaS(space, budget_of(toy, space), config, model=model).search(small_task(), None)
    assert 0.98 <= result.predicted_ms / result.budget_ms <= 1.0
    assert result.extra["trajectory"][-1]["use"] < 1.5


def test_a_network_that_is_not_trained_is_warmed_up(toy: Any, tmp_path: Path) -> None:
    model = small_model()
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8), quantum=2)
    before = [parameter.clone() for parameter in model.parameters()]
    config = replace(QUICK, warmup=replace(STEADY, steps=30, learning_rate=0.1, final_rate=0.0))
    result = PaS(space, budget_of(toy, space), config, model=model, folder=tmp_path / "run").search(small_task(), None)
    assert result.metric is not None
    assert result.metric > 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "run/state/warmup/checkpoint.safetensors").is_file()


@pytest.mark.parametrize("start", ["scratch", "model"])
def test_the_winner_starts_from_what_was_asked(case: Any, toy: Any, start: str) -> None:
    model, space = case
    task = small_task()
    found = {
        config.start: PaS(space, budget_of(toy, space), config, model=model).search(task, None)
        for config in (QUICK, replace(QUICK, start=start))
    }
    assert found["masked"].choice == found[start].choice
    assert found["masked"].extra["winner_loss"] != found[start].extra["winner_loss"]


def test_branches_learn_to_the_end_and_are_folded_before_slicing(toy: Any) -> None:
    torch.manual_seed(0)
    model, example = repvgg_small(classes=4, widths=(6, 8, 10, 12)).eval(), torch.zeros(1, 1, 8, 8)
    space = WidthSpace.from_model(fold(model), example)
    budget, task = budget_of(toy, space, 0.4), small_task()
    config = replace(QUICK, warmup=replace(STEADY, steps=20, final_rate=0.0))
    result = PaS(space, budget, config, model=model).search(task, None)
    assert 0.98 <= result.predicted_ms / result.budget_ms <= 1.0
    assert result.model is not None
    assert {type(module).__name__ for module in result.model.modules()} == {
        "RepVGG", "Sequential", "Conv2d", "ReLU", "Linear",
    }  # fmt: skip
    widths = dict(zip(result.groups, result.choice.widths, strict=True))
    assert len({width for name, width in widths.items() if name.startswith("stages.1")}) > 1, "identities tie nothing"
    assert result.model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.parameters
    with pytest.raises(InputError, match="start = 'masked'"):
        PaS(space, budget, replace(config, start="scratch"), model=model).search(task, None)


@pytest.mark.parametrize("scratch", [True, False])
def test_a_network_of_branches_is_trained_at_widths_that_its_identities_would_tie(
    scratch: bool, tmp_path: Path
) -> None:
    """What searches are compared with: uniform scaling, or any widths, of the folded form."""
    torch.manual_seed(0)
    model, task = repvgg_small(classes=4, widths=(6, 8, 8, 12)).eval(), small_task()
    space = WidthSpace.from_model(fold(model), torch.zeros(1, 1, 8, 8))
    choice = WidthChoice(tuple(group.units // 2 + at % 2 for at, group in enumerate(space.groups)))
    before = [parameter.clone() for parameter in model.parameters()]
    config = replace(STEADY, steps=20, final_rate=0.0)
    small, found = train_choice(model, space, choice, task, config, scratch=scratch, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert sum(parameter.numel() for parameter in small.parameters()) == space.parameters(choice)
    assert not any(isinstance(module, (ODBB, nn.BatchNorm2d)) for module in small.modules())
    assert found == evaluate(small, task, task.valid, config)
    assert found.metric > 0.5
    again, _ = train_choice(model, space, choice, task, config, scratch=scratch, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    tied = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))
    plain, _ = train_choice(model, tied, tied.smallest(), task, replace(config, steps=1))
    assert any(isinstance(module, ODBB) for module in plain.modules()), "in a space of its own it keeps its branches"


# ---- collapse ----


@pytest.mark.parametrize(("seeds", "median"), [(3, 0.5), pytest.param(20, 0.9, marks=pytest.mark.long)])
def test_no_group_collapses_at_a_fifth_of_the_time(case: Any, toy: Any, seeds: int, median: float) -> None:
    """The published code can switch a whole layer off, and then the gradient of its cost is gone."""
    model, _ = case
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8), minimum=2)
    task, budget = small_task(), budget_of(toy, space, 0.2)
    config = replace(QUICK, training=replace(STEADY, epochs=8), winner=None, candidates=2)
    metrics = []
    for seed in range(seeds):
        result = PaS(space, budget, config, model=model, seed=seed).search(task, None)
        assert 0.97 <= result.predicted_ms / result.budget_ms <= 1.0
        way = np.array([point["widths"] for point in result.extra["trajectory"]])
        assert way.min() >= 2
        assert result.metric is not None
        metrics.append(result.metric)
    # four classes: a dead layer leaves a quarter right
    assert min(metrics) > 0.5, metrics
    assert float(np.median(metrics)) > median, metrics


def test_a_hard_push_stops_at_the_smallest_width_and_the_gradient_lives(case: Any, toy: Any) -> None:
    model, _ = case
    space = WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8), minimum=3)
    budget = budget_of(toy, space, 0.3)
    net = MaskedNet(model, space)
    steered = Steered(net, BudgetTerm.of(space, budget, pressure=1e4), 6)
    own = {f"net.{name}": OwnRate(20.0, 0.9) for name in net.latent_names()}
    task = small_task()
    run_steps(steered, task.train, replace(STEADY, steps=6, learning_rate=0.01, final_rate=0.01),
              mask_step(steered, task, budget), identity={}, own=own)  # fmt: skip
    assert steered.path[:, 1:-2].min() == 3
    assert all(latent.grad is not None and latent.grad.abs().sum() > 0 for latent in net.latents)


# ---- resuming ----


# 6 steps of warm-up, 24 of search, 8 of fine-tuning
@pytest.mark.parametrize(
    ("last", "checkpoint_s"), [(0, 0), (4, 1000), (17, 0), (17, 1000), (29, 0), (34, 0)]
)  # fmt: skip
def test_a_killed_search_continues_to_the_same_bytes(
    case: Any, toy: Any, tmp_path: Path, last: int, checkpoint_s: float
) -> None:
    model, space = case
    task, budget = small_task(), budget_of(toy, space, measured=True)
    training = replace(STEADY, checkpoint_s=checkpoint_s)
    config = replace(QUICK, training=training, warmup=replace(training, steps=6), candidates=3)

    def search(folder: Path, task: Classification) -> tuple[bytes, str]:
        result = PaS(space, budget, config, model=model, seed=1, folder=folder).search(task, None)
        assert result.model is not None
        digest = str([tensor.double().sum().item() for tensor in result.model.state_dict().values()])
        return (folder / "result.json").read_bytes(), digest

    with pytest.raises(Killed):
        search(tmp_path / "broken", Mortal(task.train, task.valid, last=last))
    assert search(tmp_path / "broken", task) == search(tmp_path / "whole", task)


def test_seed_and_settings_decide_the_result(case: Any, toy: Any) -> None:
    model, space = case
    budget, task = budget_of(toy, space), small_task()

    def found(seed: int = 0, **changes: Any) -> str:
        config = replace(QUICK, winner=None, candidates=2, **changes)
        return json.dumps(PaS(space, budget, config, model=model, seed=seed).search(task, None).extra["trajectory"])

    assert found(1) == found(1)
    different = [found(1), found(2), found(1, mask_rate=2.0), found(1, jitter=0.0), found(1, crossing=0.5)]
    assert len(set(different)) == len(different)


# ---- the known bugs of differentiable searches (a fourth and a fifth: test_pas_masks, test_pas_cost) ----


def test_masks_learn_on_the_next_batch_in_every_step(case: Any, toy: Any) -> None:
    """Bug: ``next(iter(loader))`` in the loop gives the architecture the same batch again and again."""
    model, space = case
    seen: list[bytes] = []

    @dataclass(frozen=True)
    class Watching(Classification):
        def loss(self, output: Tensor, batch: Batch) -> Tensor:
            if output.requires_grad:
                seen.append(batch[0].numpy().tobytes())
            return super().loss(output, batch)

    task = small_task()
    watching = Watching(task.train, task.valid)
    result = PaS(space, budget_of(toy, space), replace(QUICK, winner=None), model=model).search(watching, None)
    assert len(seen) == len(result.extra["trajectory"]) == 24
    assert len(set(seen[:6])) == 6, "an epoch has each of its batches once"
    assert len(set(seen)) == 24, "and every epoch is shuffled anew"


def test_the_best_is_returned_not_the_last(case: Any, toy: Any) -> None:
    """Bug: the genotype of the last step is returned though an earlier one was better."""
    model, space = case
    task, budget = small_task(), budget_of(toy, space, 0.4)
    result = PaS(space, budget, replace(QUICK, winner=None), model=model).search(task, None)
    losses = [candidate.loss for candidate in result.candidates]
    assert len(losses) > 2
    assert result.loss == losses[0] == min(losses) < max(losses)
    assert result.choice == result.candidates[0].choice
    best = result.candidates[0].choice
    last = WidthGrid.of(space)
    snapped = last.take(last.at_least(np.array([result.extra["trajectory"][-1]["widths"]])))
    assert best.widths != tuple(snapped[0].tolist())
    assert result.extra["winner_loss"] == pytest.approx(result.loss)


def test_the_found_network_keeps_the_searched_ones_settings(case: Any, toy: Any) -> None:
    """Bug: dropout, normalisation and their like fall back to defaults in the final network."""
    model, space = case
    result = PaS(space, budget_of(toy, space), QUICK, model=model).search(small_task(), None)
    assert result.model is not None
    before, after = list(model.modules())[1:], list(result.model.modules())[1:]
    assert [type(module) for module in before] == [type(module) for module in after]
    for old, new in zip(before, after, strict=True):
        for name in ("eps", "momentum", "p", "padding", "stride", "kernel_size", "affine", "track_running_stats"):
            assert getattr(old, name, None) == getattr(new, name, None)


def test_latents_learn_at_a_rate_of_their_own_without_decay(case: Any, toy: Any) -> None:
    model, space = case
    net = MaskedNet(model, space)
    task = small_task()

    def flat(_: int, batch: Batch) -> Tensor:
        loss = task.loss(net(batch[0]), batch) * 0 + sum(0.01 * mask.sum() for mask in net.masks())
        loss.backward()
        return loss.detach()

    config = replace(STEADY, steps=1, learning_rate=0.5, final_rate=0.5, momentum=0.0, nesterov=False, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in net.model.parameters()]
    run_steps(net, task.train, config, flat, identity={}, own=dict.fromkeys(net.latent_names(), OwnRate(3.0)))
    assert all(torch.allclose(latent, torch.tensor(1 - 3 * 0.5 * 0.01)) for latent in net.latents)
    moved = [
        float((a.detach() / b).median()) for a, b in zip(net.model.parameters(), before, strict=True) if a.dim() > 1
    ]
    assert moved == pytest.approx([1 - 0.5 * 0.1] * len(moved))


@pytest.mark.slow
def test_a_budget_on_the_simulated_device_is_kept(rough: Any) -> None:
    model, space, budget = rough
    result = PaS(space, budget, replace(QUICK, measured=1), model=model).search(small_task(), None)
    assert result.measured_ms is not None
    assert result.measured_ms <= budget.limits[0].max_ms
    assert result.limits[0].predicted_ms < result.measured_ms


def test_what_cannot_be_searched_is_refused_before_any_training(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    with pytest.raises(InfeasibleBudgetError):
        PaS(space, budget_of(toy, space, 0.001), QUICK, model=model, folder=tmp_path / "a").search(small_task(), None)
    assert not (tmp_path / "a").exists()
    for wrong, words in (
        ({"cost": "joules"}, "ms, macs, parameters"), ({"start": "trial"}, "masked, scratch, model"),
        ({"jitter": 0.5}, "jitter is 0.5"), ({"mask_rate": 0.0}, "mask_rate is 0"), ({"floor": 1.0}, "floor is 1"),
        ({"aim": 0.9}, "floor is 0.98 and aim 0.9"), ({"crossing": 2.0}, "crossing is 2"),
        ({"candidates": 0}, "1 or more"),
        ({"score_images": 1}, "score_images is 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            PasConfig(**wrong)  # type: ignore[arg-type]
    folder = tmp_path / "run"
    PaS(space, budget_of(toy, space), replace(QUICK, winner=None), model=model, folder=folder).search(
        small_task(), None
    )
    with pytest.raises(InputError, match="winner"):
        PaS(space, budget_of(toy, space), QUICK, model=model, folder=folder).search(small_task(), None)
