"""CONetV2: the published rule against its own arithmetic, ours under a budget, and searches that survive a kill."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.search.annealing import AnnealSettings
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.conetv2 import ConetV2
from hwsearch.search.conetv2_config import ConetConfig
from hwsearch.search.conetv2_rules import Annealed, Published
from hwsearch.search.quality import NetworkQuality, SideQuality
from hwsearch.search.result import SearchResult
from hwsearch.search.trials import Trial
from hwsearch.train.data import TensorExamples, synthetic_images
from hwsearch.train.loop import TrainConfig, evaluate
from hwsearch.train.task import Classification, Regression

sys.path.insert(0, str(Path(__file__).parent))

from mortal import Killed, Mortal

torch.set_num_threads(1)

TRAINING = TrainConfig(epochs=2, batch_size=16, learning_rate=0.1, seed=2, checkpoint_s=0)
OURS = ConetConfig(
    trials=3, training=TRAINING, annealing=AnnealSettings(chains=4, steps=10), winner=replace(TRAINING, steps=8)
)
PAPER = ConetConfig.published(trials=4, winner=replace(TRAINING, steps=8), training=replace(TRAINING, warmup=0.0))
MODES = {"metropolis": OURS, "conetv2": PAPER, "greedy": replace(PAPER, accept="greedy", adas=False)}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def small_task() -> Classification:
    return Classification(
        synthetic_images(96, classes=4, shape=(1, 8, 8), seed=1),
        synthetic_images(64, classes=4, shape=(1, 8, 8), seed=2),
    )


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, WidthSpace]:
    model = small_model()
    return model, WidthSpace.from_model(model, torch.zeros(1, 1, 8, 8), quantum=2)


def small_budget(toy: Any, space: WidthSpace, share: float = 0.5, measured: bool = False) -> Budget:
    latency = toy.Staircase(block=4)
    full = float(latency.evaluate(np.array([space.full().widths]))[0])
    measure = (lambda choice: 1.04 * float(latency.evaluate(np.array([choice.widths]))[0])) if measured else None
    return Budget([Limit(latency, full * share, 0.5, measure=measure)])


# ---- the published rule ----


def wide_space() -> WidthSpace:
    """One convolution's outputs, up to the 256 channels that the published code stops at, in steps of 2."""
    model = nn.Sequential(nn.Conv2d(1, 256, 1), nn.Conv2d(256, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return WidthSpace.from_model(model.eval(), torch.zeros(1, 1, 4, 4), quantum=2, verify=False)


def side(quality: float) -> SideQuality:
    """A side whose published QC is ``quality``: many directions of condition infinity make it atan(rank)."""
    rank = float(np.tan(quality))
    return SideQuality("0.weight", "outputs", 256, 256, rank, rank, np.inf, rank)


class Free:
    """A latency that any choice keeps: the published rule looks at no cost."""

    def evaluate(self, choices: np.ndarray) -> np.ndarray:
        return np.full(len(choices), 0.5)


FREE = Budget([Limit(Free(), 1.0)])


@pytest.mark.parametrize(("momentum", "expected"), [(0.8, [44, 66, 98, 132, 188]), (0.9, [66, 168, 256, 256, 256])])
def test_a_constant_quality_grows_widths_to_the_published_sizes(momentum: float, expected: list[int]) -> None:
    """M adds up, so widths grow geometrically and stop by themselves: momentum alone sets the size."""
    space = wide_space()
    found = []
    for quality in (0.1, 0.2, 0.3, 0.4, 0.5):
        config = replace(ConetConfig.published(momentum), accept="greedy")
        rule = Published(space, config)
        trials: list[Trial] = []
        for _ in range(config.trials):
            trials.append(Trial(rule.following(trials, FREE), (NetworkQuality((side(quality),)),)))
        found.append(trials[-1].choice.widths[0])
    assert found == expected


def test_the_published_rule_starts_at_16_then_32_and_pushes_upward_only() -> None:
    space = wide_space()
    rule, greedy = (
        Published(space, replace(ConetConfig.published(), accept=accept)) for accept in ("conetv2", "greedy")
    )
    quality = NetworkQuality((side(0.3),))
    trials = [Trial(rule.following([], FREE), (quality,))]
    assert trials[0].choice.widths == (16,)
    trials.append(Trial(rule.following(trials, FREE), (quality,)))
    assert trials[1].choice.widths == (32,)
    pushed, plain = [], []
    for seed in range(30):
        rule.seed = seed
        pushed.append(rule.following(trials, FREE).widths[0])
        plain.append(greedy.following(trials, FREE).widths[0])
    assert set(plain) == {2 * round(32 * (1 + 0.3 * 0.8) / 2)}
    assert min(pushed) == plain[0]  # not every draw pushes
    assert max(pushed) > plain[0]
    assert all(width >= plain[0] for width in pushed)


def test_quality_of_a_trial_is_the_best_over_its_epochs_and_groups_take_their_sides_mean(case: Any) -> None:
    _, space = case
    first, second = (
        NetworkQuality(
            (
                SideQuality("0.weight", "outputs", 8, 4, 0.5, 0.5, a, 0.5),
                SideQuality("4.weight", "inputs", 8, 4, 0.5, 0.5, b, 0.5),
                SideQuality("4.weight", "outputs", 12, 0, 0.0, 0.0, 0.0, 0.0),
            )
        )
        for a, b in ((2.0, 8.0), (4.0, 2.0))
    )
    trial = Trial(space.full(), (first, second))
    best = trial.best()
    assert best["0.weight", "outputs"] == max(q.sides[0].quality for q in (first, second))
    rule = Annealed(space, OURS)
    by_group = rule.by_group(best)
    assert by_group[0] == pytest.approx((best["0.weight", "outputs"] + best["4.weight", "inputs"]) / 2)
    assert by_group[1] == 0.0


# ---- the whole search ----


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_search_finds_a_network_inside_the_budget(
    case: Any, toy: Any, tmp_path: Path, mode: str, measured: bool
) -> None:
    model, space = case
    task, budget, config = small_task(), small_budget(toy, space, measured=measured), MODES[mode]
    phases: list[str] = []
    search = ConetV2(space, budget, config, model=model, seed=1, folder=tmp_path / "run")
    result = search.search(task, None, progress=lambda *call: phases.append(call[2].split(":")[0]))
    assert budget.feasible(np.array([result.choice.widths])).all()
    if measured:
        assert result.measured_ms is not None
        assert result.measured_ms <= result.budget_ms
    assert result.model is not None
    assert result.model(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.parameters
    assert result.metric == pytest.approx(evaluate(result.model, task, task.valid, TRAINING).metric)
    assert all(budget.feasible(np.array([c.choice.widths])).all() for c in result.candidates)
    assert phases[0] == f"trial 1 of {config.trials}"
    assert len(result.extra["trials"]) == config.trials
    stored = SearchResult.load(tmp_path / "run" / "result.json")
    assert stored.to_json() == result.to_json()


def test_every_trained_network_keeps_the_budget_in_our_mode(case: Any, toy: Any) -> None:
    model, space = case
    budget = small_budget(toy, space, 0.6)
    result = ConetV2(space, budget, replace(OURS, trials=5), model=model).search(small_task(), None)
    assert budget.feasible(np.array([trial["widths"] for trial in result.extra["trials"]])).all()


def test_layer_metrics_of_every_epoch_are_in_the_run_folder(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    ConetV2(space, small_budget(toy, space), OURS, model=model, folder=tmp_path / "run").search(small_task(), None)
    lines = (tmp_path / "run" / "state" / "quality.jsonl").read_text().splitlines()
    header, records = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    assert header["schema"] == "hwsearch.layer_quality"
    assert [(r["trial"], r["epoch"], r["step"]) for r in records] == [
        (t, e, 6 * e + 6) for t in range(3) for e in (0, 1)
    ]
    assert {(s["parameter"], s["side"]) for s in records[0]["layers"]} == {
        ("0.weight", "outputs"), ("4.weight", "outputs"), ("4.weight", "inputs"),
    }  # fmt: skip
    for record in records:
        widths = dict(zip((group.name for group in space.groups), record["widths"], strict=True))
        assert record["layers"][0]["channels"] == widths["0"]
        assert 0 <= record["mean_quality"] <= np.pi / 2


# Trials take 12 steps of 2 epochs each; 36 are 3 trials, 48 the published one's 4.
@pytest.mark.parametrize(
    ("mode", "last"), [*(("metropolis", last) for last in (0, 6, 19, 50)), ("conetv2", 30), ("conetv2", 50)]
)
def test_a_killed_search_continues_to_the_same_bytes(case: Any, toy: Any, tmp_path: Path, last: int, mode: str) -> None:
    model, space = case
    task = small_task()
    budget = small_budget(toy, space, measured=True)
    config = MODES[mode] if mode == "conetv2" else replace(OURS, trials=4)

    def search(folder: Path, task: Classification) -> tuple[bytes, str]:
        result = ConetV2(space, budget, config, model=model, seed=1, folder=folder).search(task, None)
        assert result.model is not None
        digest = str([tensor.double().sum().item() for tensor in result.model.state_dict().values()])
        return (folder / "result.json").read_bytes(), digest

    with pytest.raises(Killed):
        search(tmp_path / "broken", Mortal(task.train, task.valid, last=last))
    assert search(tmp_path / "broken", task) == search(tmp_path / "whole", task)
    state = [(tmp_path / name / "state" / "quality.jsonl").read_text() for name in ("broken", "whole")]
    assert state[0] == state[1]


def test_a_kill_while_measuring_loses_nothing(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    budget, task = small_budget(toy, space, measured=True), small_task()

    def search(folder: Path, progress: Any = None) -> bytes:
        ConetV2(space, budget, OURS, model=model, folder=folder).search(task, None, progress=progress)
        return (folder / "result.json").read_bytes()

    def kill(done: int, total: int, text: str) -> None:
        if text.startswith("measuring"):
            raise Killed

    with pytest.raises(Killed):
        search(tmp_path / "broken", kill)
    assert search(tmp_path / "broken") == search(tmp_path / "whole")


def test_a_kill_between_two_trials_loses_nothing(case: Any, toy: Any, tmp_path: Path) -> None:
    """The next trial was noted but has no checkpoint yet: it starts again from the one before."""
    model, space = case
    budget, task = small_budget(toy, space), small_task()

    def search(folder: Path, progress: Any = None) -> bytes:
        ConetV2(space, budget, OURS, model=model, folder=folder).search(task, None, progress=progress)
        return (folder / "result.json").read_bytes()

    def kill(done: int, total: int, text: str) -> None:
        if text.startswith("trial 2"):
            raise Killed

    with pytest.raises(Killed):
        search(tmp_path / "broken", kill)
    (tmp_path / "broken" / "state" / "trial-1" / "checkpoint.safetensors").unlink()
    assert search(tmp_path / "broken") == search(tmp_path / "whole")


def test_the_seed_and_every_mode_decide_the_result(case: Any, toy: Any) -> None:
    model, space = case
    budget, task = small_budget(toy, space, 0.6), small_task()

    def found(config: ConetConfig, seed: int = 0) -> str:
        result = ConetV2(space, budget, config, model=model, seed=seed).search(task, None)
        return json.dumps(result.extra["trials"])

    assert found(OURS, 1) == found(OURS, 1)
    different = [
        found(OURS, 1), found(OURS, 2), found(replace(OURS, transfer="svd"), 1), found(replace(OURS, adas=True), 1),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("start", ["model", "trial", None])
def test_the_winner_starts_from_what_was_asked(case: Any, toy: Any, start: str | None) -> None:
    model, space = case
    config = replace(OURS, trials=2, winner=None) if start is None else replace(OURS, trials=2, start=start)
    result = ConetV2(space, small_budget(toy, space), config, model=model).search(small_task(), None)
    assert result.model is not None
    assert result.metric is not None


def test_a_network_of_linear_layers_is_searched_as_well(toy: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    space = WidthSpace.from_model(model, torch.zeros(1, 6))
    inputs = torch.randn(128, 6)
    examples = TensorExamples(inputs, inputs @ torch.randn(6, 2))
    budget = small_budget(toy, space, 0.6)
    result = ConetV2(space, budget, OURS, model=model).search(Regression(examples, examples), None)
    assert result.extra["metric_name"] == "rmse"


@pytest.mark.slow
def test_a_budget_on_the_simulated_device_is_kept(rough: Any) -> None:
    model, space, budget = rough
    result = ConetV2(space, budget, replace(OURS, trials=1, measured=1), model=model).search(small_task(), None)
    assert result.measured_ms is not None
    assert result.measured_ms <= budget.limits[0].max_ms
    assert result.limits[0].predicted_ms < result.measured_ms


def test_what_cannot_be_searched_is_refused_before_any_training(case: Any, toy: Any, tmp_path: Path) -> None:
    model, space = case
    with pytest.raises(InfeasibleBudgetError):
        ConetV2(space, small_budget(toy, space, 0.001), OURS, model=model, folder=tmp_path / "a").search(
            small_task(), None
        )
    assert not (tmp_path / "a").exists()
    for wrong, words in (
        ({"accept": "never"}, "metropolis, conetv2, greedy"), ({"trials": 0}, "trials is 0"),
        ({"momentum": 1.0}, "momentum is 1.0"), ({"start_share": 0.0}, "start_share"), ({"transfer": "no"}, "svd"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            ConetConfig(**wrong)  # type: ignore[arg-type]
    folder = tmp_path / "run"
    ConetV2(space, small_budget(toy, space), replace(OURS, trials=1), model=model, folder=folder).search(
        small_task(), None
    )
    with pytest.raises(InputError, match="trials"):
        ConetV2(space, small_budget(toy, space), OURS, model=model, folder=folder).search(small_task(), None)
