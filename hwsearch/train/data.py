"""Examples by index: what a training loop needs of a data set, and nothing that has a state.

A loop asks for the examples of a step by their indices, and the indices are a function of (seed, step). So there are no
iterators and no workers to restore after a kill, and the same code serves tensors in memory and any torch data set.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hwsearch.errors import InputError
from hwsearch.train.seeds import generator

#: What one step sees. The first tensor is the model's input, the others are the task's own business.
Batch = tuple[Tensor, ...]

_MOST_HELD_OUT = 5000  # where nothing is said


@runtime_checkable
class Examples(Protocol):
    """A finite set of examples that can be asked for by index."""

    @property
    def identity(self) -> str:
        """A short text that changes when the data does: a checkpoint refuses to go on with other data."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, *, augment: np.random.Generator | None = None) -> Batch:
        """The examples at ``indices`` (int64, shape (B,)) as one batch; augmented only where a generator is given."""


@dataclass(frozen=True, eq=False)
class TensorExamples:
    """A whole data set in memory, normalised (and augmented) a batch at a time.

    Args:
        inputs: (N, C, ...) uint8, divided by 255 first, or floating point.
        targets: (N, ...), any dtype: class numbers, values, masks.
        mean, std: per channel, after the division by 255; one value serves all channels.
        shift: augmentation: move the image by up to this many pixels each way; zeros come in, before normalising.
        flip: augmentation: mirror left and right, with probability one half.

    Raises:
        InputError: counts differ, nothing is there, or an augmentation does not fit the shapes.
    """

    inputs: Tensor
    targets: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise InputError(f"{len(self.inputs)} inputs but {len(self.targets)} targets; give one for each input")
        if len(self.inputs) == 0:
            raise InputError("the data set is empty; give at least one example")
        if self.inputs.dim() < 2:
            raise InputError(f"inputs have shape {tuple(self.inputs.shape)}; give (examples, channels, ...)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.inputs.shape[1]):
                raise InputError(f"{name} has {len(values)} values for {self.inputs.shape[1]} channels; give one each")
        if min(self.std) <= 0:
            raise InputError(f"std is {self.std}; give values above 0")
        if self.shift < 0:
            raise InputError(f"shift is {self.shift}; give 0 or more pixels")
        if self.shift or self.flip:
            if self.inputs.dim() != 4:
                raise InputError(
                    f"shift and flip need images (N, C, H, W), not {tuple(self.inputs.shape)}; leave them out"
                )
            if self.targets.dim() > 2:
                raise InputError(
                    f"shift and flip would move the inputs but not the targets {tuple(self.targets.shape)}; "
                    "set both to 0 or augment in an Examples class of your own"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def identity(self) -> str:
        """Shape, normalisation and checksums of the tensors' bytes."""
        parts = (_checksum(self.inputs), _checksum(self.targets))
        settings = (self.mean, self.std, self.shift, self.flip)
        return f"tensors {tuple(self.inputs.shape)} {parts[0]:08x} {parts[1]:08x} {settings}"

    def take(self, indices: np.ndarray, *, augment: np.random.Generator | None = None) -> Batch:
        """Batch of (inputs (B, C, ...) float32, targets (B, ...))."""
        index = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        if augment is not None and (self.shift or self.flip):
            picked = self._moved(index, augment)
        else:
            picked = self.inputs[index]
        scale = 255.0 if self.inputs.dtype == torch.uint8 else 1.0
        channels = (1, -1) + (1,) * (picked.dim() - 2)
        mean, std = torch.tensor(self.mean).view(channels), torch.tensor(self.std).view(channels)
        return (picked.float() - mean * scale).mul_(1.0 / (std * scale)), self.targets[index]

    def _moved(self, index: Tensor, rng: np.random.Generator) -> Tensor:
        """Shifted and mirrored images: from a padded batch, one window an image."""
        count, (channels, height, width) = len(index), self.inputs.shape[1:]
        border = self.shift
        padded = self.inputs.new_zeros((count, channels, height + 2 * border, width + 2 * border))
        padded[:, :, border : border + height, border : border + width] = self.inputs[index]
        corner = torch.from_numpy(rng.integers(0, 2 * border + 1, size=(2, count)))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        moved = windows[torch.arange(count), :, corner[0], corner[1]]
        if not self.flip:
            return moved
        mirror = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
        return torch.where(mirror, moved.flip(3), moved)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another set, by index; nothing is copied."""

    examples: Examples
    indices: np.ndarray

    def __post_init__(self) -> None:
        if len(self.indices) == 0:
            raise InputError("the subset is empty; give at least one index")

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def identity(self) -> str:
        """The identity of the whole set and a checksum of the indices."""
        checksum = zlib.crc32(np.ascontiguousarray(self.indices, dtype=np.int64).tobytes())
        return f"subset {len(self)} {checksum:08x} of {self.examples.identity}"

    def take(self, indices: np.ndarray, *, augment: np.random.Generator | None = None) -> Batch:
        """The batch of the underlying set."""
        return self.examples.take(self.indices[indices], augment=augment)


class Shuffle:
    """Which examples step number ``step`` sees: a new permutation each epoch, an incomplete last batch left out."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.steps_per_epoch = count // self.batch_size
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Indices (B,) int64 of one step, the same whenever it is asked."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # a cache of the last epoch only: the order is a function of (seed, epoch)
            self._epoch, self._order = epoch, generator(self.seed, "shuffle", epoch).permutation(self.count)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def in_order(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """All examples once, in order and not augmented, the last batch possibly smaller."""
    for start in range(0, len(examples), batch_size):
        yield examples.take(np.arange(start, min(start + batch_size, len(examples))))


def split(examples: Examples, valid: int | None, seed: int) -> tuple[Subset, Subset]:
    """Split at random into (train, valid) with ``valid`` held-out examples (None: a fifth, at most 5000); a function of
    the seed.

    Raises:
        InputError: ``valid`` leaves nothing to train on, or holds nothing out.
    """
    if valid is None:
        valid = min(max(len(examples) // 5, 1), _MOST_HELD_OUT)
    if not 0 < valid < len(examples):
        raise InputError(f"cannot hold out {valid} of {len(examples)} examples; give 1 to {len(examples) - 1}")
    order = generator(seed, "split").permutation(len(examples))
    return Subset(examples, np.sort(order[valid:])), Subset(examples, np.sort(order[:valid]))


def limit(examples: Examples, count: int | None, seed: int) -> Examples:
    """At most ``count`` examples, chosen at random by the seed (``None``: all of them).

    Raises:
        InputError: ``count`` is below 1.
    """
    if count is None or count >= len(examples):
        return examples
    if count < 1:
        raise InputError(f"limit is {count}; give 1 or more examples, or none for all of them")
    return Subset(examples, np.sort(generator(seed, "limit").permutation(len(examples))[:count]))


def synthetic_images(
    count: int, *, classes: int = 10, shape: tuple[int, int, int] = (1, 28, 28), seed: int = 0
) -> TensorExamples:
    """Labelled images that can be learnt without any file: a smooth pattern a class, shifted, under noise.

    For tests and for trying a chain out. The patterns do not depend on the seed, so that a training and a test set of
    different seeds are of the same kind.
    """
    channels, height, width = shape
    coarse = generator(0, "patterns").normal(size=(classes, channels, 4, 4))
    patterns = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(height, width), mode="bilinear")
    rng = generator(seed, "synthetic")
    labels = rng.integers(0, classes, size=count)
    noise = torch.from_numpy(rng.normal(size=(count, channels, height, width))).float()
    images = ((patterns[torch.from_numpy(labels)] + 0.6 * noise) * 48 + 128).clamp_(0, 255).to(torch.uint8)
    return TensorExamples(images, torch.from_numpy(labels), mean=(0.5,), std=(0.25,))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
