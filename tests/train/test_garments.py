"""Composed pictures: functions of their seeds, whose masks and boxes say where the garments are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from garment_files import make_garments

from hwsearch.errors import InputError
from hwsearch.train.data import TensorExamples
from hwsearch.train.detection import Detection, overlaps
from hwsearch.train.fashion_mnist import load_fashion_mnist
from hwsearch.train.garments import SIDES, VISIBLE, edges, load_garments, scenes
from hwsearch.train.segmentation import Segmentation
from hwsearch.train.task import GARMENTS, Task, load_task
from hwsearch.train.translation import Translation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_garments(tmp_path_factory.mktemp("garments"))


@pytest.fixture(scope="module")
def source(folder: Path) -> TensorExamples:
    return load_fashion_mnist(folder)[0]


def test_a_scene_shows_what_its_mask_and_its_boxes_say(source: TensorExamples) -> None:
    made = scenes(source, 40, seed=3)
    assert made.images.shape == (40, 1, 56, 56)
    assert (made.classes.shape, made.boxes.shape) == ((40, 56, 56), (40, 4, 5))
    assert torch.equal(made.classes > 0, made.images[:, 0] > VISIBLE)
    counts = (made.boxes[..., 0] >= 0).sum(dim=1)
    assert counts.min() >= 1
    assert {1, 2, 3} <= set(counts.tolist())
    for image, boxes in zip(made.classes, made.boxes, strict=True):
        true = boxes[boxes[:, 0] >= 0]
        assert set((image[image > 0] - 1).tolist()) == set(true[:, 0].int().tolist())
        covered = torch.zeros_like(image, dtype=torch.bool)
        for _, left, top, right, bottom in true.int().tolist():
            assert 0 <= left < right <= 56
            assert 0 <= top < bottom <= 56
            assert max(right - left, bottom - top) <= max(SIDES)
            covered[top:bottom, left:right] = True
        assert not (image > 0)[~covered].any(), "a visible pixel outside of all boxes"
        shares = overlaps(true[None, :, 1:], true[None, :, 1:])[0] - torch.eye(len(true))
        assert shares.max() < 0.5, "two garments on one place"


def test_a_lone_garments_box_is_tight(source: TensorExamples) -> None:
    made = scenes(source, 30, most=1, seed=1)
    for image, (box,) in zip(made.classes.numpy(), made.boxes.numpy(), strict=True):
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert box[1:].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_scenes_are_the_seeds(source: TensorExamples) -> None:
    first, again, longer, other = (scenes(source, n, seed=s) for n, s in ((5, 0), (5, 0), (8, 0), (5, 1)))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, longer.images[:5]), "more pictures do not change the first ones"
    assert not torch.equal(first.images, other.images)
    with pytest.raises(InputError, match="28 pixels or more"):
        scenes(source, 1, side=20)


def test_edges_are_where_brightness_changes() -> None:
    picture = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    picture[..., 3:6, 3:6] = 200
    found = edges(picture)[0, 0] > 0
    assert found[3, 3]
    assert found[2, 4]
    assert not found[4, 4]
    assert not found[0, :].any()


@pytest.mark.parametrize(
    ("kind", "type_", "shapes"),
    [
        ("segmentation", Segmentation, ((1, 56, 56), (56, 56))),
        ("detection", Detection, ((1, 56, 56), (4, 5))),
        ("translation", Translation, ((1, 28, 28), (1, 28, 28))),
    ],
)
def test_each_kind_is_a_task_with_a_test_set_of_other_garments(
    folder: Path, kind: str, type_: type, shapes: tuple[tuple[int, ...], ...]
) -> None:
    task, test = load_task(kind, folder=str(folder), valid=10, limit_to=40, seed=2)
    assert isinstance(task, type_)
    assert isinstance(task, Task)
    assert (len(task.train), len(task.valid)) == (30, 10)
    assert tuple(tensor.shape[1:] for tensor in task.valid.take(np.arange(2))) == shapes
    again, _ = load_garments(kind, folder, count=40, valid=10, seed=2)
    assert again.train.identity == task.train.identity
    assert test.identity not in (task.train.identity, task.valid.identity)
    other, _ = load_garments(kind, folder, count=40, valid=10, seed=3)
    assert other.train.identity != task.train.identity


def test_an_unknown_kind_and_a_missing_folder_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one of segmentation, detection, translation"):
        load_garments("depth", folder)
    with pytest.raises(InputError, match="lacks"):
        load_garments(GARMENTS[0], tmp_path)
