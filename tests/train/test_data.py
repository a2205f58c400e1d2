"""Examples: normalising, augmenting, splitting and shuffling by seeds; Fashion-MNIST's files checked."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.data import (
    Shuffle,
    TensorExamples,
    in_order,
    limit,
    split,
    synthetic_images,
)
from hwsearch.train.fashion_mnist import load_fashion_mnist, read_idx
from hwsearch.train.seeds import generator, torch_seed


def numbered(count: int = 20, **settings: object) -> TensorExamples:
    """Images whose pixels say which example and which place they are."""
    pixels = torch.arange(count * 2 * 5 * 6).reshape(count, 2, 5, 6) % 251
    return TensorExamples(pixels.to(torch.uint8), torch.arange(count), **settings)  # type: ignore[arg-type]


def test_batches_are_normalised_per_channel() -> None:
    examples = numbered(mean=(0.5, 0.25), std=(0.5, 2.0))
    images, targets = examples.take(np.array([3, 7]))
    raw = examples.inputs[[3, 7]].double() / 255
    expected = (raw - torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)) / torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), expected, atol=1e-6, rtol=1e-6)
    assert targets.tolist() == [3, 7]


def test_floating_point_inputs_are_not_divided() -> None:
    examples = TensorExamples(torch.full((4, 3), 2.0), torch.zeros(4))
    assert examples.take(np.array([0]))[0].tolist() == [[2.0, 2.0, 2.0]]


def test_shift_moves_by_whole_pixels_and_fills_with_zeros() -> None:
    examples = numbered(shift=2)
    plain = examples.take(np.arange(20))[0]
    moved = examples.take(np.arange(20), augment=generator(0, "augment", 5))[0]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    seen = set()
    for image in range(20):
        corners = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(moved[image], padded[image, :, dy : dy + 5, dx : dx + 6])
        ]
        assert corners, "an augmented image is no shift of the original"
        seen.update(corners)
    assert len(seen) > 5


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    examples = numbered(count=200, flip=True)
    plain = examples.take(np.arange(200))[0]
    moved = examples.take(np.arange(200), augment=generator(0, "augment", 1))[0]
    mirrored = [torch.equal(moved[i], plain[i].flip(2)) for i in range(200)]
    assert all(torch.equal(moved[i], plain[i]) for i in range(200) if not mirrored[i])
    assert 70 < sum(mirrored) < 130


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    examples = numbered(shift=2, flip=True)
    first, again, other = (examples.take(np.arange(20), augment=generator(1, "augment", step))[0] for step in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("inputs", "targets", "settings", "word"),
    [
        (torch.zeros(3, 1), torch.zeros(2), {}, "3 inputs but 2 targets"),
        (torch.zeros(0, 1), torch.zeros(0), {}, "empty"),
        (torch.zeros(3), torch.zeros(3), {}, "shape"),
        (torch.zeros(3, 2), torch.zeros(3), {"mean": (1.0, 2.0, 3.0)}, "mean has 3 values"),
        (torch.zeros(3, 2), torch.zeros(3), {"std": (0.0,)}, "std"),
        (torch.zeros(3, 2), torch.zeros(3), {"shift": 1}, "images"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(3, 4, 4), {"flip": True}, "targets"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(3), {"shift": -1}, "shift is -1"),
    ],
)
def test_what_does_not_fit_is_refused(
    inputs: torch.Tensor, targets: torch.Tensor, settings: dict[str, object], word: str
) -> None:
    with pytest.raises(InputError, match=word):
        TensorExamples(inputs, targets, **settings)  # type: ignore[arg-type]


def test_shuffle_visits_every_example_once_an_epoch_and_needs_no_memory() -> None:
    shuffle = Shuffle(count=23, batch_size=5, seed=3)
    assert shuffle.steps_per_epoch == 4
    epoch = np.concatenate([shuffle.indices(step) for step in range(4)])
    assert len(set(epoch.tolist())) == 20
    later = Shuffle(count=23, batch_size=5, seed=3).indices(6)
    assert np.array_equal(later, [shuffle.indices(step) for step in range(7)][6])
    assert not np.array_equal(shuffle.indices(0), shuffle.indices(4))
    assert Shuffle(count=3, batch_size=8, seed=0).indices(0).shape == (3,)


def test_split_and_limit_are_disjoint_seeded_and_checked() -> None:
    examples = numbered(count=40)
    train, valid = split(examples, 10, seed=1)
    labels = [set(batch.tolist()) for batch in (train.take(np.arange(30))[1], valid.take(np.arange(10))[1])]
    assert not labels[0] & labels[1]
    assert labels[0] | labels[1] == set(range(40))
    assert split(examples, 10, seed=1)[1].identity == valid.identity
    assert split(examples, 10, seed=2)[1].identity != valid.identity
    assert len(limit(examples, 7, seed=0)) == 7
    assert limit(examples, None, seed=0) is examples
    assert limit(examples, 400, seed=0) is examples
    with pytest.raises(InputError, match="cannot hold out 40 of 40"):
        split(examples, 40, seed=0)
    with pytest.raises(InputError, match="limit is 0"):
        limit(examples, 0, seed=0)


def test_identity_tells_data_apart() -> None:
    one, same, other = synthetic_images(16, seed=0), synthetic_images(16, seed=0), synthetic_images(16, seed=1)
    assert one.identity == same.identity
    assert one.identity != other.identity


def test_in_order_yields_everything_once() -> None:
    targets = torch.cat([batch[1] for batch in in_order(numbered(count=11), 4)])
    assert targets.tolist() == list(range(11))


def test_streams_are_independent_and_negative_seeds_are_refused() -> None:
    assert generator(0, "a", 1).random() != generator(0, "b", 1).random()
    assert generator(0, "a", 1).random() != generator(0, "a", 2).random()
    assert torch_seed(0, "a", 1) == torch_seed(0, "a", 1) < 2**63
    with pytest.raises(InputError, match="seed is -1"):
        generator(-1, "a")


def write_idx(path: Path, values: np.ndarray, *, magic: int | None = None) -> None:
    header = struct.pack(f">I{values.ndim}I", magic or (8 << 8 | values.ndim), *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny folder of Fashion-MNIST's layout: two files gzipped, two plain."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 5)):
        suffix = ".gz" if part == "train" else ""
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", rng.integers(0, 10, count))
    return tmp_path


def test_fashion_mnist_is_read_from_its_four_files(folder: Path) -> None:
    train, test = load_fashion_mnist(folder, shift=2, flip=True)
    assert (train.inputs.shape, test.inputs.shape) == ((12, 1, 28, 28), (5, 1, 28, 28))
    assert (train.shift, train.flip, test.shift, test.flip) == (2, True, 0, False)
    assert train.targets.dtype == torch.int64
    assert torch.equal(
        train.inputs[3, 0], torch.from_numpy(read_idx(folder / "train-images-idx3-ubyte.gz", 3)[3].copy())
    )


def test_fashion_mnist_missing_says_where_it_looked(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"lacks train-labels-idx1-ubyte\.gz"):
        load_fashion_mnist(folder)
    monkeypatch.setattr("hwsearch.train.fashion_mnist.default_folders", lambda: (tmp_path / "nowhere",))
    with pytest.raises(InputError, match=r"was not found in .*nowhere"):
        load_fashion_mnist()


def test_damaged_files_are_refused_by_name(folder: Path) -> None:
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SchemaError, match=r"train-images.*not a whole gzip file"):
        load_fashion_mnist(folder)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-100]))
    with pytest.raises(SchemaError, match=r"train-images.*header says"):
        load_fashion_mnist(folder)
    images.write_bytes(gzip.compress(b"<html>not found</html>"))
    with pytest.raises(SchemaError, match="no IDX file"):
        load_fashion_mnist(folder)
    write_idx(images, np.zeros((12, 28, 27)))
    with pytest.raises(SchemaError, match="28x27"):
        load_fashion_mnist(folder)
    images.write_bytes(whole)
    write_idx(labels, np.zeros(11))
    with pytest.raises(SchemaError, match=r"12 images.* 11 labels"):
        load_fashion_mnist(folder)
    write_idx(labels, np.full(12, 10))
    with pytest.raises(SchemaError, match="class 10"):
        load_fashion_mnist(folder)
