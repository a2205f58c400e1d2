"""CafeNet's super-network: the min-min step, training that survives a kill, and scores that can be trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.cafenet import min_min_step, score_candidates, train_supernet
from hwsearch.search.patterns import bins_of, complement, draw, leftmost, rightmost
from hwsearch.search.scoring import Scorer, ScoringConfig
from hwsearch.search.supernet import SuperNet
from hwsearch.search.supernet_training import bilateral_choice
from hwsearch.search.winner import train_choice
from hwsearch.train import checkpoint
from hwsearch.train.data import Batch
from hwsearch.train.loop import evaluate, run_steps
from hwsearch.train.seeds import generator
from hwsearch.train.task import Classification

sys.path.insert(0, str(Path(__file__).parent))

from small_cafenet import CONFIG, TRAINING, batch_of, same, small_model, small_space, small_task, weights

torch.set_num_threads(1)  # several threads wait for each other where anything else runs

REPOSITORY = Path(__file__).resolve().parents[2]


class Slimmable(nn.Module):
    """The small model as a slimmable network, written out by hand: leftmost slices and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_model()
        self.widths: tuple[int, ...] = (8, 12)

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (conv1, norm1, conv2, norm2, head) = self.widths, (self.body[i] for i in (0, 1, 4, 5, 10))
        x = functional.conv2d(x, conv1.weight[:a], padding=1)
        x = functional.relu(functional.batch_norm(x, None, None, norm1.weight[:a], norm1.bias[:a], True))
        x = functional.conv2d(functional.max_pool2d(x, 2), conv2.weight[:b, :a], padding=1)
        x = functional.relu(functional.batch_norm(x, None, None, norm2.weight[:b], norm2.bias[:b], True))
        return functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1), head.weight[:, :b], head.bias)


def test_offset_0_is_slimmable_training_exactly() -> None:
    task, model, twin = small_task(), small_model(), Slimmable()
    space = small_space(model)
    net = train_supernet(space, model, task, replace(CONFIG, offset=0, patterns=1))

    def step(number: int, batch: Batch) -> Tensor:
        full, drawn = (8, 12), space.sample(generator(TRAINING.seed, "pattern", number)).widths
        twin.widths = full if number % 2 == 0 else drawn
        loss = task.loss(twin(batch[0]), batch)
        loss.backward()
        return loss.detach()

    run_steps(twin, task.train, TRAINING, step, identity={})
    assert same(weights(net.model), weights(twin.body))


def test_with_offset_0_the_number_of_patterns_does_not_matter() -> None:
    task, model = small_task(), small_model()
    nets = [train_supernet(small_space(model), model, task, replace(CONFIG, offset=0, patterns=m)) for m in (1, 3)]
    assert same(weights(nets[0]), weights(nets[1]))


def test_offset_and_number_of_patterns_change_the_training() -> None:
    task, model = small_task(), small_model()
    settings = [{"offset": 0}, {"offset": 1, "patterns": 1}, {"offset": 1, "patterns": 3}, {"offset": 2}]
    trained = [weights(train_supernet(small_space(model), model, task, replace(CONFIG, **s))) for s in settings]
    assert not any(same(trained[i], trained[j]) for i in range(4) for j in range(i))


def test_the_step_trains_the_pattern_of_least_loss_on_the_same_batch_and_no_other() -> None:
    task, model = small_task(), small_model()
    space = small_space(model)
    config = replace(CONFIG, offset=2, patterns=4, full_steps=False)
    net = SuperNet(model, space).train()
    step = min_min_step(net, task, config)
    winners = set()
    for number in range(6):
        batch = batch_of(task, number)
        rng = generator(2, "pattern", number)
        choice = space.sample(rng)
        patterns = [draw(space, choice, 2, bins_of(space, None), rng) for _ in range(4)]
        losses = []
        for pattern in patterns:
            plain = shrink(model, space, choice, pattern.by_group(space), check=False).train()
            losses.append(float(task.loss(plain(batch[0]).detach(), batch)))
        best = int(np.argmin(losses))
        winners.add(best)
        net.zero_grad()
        loss = step(number, batch)
        assert float(loss) == pytest.approx(losses[best], rel=1e-4)
        gradient = net.model.get_submodule("0").weight.grad
        assert isinstance(gradient, Tensor)
        touched = np.flatnonzero(gradient.abs().sum((1, 2, 3)).numpy())
        assert set(touched) <= set(patterns[best].kept[0].tolist())
    assert len(winners) > 1


