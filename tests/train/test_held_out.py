"""Held-out scores along a training: for the eye alone, cheap, and the same after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hwsearch.report.run_data import read_run
from hwsearch.train import loop
from hwsearch.train.data import synthetic_images
from hwsearch.train.held_out import Looks
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.task import Classification

CONFIG = TrainConfig(steps=100, batch_size=80, learning_rate=0.002, seed=3, checkpoint_s=0)


class Counting(nn.Module):
    """Batch norm, dropout, and a buffer that every forward changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.head = nn.Linear(4 * 36, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.head(self.body(x))
        return out


def task() -> Classification:
    return Classification(
        synthetic_images(160, classes=4, shape=(1, 8, 8)), synthetic_images(70, classes=4, shape=(1, 8, 8), seed=9)
    )


@pytest.mark.parametrize(
    ("steps", "batch", "valid", "points", "examples"),
    [(4680, 128, 5000, 10, 500), (4680, 128, 60, 10, 60), (100, 80, 5000, 4, 50), (8, 16, 5000, 0, 0), (1, 8, 9, 0, 0)],
)
def test_a_look_costs_a_hundredth_of_the_training_at_most(
    steps: int, batch: int, valid: int, points: int, examples: int
) -> None:
    looks = Looks.of(synthetic_images(valid, shape=(1, 2, 2)), steps, batch)
    if not points:
        assert looks is None
        return
    assert looks is not None
    assert (len(looks.steps), max(looks.steps), len(looks.examples)) == (points, steps, examples)
    assert points * examples <= 0.01 * 3 * steps * batch


def test_no_bit_of_a_training_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, alone = Counting(), Counting()
    report = train(looked, task(), CONFIG)
    assert [step for step, _, _ in report.scores] == [25, 50, 75, 100]
    assert report.scores[-1][1] < report.scores[0][1], "it learns"
    monkeypatch.setattr(loop.Looks, "of", lambda *_: None)
    assert train(alone, task(), CONFIG).scores == ()
    assert all(torch.equal(one, other) for one, other in zip(looked.parameters(), alone.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(looked.buffers(), alone.buffers(), strict=True))
    assert float(looked.calls) == 100


def test_a_training_that_is_killed_has_the_same_scores(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    whole = train(Counting(), task(), CONFIG, folder=tmp_path / "state" / "winner")

    def stop(done: int, total: int, words: str) -> None:
        if done == 50:  # behind the second look, before anything else
            raise Stop

    other = tmp_path / "other" / "state" / "winner"
    with pytest.raises(Stop):
        train(Counting(), task(), CONFIG, folder=other, progress=stop)
    model = Counting()
    again = train(model, task(), CONFIG, folder=other)
    assert again == whole
    few = Looks.of(task().valid, 100, 80)
    assert few is not None
    last = evaluate(model, task(), few.examples, CONFIG)
    assert whole.scores[-1] == (100, last.loss, last.metric)
    with safe_open(str(other / "checkpoint.safetensors"), "pt") as file:
        assert len(json.loads(file.metadata()["hwsearch"])["notes"]["scores"]) == 4
    curves = {curve.quantity: curve for curve in read_run(tmp_path).curves}
    assert curves["metric"].points == tuple((step, metric) for step, _, metric in whole.scores)
    assert (curves["loss"].name, curves["metric"].name) == ("winner", "winner")
