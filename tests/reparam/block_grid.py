"""Random blocks, their statistics and their folds: what the grid and the mutation checks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.border import ring_of, split_error
from hwsearch.reparam.branches import BORDERS, BRANCHES, why_not
from hwsearch.reparam.odbb import ODBB

KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (5, 3), (2, 2), (4, 4), (2, 3)]
MODES = ["zeros", "reflect", "replicate", "circular"]
#: Odd and not square, so that swapped axes and lost rows show.
HEIGHT, WIDTH = 17, 14


@dataclass(frozen=True)
class Errors:
    """Relative errors of a fold: float64 on the border and inside, and float32 over all."""

    border: float
    interior: float
    single: float

    @property
    def worst(self) -> float:
        return max(self.border, self.interior)


def random_block(seed: int, kinds: tuple[str, ...] | None = None) -> ODBB:
    """A float64 block in eval mode of random shape and random branches, with random statistics."""
    rng = np.random.default_rng(seed)
    kernel = KERNELS[rng.integers(len(KERNELS))]
    groups = int(rng.choice([1, 2, 4]))
    channels, outputs = 4, int(rng.choice([4, 8]))
    dilation = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
    stride = (int(rng.integers(1, 4)), int(rng.integers(1, 4))) if rng.random() < 0.5 else (1, 1)
    pads = []
    for size, step in zip(kernel, dilation, strict=True):
        side = step * (size - 1) // 2
        if rng.random() < 0.2:  # any padding, which rules the identity out
            side = int(rng.integers(0, side + 2))
        pads.append((side, step * (size - 1) - side) if size % 2 == 0 and stride == (1, 1) else (side, side))
    host = ConvShape(
        channels, outputs, kernel, stride, dilation, (pads[0], pads[1]), groups, MODES[rng.integers(len(MODES))]
    )
    if not host.is_plain:  # what padding="same" gives is the only unequal padding that a layer can have
        same = tuple((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True))
        host = ConvShape(channels, outputs, kernel, stride, dilation, (same[0], same[1]), groups, host.mode)
    possible = [kind for kind in BRANCHES if not why_not(kind, host)]
    if kinds is None:
        number = int(rng.integers(1, len(possible) + 1))
        kinds = tuple(str(kind) for kind in rng.choice(possible, number, replace=bool(rng.random() < 0.2)))
    torch.manual_seed(seed)
    block = ODBB(
        host,
        kinds,
        border=BORDERS[rng.integers(2)],
        post_norm=bool(rng.random() < 0.3),
        middle_ratio=int(rng.choice([1, 2])),
        norm=(lambda width: nn.BatchNorm2d(width, affine=False)) if rng.random() < 0.1 else nn.BatchNorm2d,
        dtype=torch.float64,
    ).eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and rng.random() < 0.5:  # the first 1x1 of a sequence may have a bias too
            module.bias = nn.Parameter(torch.from_numpy(rng.normal(size=module.out_channels) * 0.3))
    shake(block, rng)
    return block


def shake(block: nn.Module, rng: np.random.Generator) -> None:
    """Statistics that hide nothing: shifted means, negative and zero gammas, an eps of its own."""
    with torch.no_grad():
        for module in block.modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            size = module.num_features
            module.eps = float(rng.choice([1e-5, 1e-3]))
            module.running_mean.copy_(torch.from_numpy(rng.uniform(-0.5, 0.5, size)))
            module.running_var.copy_(torch.from_numpy(rng.uniform(0.3, 2.0, size)))
            if module.affine:
                gamma = rng.uniform(-1.5, 1.5, size)
                gamma[rng.random(size) < 0.1] = 0.0
                module.weight.copy_(torch.from_numpy(gamma))
                module.bias.copy_(torch.from_numpy(rng.uniform(-0.5, 0.5, size)))


def random_input(seed: int, channels: int = 4) -> Tensor:
    """(1 or 2, C, 17, 14) float64 of non-zero mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + seed % 2, channels, HEIGHT, WIDTH, generator=generator, dtype=torch.float64) + 0.4


def errors_of(block: ODBB, x: Tensor) -> Errors:
    """A block, as its mask is, against its own fold in float64."""
    return subset_errors(block, x, [block.mask], single=False)[0]


def subset_errors(block: ODBB, x: Tensor, masks: list[tuple[bool, ...]], *, single: bool = True) -> list[Errors]:
    """Several subsets of a block's branches against their folds, in float64 and then, as a float32 block, in float32.

    The block is float32 afterwards: copying it would take longer than all else.
    """
    found = []
    with torch.no_grad():
        for mask in masks:
            block.activate(mask)
            expected = block(x)
            found.append((expected, *split_error(expected, block.fold()(x), ring_of(block))))
        if not single:
            return [Errors(border, interior, 0.0) for _, border, interior in found]
        block.float()
        errors = []
        for mask, (expected, border, interior) in zip(masks, found, strict=True):
            block.activate(mask)
            got = block.fold()(x.float()).double()
            errors.append(
                Errors(border, interior, float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
            )
    return errors


def subsets(block: ODBB, count: int, seed: int) -> list[tuple[bool, ...]]:
    """All branches, then random ones, at least one."""
    rng = np.random.default_rng(seed)
    number = len(block.kinds)
    chosen = [tuple(bool(value) for value in rng.random(number) < 0.4) for _ in range(count - 1)]
    return [(True,) * number, *(mask if any(mask) else tuple(i == 0 for i in range(number)) for mask in chosen)]


def cases(first: int, count: int, kinds: tuple[str, ...] | None = None) -> Iterator[tuple[int, ODBB, Tensor]]:
    """Seeds, blocks and inputs."""
    for seed in range(first, first + count):
        yield seed, random_block(seed, kinds), random_input(seed)
