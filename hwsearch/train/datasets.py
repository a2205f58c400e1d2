"""Any torch data set as ``Examples``: what its items draw at random follows the step, as in everything that is trained.

    class Flowers(torch.utils.data.Dataset):            # somebody's own, with transforms or without
        def __len__(self): ...
        def __getitem__(self, index): return image, target

Nothing else is asked of it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hwsearch.errors import InputError
from hwsearch.graph.capture import first_line
from hwsearch.graph.factory import failure
from hwsearch.train.data import Batch


@dataclass(frozen=True, eq=False)
class DatasetExamples:
    """A map-style ``torch.utils.data.Dataset`` as ``Examples``.

    What items draw at random (of torch, numpy or ``random``: transforms, augmentation) is seeded for every batch: by
    (seed, step) in training, always alike where nothing is to be augmented. So a resumed training sees what an unbroken
    one would have seen.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; items are tuples whose first part is the model's input, a tensor
            or array (C, H, W): floating point as it is, whole numbers (uint8) divided by 255. The second is the target.
        name: in messages and in ``identity``.

    Example:
        >>> import torch
        >>> ten = torch.utils.data.TensorDataset(torch.zeros(10, 3, 8, 8), torch.arange(10))
        >>> images, classes = DatasetExamples(ten, "ten").take(np.array([0, 9]))
        >>> images.shape, classes.tolist()
        (torch.Size([2, 3, 8, 8]), [0, 9])
    """

    dataset: Any
    name: str

    @cached_property
    def identity(self) -> str:
        """The name, the count, and a checksum of the first, a middle and the last item."""
        count = len(self)
        checksum = 0
        for index in sorted({0, count // 2, count - 1} if count else ()):
            for part in self.take(np.array([index])):
                checksum = zlib.crc32(part.detach().contiguous().numpy().tobytes(), checksum)
        return f"dataset {self.name} {count} {checksum:08x}"

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def take(self, indices: np.ndarray, *, augment: np.random.Generator | None = None) -> Batch:
        """Items collated by torch's own rule, the input as float32, whole targets as int64.

        Raises:
            InputError: an item cannot be had or is no (input, target), or the items do not make a batch.
        """
        from torch.utils.data import default_collate

        with _seeded(0 if augment is None else int(augment.integers(2**32))):
            items = [self._item(int(index)) for index in indices]
        try:
            inputs, *others = default_collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"items of the data set {self.name} do not make a batch ({first_line(error)}): give tensors of equal "
                "shapes, as torchvision's ToTensor and Resize do of pictures"
            ) from error
        if not all(isinstance(part, Tensor) for part in (inputs, *others)):
            kinds = ", ".join(type(part).__name__ for part in (inputs, *others))
            raise InputError(f"items of the data set {self.name} are ({kinds}): give (input, target) of tensors")
        images = _as_input(inputs)
        if not torch.isfinite(images).all():  # told here, for a loss of nan would be blamed on the learning rate
            finite = torch.isfinite(images).reshape(len(images), -1).all(dim=1)
            wrong = int(indices[int(torch.nonzero(~finite)[0])])
            raise InputError(
                f"item {wrong} of the data set {self.name} holds numbers that are not finite: leave it out"
            )
        return images, *(_as_target(part) for part in others)

    def _item(self, index: int) -> tuple[Any, ...]:
        try:
            item = self.dataset[index]
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"item {index} of the data set {self.name} fails: {failure(error)}") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise InputError(
                f"item {index} of the data set {self.name} is a {type(item).__name__}: give (input, target)"
            )
        return tuple(item)


def as_examples(found: Any, name: str) -> Any:
    """``Examples`` of whatever a user brings: ``Examples`` as they are, a map-style data set wrapped.

    Raises:
        InputError: it is neither, or it is empty.
    """
    if callable(getattr(found, "take", None)) and hasattr(found, "identity"):
        return found
    if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise InputError(
            f"the data set {name} is a {type(found).__name__} without a length or items by number: give a map-style "
            "torch data set, with __len__ and __getitem__"
        )
    if len(found) == 0:
        raise InputError(f"the data set {name} is empty: give at least one example")
    return DatasetExamples(found, name)


def _as_input(values: Tensor) -> Tensor:
    if values.is_floating_point():
        return values.float()
    return values.float() / 255 if values.dtype == torch.uint8 else values.float()


def _as_target(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every global generator drawn from ``seed`` inside, and as it was afterwards."""
    plain, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpy)
