"""Data sets from folders as they are published: class folders, CIFAR-10's binary files, CelebA's attributes.

Images in files are decoded when a batch asks for them (with Pillow), so a data set need not fit in memory; CIFAR-10 is
read whole. Nothing here reads a pickle: of CIFAR-10's three published forms it takes the binary one.
"""

from __future__ import annotations

import importlib
import itertools
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.data import Batch, TensorExamples
from hwsearch.train.seeds import generator

#: Mean and standard deviation of ImageNet's training images, per channel, after division by 255.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The same of CIFAR-10.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

#: Of the picture files that are read.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_TEST_SHARE = 5  # one in so many
_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files and their targets; decoded, cut and normalised a batch at a time.

    Args:
        paths: of the files.
        targets: (N, ...), class numbers or labels.
        size: side of the square that comes out, in pixels.
        area: smallest share of an image that the random cut of an augmented batch keeps; it is mirrored half the time.
            Not augmented: the short side becomes ``size / 0.875``, and the middle is cut out.

    Reference: the training cut is that of Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6.
    """

    paths: tuple[Path, ...]
    targets: torch.Tensor
    size: int = 224
    area: float = 0.08
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.targets) or not self.paths:
            raise InputError(f"{len(self.paths)} images and {len(self.targets)} targets; give one for each")
        if self.size < 1 or not 0 < self.area <= 1:
            raise InputError(f"size {self.size} and area {self.area}: give 1 pixel or more and a share up to 1")

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def identity(self) -> str:
        """Names and targets; the pictures themselves are not read for it."""
        names = zlib.crc32("\n".join(f"{p.parent.name}/{p.name}" for p in self.paths).encode())
        labels = zlib.crc32(self.targets.contiguous().numpy().tobytes())
        return f"images {len(self)} {names:08x} {labels:08x} {(self.size, self.area, self.mean, self.std)}"

    def take(self, indices: np.ndarray, *, augment: np.random.Generator | None = None) -> Batch:
        """Batch of (images (B, 3, size, size) float32, targets)."""
        pictures = np.stack([self._picture(self.paths[int(index)], augment) for index in indices])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255.0)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std, self.targets[torch.from_numpy(np.asarray(indices, dtype=np.int64))]

    def _picture(self, path: Path, augment: np.random.Generator | None) -> np.ndarray:
        """One image (size, size, 3) uint8."""
        pillow = _pillow()
        try:
            with pillow.open(path) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise SchemaError(f"{path} is no image that can be read ({error}); restore it") from error
        width, height = image.size
        if augment is None:
            scale = self.size / 0.875 / min(width, height)
            image = image.resize((max(round(width * scale), self.size), max(round(height * scale), self.size)))
            left, top = (image.size[0] - self.size) // 2, (image.size[1] - self.size) // 2
            return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        area = width * height * augment.uniform(self.area, 1.0)
        ratio = float(np.exp(augment.uniform(np.log(3 / 4), np.log(4 / 3))))
        wide, high = min(round((area * ratio) ** 0.5), width), min(round((area / ratio) ** 0.5), height)
        left, top = (int(augment.integers(0, room + 1)) for room in (width - wide, height - high))
        image = image.resize((self.size, self.size), box=(left, top, left + max(wide, 1), top + max(high, 1)))
        picture = np.asarray(image)
        return picture[:, ::-1] if augment.random() < 0.5 else picture


def class_folders(folder: str | Path, *, size: int = 224) -> tuple[ImageFiles, ImageFiles]:
    """(train, val) of a folder in ImageNet's layout: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

    Where there is no ``val`` but a ``test``, that is taken.

    Raises:
        InputError: a folder is missing or empty, or the two parts have different classes.
    """
    root = Path(folder)
    other = "test" if not (root / "val").is_dir() and (root / "test").is_dir() else "val"
    names = {part: sorted(p.name for p in _listed(root / part) if _is_class(p)) for part in ("train", other)}
    if names["train"] != names[other] or not names["train"]:
        odd = sorted({*names["train"]} ^ {*names[other]})
        alone = f", {odd[0]} in one of them alone" if odd else ""
        raise InputError(
            f"{root} has {len(names['train'])} classes in train and {len(names[other])} in {other}{alone}: give "
            "ImageNet's layout, train/<class>/ and val/<class>/ with the same classes"
        )
    parts = []
    for part in ("train", other):
        pairs = [
            (path, number)
            for number, name in enumerate(names[part])
            for path in sorted(_listed(root / part / name))
            if path.suffix.lower() in ENDINGS
        ]
        targets = torch.tensor([number for _, number in pairs], dtype=torch.int64)
        parts.append(ImageFiles(tuple(path for path, _ in pairs), targets, size))
    return parts[0], parts[1]


def has_class_folders(folder: str | Path) -> bool:
    """Whether a folder holds at least two folders with pictures in them, a class each."""
    root = Path(folder)
    if not root.is_dir():
        return False
    found = (p for p in _listed(root) if _is_class(p) and any(q.suffix.lower() in ENDINGS for q in _listed(p)))
    return len(list(itertools.islice(found, 2))) == 2


def unsplit_class_folders(folder: str | Path, *, size: int = 224, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
    """(train, test) of a folder with a folder a class and no parts, as torchvision's ``ImageFolder`` takes it.

    One in five pictures of each class, drawn by the seed, is the test set.

    Raises:
        InputError: a class has no picture to spare.
    """
    root = Path(folder)
    train: list[tuple[Path, int]] = []
    test: list[tuple[Path, int]] = []
    names = sorted(p.name for p in _listed(root) if _is_class(p))
    for number, name in enumerate(names):
        paths = sorted(path for path in _listed(root / name) if path.suffix.lower() in ENDINGS)
        spared = len(paths) // _TEST_SHARE
        if not spared:
            raise InputError(f"{root / name} has {len(paths)} pictures: give {_TEST_SHARE} or more of each class")
        order = generator(seed, "test set", number).permutation(len(paths))
        train += [(paths[at], number) for at in sorted(order[spared:])]
        test += [(paths[at], number) for at in sorted(order[:spared])]
    parts = []
    for pairs in (train, test):
        targets = torch.tensor([number for _, number in pairs], dtype=torch.int64)
        parts.append(ImageFiles(tuple(path for path, _ in pairs), targets, size))
    return parts[0], parts[1]


def cifar10(folder: str | Path, *, shift: int = 4, flip: bool = True) -> tuple[TensorExamples, TensorExamples]:
    """(train, test) of CIFAR-10's binary version, ``cifar-10-batches-bin``: images (N, 3, 32, 32), classes 0 to 9.

    Args:
        folder: holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or the folder that has them.
        shift, flip: augmentation of the training images, see ``TensorExamples``.

    Raises:
        InputError: a file is missing.
        SchemaError: a file does not hold whole records, or a class is not 0 to 9.

    Reference: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    root = Path(folder)
    root = root / "cifar-10-batches-bin" if (root / "cifar-10-batches-bin").is_dir() else root
    parts = [_records([root / f"data_batch_{n}.bin" for n in range(1, 6)]), _records([root / "test_batch.bin"])]
    return (
        TensorExamples(*parts[0], mean=CIFAR_MEAN, std=CIFAR_STD, shift=shift, flip=flip),
        TensorExamples(*parts[1], mean=CIFAR_MEAN, std=CIFAR_STD),
    )


