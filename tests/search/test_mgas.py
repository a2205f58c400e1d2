"""MGAS: searches that end inside the budget, the same after a kill, and what stages, commits and regrowth do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.models.cells import Blueprint, CellNetwork, Genotype
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.mgas import MGAS, start_of
from hwsearch.search.mgas_config import MgasConfig, schedule
from hwsearch.search.mgas_cost import Narrowed, Sized, cheapest, rounded, worth
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.search.mgas_stages import Stages, StageSearch, regrow
from hwsearch.search.mgas_weight_search import size_of
from hwsearch.search.mgas_weights_config import WeightConfig
from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig, run_steps
from hwsearch.train.task import Classification

torch.set_num_threads(1)
BLUEPRINT = Blueprint(classes=4, channels=8, cells=2, reductions=(1,), operations=("skip", "sep3", "max3"))
STEADY = TrainConfig(batch_size=16, learning_rate=0.05, final_rate=0.05, warmup=0.0, nesterov=False, checkpoint_s=0)
QUICK = MgasConfig(
    training=STEADY, stages=2, warmup_epochs=0.5, stage_epochs=1.5, final_epochs=2.0, prune_every=0.5, rate=60.0,
    quantum=2, least=2, winner=TrainConfig(steps=6, batch_size=16, checkpoint_s=0),
)  # fmt: skip


SPACES: dict[Genotype, WidthSpace] = {}
MS = {"skip": 0.001, "max3": 0.02, "sep3": 0.06}


class Weighed:
    """Milliseconds in closed form: each operation by its kind, its widths rounded up, and the cell that it is in."""

    def __init__(self, measured: float | None = None) -> None:
        self.measured, self.asked = measured, 0

    def one(self, sized: Sized) -> float:
        genotype, widths = sized
        edges, total = genotype.blueprint.edges(), 0.05
        for c, e, name in genotype.operations():
            width = widths[f"{c}.node{edges[e][1]}"] + (widths.get(f"{c}.{e}.{name}", 0))
            total += MS[name] * width / genotype.blueprint.width(c) / (c + 1)
        return total

    def ms(self, networks: Sequence[Sized]) -> np.ndarray:
        self.asked += len(networks)
        return np.asarray([self.one(sized) for sized in networks])

    def narrowed(self, network: CellNetwork, budget: Budget, quantum: int) -> Narrowed:
        genotype, cost = network.genotype, self
        if genotype not in SPACES:  # seconds each
            SPACES[genotype] = WidthSpace.from_model(network, torch.zeros(1, 1, 8, 8), quantum=quantum, verify=False)
        space = SPACES[genotype]

        class Widths:
            def evaluate(self, rows: Any) -> np.ndarray:
                full, writers = genotype.widths(), genotype.writers()
                found = []
                for row in np.asarray(rows):
                    named = dict(full)
                    for group, width in zip(space.groups, row.tolist(), strict=True):
                        for slot in group.slots:
                            if slot.axis == 0 and slot.parameter in writers:
                                named[writers[slot.parameter]] = width
                    found.append(cost.one((genotype, named)))
                return np.asarray(found)

        latency, limit = Widths(), budget.limits[0]
        off = self.measured
        measure = None if off is None else lambda choice: off * float(latency.evaluate([choice.widths])[0])
        return Narrowed(space, Budget([Limit(latency, limit.max_ms, 0.5, measure=measure)], floor=budget.floor))


def task_() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    return WidthSpace.from_model(
        CellNetwork(Genotype.full(BLUEPRINT)), torch.zeros(1, 1, 8, 8), quantum=2, verify=False
    )


def budget_of(share: float) -> tuple[Budget, float]:
    whole = Genotype.full(BLUEPRINT)
    full = Weighed().one((whole, whole.widths()))

    class Nothing:
        def evaluate(self, rows: Any) -> np.ndarray:
            return np.full(len(rows), full)

    return Budget([Limit(Nothing(), share * full, 0.5)]), full


# ---- the whole search ----


@pytest.mark.parametrize(("share", "seed"), [(0.5, 0), (0.3, 1)])
def test_a_search_ends_inside_the_budget(space: WidthSpace, tmp_path: Path, share: float, seed: int) -> None:
    budget, _ = budget_of(share)
    titles: list[str] = []
    search = MGAS(space, budget, QUICK, cost=Weighed(), seed=seed, folder=tmp_path / "run")
    result = search.search(task_(), None, progress=lambda *call: titles.append(call[2].split(":")[0]))
    assert result.predicted_ms <= result.budget_ms
    assert result.predicted_ms > 0.8 * result.budget_ms
    genotype = Genotype.from_dict(result.extra["genotype"])
    assert genotype.count < Genotype.full(BLUEPRINT).count
    assert result.model is not None
    assert result.model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert sum(p.numel() for p in result.model.parameters()) == result.parameters
    assert result.metric is not None
    assert list(dict.fromkeys(titles)) == ["stages", "winner"]
    way = result.extra["trajectory"]
    assert {point["stage"] for point in way} == {0.0, 1.0}
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    ends = [e for e in events if e["event"] == "committed"]
    assert ends[-1]["final"]
    assert ends[-1]["predicted_ms"] <= QUICK.aim * result.budget_ms


def test_single_weights_of_the_found_network_keep_a_size_budget(space: WidthSpace) -> None:
    budget, _ = budget_of(0.5)
    weights = WeightConfig(max_parameters=900, training=replace(STEADY, nesterov=True), epochs=1, tuning_epochs=0.5)
    result = MGAS(space, budget, replace(QUICK, weights=weights), cost=Weighed()).search(task_(), None)
    assert result.model is not None
    assert result.extra["weights"]["parameters"] == 900 < result.extra["weights"]["parameters_before"]
    assert size_of(result.model, torch.zeros(1, 1, 8, 8), in_bytes=False).parameters == 900
    assert result.predicted_ms <= result.budget_ms


def test_what_is_measured_decides_and_a_slow_genotype_is_cut_further(space: WidthSpace, tmp_path: Path) -> None:
    budget, _ = budget_of(0.35)
    for off in (1.08, 2.4):
        folder = tmp_path / f"run-{off}"
        result = MGAS(space, budget, QUICK, cost=Weighed(measured=off), folder=folder).search(task_(), None)
        assert result.measured_ms is not None
        assert result.measured_ms <= result.budget_ms
        assert ("cut_further" in (folder / "events.jsonl").read_text()) == (off > 1.5)


def test_a_killed_search_ends_the_same_as_an_unbroken_one_of_its_seed(space: WidthSpace, tmp_path: Path) -> None:
    budget, _ = budget_of(0.4)

    def search(name: str, kill: int | None = None) -> str:

        def progress(done: int, total: int, text: str) -> None:
            if kill is not None and text.startswith("stages") and done >= kill:
                raise KeyboardInterrupt

        found = MGAS(space, budget, QUICK, cost=Weighed(), seed=3, folder=tmp_path / name)
        return found.search(task_(), None, progress=progress).to_json()

    whole = search("whole")
    with pytest.raises(KeyboardInterrupt):
        search("killed", kill=1)
    assert search("killed") == whole


def test_a_budget_below_the_plainest_network_is_refused_before_anything_is_trained(space: WidthSpace) -> None:
    cost = Weighed()
    budget, full = budget_of(0.04)
    plainest, ms = cheapest(cost, Genotype.full(BLUEPRINT), 2, 2)
    assert ms > 0.04 * full
    assert plainest[0].count == 4
    with pytest.raises(InfeasibleBudgetError, match="the plainest is predicted at"):
        MGAS(space, budget, QUICK, cost=cost).search(task_(), None)


def test_what_mgas_cannot_search_is_refused(space: WidthSpace) -> None:
    budget, _ = budget_of(0.5)
    with pytest.raises(InputError, match="3 stages cannot divide 2 cells"):
        MGAS(space, budget, replace(QUICK, stages=3), cost=Weighed())
    with pytest.raises(InputError, match="keeps one limit"):
        MGAS(space, Budget([*budget.limits, *budget.limits]), QUICK, cost=Weighed())
    less = CellNetwork(Genotype.full(BLUEPRINT).without(0, 0, "skip"))
    with pytest.raises(InputError, match="with everything kept"):
        MGAS(space, budget, QUICK, cost=Weighed(), model=less)
    for name, value in (("controller", "x"), ("aim", 0.0), ("quantum", 0), ("gate_momentum", 1.0), ("rate", -1.0)):
        with pytest.raises(InputError, match=name):
            replace(QUICK, **{name: value})  # type: ignore[arg-type]


# ---- cost ----


def test_an_operation_costs_what_the_network_without_it_saves() -> None:
    cost, whole = Weighed(), Genotype.full(BLUEPRINT)
    found = worth(cost, (whole, whole.widths()), quantum=2, least=2)
    assert found.ms == pytest.approx(cost.one((whole, whole.widths())))
    assert found.operations[0, 1, "sep3"] == pytest.approx(0.12)
    assert found.operations[1, 4, "max3"] == pytest.approx(0.01)
    assert len(found.operations) == whole.count
    inner = next(each for tied, each in found.filters.items() if tied == ("1.3.sep3",))
    assert inner == pytest.approx(0.06 / 16 / 2)
    one = Genotype(BLUEPRINT, ((("skip",), (), ("sep3", "skip"), (), ()),) * 2)
    assert (0, 0, "skip") not in worth(cost, (one, one.widths()), 2).operations
    assert rounded({"a": 5, "b": 8}, {"a": 8, "b": 8}, 4) == {"a": 8, "b": 8}


def test_phases_follow_one_another_and_commit_at_their_ends() -> None:
    config = MgasConfig(warmup_epochs=1, stage_epochs=3, final_epochs=2, prune_every=1)
    phases = schedule(config, 10, 3)
    assert [phase.stage for phase in phases] == [0, 1, 2, 2]
    assert [phase.start for phase in phases] == [0, 40, 80, 120]
    assert phases[0].commits == (20, 30, 40)
    assert phases[-1].commits == (20, 30)
    assert [phase.final for phase in phases] == [False, False, False, True]
    assert len(schedule(config, 10, 1)) == 1


# ---- stages ----


def searching(config: MgasConfig = QUICK, share: float = 0.4) -> StageSearch:
    torch.manual_seed(0)
    net = CellSuperNet(BLUEPRINT, stages=(1, 2), least=config.least, filters=config.filters)
    _, full = budget_of(share)
    phases = schedule(config, 6, 2)
    return StageSearch(
        Stages(net, 8), task_(), Weighed(), share * full, config, phases, seed=0, tell=lambda *_, **__: None
    )


def test_cutting_to_a_target_takes_the_weakest_units_for_their_milliseconds() -> None:
    search = searching()
    net = search.net
    with torch.no_grad():
        for module in net.operation_gates.values():
            module.average.fill_(0.5)  # type: ignore[union-attr,operator]
        net.operation_gate(0, 1).average[net.of_node[1].index((3, "sep3"))] = 0.01
    before = search.worth(2).ms
    assert search.project(2, before - 0.01) == 1
    assert "sep3" not in net.genotype().kept[0][3]
    assert search.project(2, 0.0) > 5, "cuts until nothing can go"
    assert net.genotype().count == 4, "one operation a node is left"
    assert all(width >= 2 for width in net.widths(net.genotype()).values())


def test_a_commit_takes_what_fell_furthest_and_no_more_than_the_target_needs() -> None:
    search = searching()
    net, before = search.net, search.worth(2).ms
    for gate in net.operation_gates.values():
        gate.average.fill_(-0.1)  # type: ignore[union-attr,operator]
    for gate in net.filter_gates.values():
        gate.average.fill_(0.3)  # type: ignore[union-attr,operator]
    weakest = net.of_node[1].index((2, "sep3"))
    net.operation_gate(0, 1).average[weakest] = -0.4
    assert search.commit_needed(2, before - 0.05) == (1, 0)
    assert "sep3" not in net.genotype().kept[0][2]
    assert search.commit_needed(2, search.worth(2).ms) == (0, 0)
    operations, filters = search.commit_needed(2, 0.0)
    assert operations > 10
    assert filters == 0, "no filter's average is below 0"
    assert net.genotype().count == 4


def test_exactly_the_number_asked_for_is_regrown_in_the_stages_so_far() -> None:
    search = searching()
    net = search.net
    for edge in range(5):
        for name in ("skip", "max3"):
            net.close(0, edge, name)
            net.close(1, edge, name)
    dead = net.genotype()
    found = regrow(net, 1, 4, seed=0, stream=0)
    assert len(set(found)) == 4
    assert net.genotype().count == dead.count + 4
    assert all(cell == 0 for cell, _, _ in found)
    assert net.genotype().kept[1] == dead.kept[1]
    again = searching().net
    for edge in range(5):
        for name in ("skip", "max3"):
            again.close(0, edge, name)
            again.close(1, edge, name)
    assert regrow(again, 1, 4, seed=0, stream=0) == found
    assert regrow(again, 1, 6, seed=1, stream=0)


def test_the_multiplier_rises_while_the_target_is_missed_and_never_below_zero() -> None:
    search = searching()
    control, task = search.stages.control, search.task
    batch = tuple(task.train.take(np.arange(16)))
    warm = search.phases[0].warm
    for number in range(warm + 3):
        search.step(number, batch)
        if number < warm:
            assert float(control[0]) == 0.0
            assert search.net.operation_gate(0, 0).score.grad is None
    assert float(control[0]) > 0
    search.max_ms, search._targets = 1e9, {0: 1e9}
    control[0] = 0.01
    search.step(warm + 3, batch)
    assert float(control[0]) == 0.0


def test_gold_nas_raises_the_multiplier_faster_and_faster_until_enough_is_pruned() -> None:
    search = searching(MgasConfig.published(stages=2, prune_goal=3, least=2))
    control, seen = search.stages.control, []
    for pruned in (0, 0, 0, 6, 12, 0):
        search._goldnas(pruned)
        seen.append(float(control[0]))
    steps = [4e-5, 2e-4, 8.4e-4, 8.4e-4, 4.2e-4, 4.6e-4]
    assert seen == pytest.approx(steps)


def test_the_papers_settings_search_as_well_and_end_at_the_target() -> None:
    short = {
        name: getattr(QUICK, name) for name in ("stages", "warmup_epochs", "stage_epochs", "final_epochs", "least")
    }
    search = searching(MgasConfig.published(**short, prune_every=0.5))
    training = replace(STEADY, steps=search.phases[-1].start + search.phases[-1].steps)
    run_steps(search.stages, search.task.train, training, search.step, identity={})
    assert search.worth(2).ms <= search.max_ms
    assert float(search.stages.control[0]) > 0


def test_widths_by_name_are_the_choice_of_the_found_network(space: WidthSpace) -> None:
    genotype = Genotype.full(BLUEPRINT).without(0, 3, "sep3")
    network = CellNetwork(genotype)
    own = WidthSpace.from_model(network, torch.zeros(1, 1, 8, 8), quantum=2, verify=False)
    widths = {name: 4 if "sep3" in name else width for name, width in genotype.widths().items()}
    widths["stem"] = 6
    choice = own.choices(np.asarray([start_of(own, genotype, widths)]))[0]
    small = CellNetwork(genotype, widths)
    assert sum(p.numel() for p in small.parameters()) == own.parameters(choice)
