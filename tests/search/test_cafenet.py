"""CafeNet: the whole search, what it starts from, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.cafenet import CafeNet, CafeNetConfig, train_supernet
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.result import SearchResult
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train.data import TensorExamples, synthetic_images
from hwsearch.train.loop import evaluate
from hwsearch.train.task import Regression

sys.path.insert(0, str(Path(__file__).parent))

from small_cafenet import CONFIG, TRAINING, small_model, small_space, small_task

torch.set_num_threads(1)  # several threads wait for each other where anything else runs

# ---- the whole search ----

SEARCH = replace(
    CONFIG,
    evolution=EvolutionSettings(population=6, generations=3),
    winner=replace(TRAINING, steps=8),
)


def small_budget(
    toy: Any, share: float = 0.5, measured: bool = False, model: nn.Module | None = None
) -> tuple[Any, Budget]:
    space = small_space(model or small_model(), quantum=1)
    latency = toy.Staircase(block=4)
    full = float(latency.evaluate(np.array([space.full().widths]))[0])
    measure = (lambda choice: 1.04 * float(latency.evaluate(np.array([choice.widths]))[0])) if measured else None
    return space, Budget([Limit(latency, full * share, 0.5, measure=measure)])


@pytest.mark.parametrize("measured", [False, True])
def test_a_search_finds_a_network_inside_the_budget(toy: Any, tmp_path: Path, measured: bool) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy, measured=measured)
    phases: list[str] = []
    search = CafeNet(space, budget, SEARCH, model=model, seed=1, folder=tmp_path / "run")
    result = search.search(task.train, task.valid, progress=lambda *call: phases.append(call[2].split(":")[0]))
    assert budget.feasible(np.array([result.choice.widths])).all()
    if measured:
        assert result.measured_ms is not None
        assert result.measured_ms <= result.budget_ms
    assert result.model is not None
    assert result.model(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.parameters
    assert result.macs == space.macs(result.choice)
    assert result.metric == pytest.approx(evaluate(result.model, task, task.valid, TRAINING).metric)
    assert all(budget.feasible(np.array([c.choice.widths])).all() for c in result.candidates)
    assert list(dict.fromkeys(phases))[:2] == ["super-network", "evolution"]
    stored = SearchResult.load(tmp_path / "run" / "result.json")
    assert stored.to_json() == result.to_json()


class Killed(Exception):
    """Stands for a kill: raised in the middle of a phase."""


@pytest.mark.parametrize("phase", ["super-network", "evolution", "winner"])
def test_a_killed_search_continues_to_the_same_bytes(toy: Any, tmp_path: Path, phase: str) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy, measured=True)

    def search(folder: Path, progress: Any = None) -> bytes:
        CafeNet(space, budget, SEARCH, model=model, seed=1, folder=folder).search(task, None, progress=progress)
        return (folder / "result.json").read_bytes()

    def kill(done: int, total: int, text: str) -> None:
        if text.startswith(phase):
            raise Killed

    with pytest.raises(Killed):
        search(tmp_path / "broken", kill)
    assert search(tmp_path / "broken") == search(tmp_path / "whole")
    assert search(tmp_path / "whole") == search(tmp_path / "broken")


@pytest.mark.parametrize("start", ["model", "supernet", None])
def test_the_winner_starts_from_what_was_asked(toy: Any, start: str | None) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy)
    config = replace(SEARCH, winner=None) if start is None else replace(SEARCH, start=start)
    result = CafeNet(space, budget, config, model=model).search(task, None)
    assert result.model is not None
    assert result.metric is not None


def test_a_task_of_another_kind_is_searched_as_well(toy: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    space = WidthSpace.from_model(model, torch.zeros(1, 6))
    inputs = torch.randn(128, 6)
    examples = TensorExamples(inputs, inputs @ torch.randn(6, 2))
    latency = toy.Staircase(block=4)
    budget = Budget([Limit(latency, 0.6 * float(latency.evaluate(np.array([space.full().widths]))[0]), 0.5)])
    result = CafeNet(space, budget, SEARCH, model=model).search(Regression(examples, examples), None)
    assert result.extra["metric_name"] == "rmse"


def test_an_infeasible_budget_is_refused_before_any_training(toy: Any, tmp_path: Path) -> None:
    model = small_model()
    space, budget = small_budget(toy, share=0.001)
    with pytest.raises(InfeasibleBudgetError):
        CafeNet(space, budget, SEARCH, model=model, folder=tmp_path / "run").search(small_task(), None)
    assert not (tmp_path / "run").exists()


def test_what_is_neither_task_nor_examples_is_refused(toy: Any) -> None:
    model = small_model()
    space, budget = small_budget(toy)
    with pytest.raises(InputError, match="not list and NoneType"):
        CafeNet(space, budget, SEARCH, model=model).search([1, 2], None)
    with pytest.raises(InputError, match="brings its own"):
        CafeNet(space, budget, SEARCH, model=model).search(small_task(), synthetic_images(8))


@pytest.mark.parametrize(
    "settings",
    [{"offset": -1}, {"patterns": 0}, {"bin_units": 0}, {"distillation": 1.5}, {"start": "nothing"}, {"rounds": 0}],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        CafeNetConfig(**settings)
    with pytest.raises(InputError, match="images is 1"):
        ScoringConfig(images=1)


# ---- sharing from both sides, levels, starts, the floor ----


def test_a_search_from_coarse_to_fine_scores_no_more_and_ends_on_fine_widths(toy: Any, tmp_path: Path) -> None:
    model = small_model()
    space, budget = small_budget(toy, share=0.7)
    config = replace(SEARCH, refinements=1, bins="none", winner=None, finalists=0)
    result = CafeNet(space, budget, config, model=model, folder=tmp_path).search(small_task(), None)
    assert (tmp_path / "state" / "losses-0.jsonl").exists()
    assert (tmp_path / "state" / "losses.jsonl").exists()
    assert len(result.candidates) <= 18
    assert any(width % 2 for c in result.candidates for width in c.choice.widths)


def test_all_starts_are_trained_side_by_side_and_the_best_is_kept(toy: Any) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy)
    result = CafeNet(space, budget, replace(SEARCH, start="all"), model=model).search(task, None)
    starts = result.extra["starts"]
    assert list(starts) == ["scratch", "model", "supernet"]
    assert result.metric == max(starts.values())


def test_the_fewest_milliseconds_above_a_floor(toy: Any, tmp_path: Path) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy, share=1.0, measured=True)
    budget = Budget([replace(budget.limits[0], max_ms=2 * budget.limits[0].max_ms)])
    easy = replace(SEARCH, floor=0.0)
    result = CafeNet(space, budget, easy, model=model, folder=tmp_path).search(task, None)
    assert result.metric is not None
    assert result.measured_ms == pytest.approx(1.04 * result.predicted_ms)
    # A floor of nothing is kept by the fastest of the front: no candidate is faster.
    assert result.predicted_ms == min(candidate.predicted_ms for candidate in result.candidates)
    with pytest.raises(AnswerIsNo, match="no network keeps the floor of 1"):
        CafeNet(space, budget, replace(SEARCH, floor=1.01), model=model).search(task, None)
    with pytest.raises(InputError, match="floor judges trained networks"):
        replace(SEARCH, floor=0.5, winner=None)


def test_one_super_network_serves_several_budgets(toy: Any) -> None:
    model, task = small_model(), small_task()
    space, budget = small_budget(toy)
    config = replace(SEARCH, bins="none", finalists=0)
    net = train_supernet(space, model, task, config)
    shared = CafeNet(space, budget, config, model=model, supernet=net).search(task, None)
    assert shared.choice == CafeNet(space, budget, config, model=model).search(task, None).choice
    with pytest.raises(InputError, match="another space"):
        CafeNet(space, budget, replace(config, bins="ms"), model=model, supernet=net).search(task, None)


def test_the_reduction_is_told_before_anything_is_trained(toy: Any) -> None:
    said: list[str] = []
    phases: list[str] = []
    space, budget = small_budget(toy)
    CafeNet(space, budget, SEARCH, model=small_model(), say=lambda line: said.append(f"{len(phases)}{line}")).search(
        small_task(), None, progress=lambda *call: phases.append(call[2])
    )
    assert said[0].startswith("0  widths by ms: 10^")