def test_every_other_step_trains_the_full_network() -> None:
    task, model = small_task(), small_model()
    net = SuperNet(model, small_space(model)).train()
    step = min_min_step(net, task, CONFIG)
    step(4, batch_of(task, 4))
    assert net.active is None
    step(5, batch_of(task, 5))
    assert net.active is not None


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [({"patterns": 1}, 1), ({"patterns": 3}, 3), ({"patterns": 3, "offset": 0}, 1), ({"distillation": 0.5}, 3)],
)
def test_a_sampled_step_costs_m_forwards_and_one_backward(settings: dict[str, Any], forwards: int) -> None:
    task, model = small_task(), small_model()
    net = SuperNet(model, small_space(model)).train()
    step = min_min_step(net, task, replace(CONFIG, **settings))
    calls: list[bool] = []
    backwards: list[None] = []
    net.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    parameter = next(p for name, p in net.named_parameters() if name.endswith("bias"))  # the classifier's is never cut
    parameter.register_post_accumulate_grad_hook(lambda _: backwards.append(None))
    step(1, batch_of(task, 1))
    assert len(calls) == forwards
    assert sum(not graded for graded in calls) == (1 if "distillation" in settings else 0)  # the teacher
    assert len(backwards) == 1


def test_dropout_does_not_decide_which_pattern_is_best() -> None:
    """All patterns of a width see the same noise: with equal weights everywhere, all losses are equal."""
    task, model = small_task(), small_model(dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(parameter.flatten()[0]))
        model[10].weight.copy_(
            torch.arange(4.0)[:, None].expand(4, 12)
        )  # the loss counts the units that dropout spares
    net = SuperNet(model, small_space(model)).train()
    losses: list[float] = []

    @dataclass(frozen=True)
    class Listening(Classification):
        def loss(self, output: Tensor, batch: Batch) -> Tensor:
            value = super().loss(output, batch)
            losses.append(float(value.detach()))
            return value

    min_min_step(net, Listening(task.train, task.valid), replace(CONFIG, patterns=4))(1, batch_of(task, 1))
    assert len(losses) == 4
    assert max(losses) - min(losses) < 1e-5


def test_distillation_pulls_towards_the_full_network() -> None:
    task, model = small_task(), small_model()
    net = SuperNet(model, small_space(model)).train()
    batch = batch_of(task, 1)
    loss = min_min_step(net, task, replace(CONFIG, distillation=1.0, patterns=1))(1, batch)
    with torch.no_grad():
        student = net(batch[0])
        net.activate(None)
        teacher = net(batch[0])
    assert float(loss) == pytest.approx(float(task.imitate(student, teacher)), rel=1e-5)


