"""Data from folders in their published layouts, each from a tiny stand-in, and tasks of several labels."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.data import Subset
from hwsearch.train.folders import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, attributes, cifar10, class_folders
from hwsearch.train.task import Classification, MultiLabel, load_task

Image = pytest.importorskip("PIL.Image")

_FOUND = importlib.util.spec_from_file_location("stand_ins", Path(__file__).with_name("stand_ins.py"))
assert _FOUND is not None
assert _FOUND.loader is not None
stand_ins = importlib.util.module_from_spec(_FOUND)
_FOUND.loader.exec_module(stand_ins)
make_imagenet, make_cifar10, make_celeba = stand_ins.make_imagenet, stand_ins.make_cifar10, stand_ins.make_celeba


def test_class_folders_give_images_of_the_asked_size(tmp_path: Path) -> None:
    train, val = class_folders(make_imagenet(tmp_path, images=3), size=24)
    assert (len(train), len(val)) == (6, 4)
    images, classes = train.take(np.array([0, 5]))
    assert images.shape == (2, 3, 24, 24)
    assert classes.tolist() == [0, 1]
    # The stand-ins are of one colour each: dark in the first class, bright in the second.
    colour = images.mean((2, 3)) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    assert colour[0].mean() < 0.4 < 0.6 < colour[1].mean()


def test_augmentation_is_the_generators_and_changes_the_cut(tmp_path: Path) -> None:
    train, _ = class_folders(make_imagenet(tmp_path, images=2, noise=True), size=16)
    plain, same = (train.take(np.array([0]))[0] for _ in range(2))
    assert torch.equal(plain, same)
    one, again, other = (train.take(np.array([0]), augment=np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_an_image_that_claims_to_be_enormous_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "huge.bmp")
    content = bytearray((tmp_path / "huge.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", 400_000, 400_000)
    (tmp_path / "huge.bmp").write_bytes(content)
    with pytest.raises(SchemaError, match=r"huge\.bmp is no image that can be read"):
        ImageFiles((tmp_path / "huge.bmp",), torch.zeros(1), 8).take(np.array([0]))


def test_a_folder_without_classes_and_a_broken_image_are_told(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path, images=2)
    (root / "val" / "n01").rename(root / "val" / "other")
    with pytest.raises(InputError, match=r"in val, n01 in one of them alone: .* same classes"):
        class_folders(root)
    (root / "val" / "other").rename(root / "val" / "n01")
    (root / "val" / ".checkpoints").mkdir()  # what editors leave is no class
    assert len(class_folders(root)[1]) == 4
    next((root / "train" / "n00").iterdir()).write_bytes(b"no image")
    with pytest.raises(SchemaError, match="no image that can be read"):
        class_folders(root, size=8)[0].take(np.arange(2))
    with pytest.raises(InputError, match="cannot read"):
        class_folders(tmp_path / "nowhere")


def test_cifar10_is_read_from_its_binary_files(tmp_path: Path) -> None:
    root = make_cifar10(tmp_path, images=4)
    train, test = cifar10(root, shift=0, flip=False)
    assert (len(train), len(test)) == (20, 4)
    images, classes = train.take(np.array([1]))
    assert images.shape == (1, 3, 32, 32)
    assert classes.tolist() == [1]
    raw = np.fromfile(root / "cifar-10-batches-bin" / "data_batch_1.bin", dtype=np.uint8).reshape(-1, 3073)
    assert torch.equal(train.inputs[1].flatten(), torch.from_numpy(raw[1, 1:]))
    (root / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(SchemaError, match="5 bytes"):
        cifar10(root)
    (root / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match="data_batch_3"):
        cifar10(root)


def test_attributes_are_labels_of_zero_and_one(tmp_path: Path) -> None:
    train, test, names = attributes(make_celeba(tmp_path, images=6), size=16)
    assert names == ("Bright", "Red", "Large")
    assert (len(train), len(test)) == (4, 2)
    images, labels = train.take(np.arange(4))
    assert images.shape == (4, 3, 16, 16)
    assert set(labels.unique().tolist()) <= {0.0, 1.0}
    assert labels[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]
    lines = (tmp_path / "celeba" / "list_attr_celeba.txt").read_text().replace(" -1 ", " 7 ", 1)
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text(lines)
    with pytest.raises(SchemaError, match="does not fit its header"):
        attributes(tmp_path / "celeba")


def test_a_folder_is_recognised_by_its_layout(tmp_path: Path) -> None:
    single, _ = load_task(str(make_imagenet(tmp_path, images=3)), valid=2, size=8)
    assert isinstance(single, Classification)
    assert (len(single.train), len(single.valid)) == (4, 2)
    several, test = load_task(str(make_celeba(tmp_path, images=6)), valid=1, size=8)
    assert isinstance(several, MultiLabel)
    assert isinstance(several.train, Subset)
    assert (len(several.train), len(several.valid), len(test)) == (3, 1, 2)
    small, _ = load_task(str(make_cifar10(tmp_path, images=2)), valid=5)
    assert (len(small.train), len(small.valid)) == (5, 5)


def test_several_labels_are_judged_one_by_one() -> None:
    task = MultiLabel(None, None)  # type: ignore[arg-type]
    output = torch.tensor([[2.0, -1.0], [-3.0, -0.5]])
    batch = (torch.zeros(2, 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    expected = functional.binary_cross_entropy_with_logits(output, batch[1])
    assert float(task.loss(output, batch)) == pytest.approx(float(expected))
    judged = task.summary(task.tally(output, batch) + task.tally(output, batch))
    assert judged.metric == 0.75
    assert judged.loss == pytest.approx(float(expected))
    assert judged.examples == 4
    sure = torch.tensor([[9.0, -9.0]])
    assert float(task.imitate(sure, sure)) < float(task.imitate(-sure, sure))
