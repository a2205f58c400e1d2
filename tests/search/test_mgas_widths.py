"""MGAS on an ordinary network: searches that end inside the budget, the same after a kill, and what a filter costs."""

from __future__ import annotations

import json
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
from hwsearch.search.grid import WidthGrid
from hwsearch.search.mgas_config import Phase
from hwsearch.search.mgas_filter_search import Filters, FilterSearch, FilterWorth, filter_worth
from hwsearch.search.mgas_filters import FilterNet
from hwsearch.search.mgas_weight_search import size_of
from hwsearch.search.mgas_weights_config import WeightConfig
from hwsearch.search.mgas_widths import FilterConfig, MgasWidths
from hwsearch.search.result import SearchResult
from hwsearch.search.stairs import stair_edges
from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.task import Classification

torch.set_num_threads(1)
STEADY = TrainConfig(
    batch_size=16, learning_rate=0.05, final_rate=0.05, warmup=0.0, nesterov=False, seed=2, checkpoint_s=0
)  # fmt: skip
QUICK = FilterConfig(
    training=STEADY, warmup_epochs=0.5, epochs=4, prune_every=0.5, rate=60.0, score_images=None, calibration_images=32,
    winner=replace(STEADY, steps=8, final_rate=0.0),
)  # fmt: skip