_SCRIPT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("kill_me", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["kill_me"] = module
spec.loader.exec_module(module)
model = module.small_model(0.1)
module.train_supernet(module.small_space(model), model, module.small_task(), module.LONG, Path(sys.argv[2]))
"""
LONG = replace(CONFIG, training=replace(TRAINING, steps=60))


def steps_taken(path: Path) -> int:
    if not path.exists():
        return -1
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["hwsearch"])["step"])


def test_kill_9_of_the_supernet_training_changes_no_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, __file__, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 100
    while steps_taken(tmp_path / checkpoint.NAME) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= steps_taken(tmp_path / checkpoint.NAME) < 60
    model = small_model(0.1)
    resumed = train_supernet(small_space(model), model, small_task(), LONG, tmp_path)
    unbroken = train_supernet(small_space(model), model, small_task(), LONG)
    assert same(weights(resumed), weights(unbroken))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    task, model = small_task(), small_model()
    train_supernet(small_space(model), model, task, CONFIG, tmp_path)
    with pytest.raises(InputError, match="offset was 1, now 2"):
        train_supernet(small_space(model), model, task, replace(CONFIG, offset=2), tmp_path)
    with pytest.raises(InputError, match="space was"):
        train_supernet(small_space(model, quantum=1), model, task, replace(CONFIG, bin_units=2), tmp_path)


@pytest.fixture(scope="module")
def trained() -> SuperNet:
    model = small_model()
    return train_supernet(small_space(model), model, small_task(), CONFIG)


def test_a_score_is_the_held_out_loss_of_the_extracted_network(trained: SuperNet) -> None:
    task = small_task()
    scorer = Scorer(trained, task, replace(CONFIG.scoring, images=None), TRAINING)
    choice = trained.space.uniform(0.5)
    small = trained.extract(leftmost(choice), scorer.calibration())
    loss = scorer(trained.space.choice_array([choice]))[0]
    assert loss == pytest.approx(evaluate(small, task, task.valid).loss, rel=1e-5)


def test_scores_do_not_depend_on_order_or_company_and_are_computed_once(trained: SuperNet) -> None:
    rows = np.array([[8, 12], [4, 6], [2, 2], [8, 2]])
    losses = score_candidates(trained, small_task(), rows, CONFIG)
    assert losses.shape == (4,)
    assert len(set(losses.tolist())) == 4
    scorer = Scorer(trained, small_task(), CONFIG.scoring, TRAINING)
    assert scorer(rows[::-1]).tolist() == losses[::-1].tolist()
    calls: list[object] = []
    handle = trained.register_forward_hook(lambda *_: calls.append(None))
    assert scorer(rows).tolist() == losses.tolist()
    handle.remove()
    assert not calls


def test_patterns_are_picked_on_one_half_and_judged_on_the_other(trained: SuperNet) -> None:
    task = small_task()
    several = Scorer(trained, task, replace(CONFIG.scoring, images=None, patterns=4), TRAINING, offset=2)
    choice = WidthChoice((4, 6))
    pattern = several.pattern(choice)
    loss = several(np.array([choice.widths]))[0]
    small = trained.extract(pattern, several.calibration())
    half = task.valid.take(np.arange(32, 64))
    with torch.no_grad():
        assert loss == pytest.approx(float(task.loss(small(half[0]), half)), rel=1e-4)
    assert several(np.array([choice.widths]))[0] == loss
    with pytest.raises(InputError, match="one batch"):
        Scorer(trained, task, ScoringConfig(patterns=2, batch_size=64), TRAINING)


def test_the_digest_changes_with_weights_and_way_of_judging(trained: SuperNet) -> None:
    task = small_task()
    first = Scorer(trained, task, CONFIG.scoring, TRAINING).digest()
    assert first == Scorer(trained, task, CONFIG.scoring, TRAINING).digest()
    assert first != Scorer(trained, task, replace(CONFIG.scoring, images=20), TRAINING).digest()
    other = SuperNet(small_model(), trained.space)
    assert first != Scorer(other, task, CONFIG.scoring, TRAINING).digest()


def test_a_choice_is_trained_from_scratch_or_from_what_is_there() -> None:
    task, model = small_task(), small_model()
    space = small_space(model)
    none = replace(TRAINING, steps=1, learning_rate=1e-9)
    kept, _ = train_choice(model, space, space.uniform(0.5), task, none, scratch=False)
    sizes = model[0].weight.detach().abs().mean((1, 2, 3))
    strongest = torch.sort(sizes.argsort(descending=True, stable=True)[:4]).values
    torch.testing.assert_close(kept[0].weight, model[0].weight[strongest], atol=1e-6, rtol=0)
    fresh = [train_choice(model, space, space.uniform(0.5), task, none)[0] for _ in range(2)]
    assert same(weights(fresh[0]), weights(fresh[1]))
    assert not torch.allclose(fresh[0][0].weight, model[0].weight[strongest], atol=1e-2)


def test_bilateral_training_goes_left_and_right_with_half_the_loss_each() -> None:
    task, model = small_task(), small_model()
    space = small_space(model)
    config = replace(CONFIG, sharing="bilateral", full_steps=False)
    net = SuperNet(model, space).train()
    batch = batch_of(task, 0)
    choice = bilateral_choice(space, config, 0)
    loss = min_min_step(net, task, config)(0, batch)
    losses = []
    for pattern in (leftmost(choice), rightmost(space, choice)):
        plain = shrink(model, space, choice, pattern.by_group(space), check=False).train()
        losses.append(float(task.loss(plain(batch[0]).detach(), batch)))
    assert losses[0] != losses[1]
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_a_complement_uses_what_the_step_before_left_over() -> None:
    space = small_space(small_model())
    config = replace(CONFIG, sharing="bilateral", full_steps=False)
    drawn, other = (bilateral_choice(space, config, number) for number in (0, 1))
    assert [a + b for a, b in zip(drawn.widths, other.widths, strict=True) if a < 8] == [
        group.units for group, a in zip(space.groups, drawn.widths, strict=True) if a < 8
    ]
    assert bilateral_choice(space, replace(config, complementary=False), 1) == space.sample(generator(2, "pattern", 1))
    # Every second step trains the full network: the pairs are two steps apart.
    halved = replace(config, full_steps=True)
    assert bilateral_choice(space, halved, 3) == complement(space, bilateral_choice(space, halved, 1))


def test_a_bilateral_score_is_the_mean_of_both_sides(trained: SuperNet) -> None:
    task, choice = small_task(), trained.space.uniform(0.5)
    both = Scorer(trained, task, CONFIG.scoring, TRAINING, bilateral=True)
    left = Scorer(trained, task, CONFIG.scoring, TRAINING)
    row = trained.space.choice_array([choice])
    trained.activate(rightmost(trained.space, choice))
    trained.calibrate(both.calibration())
    batches = both._judging
    with torch.no_grad():
        tallies = torch.stack([task.tally(trained(batch[0]), batch) for batch in batches]).sum(dim=0)
    assert both(row)[0] == pytest.approx((left(row)[0] + task.summary(tallies).loss) / 2)
    assert both.digest() != left.digest()


def test_recorded_losses_are_means_by_width_and_survive_in_the_checkpoint(tmp_path: Path) -> None:
    task, model = small_task(), small_model()
    net = train_supernet(small_space(model), model, task, CONFIG, tmp_path)
    sums, counts = net.recorded.numpy()  # type: ignore[operator]
    assert counts.sum(axis=1).tolist() == [6, 6]  # every second of twelve steps
    losses = net.recorded_losses()
    seen = counts > 0
    np.testing.assert_allclose(losses[seen], sums[seen] / counts[seen])
    again = train_supernet(small_space(model), model, task, CONFIG, tmp_path)
    assert torch.equal(net.recorded, again.recorded)  # type: ignore[arg-type]
