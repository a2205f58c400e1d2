"""Kernels as numbers: what shows the stairs, what must not be confused, what is unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwsearch.graph.kernel import FAMILIES as KERNEL_FAMILIES
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import FEATURES, TERMS, Vocabulary, cost_terms, describe, is_blocked

CONV = Kernel("conv", "Conv", layout_in="nchwc", layout_out="nchwc", in_channels=64, in_height=28, in_width=28,
              out_channels=64, out_height=28, out_width=28, kernel_height=3, kernel_width=3)  # fmt: skip


def terms(kernel: Kernel, block: int = 8) -> dict[str, float]:
    vocabulary = Vocabulary((), (), (), (), block)
    return dict(zip(TERMS, cost_terms([kernel], vocabulary)[0], strict=True))


def test_blocks_are_read_off_the_channels() -> None:
    assert Vocabulary.of([CONV, replace(CONV, out_channels=80)]).block == 16
    assert Vocabulary.of([CONV, replace(CONV, out_channels=72)]).block == 8
    assert Vocabulary.of([replace(CONV, layout_out="nchw", out_channels=3)]).block == 8


def test_a_remainder_of_blocks_is_a_cost_of_its_own() -> None:
    full, over = terms(CONV), terms(replace(CONV, out_channels=72))
    assert full["macs_last_1"] == 0 < over["macs_last_1"]
    assert over["macs_full"] == pytest.approx(full["macs_full"])
    assert terms(replace(CONV, out_channels=80))["macs_last_2"] > 0
    assert terms(replace(CONV, out_channels=88))["macs_last_3"] > 0


def test_taps_outside_the_image_are_not_computed() -> None:
    # 28x28, 3x3, padding 1: 82 of 84 taps fall inside along each axis.
    assert terms(CONV)["macs_full"] == pytest.approx(CONV.macs / 1e6 * (82 / 84) ** 2)
    valid = replace(CONV, in_height=30, in_width=30)
    assert terms(valid)["macs_full"] == pytest.approx(valid.macs / 1e6)
    assert terms(valid)["macs_border"] == 0 < terms(CONV)["macs_border"]


@pytest.mark.parametrize(
    "other",
    [
        replace(CONV, groups=4),
        replace(CONV, dilation=2),
        replace(CONV, kernel_width=1),
        replace(CONV, in_width=14, out_width=14),
        replace(CONV, batch=2),
        replace(CONV, layout_out="nchw"),
        replace(CONV, fused=("add", "relu")),
        replace(CONV, fused=("hardsigmoid",)),
        replace(CONV, stride=2, out_height=14, out_width=14),
        replace(CONV, dtype="int8"),
    ],
)
def test_nothing_is_priced_as_a_dense_square_convolution(other: Kernel) -> None:
    vocabulary = Vocabulary.of([CONV, other])
    features = describe([CONV, other], vocabulary, np.zeros(2))
    assert not np.array_equal(features[0], features[1], equal_nan=True)


def test_unknown_texts_are_missing_values_not_numbers() -> None:
    vocabulary = Vocabulary.of([CONV])
    strange = replace(CONV, op="Winograd")
    assert vocabulary.knows(CONV)
    assert not vocabulary.knows(strange)
    row = dict(zip(FEATURES, describe([strange], vocabulary, np.zeros(1))[0], strict=True))
    assert np.isnan(row["op"])
    assert not np.isnan(row["layout"])


def test_every_family_has_finite_non_negative_terms() -> None:
    kernels = [Kernel(family, "Op") for family in KERNEL_FAMILIES]
    vocabulary = Vocabulary.of(kernels)
    table = cost_terms(kernels, vocabulary)
    assert table.shape == (len(kernels), len(TERMS))
    assert np.isfinite(table).all()
    assert (table >= 0).all()
    assert np.isfinite(describe(kernels, vocabulary, np.zeros(len(kernels)))).all()
    assert describe([], vocabulary, np.zeros(0)).shape == (0, len(FEATURES))


def test_blocked_layouts() -> None:
    assert [is_blocked(name) for name in ("nchwc", "nchw8c", "nchw16c", "nchw", "nhwc")] == [True] * 3 + [False] * 2
