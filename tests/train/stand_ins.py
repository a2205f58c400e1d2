"""Tiny folders in the layouts of ImageNet, CIFAR-10 and CelebA."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_imagenet(folder: Path, *, images: int, noise: bool = False, side: int = 40) -> Path:
    """Two classes, the first dark and the second bright; two images a class in val."""
    root = folder / "imagenet"
    for part, count in (("train", images), ("val", 2)):
        for number, name in enumerate(("n00", "n01")):
            place = root / part / name
            place.mkdir(parents=True)
            for at in range(count):
                _save(place / f"{name}_{at}.JPEG", 60 + 130 * number, side + at, noise)
    return root


def make_cifar10(folder: Path, *, images: int, noise: bool = True) -> Path:
    """Every file with ``images`` records of noise, their classes counted up."""
    assert noise
    root = folder / "cifar10"
    place = root / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (images, 3073)).astype(np.uint8)
        rows[:, 0] = np.arange(images) % 10
        rows.tofile(place / name)
    return root


def make_celeba(folder: Path, *, images: int, noise: bool = False) -> Path:
    """Three labels; the last third of the images is the test part."""
    root = folder / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    lines, parts = [str(images), "Bright Red Large"], []
    for at in range(images):
        name = f"{at + 1:06d}.jpg"
        bright = at % 2
        _save(root / "img_align_celeba" / name, 60 + 130 * bright, 40 + (at if noise else 0), noise)
        lines.append(f"{name} {1 if bright else -1} {-1 if at % 3 else 1}  1")
        parts.append(f"{name} {2 if at >= images - images // 3 else at % 2}")
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def _save(path: Path, level: int, side: int, noise: bool) -> None:
    from PIL import Image

    rng = np.random.default_rng(level + side)
    spread = rng.integers(-50, 50, (side, side + 8, 3)) if noise else 0
    Image.fromarray(np.clip(np.full((side, side + 8, 3), level) + spread, 0, 255).astype(np.uint8)).save(path)
