"""Segmentation, translation and detection: metrics worked out by hand, sums that add up, and losses that teach."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from garment_files import make_garments
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.models import detector_small, segmenter_small, translator_small
from hwsearch.train.data import TensorExamples
from hwsearch.train.detection import ANCHOR, BOX, Detection, decode, overlaps
from hwsearch.train.garments import load_garments
from hwsearch.train.loop import TrainConfig, evaluate, train
from hwsearch.train.segmentation import Segmentation
from hwsearch.train.task import Task
from hwsearch.train.translation import Translation

NOTHING = TensorExamples(torch.zeros(1, 1), torch.zeros(1))
MODELS = {"segmentation": segmenter_small, "detection": detector_small, "translation": translator_small}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_garments(tmp_path_factory.mktemp("garments"))


# ---- segmentation ----


def told(classes: list[list[int]], count: int = 4) -> Tensor:
    """A map (1, count, H, W) that says these classes."""
    return nn.functional.one_hot(torch.tensor([classes]), count).permute(0, 3, 1, 2).float() * 9


def test_overlap_is_summed_over_all_pixels_and_averaged_over_the_classes_that_occur() -> None:
    task = Segmentation(NOTHING, NOTHING)
    images = [([[0, 0], [1, 1]], [[0, 1], [1, 1]]), ([[0, 2], [0, 0]], [[0, 0], [0, 0]])]
    tally = sum(
        (task.tally(told(said), (torch.zeros(1), torch.tensor([true]).byte())) for true, said in images),
        start=torch.zeros(19, dtype=torch.float64),
    )
    found = task.summary(tally)
    # class 0: 4 right, 5 true, 5 told; class 1: 2 right, 2 true, 3 told; class 2: missed; class 3 occurs nowhere
    assert found.metric == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert found.examples == 2
    assert task.higher_is_better


# ---- translation ----


def test_the_ratio_is_of_all_pixels_of_all_images() -> None:
    task = Translation(NOTHING, NOTHING)
    target = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    output = torch.tensor([[[[0.1, 1.0], [0.2, 0.6]]]])
    tally = task.tally(output, (target, target)) + task.tally(
        torch.zeros(1, 1, 2, 2), (target, torch.zeros(1, 1, 2, 2))
    )
    found = task.summary(tally)
    assert found.loss == pytest.approx((0.1 + 0.2) / 8)
    assert found.metric == pytest.approx(10 * math.log10(8 / (0.01 + 0.04)), rel=1e-5)
    assert found.examples == 2
    assert task.summary(task.tally(torch.zeros(1, 1, 2, 2), (target, torch.zeros(1, 1, 2, 2)))).metric == 120.0
    assert task.loss(output, (target, target)).item() == pytest.approx(0.3 / 4)


# ---- detection ----


def head(objects: list[tuple[int, tuple[float, float, float, float], float]], classes: int = 3) -> Tensor:
    """Cells (1, 5 + classes, 7, 7) that say these (class, box, logit of the object), one a cell."""
    cells = torch.zeros(1, BOX + classes, 7, 7)
    cells[:, 0], cells[:, 3:BOX] = -20.0, -6.0  # no object, and a box of no size
    for label, (left, top, right, bottom), logit in objects:
        x, y = (left + right) / 16, (top + bottom) / 16
        column, row = int(x), int(y)
        inside = torch.tensor([x - column, y - row]).clamp(1e-4, 1 - 1e-4)
        size = torch.tensor([(right - left) / ANCHOR, (bottom - top) / ANCHOR]).log()
        cells[0, :, row, column] = torch.cat(
            [
                torch.tensor([logit]),
                torch.logit(inside),
                size,
                30.0 * nn.functional.one_hot(torch.tensor(label), classes),
            ]
        )
    return cells


def batch(objects: list[tuple[int, tuple[float, float, float, float]]]) -> tuple[Tensor, Tensor]:
    boxes = torch.full((1, 4, 5), -1.0)
    for at, (label, box) in enumerate(objects):
        boxes[0, at] = torch.tensor([label, *box])
    return torch.zeros(1, 1, 56, 56), boxes


FIRST, SECOND, THIRD = (2.0, 4.0, 18.0, 24.0), (30.0, 4.0, 50.0, 30.0), (8.0, 30.0, 30.0, 52.0)


def test_a_head_says_boxes_in_pixels() -> None:
    found = decode(head([(2, FIRST, 5.0), (0, SECOND, 9.0)]), 56)
    assert torch.allclose(found.corners[0, :2], torch.tensor([SECOND, FIRST]), atol=2e-2)
    assert found.classes[0, :2].tolist() == [0, 2]
    assert found.scores[0, :2].tolist() == pytest.approx([0.9999, 0.9933], abs=1e-3)
    assert (found.scores[0, 2:] < 1e-6).all()
    with pytest.raises(InputError, match="detector_small"):
        decode(torch.zeros(1, 8, 5, 5), 56)


def test_of_two_boxes_of_one_thing_the_likelier_stays() -> None:
    near = (3.0, 12.0, 19.0, 32.0)  # of another cell, and more than half of the first
    assert overlaps(torch.tensor([[FIRST]]), torch.tensor([[near]])).item() < 0.5
    near = (2.0, 7.0, 18.0, 27.0)
    assert overlaps(torch.tensor([[FIRST]]), torch.tensor([[near]])).item() > 0.5
    same = decode(head([(1, FIRST, 2.0), (1, near, 3.0)]), 56)
    assert (same.scores[0] > 0.5).sum() == 1
    assert torch.allclose(same.corners[0, 0], torch.tensor(near), atol=2e-2)
    others = decode(head([(1, FIRST, 2.0), (2, near, 3.0)]), 56)
    assert (others.scores[0] > 0.5).sum() == 2


def test_average_precision_counts_each_object_once_and_in_order_of_the_scores() -> None:
    task = Detection(NOTHING, NOTHING)

    def precision(*images: tuple[list[Any], list[Any]]) -> float:
        return task.summary(torch.stack([task.tally(head(said), batch(true)) for said, true in images]).sum(0)).metric

    right = ([(0, FIRST, 4.0), (1, SECOND, 4.0)], [(0, FIRST), (1, SECOND)])
    assert precision(right) == 1.0
    assert precision(([], [(0, FIRST)])) == 0.0
    assert precision(([(2, FIRST, 4.0)], [(0, FIRST)])) == 0.0, "of another class"
    assert precision(right, ([], [(0, THIRD), (1, THIRD)])) == 0.5, "half of the objects of both classes"
    # one wrong box less likely than the right one costs nothing, one more likely halves the precision
    assert precision(([(0, FIRST, 4.0), (0, THIRD, 1.0)], [(0, FIRST)])) == 1.0
    assert precision(([(0, FIRST, 1.0), (0, THIRD, 4.0)], [(0, FIRST)])) == 0.5
    off = (10.0, 4.0, 26.0, 24.0)
    assert precision(([(0, off, 4.0)], [(0, FIRST)])) == 0.0, "half overlap is asked for"


def test_the_loss_is_least_at_the_truth() -> None:
    task = Detection(NOTHING, NOTHING)
    true = batch([(0, FIRST), (1, SECOND)])
    exact = task.loss(head([(0, FIRST, 20.0), (1, SECOND, 20.0)]), true)
    assert exact < 1e-2
    wrongs = ([(0, FIRST, 20.0)], [(2, FIRST, 20.0), (1, SECOND, 20.0)],
              [(0, (2.0, 4.0, 18.0, 28.0), 20.0), (1, SECOND, 20.0)])  # fmt: skip
    for wrong in wrongs:
        assert task.loss(head(wrong), true) > exact + 0.1
    output = head([]).requires_grad_()
    task.loss(output, true).backward()
    assert output.grad is not None
    assert (output.grad[0, 0] != 0).all()
    assert (output.grad[0, 1:].abs().sum(0) > 0).sum() == 2


# ---- all of them ----


@pytest.mark.parametrize("kind", list(MODELS))
def test_networks_learn_their_tasks(folder: Path, kind: str) -> None:
    task, test = load_garments(kind, folder, count=60, valid=12, test=12)
    torch.manual_seed(0)
    model = MODELS[kind](width=0.5)
    config = TrainConfig(steps=30, batch_size=16, learning_rate=0.05, seed=1)
    before = evaluate(model, task, task.train, config)
    train(model, task, config)
    after = evaluate(model, task, task.train, config)
    assert after.loss < 0.8 * before.loss
    assert after.metric > before.metric
    assert evaluate(model, task, test, config).examples == 12


@pytest.mark.parametrize("kind", list(MODELS))
def test_batches_of_any_size_add_up_and_a_twin_is_imitated_best(folder: Path, kind: str) -> None:
    task, _ = load_garments(kind, folder, count=20, valid=10, test=10)
    torch.manual_seed(0)
    model = MODELS[kind](width=0.25).eval()
    assert isinstance(task, Task)
    with torch.no_grad():
        batches = [task.valid.take(np.arange(a, b)) for a, b in ((0, 10), (0, 3), (3, 10))]
        tallies = [task.tally(model(b[0]), b) for b in batches]
        one, two = task.summary(tallies[0]), task.summary(tallies[1] + tallies[2])
        assert (one.examples, one.metric) == (two.examples, pytest.approx(two.metric))
        assert one.loss == pytest.approx(two.loss)
        assert one.loss == pytest.approx(float(task.loss(model(batches[0][0]), batches[0])), rel=1e-5)
        said = model(batches[0][0])
        other = said + torch.randn(said.shape, generator=torch.Generator().manual_seed(0))
        assert task.imitate(said, said) < task.imitate(other, said)


def test_tasks_are_frozen_and_say_their_metric(folder: Path) -> None:
    names = {kind: load_garments(kind, folder, count=20, valid=10)[0].metric_name for kind in MODELS}
    assert names == {"segmentation": "mIoU", "detection": "AP at IoU 0.5", "translation": "PSNR"}
    assert replace(Segmentation(NOTHING, NOTHING), metric_name="IoU").metric_name == "IoU"