def attributes(folder: str | Path, *, size: int = 224) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """(train and validation images, test images, names of the labels) in CelebA's layout; labels (N, K) 0 or 1.

    Args:
        folder: holds ``list_attr_celeba.txt`` (count, names, then a file name and K values of 1 or -1 a line),
            ``list_eval_partition.txt`` (file name and 0, 1 or 2 a line) and the images in ``img_align_celeba``.

    Raises:
        InputError: a file is missing.
        SchemaError: a line does not have as many values as there are names.
    """
    root = Path(folder)
    lines = _text(root / "list_attr_celeba.txt")
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    parts = dict(line.split()[:2] for line in _text(root / "list_eval_partition.txt") if line.strip())
    rows: dict[bool, list[tuple[Path, list[float]]]] = {True: [], False: []}
    for number, line in enumerate(lines[2:], 3):
        if not line.strip():
            continue
        name, *values = line.split()
        if len(values) != len(names) or name not in parts or not {*values} <= {"1", "-1"}:
            file = root / "list_attr_celeba.txt"
            raise SchemaError(f"{file} line {number} does not fit its header; download it again")
        rows[parts[name] == "2"].append((root / "img_align_celeba" / name, [float(value == "1") for value in values]))
    made = [
        ImageFiles(tuple(path for path, _ in found), torch.tensor([labels for _, labels in found]), size, area=0.5)
        for found in (rows[False], rows[True])
    ]
    return made[0], made[1], names


def _records(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and classes of CIFAR-10's binary files."""
    parts = []
    for path in paths:
        try:
            raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}; name the folder of CIFAR-10's binary version"
            ) from error
        if len(raw) == 0 or len(raw) % _RECORD:
            raise SchemaError(f"{path} has {len(raw)} bytes, no whole records of {_RECORD}; download it again")
        parts.append(raw.reshape(-1, _RECORD))
    rows = np.concatenate(parts)
    if rows[:, 0].max() > 9:
        raise SchemaError(f"{paths[0].parent} has class {rows[:, 0].max()}, not 0 to 9; download CIFAR-10 again")
    images = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(rows[:, 0].astype(np.int64))


def _is_class(path: Path) -> bool:
    """Not a folder that an editor or a file system left there (``.ipynb_checkpoints``)."""
    return path.is_dir() and not path.name.startswith(".")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}; name a folder in the published layout") from error


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; name a folder in CelebA's layout") from error


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise InputError("images in files need Pillow; install it with: pip install 'hwsearch[images]'") from error
