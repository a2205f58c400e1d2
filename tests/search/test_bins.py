"""Bins: what a rule leaves of a space, known in advance for MobileNetV2, and a coarse space before a fine one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.models import vgg_small
from hwsearch.search.bins import binned, bins_by_macs, levels, macs_per_unit, reduce_space


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    return WidthSpace.from_model(vgg_small(width=0.5).eval(), torch.zeros(1, 1, 16, 16), verify=False)


def test_the_macs_of_a_unit_are_its_own_and_its_readers(space: WidthSpace) -> None:
    # First convolution: 9 weights on 16x16, read by 16 outputs on the same map.
    cost = macs_per_unit(space)
    assert cost[0] == 9 * 256 + 16 * 9 * 256
    # Last group: 9 * 64 inputs on 4x4, read by ten classes.
    assert cost[-1] == 9 * 64 * 16 + 10
    assert space.groups[0].units == 16


def test_costly_channels_get_fine_bins(space: WidthSpace) -> None:
    cost, bins = macs_per_unit(space), bins_by_macs(space, smallest=1)
    for own, size, group in zip(cost, bins, space.groups, strict=True):
        wanted = 2 ** int(np.ceil(np.log2(cost.max() / own)))
        assert size == min(wanted, group.units // 8)
        assert group.units % size == 0
    assert len(set(bins)) > 1
    assert bins_by_macs(space, smallest=4, largest=4)[-1] == 4
    with pytest.raises(InputError, match="smallest"):
        bins_by_macs(space, smallest=4, largest=2)


def test_a_size_that_does_not_divide_moves_to_the_next_that_does() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(40, 400, 3, 2),
                                torch.nn.ReLU(), torch.nn.Conv2d(400, 7, 1))  # fmt: skip
    found = WidthSpace.from_model(model, torch.zeros(1, 3, 9, 9), verify=False)
    bins = bins_by_macs(found)
    assert all(group.units % size == 0 for group, size in zip(found.groups, bins, strict=True))


def test_a_binned_space_has_whole_bins_and_the_full_width(space: WidthSpace) -> None:
    small = binned(space, (4, 4, 8, 8, 8, 64))
    assert small.groups[0].widths == (4, 8, 12, 16)
    assert small.groups[-1].widths == (64,)


def test_the_reduction_says_what_is_left_and_what_it_reaches(toy: Any, space: WidthSpace) -> None:
    budget = toy.budget(space, 0.5)
    by_ms, by_macs, none = (reduce_space(space, budget, rule) for rule in ("ms", "macs", "none"))
    assert by_ms.log10_after < by_ms.log10_before == space.log10_size == none.log10_after
    assert by_macs.bins == bins_by_macs(space)
    assert by_macs.log10_after < space.log10_size
    assert by_ms.reach_after.largest_ms == by_ms.reach_before.largest_ms
    assert by_ms.summary().startswith("widths by ms: 10^")
    assert f"{by_macs.reach_after.smallest_ms:.4g} .. " in by_macs.summary()
    with pytest.raises(InputError, match="bins is 'flops'"):
        reduce_space(space, budget, "flops")


def test_levels_go_from_coarse_to_fine_and_end_with_the_space(space: WidthSpace) -> None:
    found = levels(space, 2)
    assert len(found) == 3
    assert found[-1] is space
    for coarse, fine in itertools.pairwise(found):
        for one, other in zip(coarse.groups, fine.groups, strict=True):
            assert set(one.widths) < set(other.widths)
            assert one.widths[-1] == one.units
    assert levels(space, 0) == [space]
    assert len(levels(space, 50)) < 10


@pytest.mark.slow
def test_mobilenetv2_has_the_bins_that_were_worked_out_by_hand() -> None:
    """Sizes at 224x224 with bins of 2 to 64; a group of few units keeps at least eight bins."""
    from hwsearch.models.mobilenetv2 import mobilenetv2

    found = WidthSpace.from_model(mobilenetv2().eval(), torch.zeros(1, 3, 224, 224), verify=False)
    assert found.macs(found.full()) == 300_774_272
    units = [group.units for group in found.groups]
    bins = bins_by_macs(found, smallest=2, largest=64)
    golden = {32: 4, 16: 2, 96: 8, 24: 2, 144: 16}
    assert [dict(zip(units[:5], bins[:5], strict=True))[size] for size in golden] == list(golden.values())
    assert dict(zip(units, bins, strict=True))[1280] == 64
    # 192 units: the rule says 32 to 64, an eighth of the group is 24
    assert all(size <= max(group.units // 8, 2) for group, size in zip(found.groups, bins, strict=True))
