"""A tiny folder in Fashion-MNIST's layout: bright shapes in the middle of dark pictures, a kind a class."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def make_garments(folder: Path, *, train: int = 60, test: int = 30) -> Path:
    """Write the four files; pictures are the same for the same counts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        pictures = np.zeros((count, 28, 28), dtype=np.uint8)
        for at, label in enumerate(labels):
            top, left = 3 + label % 3, 2 + label % 5
            bright = rng.integers(60 + 15 * label, 90 + 15 * label, size=(25 - 2 * top, 25 - 2 * left))
            pictures[at, top : top + bright.shape[0], left : left + bright.shape[1]] = bright
        _write(folder / f"{part}-images-idx3-ubyte", pictures)
        _write(folder / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8))
    return folder


def _write(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">I", 8 << 8 | values.ndim) + b"".join(struct.pack(">I", size) for size in values.shape)
    path.write_bytes(header + values.tobytes())
