"""Pictures made of Fashion-MNIST's garments, with something to say of every pixel: for tasks beyond classification.

``segmentation`` and ``detection`` show several garments on one canvas, ``translation`` the edges of one garment whose
picture is wanted. The garments are real, what is composed of them is a function of the seed; training pictures are made
of training garments only, the test's of test garments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.train.data import Examples, TensorExamples, split
from hwsearch.train.fashion_mnist import MEAN, STD, load_fashion_mnist
from hwsearch.train.seeds import generator
from hwsearch.train.task import GARMENTS

if TYPE_CHECKING:
    from pathlib import Path

    from hwsearch.train.task import Task

#: Pictures of the training part (held-out ones included) and of the test, where nothing else is asked for.
COUNT, TEST_COUNT = 9000, 1000
#: Sides of a garment on a canvas, in pixels.
SIDES = (16, 20, 24, 28)
#: A pixel of a garment is brighter than this, of 255: its outline, not the noise around it.
VISIBLE = 32
#: An edge is where brightness changes by more than this, of 255, from pixel to pixel.
EDGE = 56

_TRIES = 8  # places that are tried for a garment before it is left out
_OVERLAP = 0.1  # most of a garment's box that an earlier one may cover


@dataclass(frozen=True, eq=False)
class Scenes:
    """Canvases with garments.

    Attributes:
        images: (N, 1, side, side) uint8.
        classes: (N, side, side) uint8: 0 where nothing is, else 1 + the garment's class.
        boxes: (N, most, 5) float32: class, left, top, right, bottom in pixels; class -1 where there is no garment.
    """

    images: Tensor
    classes: Tensor
    boxes: Tensor


def scenes(source: TensorExamples, count: int, *, side: int = 56, most: int = 4, seed: int = 0) -> Scenes:
    """Compose ``count`` canvases of 1 to ``most`` garments at random places, in four sizes, hardly overlapping.

    Args:
        source: garments (N, 1, h, w) uint8 and their classes (N,).
        side: of the canvas, in pixels.

    Raises:
        InputError: a canvas smaller than a garment, or a count below 1.

    Example:
        >>> from hwsearch.train.data import synthetic_images
        >>> made = scenes(synthetic_images(8), 3)
        >>> tuple(made.images.shape), tuple(made.boxes.shape)
        ((3, 1, 56, 56), (3, 4, 5))
    """
    if side < max(SIDES) or count < 1 or most < 1:
        raise InputError(
            f"{count} canvases of side {side} with up to {most} garments: give 1 or more of each, and a side of "
            f"{max(SIDES)} pixels or more"
        )
    labels = source.targets.numpy()
    sized = {s: functional.adaptive_avg_pool2d(source.inputs.float(), s).round().to(torch.uint8).numpy() for s in SIDES}
    images = np.zeros((count, side, side), dtype=np.uint8)
    classes = np.zeros((count, side, side), dtype=np.uint8)
    boxes = np.full((count, most, 5), -1, dtype=np.float32)
    for at in range(count):
        rng = generator(seed, "scene", at)
        placed: list[tuple[int, int, int]] = []
        for _ in range(int(rng.integers(1, most + 1))):
            which, size = int(rng.integers(len(labels))), int(rng.choice(SIDES))
            corners = rng.integers(0, side - size + 1, size=(_TRIES, 2)).tolist()
            free = next((c for c in corners if all(_free(c, size, other) for other in placed)), None)
            garment = sized[size][which, 0]
            seen = garment > VISIBLE
            if free is None or not seen.any():
                continue
            left, top = free
            window = (at, slice(top, top + size), slice(left, left + size))
            images[window] = np.maximum(images[window], garment)
            classes[window] = np.where(seen, 1 + labels[which], classes[window])
            rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
            edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            boxes[at, len(placed)] = (labels[which], *edges)
            placed.append((left, top, size))
    return Scenes(torch.from_numpy(images[:, None]), torch.from_numpy(classes), torch.from_numpy(boxes))


def edges(images: Tensor) -> Tensor:
    """Where brightness changes, as 0 or 255: uint8 images (N, 1, h, w) to uint8 (N, 1, h, w), by Sobel's filter.

    Example:
        >>> step = torch.zeros(1, 1, 3, 4, dtype=torch.uint8)
        >>> step[..., 2:] = 200
        >>> edges(step)[0, 0, 1].tolist()
        [0, 255, 255, 0]
    """
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    padded = functional.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    slopes = functional.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return (slopes.square().sum(dim=1, keepdim=True).sqrt() > EDGE).to(torch.uint8) * 255


def load_garments(
    kind: str,
    folder: str | Path | None = None,
    *,
    count: int | None = None,
    valid: int = 1000,
    test: int = TEST_COUNT,
    seed: int = 0,
) -> tuple[Task, Examples]:
    """The task of a kind, and its test set, which no search may look at.

    * ``segmentation``: canvases (1, 56, 56) to 11 classes a pixel, see ``Segmentation``;
    * ``detection``: the same canvases to boxes of garments in cells of 8 pixels, see ``Detection``;
    * ``translation``: edges (1, 28, 28) to the garment's picture, see ``Translation``.

    Args:
        folder: of Fashion-MNIST's files, see ``load_fashion_mnist``.
        count: training pictures, the ``valid`` held-out ones included; ``None``: 9000.
        test: test pictures.
        seed: of the split; the pictures themselves are the same for every seed.

    Raises:
        InputError: an unknown kind, missing files, or more held out than there is.
    """
    from hwsearch.train.detection import Detection
    from hwsearch.train.segmentation import Segmentation
    from hwsearch.train.translation import Translation

    if kind not in GARMENTS:
        raise InputError(f"there is no task {kind!r} of garments; give one of {', '.join(GARMENTS)}")
    sources = load_fashion_mnist(folder)
    make = {"segmentation": _masks, "detection": _boxes, "translation": _pictures}[kind]
    whole, tested = (
        make(source, number, at)
        for at, (source, number) in enumerate(zip(sources, (COUNT if count is None else count, test), strict=True))
    )
    train, held_out = split(whole, valid, seed)
    if kind == "segmentation":
        return Segmentation(train, held_out), tested
    return (Detection(train, held_out) if kind == "detection" else Translation(train, held_out)), tested


def _masks(source: TensorExamples, count: int, seed: int) -> TensorExamples:
    made = scenes(source, count, seed=seed)
    return TensorExamples(made.images, made.classes, mean=(MEAN,), std=(STD,))


def _boxes(source: TensorExamples, count: int, seed: int) -> TensorExamples:
    made = scenes(source, count, seed=seed)
    return TensorExamples(made.images, made.boxes, mean=(MEAN,), std=(STD,))


def _pictures(source: TensorExamples, count: int, seed: int) -> TensorExamples:
    order = generator(seed, "pictures").permutation(len(source))[:count]
    images = source.inputs[torch.from_numpy(np.sort(order))]
    return TensorExamples(edges(images), images, mean=(0.5,), std=(0.5,))


def _free(corner: list[int], size: int, other: tuple[int, int, int]) -> bool:
    """Whether a square at ``corner`` (left, top) hardly covers another one (left, top, size)."""
    wide, high = (
        max(min(corner[axis] + size, other[axis] + other[2]) - max(corner[axis], other[axis]), 0) for axis in (0, 1)
    )
    return wide * high <= _OVERLAP * min(size, other[2]) ** 2
