"""Fashion-MNIST from a local folder: the four IDX files as they are published, checked before use.

Reference: the IDX format, http://yann.lecun.com/exdb/mnist/ : two zero bytes, type code 8 (unsigned byte), number of
dimensions, then each dimension as a big-endian 32-bit integer, then the bytes.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.data import TensorExamples

#: Mean and standard deviation of the training images, after division by 255.
MEAN, STD = 0.2860, 0.3530

_UNSIGNED_BYTE = 8
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def default_folders() -> tuple[Path, ...]:
    """Where the files are looked for: ``$HWSEARCH_DATA``, ``./data``, Debian's ``dataset-fashion-mnist``."""
    own = os.environ.get("HWSEARCH_DATA")
    return (
        *((Path(own) / "fashion-mnist",) if own else ()),
        Path("data/fashion-mnist"),
        Path("/usr/share/datasets/fashion-mnist"),
    )


def load_fashion_mnist(
    folder: str | Path | None = None, *, shift: int = 0, flip: bool = False
) -> tuple[TensorExamples, TensorExamples]:
    """Load (train, test): (60000, 1, 28, 28) and (10000, 1, 28, 28) uint8 images with their classes 0 to 9.

    Args:
        folder: holds the four ``*-ubyte`` files, gzipped or not; ``None`` looks in ``default_folders()``.
        shift, flip: augmentation of the training images, see ``TensorExamples``.

    Raises:
        InputError: a file is missing.
        SchemaError: a file is damaged or not what its name says.
    """
    place = _find(folder)
    train, test = (_load(place, *_FILES[part]) for part in ("train", "test"))
    return (
        TensorExamples(*train, mean=(MEAN,), std=(STD,), shift=shift, flip=flip),
        TensorExamples(*test, mean=(MEAN,), std=(STD,)),
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes (``.gz`` or plain) with the given number of dimensions.

    Raises:
        SchemaError: wrong magic number, a size that does not fit the header, a broken gzip stream.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SchemaError(f"{path} is not a whole gzip file ({error}); download it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    header = 4 + 4 * dimensions
    magic = _UNSIGNED_BYTE << 8 | dimensions
    if len(raw) < header or struct.unpack(">I", raw[:4])[0] != magic:
        found = raw[:4].hex() or "nothing"
        raise SchemaError(f"{path} starts with {found}, not {magic:08x}: no IDX file of this kind; download it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - header != expected:
        raise SchemaError(f"{path} holds {len(raw) - header} values but its header says {shape}; download it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _find(folder: str | Path | None) -> Path:
    folders = default_folders() if folder is None else (Path(folder),)
    names = [name for pair in _FILES.values() for name in pair]
    for place in folders:
        if all(_file(place, name) is not None for name in names):
            return place
    if folder is None:
        looked = ", ".join(str(place) for place in folders)
        raise InputError(
            f"Fashion-MNIST was not found in {looked}; "
            "run tools/setup, install Debian's dataset-fashion-mnist, or name its folder"
        )
    missing = ", ".join(f"{name}.gz" for name in names if _file(folders[0], name) is None)
    raise InputError(f"{folder} lacks {missing}; name a folder that holds the four Fashion-MNIST files")


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _load(folder: Path, images_name: str, labels_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    images_file, labels_file = _file(folder, images_name), _file(folder, labels_name)
    if images_file is None or labels_file is None:
        raise InputError(f"{folder} lacks {images_name} or {labels_name}; name a folder that holds the four files")
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (28, 28):
        size = f"{images.shape[1]}x{images.shape[2]}"
        raise SchemaError(f"{images_file} holds images of {size}, not 28x28; name a folder of Fashion-MNIST")
    if len(images) != len(labels):
        counts = f"{len(images)} images, {labels_file.name} {len(labels)} labels"
        raise SchemaError(f"{images_file} holds {counts}; download both again")
    if labels.size and labels.max() > 9:
        raise SchemaError(f"{labels_file} holds class {labels.max()}, not 0 to 9; name a folder of Fashion-MNIST")
    # np.frombuffer's memory is read-only, which torch does not know: copy once
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))
