"""Data in one ``.npz`` file: arrays of images and targets, as numpy saves them. Read without pickle.

    np.savez("digits.npz", x_train=..., y_train=..., x_test=..., y_test=...)

The names may be MedMNIST's as well.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.capture import first_line
from hwsearch.train.data import TensorExamples

#: Names of the arrays: as Keras' files have them, and as MedMNIST's.
_NAMES = (
    ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"),
    ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
)
_CHANNELS = (1, 3, 4)


def load_npz(
    path: str | Path, *, shift: int = 0, flip: bool = False
) -> tuple[TensorExamples, TensorExamples | None, TensorExamples]:
    """(train, held out where the file has it, test) of a file with ``x_train``, ``y_train``, ``x_test``, ``y_test``
    (``x_valid``, ``y_valid``), or the same in MedMNIST's names.

    Images are (N, H, W), (N, C, H, W) or (N, H, W, C), whole numbers of 0 to 255 or floating point; targets (N,) or
    (N, ...). The training images' own mean and standard deviation, a channel, normalise all of them.

    Args:
        shift, flip: augmentation of the training images, see ``TensorExamples``.

    Raises:
        InputError: there is no such file, an array is missing, or counts differ.
        SchemaError: it is no such archive, is damaged, or holds Python objects.
    """
    file = Path(path)
    arrays = _arrays(file)
    names = next((names for names in _NAMES if names[0] in arrays), _NAMES[0])
    needed = (*names[:2], *names[4:])
    if missing := [name for name in needed if name not in arrays]:
        found = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise InputError(f"{file} has no array {missing[0]}: give {', '.join(needed)} (it has {found})")
    train = _images(arrays[names[0]], f"{names[0]} of {file}")
    mean, std = _statistics(train)

    def part(at: int, images: Tensor | None = None, **augmentation: int | bool) -> TensorExamples:
        inputs = _images(arrays[names[at]], f"{names[at]} of {file}") if images is None else images
        targets = _targets(arrays[names[at + 1]], f"{names[at + 1]} of {file}")
        return TensorExamples(inputs, targets, mean=mean, std=std, **augmentation)  # type: ignore[arg-type]

    valid = part(2) if {names[2], names[3]} <= arrays.keys() else None
    return part(0, train, shift=shift, flip=flip), valid, part(4)


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """The known arrays of an archive."""
    if not file.is_file():
        raise InputError(f"there is no data file {file}: check the path")
    wanted = {name for names in _NAMES for name in names}
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SchemaError(f"{file} holds one array: save images and targets together with numpy.savez")
            return {name: archive[name] for name in archive.files if name in wanted}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise SchemaError(
            f"{file} cannot be read ({first_line(error)}): save plain arrays of numbers with numpy.savez"
        ) from error


def _images(array: np.ndarray, name: str) -> Tensor:
    """(N, C, ...), uint8 or float32."""
    if array.dtype.kind not in "uif" or array.ndim < 2:
        raise InputError(f"{name} is {array.dtype} of shape {array.shape}: give images (N, H, W) or (N, C, H, W)")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        if array.size and (array.min() < 0 or array.max() > 255):
            raise InputError(f"{name} has whole numbers beyond 0 to 255: give uint8, or floating point")
        array = array.astype(np.uint8)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in _CHANNELS and array.shape[3] in _CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    plain = array if array.dtype == np.uint8 else array.astype(np.float32)
    if plain.dtype != np.uint8 and not np.isfinite(plain).all():
        raise InputError(f"{name} holds numbers that are not finite: leave those images out")
    return torch.from_numpy(np.ascontiguousarray(plain))


def _targets(array: np.ndarray, name: str) -> Tensor:
    """(N, ...), int64 or float32; a single column is one target each."""
    if array.dtype.kind not in "uifb":
        raise InputError(f"{name} is {array.dtype}: give class numbers or values")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32 if array.dtype.kind == "f" else np.int64)))


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, after the division by 255; 1 for a channel that does not vary."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    means, stds = [], []
    for channel in range(images.shape[1]):
        values = images[:, channel].double() / scale
        spread = float(values.std(correction=0)) if values.numel() else 0.0
        means.append(round(float(values.mean()), 6) if values.numel() else 0.0)
        stds.append(round(spread, 6) if spread > 1e-6 else 1.0)
    return tuple(means), tuple(stds)
