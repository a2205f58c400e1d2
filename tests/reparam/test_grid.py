"""Blocks of every shape fold exactly: 2,112 random folds, the lemma on its own grid, and odd inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from block_grid import cases, random_block, random_input, shake, subset_errors, subsets
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.reparam.algebra import ConvMap, ConvShape
from hwsearch.reparam.branches import BRANCHES, pad
from hwsearch.reparam.odbb import ODBB

torch.set_num_threads(1)


@pytest.mark.parametrize("first", range(0, 264, 33))
def test_random_blocks_fold_exactly(first: int) -> None:
    """264 blocks, 8 subsets of each one's branches: 2,112 folds.

    Relative to the largest output: float64 to 1e-12 on the border and inside, float32 to 1e-5.
    """
    wrong = []
    for seed, block, x in cases(first, 33):
        masks = subsets(block, 8, seed)
        for mask, found in zip(masks, subset_errors(block, x, masks), strict=True):
            if found.border > 1e-12 or found.interior > 1e-12 or found.single > 1e-5:
                wrong.append((seed, block.kinds, mask, block.host, found))
    assert not wrong, f"{len(wrong)} of 264, the first {wrong[0]}"


def test_the_grid_covers_what_it_should() -> None:
    blocks = [random_block(seed) for seed in range(300)]
    assert {kind for block in blocks for kind in block.kinds} == set(BRANCHES)
    hosts = [block.host for block in blocks]
    assert {host.mode for host in hosts} == {"zeros", "reflect", "replicate", "circular"}
    assert {host.groups for host in hosts} == {1, 2, 4}
    assert any(host.depthwise and host.out_channels > host.in_channels for host in hosts)
    assert any(not host.is_plain for host in hosts), "no unequal padding"
    assert {block.border for block in blocks} == {"pad_first", "bn_pad"}
    assert sum(len(block.kinds) > len(set(block.kinds)) for block in blocks) > 10, "no kind occurs twice"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_lemma_says_exactly_which_parts_fit(mode: str) -> None:
    """Parts k, d, p in targets K, D, P: what it accepts is exact, what it refuses has no kernel in the target."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(1, 2, 11, 12)))
    accepted = refused = 0
    for k, d, p, size, step, padding, stride in itertools.product(
        (1, 2, 3), (1, 2), (0, 1, 2), (2, 3, 5), (1, 2), (0, 1, 2, 4), (1, 2)
    ):
        part = ConvShape(2, 2, (k, 1), (stride, 1), (d, 1), ((p, p), (0, 0)), 1, mode)
        target = ConvShape(2, 2, (size, 1), (stride, 1), (step, 1), ((padding, padding), (0, 0)), 1, mode)
        weight = torch.from_numpy(rng.normal(size=(2, 2, k, 1)))
        found = ConvMap(weight, weight.new_zeros(2), part)
        expected = functional.conv2d(pad(x, part), weight, None, part.stride, 0, part.dilation)
        try:
            whole = found.embedded(target)
        except InputError:
            refused += 1
            positions = [j * d - p for j in range(k)]
            assert not set(positions) <= {t * step - padding for t in range(size)} or (
                2 * p - d * (k - 1) != 2 * padding - step * (size - 1)
            )
            continue
        accepted += 1
        got = functional.conv2d(pad(x, target), whole.weight, None, target.stride, 0, target.dilation)
        assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    assert accepted > 40
    assert refused > 400


@pytest.mark.parametrize("border", ["pad_first", "bn_pad"])
def test_odd_inputs(border: str) -> None:
    """Smaller than the kernel, one pixel, channels last, not contiguous, no example at all."""
    host = ConvShape(4, 4, (5, 5), padding=((2, 2), (2, 2)))
    block = ODBB(host, BRANCHES, border=border, dtype=torch.float64).eval()
    shake(block, np.random.default_rng(1))
    wide = random_input(0)
    inputs = [
        wide[:, :, :3, :2],
        wide[:, :, :1, :1],
        wide.contiguous(memory_format=torch.channels_last),
        wide[:, :, ::2, ::3],
        wide.transpose(2, 3),
    ]
    folded = block.fold()
    with torch.no_grad():
        for x in inputs:
            assert torch.allclose(folded(x), block(x), rtol=0, atol=1e-12)
        assert folded(wide[:0]).shape == block(wide[:0]).shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_low_precision_is_folded_in_double_and_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    block, x = random_block(11, ("kxk", "1x1", "1x1-kxk")), random_input(11)
    low = random_block(11, ("kxk", "1x1", "1x1-kxk")).to(dtype)
    folded = low.fold()
    assert folded.weight.dtype == dtype
    with torch.no_grad():
        expected = block(x)
        got = functional.conv2d(
            pad(x, block.host), folded.weight.double(), folded.bias.double(), block.host.stride, 0,
            block.host.dilation, block.host.groups,
        )  # fmt: skip
    assert float((got - expected).abs().max() / expected.abs().max()) < tolerance