def task_() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, WidthSpace]:
    """A trained network and all its widths."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    train(model, task_(), replace(STEADY, learning_rate=0.1, final_rate=0.0, steps=40))
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8))


def budget_of(toy: Any, space: WidthSpace, share: float, off: float | None = None, block: int = 1) -> Budget:
    latency = toy.Staircase(block=block, fixed_ms=0.02)
    full = float(latency.evaluate(np.array([space.full().widths]))[0])
    measure = None if off is None else lambda choice: off * float(latency.evaluate(np.array([choice.widths]))[0])
    return Budget([Limit(latency, full * share, 0.5, measure=measure)])


# ---- the whole search ----


@pytest.mark.parametrize(("share", "start"), [(0.6, "masked"), (0.3, "scratch")])
def test_a_search_ends_on_the_budget_and_on_stair_edges(
    case: Any, toy: Any, tmp_path: Path, share: float, start: str
) -> None:
    model, space = case
    task, budget, titles = task_(), budget_of(toy, space, share, block=2), []
    search = MgasWidths(space, budget, replace(QUICK, start=start), model=model, folder=tmp_path / "run")
    result = search.search(task, None, progress=lambda *call: titles.append(call[2].split(":")[0]))
    stair_edges(space, budget).space.validate(result.choice)
    assert 0.97 <= result.predicted_ms / result.budget_ms <= 1.0
    assert result.model is not None
    assert result.model(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.parameters
    assert result.metric is not None
    assert result.metric == pytest.approx(evaluate(result.model, task, task.valid, STEADY).metric)
    assert start == "scratch" or result.metric > 0.5, "what was learnt is kept"
    assert list(dict.fromkeys(titles)) == ["filters", "winner"]
    way = result.extra["trajectory"]
    assert way[0]["widths"] == list(space.full().widths)
    assert way[-1]["use"] <= 1.0 < way[0]["use"]
    counts = np.asarray([point["widths"] for point in way])
    assert (np.diff(counts, axis=0) <= 0).all(), "what was committed as off stays off"
    assert [len(units) for units in result.extra["kept_units"].values()] == list(result.choice.widths)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    fallen = [e["filters"] for e in events if e["event"] == "committed"]
    assert sum(fallen) > 0, "thresholds took filters with them before the end"


def test_what_is_measured_decides(case: Any, toy: Any) -> None:
    model, space = case
    result = MgasWidths(space, budget_of(toy, space, 0.5, off=1.06), QUICK, model=model).search(task_(), None)
    assert result.measured_ms is not None
    assert 0.94 * result.budget_ms <= result.measured_ms <= result.budget_ms


def test_all_of_several_limits_are_kept(case: Any, toy: Any) -> None:
    model, space = case
    binding, loose = (budget_of(toy, space, share).limits[0] for share in (0.4, 0.9))
    result = MgasWidths(space, Budget([loose, replace(binding, name="other")]), QUICK, model=model).search(
        task_(), None
    )
    uses = [limit.predicted_ms / limit.max_ms for limit in result.limits]
    assert 0.97 <= uses[1] <= 1.0
    assert uses[0] < 0.6


def test_a_killed_search_ends_the_same_as_an_unbroken_one_of_its_seed(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    budget = budget_of(toy, space, 0.45, off=1.02)

    def search(name: str, kill: tuple[str, int] | None = None) -> str:

        def progress(done: int, total: int, text: str) -> None:
            if kill is not None and text.startswith(kill[0]) and done >= kill[1]:
                raise KeyboardInterrupt

        found = MgasWidths(space, budget, QUICK, model=model, seed=3, folder=tmp_path / name)
        return found.search(task_(), None, progress=progress).to_json()

    whole = search("whole")
    for kill in (("filters", 1), ("measuring", 0), ("winner", 1)):
        with pytest.raises(KeyboardInterrupt):
            search("killed", kill=kill)
    assert search("killed") == whole
    assert MgasWidths(space, budget, QUICK, model=model, seed=3).search(task_(), None).to_json() == whole


def test_a_budget_out_of_reach_is_refused_before_anything_is_trained(case: Any, toy: Any) -> None:
    model, space = case
    budget = Budget([replace(budget_of(toy, space, 0.5).limits[0], max_ms=0.001)])
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable"):
        MgasWidths(space, budget, QUICK, model=model).search(task_(), None)


def test_a_budget_that_the_full_network_keeps_leaves_it_whole(case: Any, toy: Any) -> None:
    model, space = case
    result = MgasWidths(space, budget_of(toy, space, 1.2), QUICK, model=model).search(task_(), None)
    assert result.choice == space.full()


def test_settings_that_do_not_go_together_are_refused() -> None:
    for name, value in (("start", "x"), ("aim", 0.0), ("gate_momentum", 1.0), ("rate", -1.0), ("candidates", 0)):
        with pytest.raises(InputError, match=name):
            replace(QUICK, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="winner is None, but start is 'scratch'"):
        replace(QUICK, winner=None)


def test_a_size_budget_is_kept_beside_the_milliseconds(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    weights = WeightConfig(max_parameters=900, training=STEADY, epochs=2, tuning_epochs=0.5, rate=200.0)
    config, titles = replace(QUICK, start="masked", weights=weights), []
    search = MgasWidths(space, budget_of(toy, space, 0.6), config, model=model, folder=tmp_path / "run")
    result = search.search(task_(), None, progress=lambda *call: titles.append(call[2].split(":")[0]))
    assert list(dict.fromkeys(titles)) == ["filters", "winner", "weights"]
    assert 0.97 <= result.predicted_ms / result.budget_ms <= 1.0
    assert result.model is not None
    assert sum(p.numel() for p in result.model.parameters()) == result.parameters > 900
    assert size_of(result.model, torch.zeros(1, 1, 8, 8), in_bytes=False).parameters == 900
    assert result.extra["weights"]["parameters"] == 900
    assert SearchResult.load(tmp_path / "run" / "result.json").to_json() == result.to_json()
    tiny = replace(QUICK, weights=replace(weights, max_parameters=1))
    search = MgasWidths(space, budget_of(toy, space, 0.6), tiny, model=model)
    with pytest.raises(AnswerIsNo, match="no network of this width space keeps 1 parameters"):
        search.search(task_(), None)


# ---- price, commits and the controller ----


def test_a_filter_costs_its_share_of_the_next_stair_of_the_envelope(toy: Any) -> None:
    class Stairs:
        """The second group falls every eight channels, and six of them are slower than eight."""

        def evaluate(self, rows: np.ndarray) -> np.ndarray:
            rows = np.asarray(rows)
            second = np.ceil(rows[:, 1] / 8) * 0.8 + np.where(rows[:, 1] == 6, 5.0, 0.0)
            return 0.1 * rows[:, 0] + second

    space = toy.space([range(2, 17, 2), range(2, 17, 2)])
    budget = Budget([Limit(Stairs(), 1.6, 0.5)])
    grid = WidthGrid.of(space)
    found = filter_worth(budget, grid, np.asarray([16, 16]))
    assert found.use == pytest.approx(3.2 / 1.6)
    assert found.prices == pytest.approx([0.1 / 1.6, 0.0]), "two stairs below 16 are as slow as 16"
    found = filter_worth(budget, grid, np.asarray([2, 10]))
    assert found.prices == pytest.approx([0.0, 0.4 / 1.6]), "10 to 8 saves 0.8; the smallest width costs nothing"
    found = filter_worth(budget, grid, np.asarray([16, 6]))
    assert found.use == pytest.approx(2.4 / 1.6), "8 channels would be built"


def searching(case: Any, toy: Any, share: float = 0.5) -> FilterSearch:
    model, space = case
    phase = Phase(0, 0, 12, 4, (8, 12), final=True)
    filters = Filters(FilterNet(model, space), 4)
    return FilterSearch(filters, task_(), budget_of(toy, space, share), QUICK, phase, tell=lambda *_, **__: None)


def test_weights_learn_alone_first_and_the_multiplier_follows_the_target(case: Any, toy: Any) -> None:
    search = searching(case, toy)
    control, batch = search.filters.control, tuple(search.task.train.take(np.arange(16)))
    for number in range(6):
        search.step(number, batch)
        if number < 4:
            assert float(control[0]) == 0.0
            assert search.net.gate(0).score.grad is None
    assert float(control[0]) > 0
    assert search.net.gate(0).threshold.grad is not None
    assert [search.target(number) for number in (3, 5)] == pytest.approx([2.0, 2.0 * (0.99 / 2.0) ** (2 / 6.4)])
    assert search.target(11) == pytest.approx(0.99)
    with torch.no_grad():
        search.net.gate(0).threshold.fill_(0.9)
    control[0] = 0.01
    assert search.penalty()[1] < search.worth().use
    search.budget = budget_of(toy, case[1], 5.0)
    search._worth = None
    search.step(6, batch)
    assert float(control[0]) == 0.0, "never below 0"


def test_a_threshold_hears_the_mean_of_its_living_filters_whatever_the_width(case: Any, toy: Any) -> None:
    search = searching(case, toy)
    net = search.net
    net.gate(2).close([0, 1, 2, 3])
    search._worth = (net.alive(), FilterWorth(1.0, np.asarray([0.01, 0.01, 0.02])))
    search.penalty()[0].backward()  # type: ignore[no-untyped-call]
    search._even()
    found = [float(gate.threshold.grad) for _, gate in net.searched()]  # type: ignore[arg-type]
    mean = (12 + 16 + 16) / 3
    assert found == pytest.approx([-0.4 * 0.01 * mean, -0.4 * 0.01 * mean, -0.4 * 0.02 * mean])


def test_a_commit_takes_what_fell_furthest_and_no_more_than_the_target_needs(case: Any, toy: Any) -> None:
    search = searching(case, toy)
    net, known = search.net, search.worth()
    for _, gate in net.searched():
        gate.average.fill_(-0.1)
    net.gate(1).average[5] = -0.4
    assert search.commit_needed(known.use - 0.5 * float(known.prices[1])) == 1
    assert not bool(net.gate(1).alive[5])
    assert search.commit_needed(search.worth().use) == 0
    assert search.commit_needed(-9.0) > 20
    assert net.alive() == tuple(group.widths[0] for group in net.space.groups)


def test_cutting_to_a_target_takes_the_weakest_for_their_milliseconds_and_stops_at_the_smallest(
    case: Any, toy: Any
) -> None:
    search = searching(case, toy)
    net = search.net
    net.gate(2).average.fill_(0.5)
    net.gate(2).average[[3, 7]] = 0.01
    assert search.project(search.worth().use - 1e-6) == 1
    assert torch.nonzero(~net.gate(2).alive).flatten().tolist() == [3]
    assert search.project(1.0) > 3
    assert search.worth().use <= 1.0
    search.project(0.0)
    assert net.alive() == tuple(group.widths[0] for group in net.space.groups)
