"""Tasks: classification and regression as built in, segmentation as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.train.data import Batch, Examples, TensorExamples, synthetic_images
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.task import Classification, Evaluation, Regression, Task, load_task


@dataclass(frozen=True)
class Segmentation:
    """A task of somebody else: a class a pixel, mean intersection over union, which is no mean over examples."""

    train: Examples
    valid: Examples
    classes: int = 3
    metric_name: str = "mIoU"
    higher_is_better: bool = True

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(output, batch[1])

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        pairs = batch[1].flatten() * self.classes + output.argmax(1).flatten()
        counts = torch.bincount(pairs, minlength=self.classes**2).double()
        extra = torch.tensor([self.loss(output, batch).item() * len(output), len(output)], dtype=torch.float64)
        return torch.cat([counts, extra])

    def summary(self, tally: Tensor) -> Evaluation:
        counts, (loss, examples) = tally[:-2].view(self.classes, self.classes), tally[-2:].tolist()
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        return Evaluation(loss / examples, float((counts.diagonal() / union.clamp(min=1)).mean()), int(examples))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        return functional.cross_entropy(output, teacher.softmax(1))


CONFIG = TrainConfig(steps=40, batch_size=32, learning_rate=0.1, seed=1)


def test_classification_tallies_loss_and_accuracy_over_uneven_batches() -> None:
    examples = synthetic_images(70, classes=4, shape=(1, 8, 8))
    task = Classification(examples, examples, label_smoothing=0.1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    evaluation = evaluate(model, task, examples, TrainConfig(batch_size=64))
    inputs, targets = examples.inputs, examples.targets
    output = model((inputs.float() / 255 - 0.5) / 0.25)
    assert evaluation.examples == 70
    assert evaluation.loss == pytest.approx(functional.cross_entropy(output, targets).item(), rel=1e-5)
    assert evaluation.metric == pytest.approx((output.argmax(1) == targets).double().mean().item())
    assert task.loss(output, (inputs, targets)).item() == pytest.approx(
        functional.cross_entropy(output, targets, label_smoothing=0.1).item()
    )


def test_imitating_is_best_at_the_teacher() -> None:
    teacher = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    examples = synthetic_images(4)
    for task in (Classification(examples, examples), Regression(examples, examples)):
        student = teacher.clone().requires_grad_(True)
        task.imitate(student, teacher).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-6


def test_regression_is_learnt_and_scored_by_its_root_mean_square() -> None:
    inputs = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    examples = TensorExamples(inputs, inputs @ torch.arange(12.0).view(6, 2))
    task = Regression(examples, examples)
    model = nn.Linear(6, 2)
    before = evaluate(model, task, examples)
    train(model, task, TrainConfig(steps=60, batch_size=64, learning_rate=0.05, weight_decay=0))
    after = evaluate(model, task, examples)
    assert after.metric == pytest.approx(after.loss**0.5)
    assert after.metric < 0.1 * before.metric
    assert isinstance(task, Task)


def test_a_task_of_ones_own_trains_and_scores() -> None:
    images = synthetic_images(128, classes=3, shape=(1, 12, 12))
    masks = (images.inputs[:, 0].float() / 86).long().clamp(max=2)
    examples = TensorExamples(images.inputs, masks, mean=(0.5,), std=(0.25,))
    task = Segmentation(examples, examples)
    assert isinstance(task, Task)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    before = evaluate(model, task, examples)
    report = train(model, task, CONFIG)
    after = evaluate(model, task, examples)
    assert after.metric > before.metric
    assert after.loss < before.loss
    assert report.final_loss < report.history[0][1]


def test_a_name_stands_for_a_task(tmp_path: Path) -> None:
    task, test = load_task("synthetic", valid=100, limit_to=500, label_smoothing=0.1)
    assert (len(task.train), len(task.valid), len(test)) == (400, 100, 1024)
    assert task.label_smoothing == 0.1
    with pytest.raises(InputError, match="'imagenet' is neither"):
        load_task("imagenet")
    with pytest.raises(InputError, match=r"holds no pictures in folders of two or more classes \(\.jpg, .*"):
        load_task(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").touch()
    with pytest.raises(InputError, match="lacks train-images"):
        load_task(str(tmp_path))
    with pytest.raises(InputError, match=r"label_smoothing is 1\.0"):
        load_task("synthetic", valid=9, label_smoothing=1.0)
